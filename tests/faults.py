"""What can go wrong around a run of `train.py`, done to it: nothing may be lost, and each fault is reported.

    python tests/faults.py [--kills 50] [--seed 1] [--only WORD ...] [--write FILE]

Kills: SIGKILL at random moments of a small run that saves after every step, then the same command until it is done. The
weights have to be those of a run that was never interrupted, to the bit. Of the moments about one in six is drawn in
start-up, a third over all of training, a third while a checkpoint of a random step is written or put in its place, and
one in six while the final model is; the row says where they fell, as the folder shows it.

Runs are forks of this process, which has done their imports: those write nothing, and take longer than all the rest.
Where a fault needs it (limits, modes, a signal during the imports), the run is a process of its own.

Other faults are rows of `FAULTS`. A full disk is a tmpfs of a few MiB, or a limit on the size of files (RLIMIT_FSIZE;
Python ignores SIGXFSZ, so that a write fails with EFBIG). A read-only folder has mode 0555; where root runs this, the
run is root without CAP_DAC_OVERRIDE, so that the mode binds it. Rows that the machine does not allow say so, and count
as nothing. The exit status is 1 where a row is wrong.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_scene import (
    NotHereError,
    Scene,
    WrongError,
    bound_by_modes,
    check,
    content,
    expect,
    happened,
    losses,
    same,
    small_disk,
    until,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_kernels.training import checkpoints

# Kills


WHERE = ("start-up", "training", "a checkpoint being saved", "the model being saved", "after the model was saved")


def _options(output_dir: Path) -> dict[str, Any]:
    """Of a run that is killed: it deletes checkpoints too, and has a cache of pairs of its own to fill."""
    cache = output_dir.with_suffix(".cache")
    return {"save_total_limit": 2, "environment": {"HF_DATASETS_CACHE": str(cache)}}


def kill(scene: Scene, random_: random.Random, output_dir: Path, moment: str = "") -> str:
    """A run killed at a random moment; says where that fell."""
    moment = moment or random_.choices(("start", "training", "checkpoint", "model"), (1, 2, 2, 1))[0]
    with scene.start(output_dir, **_options(output_dir)) as process:
        waits: dict[str, tuple[Callable[[], bool], float]] = {
            "start": (lambda: True, scene.began),
            "training": ((output_dir / "log.jsonl").exists, scene.ended - scene.began),
            "checkpoint": (_staged(output_dir, f"checkpoint-{random_.randint(1, scene.steps)}").exists, 0.06),
            "model": (_staged(output_dir, "model").exists, 0.04),
        }
        condition, longest = waits[moment]
        if until(condition, process, may_end=True):
            time.sleep(random_.uniform(0, longest))
        process.process.kill()
        code = process.process.wait()
    if code == 0:  # it was done before: another moment
        shutil.rmtree(output_dir)
        return kill(scene, random_, output_dir, moment)
    expect(code == -signal.SIGKILL, f"ended with {code} before the kill")
    return _where(output_dir)


def resumed(scene: Scene, output_dir: Path) -> None:
    """Resumes a run that was killed, until it is done, and compares."""
    whole = checkpoints.all_of(output_dir)
    damaged = {path.name: said for path in whole if (said := checkpoints.damage(path))}
    expect(not damaged, f"torn checkpoints: {damaged}")
    if (output_dir / "config.json").exists():  # what can be loaded is the final model
        expect(same(output_dir / "model.safetensors", scene.straight / "model.safetensors"), "a torn model")
    done = scene.finish(output_dir, **_options(output_dir))
    if whole:
        expect(f"going on from {whole[-1]}\n" in done.out, f"{whole[-1].name} was there, and was not taken")


def kills(scene: Scene, count: int, seed: int, tell: Callable[[str], None] = print) -> list[Row]:
    """Rows of where the kills fell."""
    found: collections.Counter[str] = collections.Counter()
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    for number in range(count):
        output_dir, where = scene.folder / f"kill-{number}", "before its moment"
        try:
            where = kill(scene, random.Random(f"{seed} {number}"), output_dir)
            resumed(scene, output_dir)
            tell(f"kill {number}: {where}")
        except Exception as error:
            wrong[where].append(f"kill {number}: {error}")
            tell(f"kill {number}: {where}: WRONG: {error}")
        found[where] += 1
        for folder in (output_dir, output_dir.with_suffix(".cache")):
            shutil.rmtree(folder, ignore_errors=True)
    return [
        Row(
            f"kill -9: {where}", f"{found[where]} kills, resumed with the same command",
            "" if wrong[where] else "nothing: the same weights to the bit", wrong[where],
        )
        for where in (*WHERE, "before its moment") if found[where]
    ]  # fmt: skip


def _staged(output_dir: Path, name: str) -> Path:
    return checkpoints.staging(output_dir) / name


def _where(output_dir: Path) -> str:
    if not (output_dir / "log.jsonl").exists():
        return WHERE[0]
    if any(_staged(output_dir, name).exists() for name in ("model", "model.whole", "model.clear")):
        return WHERE[3]
    if (output_dir / "model.safetensors").exists():
        return WHERE[4]
    return WHERE[2] if checkpoints.staging(output_dir).exists() else WHERE[1]


# Other faults: each function makes one, checks what came of it, and says what happened and what was lost.


@dataclass
class Row:
    fault: str
    happened: str
    lost: str
    wrong: list[str] = field(default_factory=list)


def signalled(number: signal.Signals, code: int) -> Callable[[Scene, Path], tuple[str, str]]:
    def fault(scene: Scene, output_dir: Path) -> tuple[str, str]:
        with scene.start(output_dir) as process:
            until(lambda: len(losses(output_dir)) >= 2, process)
            process.process.send_signal(number)
            done = process.end()
        check(done, code, "stopped after step")
        newest = checkpoints.latest(output_dir)
        expect(newest is not None and f"step {checkpoints.step_of(newest)};" in done.sentence, "no checkpoint of it")
        scene.finish(output_dir)
        return happened(done), "nothing: resumed, same bits"

    return fault


def signalled_early(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with scene.start(output_dir, cold=True) as process:
        time.sleep(2)  # in the imports
        process.process.send_signal(signal.SIGINT)
        done = process.end()
    check(done, 130, "SIGINT: stopped")
    scene.finish(output_dir)
    return happened(done), "nothing: resumed, same bits"


def full_disk(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with small_disk(output_dir, "3m") as resize:  # room for two checkpoints
        done = scene.run(output_dir)
        check(done, 1, "could not be written to", "MiB are free there")
        kept = checkpoints.all_of(output_dir)
        expect(bool(kept) and not any(map(checkpoints.damage, kept)), "no whole checkpoint is left")
        again = scene.run(output_dir)
        check(again, 1, "No space left on device")
        expect(checkpoints.all_of(output_dir)[: len(kept)] == kept, "a checkpoint is gone")
        resize("64m")
        scene.finish(output_dir)
    return happened(done), f"nothing: with room resumed from {kept[-1].name}, same bits"


def full_disk_of_the_cache(scene: Scene, output_dir: Path) -> tuple[str, str]:
    cache = scene.folder / "small cache"
    with small_disk(cache, "8k"):
        done = scene.run(output_dir, environment={"HF_DATASETS_CACHE": str(cache)})
    check(done, 1, "the cache of pairs", "cannot be written to")
    scene.finish(output_dir)
    return happened(done), "nothing"


def limited(size: int) -> Callable[[Scene, Path], tuple[str, str]]:
    def fault(scene: Scene, output_dir: Path) -> tuple[str, str]:
        half = scene.half(output_dir.name)
        before = content(half)
        done = scene.run(half, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        check(done, 1, "the checkpoint of step 4 could not be written to", "the newest checkpoint is")
        expect(before.items() <= content(half).items(), "a file of the checkpoints has changed")
        scene.finish(half)
        return happened(done), "nothing: without the limit resumed, same bits"

    return fault


def read_only(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half = scene.half(output_dir.name)
    before = content(half)
    half.chmod(0o555)
    done = scene.run(half, before=bound_by_modes())
    check(done, 1, "cannot be written to")
    expect(content(half) == before, "something was written all the same")
    half.chmod(0o755)
    scene.finish(half)
    return happened(done), "nothing: writable again, resumed, same bits"


def read_only_later(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with scene.start(output_dir, before=bound_by_modes()) as process:
        until(lambda: len(losses(output_dir)) >= 2, process)
        output_dir.chmod(0o555)
        done = process.end()
    output_dir.chmod(0o755)
    check(done, 1, "could not be written to", "Permission denied")
    scene.finish(output_dir)
    return happened(done), "nothing: writable again, resumed, same bits"


def below_a_file(scene: Scene, output_dir: Path) -> tuple[str, str]:
    output_dir.write_text("mine")
    done = scene.run(output_dir / "out")
    check(done, 1, "cannot be written to")
    expect(output_dir.read_text() == "mine", "the file has changed")
    return happened(done), "nothing"


def two_at_once(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with scene.start(output_dir) as first:
        until(lambda: len(losses(output_dir)) >= 1, first)
        done = scene.run(output_dir, say="second")
        expect(first.process.poll() is None, "the first run ended before the second was refused")
        code = first.end().code
    check(done, 1, "is in use by another run (process")
    expect(code == 0, f"the first run ends with {code}")
    scene.check_done(output_dir)
    return happened(done), "nothing: the first run ends with the same bits"


def damaged(name: str, mend: Callable[[Path], None]) -> Callable[[Scene, Path], tuple[str, str]]:
    """The newest checkpoint; the one before it is taken, unless the damaged one is asked for."""

    def fault(scene: Scene, output_dir: Path) -> tuple[str, str]:
        half = scene.half(output_dir.name)
        newest = half / "checkpoint-3"
        mend(newest / name)
        before = content(newest)
        asked = scene.run(half, resume_from_checkpoint=newest)
        check(asked, 1, "resume_from_checkpoint is", name)
        expect(content(newest) == before, "the damaged checkpoint has changed")
        done = scene.finish(half)
        check(done, 0, "checkpoint-3 has ", name, "going on from")
        expect(f"going on from {half / 'checkpoint-2'}\n" in done.out, "the one before it was not taken")
        expect(content(half / "checkpoint-3.set-aside") == before, "the damaged one is not kept")
        said = next(line for line in done.err.splitlines() if "checkpoint-3 has" in line)
        return f"0; {said.partition('Warning: ')[2]}. Named by its folder: {happened(asked)}", "nothing: same bits"

    return fault


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def all_damaged(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half = scene.half(output_dir.name)
    for path in checkpoints.all_of(half):
        cut(path / "optimizer.pt")
    before = content(half)
    done = scene.run(half)
    check(done, 1, "no checkpoint in", "is whole")
    expect(content(half) == before, "something has changed")
    return happened(done), "nothing more"


def changed_data(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half, data = scene.half(output_dir.name), scene.folder / "others.jsonl"
    before = content(half)
    done = scene.run(half, data_path=data)
    check(done, 1, "the pairs are not those that", "--allow_changed_data")
    expect(content(half) == before, "something has changed")
    allowed = scene.run(half, data_path=data, allow_changed_data=True)
    check(allowed, 0, "other pairs than", "as allowed")
    expect(allowed.err.count("as allowed") == 1, "says it more than once")
    shutil.rmtree(half)
    scene.finish(scene.half(output_dir.name))
    return happened(done), "nothing: with the data of before, same bits"


def changed_options(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half = scene.half(output_dir.name)
    done = scene.run(half, learning_rate=5e-4, beta=0.2)
    check(done, 0, "was trained with other options: learning_rate 0.001 -> 0.0005, beta 0.1 -> 0.2")
    said = next(line for line in done.err.splitlines() if "other options" in line)
    return f"0; {said.partition('Warning: ')[2]}", "nothing"


def cut_model(scene: Scene, output_dir: Path) -> tuple[str, str]:
    model = scene.folder / "cut model"
    shutil.copytree(scene.folder / "model", model)
    cut(model / "model.safetensors")
    done = scene.run(output_dir, ref_weight=model)
    check(done, 1, "holds files that cannot be read, cut short perhaps")
    return happened(done), "nothing"


def without_checkpoints(scene: Scene, output_dir: Path) -> tuple[str, str]:
    shutil.copytree(scene.straight, output_dir, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = content(output_dir)
    done = scene.run(output_dir)
    check(done, 1, "holds a model, and no checkpoint to go on from")
    expect(content(output_dir) == before, "something has changed")
    return happened(done), "nothing"


def of_another_run(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half = scene.half(output_dir.name)
    before = content(half)
    done = scene.run(half, resume_from_checkpoint=scene.straight / "checkpoint-2")
    check(done, 1, "is a checkpoint of another")
    expect(content(half) == before, "something has changed")
    return happened(done), "nothing"


def an_older_one(scene: Scene, output_dir: Path) -> tuple[str, str]:
    half = scene.half(output_dir.name)
    before = content(half / "checkpoint-3")
    done = scene.finish(half, resume_from_checkpoint=half / "checkpoint-1", save_total_limit=1)
    check(done, 0, "kept, and taken up by no run: checkpoint-2.set-aside, checkpoint-3.set-aside")
    expect(content(half / "checkpoint-3.set-aside") == before, "the newer checkpoint is not kept")
    said = next(line for line in done.err.splitlines() if "taken up by no run" in line)
    return f"0; {said.partition('Warning: ')[2]}", "nothing: same bits"


def tries(fault: Callable[[Scene, Path], tuple[str, str] | None]) -> Callable[[Scene, Path], tuple[str, str]]:
    """A fault that has to fall into a few milliseconds, until it does; None: it did not."""

    def until_it_does(scene: Scene, output_dir: Path) -> tuple[str, str]:
        for number in range(10):
            if found := fault(scene, output_dir.with_name(f"{output_dir.name}.{number}")):
                return found
        raise WrongError("never fell into its moment")

    return until_it_does


@tries
def interrupted_twice(scene: Scene, output_dir: Path) -> tuple[str, str] | None:
    said = scene.folder / f"{output_dir.name}.err"
    with scene.start(output_dir) as process:
        until(lambda: len(losses(output_dir)) >= 2, process)
        process.process.send_signal(signal.SIGINT)
        until(lambda: "SIGINT: saving" in said.read_text(encoding="utf-8"), process)
        process.process.send_signal(signal.SIGINT)
        done = process.end()
    if "stopped at once" not in done.out:  # the step was saved before
        return None
    newest = checkpoints.latest(output_dir)
    check(done, 130, f"stopped at once, the newest checkpoint is {newest};")
    expect(f"going on from {newest}\n" in scene.finish(output_dir).out, "another checkpoint was taken")
    return happened(done), "the step that ran: resumed, same bits"


@tries
def signalled_in_the_model(scene: Scene, output_dir: Path) -> tuple[str, str] | None:
    with scene.start(output_dir) as process:
        if until(_staged(output_dir, "model").exists, process, may_end=True):
            process.process.send_signal(signal.SIGTERM)
        done = process.end()
    if done.code == 0:
        return None
    check(done, 143, "SIGTERM: stopped; go on with --resume_from_checkpoint")
    scene.finish(output_dir)
    return happened(done), "nothing: resumed, same bits"


def full_disk_at_start(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with small_disk(output_dir, "64k") as resize:
        (output_dir / "mine").write_bytes(bytes(2**16))
        done = scene.run(output_dir)
        check(done, 1, "No space left on device")
        expect(list(content(output_dir)) == ["mine"], "something is left")
        resize("64m")
        scene.finish(output_dir)
    return happened(done), "nothing"


def full_disk_of_the_model(scene: Scene, output_dir: Path) -> tuple[str, str]:
    with small_disk(output_dir, "256k") as resize:  # room for the log and pictures
        done = scene.run(output_dir, save_strategy="no")
        check(done, 1, "the model could not be written to", "nothing of this training is saved")
        expect(losses(output_dir) == losses(scene.straight), "the log is not whole")
        resize("64m")
        scene.finish(output_dir)
    return happened(done), "the training, of which no checkpoint was asked for (--save_strategy no)"


def model_replaced(scene: Scene, output_dir: Path) -> tuple[str, str]:
    """By a resumed run, which is killed while it does so."""
    random_, wheres = random.Random(output_dir.name), collections.Counter[str]()
    while wheres["in pieces"] + wheres["whole"] < 8:
        half = scene.half(f"{output_dir.name}.{wheres.total()}", last=5)
        shutil.copytree(scene.folder / "model", half, dirs_exist_ok=True)
        old = (half / "model.safetensors").read_bytes()
        with scene.start(half) as process:
            names = ("model.whole", "model.clear")
            if until(lambda: any(_staged(half, name).exists() for name in names), process, may_end=True):  # noqa: B023
                time.sleep(random_.uniform(0, 0.003))
            process.process.kill()
            if process.process.wait() == 0:
                wheres["too late"] += 1
                continue
        loadable = (half / "config.json").exists()
        wheres["whole" if loadable else "in pieces"] += 1
        if loadable and (half / "model.safetensors").read_bytes() != old:
            expect(same(half / "model.safetensors", scene.straight / "model.safetensors"), "a torn model")
            expect(same(half / "config.json", scene.straight / "config.json"), "the old configuration")
        scene.finish(half)
    said = f"8 kills, after {wheres['in pieces']} of which no model can be loaded until the run is resumed"
    return said, "nothing: resumed, same bits"


FAULTS: dict[str, Callable[[Scene, Path], tuple[str, str]]] = {
    "SIGTERM in training": signalled(signal.SIGTERM, 143),
    "SIGINT in training": signalled(signal.SIGINT, 130),
    "SIGINT in start-up": signalled_early,
    "full disk": full_disk,
    "full disk below the cache of pairs": full_disk_of_the_cache,
    "model.safetensors larger than files may be": limited(200_000),
    "optimizer.pt larger than files may be": limited(400_000),
    "read-only folder": read_only,
    "folder made read-only in training": read_only_later,
    "folder below a file": below_a_file,
    "two runs into one folder": two_at_once,
    "model.safetensors cut short": damaged("model.safetensors", cut),
    "optimizer.pt cut short": damaged("optimizer.pt", cut),
    "optimizer.pt missing": damaged("optimizer.pt", Path.unlink),
    "trainer_state.json missing": damaged("trainer_state.json", Path.unlink),
    "trainer_state.json cut short": damaged("trainer_state.json", cut),
    "rng_state.pth missing": damaged("rng_state.pth", Path.unlink),
    "every checkpoint damaged": all_damaged,
    "other data on resume": changed_data,
    "other options on resume": changed_options,
    "safetensors of --ref_weight cut short": cut_model,
    "checkpoints deleted, the model left": without_checkpoints,
    "checkpoint of another run": of_another_run,
    "resumed from an older checkpoint": an_older_one,
    "SIGINT twice in training": interrupted_twice,
    "SIGTERM while the model is saved": signalled_in_the_model,
    "full disk at start": full_disk_at_start,
    "full disk when the model is saved, no checkpoints": full_disk_of_the_model,
    "kill -9 while a model is replaced": model_replaced,
}


def table(rows: list[Row], title: str) -> Table:
    made = Table("fault", "exit status and what is said", "lost", "", title=title, show_lines=True)
    for row in rows:
        verdict = "\n".join(("WRONG", *row.wrong)) if row.wrong else "right"
        made.add_row(*map(Text, (row.fault, row.happened, row.lost, verdict)))
    return made


def page(rows: list[Row], title: str) -> str:
    """docs/faults.md."""
    lines = [
        "# What is done to runs, and what comes of it",
        "",
        f"{title}; `make faults` does it (`tests/faults.py` says how). DIR is the folder of the runs.",
        "",
        "| fault | exit status and what is said | lost |",
        "|---|---|---|",
    ]
    for row in rows:
        happened = f"WRONG: {'; '.join(row.wrong)}" if row.wrong else row.happened
        lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in (row.fault, happened, row.lost))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, metavar="WORD", help="faults with one of these in the name")
    parser.add_argument("--write", type=Path, help="a file for the table, in Markdown: docs/faults.md")
    args = parser.parse_args()
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), warm=True)
        print(f"a run without a fault: {scene.began:.1f} s of start-up, {scene.ended:.1f} s in all", flush=True)
        for number, (name, fault) in enumerate(FAULTS.items()):
            if args.only is not None and not any(word in name for word in args.only):
                continue
            row = Row(name, "", "")
            try:
                row.happened, row.lost = fault(scene, scene.folder / f"fault-{number}")
            except NotHereError as error:
                row.happened = f"not tried here: {error}"
            except Exception as error:  # also of this program: the other rows are still to come
                row.wrong = [f"{type(error).__name__}: {error}"]
            row.happened, row.lost = (text.replace(folder, "DIR") for text in (row.happened, row.lost))
            rows.append(row)
            print(f"{name}: {'WRONG: ' + row.wrong[0] if row.wrong else row.happened}", flush=True)
        rows = kills(scene, args.kills, args.seed) + rows
    title = f"{args.kills} kills, seed {args.seed}, {time.monotonic() - start:.0f} s, {datetime.date.today()}"
    Console(width=150).print(table(rows, title))
    if args.write:
        args.write.write_text(page(rows, title), encoding="utf-8")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
