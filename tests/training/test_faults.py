"""A short fixed part of `make faults`: one kill, and what is done about damage, other data and a second run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fault_scene import Scene
from faults import kill, resumed
from helpers import EXAMPLE
from training_helpers import Pairs, logs, make_trainer, weights
from transformers import Trainer, TrainerCallback

from dpo_kernels.training import DPODataset, checkpoints, resume
from dpo_kernels.training.callbacks import RunLog, StopOnSignal
from dpo_kernels.training.checkpoints import CheckpointError, SaveError
from dpo_kernels.training.loading import LoadError, load_config, load_model, load_tokenizer
from dpo_kernels.training.ownership import LOCK_NAME, owned
from dpo_kernels.training.small_model import make_small_model

SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def test_a_run_killed_while_it_saves_ends_with_the_same_weights(tmp_path):
    scene = Scene(tmp_path, steps=3)
    assert "save" in kill(scene, random.Random(0), tmp_path / "killed", "checkpoint")
    resumed(scene, tmp_path / "killed")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("dpo_kernels.training.callbacks.save_curves", lambda *_: None)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Two steps, a checkpoint of each, and the weights of a third."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, max_steps=3, **SAVING)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-3")
    return folder, weights(trainer)


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of two steps and their checkpoints, and a trainer to go on with."""
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    return make_trainer(tmp_path, max_steps=3, **SAVING)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = [
    ("model.safetensors", cut, r"has [\d,]+ bytes of model.safetensors, not the"),
    ("optimizer.pt", cut, r"has [\d,]+ bytes of optimizer.pt, not the"),
    ("optimizer.pt", os.unlink, "has no optimizer.pt"),
    ("rng_state.pth", os.unlink, "has no rng_state.pth"),
    ("trainer_state.json", os.unlink, "has no trainer_state.json"),
    ("trainer_state.json", cut, "has a trainer_state.json that is no JSON"),
]


