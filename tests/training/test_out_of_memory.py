"""Out of memory in the middle of a run: in a step, in an evaluation, in the optimizer."""

from __future__ import annotations

import pytest
import torch
from training_helpers import Trees, logs, make_trainer, weights

from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.memory import checkpointing, rescue
from dpo_kernels.training.memory.out_of_memory import OutOfMemoryError, is_out_of_memory


class Full:
    """A policy that has no memory left in the backward of some batches."""

    def __init__(self, trainer, at, error=None):
        self.trainer, self.at, self.calls = trainer, set(at), 0
        self.error = error or RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        self.own = trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        loss = self.own(model, inputs, **kwargs)
        if model.training:
            self.calls += 1
            if self.calls in self.at:
                loss.register_hook(self.fail)
        return loss

    def fail(self, grad):
        raise self.error


@pytest.mark.parametrize(
    ("accumulated", "at", "step", "error"),
    [
        (1, 2, 2, None),
        (1, 2, 2, MemoryError()),
        (3, 6, 3, torch.OutOfMemoryError("CUDA out of memory")),  # the second of three batches; step 2 has one
    ],
    ids=str,
)
def test_a_step_without_memory_is_run_again_one_part_lower(tmp_path, accumulated, at, step, error):
    options = {"pairs": Trees(), "max_steps": 4, "gradient_accumulation_steps": accumulated, "layout": "bucketed",
               "per_device_train_batch_size": 1, "num_train_epochs": 20}  # fmt: skip
    usual = make_trainer(tmp_path / "usual", **options)
    usual.train()
    trainer = make_trainer(tmp_path / "full", **options)
    Full(trainer, [at], error)
    with pytest.warns(
        UserWarning, match=f"step {step}: memory did not suffice .*run again with --gradient_checkpointing"
    ):
        trainer.train()
    assert checkpointing.is_on(trainer.model)
    for name, weight in weights(usual).items():
        torch.testing.assert_close(weights(trainer)[name], weight, rtol=0, atol=1e-6)
    assert [e["loss"] for e in logs(tmp_path / "full")] == pytest.approx([e["loss"] for e in logs(tmp_path / "usual")])
    assert [e["rewards/margins"] for e in logs(tmp_path / "full")] == pytest.approx(
        [e["rewards/margins"] for e in logs(tmp_path / "usual")], abs=1e-5
    )
    assert [e["lowered"] for e in logs(tmp_path / "full", "lowered")] == ["--gradient_checkpointing true"]


def test_what_a_run_can_be_lowered_by(tmp_path):
    trainer = make_trainer(tmp_path, pairs=Trees(), layout="shared")
    told = [one.split(" ")[0] + " " + one.split(" ")[1] for one in rescue.lower(trainer)]
    assert told == ["--gradient_checkpointing true", "--mlp_tiles auto", "--answers_at_once 2", "--answers_at_once 1"]
    assert trainer.layout == Layout("bucketed", answers_at_once=1) == trainer.reference.layout
    trainer.train()
    assert logs(tmp_path)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_without_memory_even_then_the_last_step_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, pairs=Trees(), layout="bucketed", max_steps=5)
    Full(trainer, [3, 4])
    with (
        pytest.warns(UserWarning, match="memory did not suffice"),
        pytest.raises(OutOfMemoryError, match=r"nor with --gradient_checkpointing true .* saved in .*checkpoint-2"),
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    again = make_trainer(tmp_path, pairs=Trees(), layout="bucketed", max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_another_error_is_no_lack_of_memory(tmp_path):
    trainer = make_trainer(tmp_path, pairs=Trees(), layout="bucketed")
    Full(trainer, [1], RuntimeError("a kernel is wrong"))
    with pytest.raises(RuntimeError, match="a kernel is wrong"):
        trainer.train()
    assert not is_out_of_memory(ValueError("out of memory"))


# Evaluation and optimizer


class FullOfPairs(Full):
    """A policy that has no memory for the evaluation of more pairs than `most` at once."""

    def __init__(self, trainer, most):
        super().__init__(trainer, [])
        self.most, self.evaluated = most, []

    def compute_loss(self, model, inputs, **kwargs):
        pairs = len(inputs["x_chosen"])
        if not model.training:
            if pairs > self.most:
                raise self.error
            self.evaluated.append(pairs)
        return super().compute_loss(model, inputs, **kwargs)


def evaluated(folder, most=None, **options):
    trainer = make_trainer(
        folder, pairs=Trees(), eval_pairs=Trees(), eval_strategy="steps", eval_steps=2, max_steps=3,
        per_device_eval_batch_size=3, layout="bucketed", **options,
    )  # fmt: skip
    return trainer, None if most is None else FullOfPairs(trainer, most)


@pytest.mark.parametrize("losses", [["sigmoid"], ["sigmoid", "sft"]], ids=str)
def test_an_evaluation_without_memory_goes_on_with_fewer_pairs(tmp_path, losses):
    """A negative log-likelihood is a mean over the tokens of the whole batch."""
    usual, _ = evaluated(tmp_path / "usual", loss_type=losses)
    usual.train()
    trainer, full = evaluated(tmp_path / "full", most=1, loss_type=losses)
    with pytest.warns(UserWarning, match="evaluation of a batch .* it goes on with 1 at once"):
        trainer.train()
    assert set(full.evaluated) == {1}
    assert len(full.evaluated) == 2 * len(Trees())  # at step 2, and at the end
    expected, found = (logs(tmp_path / name, "eval_loss")[-1] for name in ("usual", "full"))
    for name, value in expected.items():
        if name.startswith(("eval_loss", "eval_rewards", "eval_logps")):
            assert found[name] == pytest.approx(value, abs=1e-5), name


def test_an_evaluation_without_memory_for_a_pair_saves_the_last_step(tmp_path):
    trainer, _ = evaluated(tmp_path, most=0)
    with (
        pytest.warns(UserWarning, match="goes on with"),
        pytest.raises(OutOfMemoryError, match=r"evaluation of one pair .* saved in .*checkpoint-2\. Give a smaller"),
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_an_evaluation_outside_of_training_saves_nothing(tmp_path):
    trainer, _ = evaluated(tmp_path, most=0)
    with pytest.warns(UserWarning, match="goes on with"), pytest.raises(OutOfMemoryError, match="of one pair") as told:
        trainer.evaluate()
    assert "saved" not in str(told.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("saves", [False, True])
def test_an_optimizer_without_memory_saves_no_half_of_a_step(tmp_path, saves):
    options = {"save_strategy": "steps", "save_steps": 1} if saves else {}
    trainer = make_trainer(tmp_path, pairs=Trees(), max_steps=4, **options)
    trainer.create_optimizer()
    own, calls = trainer.optimizer.step, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return own(*args, **kwargs)

    trainer.optimizer.step = step
    last = "the last checkpoint is .*checkpoint-1" if saves else "no checkpoint was saved yet"
    with pytest.raises(OutOfMemoryError, match=f"after step 1: memory did not suffice for the optimizer.*{last}"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] * saves