@pytest.mark.parametrize(("name", "change", "said"), DAMAGE)
def test_a_damaged_checkpoint_is_warned_of_and_the_one_before_it_taken(two_steps, tmp_path, name, change, said):
    shutil.copytree(two_steps[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match=rf"resume_from_checkpoint is .*checkpoint-2', which .*{name}"):
        resume.check_folder(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=rf"checkpoint-2 {said}.*: going on from checkpoint-1"):
        assert resume.newest_whole(tmp_path) == tmp_path / "checkpoint-1"


def test_after_damage_the_weights_are_the_same(two_steps, run, tmp_path):
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint-2 has no optimizer.pt: going on from checkpoint-1"):
        run.train(resume_from_checkpoint=True)
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-2.set-aside").is_dir()
    assert all(torch.equal(weights(run)[name], weight) for name, weight in two_steps[1].items())


def test_files_of_other_programs_are_looked_into(run, tmp_path):
    """Where no sizes are noted, and where they are right."""
    folder = tmp_path / "checkpoint-2"
    (folder / checkpoints.FACTS_NAME).unlink()
    assert checkpoints.damage(folder) == ""
    with pytest.warns(UserWarning, match="does not say what data it was trained on"):
        resume.check_data(folder, Pairs(3), allow_changed=False)
    whole = {path: path.read_bytes() for path in (folder / "model.safetensors", folder / "optimizer.pt")}
    for path, content in whole.items():
        for part in (content[:-1], content[:5], b"", content[:8] + b"[" + content[9:]):
            if path.suffix == ".pt" and len(part) == len(content):
                continue
            path.write_bytes(part)
            assert checkpoints.damage(folder) == f"has only a part of {path.name}"
        path.write_bytes(content)
    (folder / "optimizer.pt").write_bytes(whole[folder / "optimizer.pt"].replace(b"state", b"stale"))
    with (
        pytest.warns(UserWarning, match="does not say"),
        pytest.raises(CheckpointError, match="cannot be read, or is not of this model"),
    ):
        run.train(resume_from_checkpoint=str(folder))


def test_where_every_checkpoint_is_damaged_none_is_touched(run, tmp_path):
    for folder in checkpoints.all_of(tmp_path):
        cut(folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: checkpoint-2 has .*, checkpoint-1 has"):
        run.train(resume_from_checkpoint=True)
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=True)


def test_other_data_is_refused_unless_allowed(run, tmp_path):
    run.train_dataset = Pairs(6)
    with pytest.raises(CheckpointError, match=r"not those that .*checkpoint-2 was trained on \(8 then, 6 now\)"):
        run.train(resume_from_checkpoint=True)
    run.args.allow_changed_data = True
    with pytest.warns(UserWarning, match="other pairs than .*, as allowed"):
        run.train(resume_from_checkpoint=True)


def test_the_same_number_of_other_pairs_or_another_order_is_other_data(tmp_path):
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    dataset = DPODataset(EXAMPLE, tokenizer, 80, cache_dir=tmp_path)
    resume._hash.cache_clear()
    some = dataset.select([0, 1, 2])
    checkpoints.write_facts(tmp_path, {"data": resume.data_facts(some)})
    resume.check_data(tmp_path, some, allow_changed=False)
    assert resume._hash.cache_info().misses == 1
    resume.check_data(tmp_path, dataset.select([0, 1, 2]), allow_changed=False)
    for other in (dataset.select([0, 1, 3]), dataset.select([0, 2, 1]), dataset.select([0, 1])):
        with pytest.raises(CheckpointError, match="the pairs are not those that"):
            resume.check_data(tmp_path, other, allow_changed=False)


def test_other_options_and_a_missing_optimizer_are_warned_of(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_only_model=True, **SAVING).train()
    trainer = make_trainer(tmp_path, max_steps=2, **SAVING | {"learning_rate": 0.5, "beta": 0.2})
    with pytest.warns(UserWarning, match="checkpoint-1") as warned:
        trainer.train(resume_from_checkpoint=True)
    said = " ".join(str(warning.message) for warning in warned)
    assert "was trained with other options: learning_rate 0.01 -> 0.5, max_steps 1 -> 2, beta 0.1 -> 0.2" in said
    assert "holds no state of the optimizer" in said


def test_a_run_that_is_done_takes_no_step_more(run, tmp_path):
    """Its last checkpoint lies within an epoch: transformers would."""
    run.args.max_steps = 2
    with pytest.warns(UserWarning, match="max_steps 3 -> 2"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 2
    assert [entry["step"] for entry in logs(tmp_path)] == [1, 2]
    saved = type(run.model).from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(p, weights(run)[name]) for name, p in saved.named_parameters())


def test_from_an_older_checkpoint_newer_ones_are_kept_and_not_taken(run, tmp_path):
    run.args.save_total_limit = 1
    with pytest.warns(UserWarning, match=r"kept, and taken up by no run: checkpoint-2.set-aside in .*rename it back"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-3"]
    (tmp_path / "checkpoint-2").mkdir()
    assert checkpoints.set_aside(tmp_path / "checkpoint-2").name == "checkpoint-2.set-aside-2"


def test_a_checkpoint_that_was_being_replaced_is_the_newest(run, tmp_path):
    checkpoints.staging(tmp_path).mkdir(exist_ok=True)
    (tmp_path / "checkpoint-2").replace(checkpoints.staging(tmp_path) / "checkpoint-2.replaced")
    steps = []
    run.add_callback(At(3, lambda: steps.append(3)))
    run.add_callback(At(2, lambda: steps.append(2)))
    run.train(resume_from_checkpoint=True)
    assert steps == [3]
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_newer_checkpoints_stay_where_the_chosen_one_cannot_be_loaded(run, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", full)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_rotation_never_takes_what_was_just_saved(tmp_path):
    for step in (1, 2, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, 2, None, tmp_path / "checkpoint-2")
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-2", "checkpoint-9"]


SHARDED = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
           "model.safetensors.index.json", "inner/code.py")  # fmt: skip
SINGLE = ("config.json", "model.safetensors", "training_args.bin")


@pytest.mark.parametrize(("old", "new"), [((), SHARDED), (SHARDED, SHARDED), (SHARDED, SINGLE), (SINGLE, SHARDED)])
def test_a_model_comes_whole_wherever_its_save_is_cut_short(tmp_path, monkeypatch, old, new):
    def write(folder, names, text):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def held(folder):
        return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}

    kept = dict.fromkeys(["mine.txt", *({"inner/code.py", "training_args.bin"} & set(old))], "old")
    before, after = kept | dict.fromkeys(old, "old"), kept | dict.fromkeys(new, "new")
    ends = []
    for point in range(30):
        folder = tmp_path / str(point)
        write(folder, before, "old")
        write(checkpoints.staging(folder) / "model", new, "new")
        with monkeypatch.context() as dying:
            dying.setattr(checkpoints, "_fsync", Dies(after=point))
            with suppress(KeyboardInterrupt):
                checkpoints.publish_files(checkpoints.staging(folder) / "model", folder)
        found = {name: text for name, text in held(folder).items() if not name.startswith(checkpoints.STAGING)}
        if "config.json" in found:  # without which none can be loaded
            assert found in (before, after)
        checkpoints.clean(folder)
        ends.append(held(folder))
        assert ends[-1] in (before, after)
    assert ends[0] == before
    assert ends[-1] == after


class Dies:
    def __init__(self, after):
        self.after = after

    def __call__(self, path):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt


def in_a_fork(do):
    """What a forked process says of `do`: "", or its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_a_folder_has_one_run(tmp_path):
    folder, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(folder)

    def second():
        with owned(folder):
            pass

    refused = f"FolderInUseError: output_dir {folder} is in use by another run (process {os.getpid()} on"
    with owned(folder):
        assert in_a_fork(second).startswith(refused)
        with owned(folder), owned(link):
            pass
        assert in_a_fork(second).startswith(refused)  # the inner ones are over
        shutil.copytree(folder, tmp_path / "copy")  # reads the lock's file and closes it, as an upload does
        assert in_a_fork(second).startswith(refused)
    assert not (folder / LOCK_NAME).exists()
    assert in_a_fork(second) == ""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .* cannot be written to"), owned(tmp_path / "file" / "out"):
        pass


def test_a_fork_neither_ends_nor_keeps_its_parents_hold(tmp_path):
    reader, writer = os.pipe()
    with owned(tmp_path):
        leaves = os.fork()  # it goes out of `owned` too
        if leaves:
            os.waitpid(leaves, 0)
            assert (tmp_path / LOCK_NAME).exists()
            stays = os.fork()
            if stays == 0:
                os.close(writer)
                os.read(reader, 1)  # until the parent closes its end
                os._exit(0)
    if leaves == 0:
        os._exit(0)
    with owned(tmp_path):  # while a fork of the time before lives
        os.close(writer)
    os.waitpid(stays, 0)
    os.close(reader)


def test_a_full_disk_does_not_keep_a_run_from_its_folder(tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(os, "write", Full())
        with owned(tmp_path):
            assert (tmp_path / LOCK_NAME).read_text() == ""
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as full:
        full.setattr("dpo_kernels.training.ownership._is_still", Full())
        with pytest.raises(OSError, match="No space left"), owned(tmp_path):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    with owned(tmp_path):
        pass


class Full:
    """A disk on which nothing has room."""

    def __call__(self, *args, **kwargs):
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    def fill():
        monkeypatch.setattr(trainer, "_save_rng_state", Full())

    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[At(3, fill)], **SAVING)
    with pytest.raises(SaveError, match=r"the checkpoint of step 3 could not be .*No space left.*checkpoint is .*-2"):
        trainer.train()
    assert not checkpoints.staging(tmp_path).exists()
    assert not any(map(checkpoints.damage, checkpoints.all_of(tmp_path)))
    monkeypatch.setattr("dpo_kernels.training.checkpoints.publish_files", Full())
    with pytest.raises(SaveError, match=r"the model could not be written to .*as it was, the newest checkpoint is"):
        trainer.save_model()
    for folder in checkpoints.all_of(tmp_path):
        shutil.rmtree(folder)
    with pytest.raises(SaveError, match=r"No space left.*nothing of this training is saved\. Make room"):
        trainer.save_model()


def test_of_errors_those_of_files_are_translated(tmp_path):
    """Others have nothing to do with what is saved, and say themselves what they are."""
    memory, name = torch.OutOfMemoryError("CUDA out of memory"), r"PytorchStreamReader failed"
    for error in (memory, RuntimeError("of another kind")):
        with pytest.raises(type(error), match=str(error)), checkpoints.writing("it", None, tmp_path, tmp_path):
            raise error
        with pytest.raises(type(error), match=str(error)), checkpoints.reading(tmp_path):
            raise error
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="size mismatch"), checkpoints.reading(tmp_path):
        model.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match=name), checkpoints.reading(tmp_path):
        raise RuntimeError(f"{name} reading zip archive")


def test_what_comes_after_a_checkpoint_is_in_its_place_ends_no_training(tmp_path, monkeypatch):
    """Nor does its upload see a part of it."""
    seen, discard = [], checkpoints._discard

    def fails(folder, through=None):
        return Full()() if folder.exists() else discard(folder, through)

    monkeypatch.setattr(checkpoints, "_discard", fails)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda _, folder: seen.append((folder, os.listdir(folder))))  # noqa: PTH208
    trainer = make_trainer(tmp_path, max_steps=2, save_total_limit=1, **SAVING)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda **_: None)
    with pytest.warns(UserWarning, match="checkpoint-1 is beyond save_total_limit, and cannot be deleted"):
        trainer.train()
    assert [folder for folder, _ in seen] == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert all(checkpoints.FACTS_NAME in names for _, names in seen)


class At(TrainerCallback):
    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.do()


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    path = tmp_path / "elsewhere" / "log.jsonl"
    monkeypatch.setattr(RunLog, "_path", lambda *_: path)
    monkeypatch.setattr("dpo_kernels.training.callbacks.save_curves", Full())

    def hide():
        path.unlink()
        path.parent.rmdir()
        path.parent.write_text("")  # a file where the folder was

    def show():
        path.parent.unlink()

    path.parent.write_text("")
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[At(1, show), At(2, hide), At(3, show)])
    with pytest.warns(UserWarning, match="log and curves cannot be written .*; training goes on without"):
        trainer.train()
    steps = [json.loads(line).get("step") for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]


def test_sigint_saves_then_interrupts(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[At(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.interrupted
    assert checkpoints.latest(tmp_path).name == "checkpoint-2"

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(tmp_path / "twice", max_steps=4, callbacks=[At(2, twice)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.interrupted
    assert checkpoints.latest(tmp_path / "twice") is None


def test_a_fork_of_a_run_that_listens_ends_at_its_own_sigterm():
    """A SIGINT, which a terminal sends to all, is the run's."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in signals]
    with StopOnSignal(None).listening():
        pid = os.fork()
        if pid == 0:
            for _ in range(2):
                time.sleep(20)
            os._exit(3)
        for number in signals:
            os.kill(pid, number)
            time.sleep(0.05)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_in_the_last_step_interrupts_nothing(tmp_path):
    """Its model is trained, and there may be no checkpoint of it."""
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    trainer.train()
    assert trainer.stopped_by == signal.SIGTERM
    assert not trainer.interrupted


def test_models_that_cannot_be_read_are_an_error(tmp_path):
    model, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        cut(tmp_path / name)
    with pytest.raises(LoadError, match="holds files that cannot be read, cut short perhaps"):
        load_model(str(tmp_path))
    with pytest.raises(LoadError, match="holds files that cannot be read, cut short perhaps"):
        load_tokenizer(str(tmp_path))
    for load in (load_config, load_tokenizer):
        with pytest.raises(LoadError, match="there is no model folder /nowhere/model"):
            load("/nowhere/model")
