"""A fused head on models whose weights are split over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import slow
from script_helpers import check_probe
from torch import nn

from dpo_kernels.training import checkpoints, split_checkpoints, zero_checkpoints
from dpo_kernels.training.checkpoints import CheckpointError


@pytest.mark.parametrize("processes", [2, slow(4)])
def test_fused_heads_on_split_models(processes):
    """Four: tensor parallelism and FSDP at once."""
    check_probe("tensor_parallel_probe.py", processes)


class Trained:
    """Two groups of parameters, as transformers makes them, after two steps."""

    def __init__(self, sizes: tuple[int, int] = (4, 3), decayed: float = 0.1):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(*sizes), nn.LayerNorm(sizes[1]))
        groups = [
            {"params": [self.model[0].weight], "weight_decay": decayed},
            {"params": [self.model[0].bias, *self.model[1].parameters()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def step(self) -> None:
        self.model(torch.arange(8.0).view(2, 4)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def load(self, folder: Path) -> None:
        split_checkpoints.load_optimizer(str(folder), self.model, self.optimizer, self.scheduler)


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of one process, and the run that saved it."""
    trained = Trained()
    trained.step()
    trained.step()
    torch.save(trained.optimizer.state_dict(), tmp_path / split_checkpoints.WHOLE)
    torch.save(trained.scheduler.state_dict(), tmp_path / split_checkpoints.SCHEDULER)
    return tmp_path, trained


def test_the_optimizer_of_one_process_is_gone_on_from(whole):
    folder, trained = whole
    again = Trained(decayed=0.5)  # which the checkpoint knows better, as everywhere
    again.model.load_state_dict(trained.model.state_dict())
    again.load(folder)
    for one in (trained, again):
        one.step()
    for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_of_other_parameters_or_none_is_told(whole, tmp_path):
    folder, _ = whole
    other = Trained()
    other.optimizer.param_groups[1]["params"].pop()
    with pytest.raises(CheckpointError, match="is of 4 parameters in 2 groups, and this run trains 3 in 2"):
        other.load(folder)
    with pytest.raises(CheckpointError, match=r"no state of 0\.weight, or one of another shape than \(5, 4\)"):
        Trained((4, 5)).load(folder)
    saved = torch.load(folder / split_checkpoints.WHOLE)
    del saved["state"][2]
    torch.save(saved, folder / split_checkpoints.WHOLE)
    with pytest.raises(CheckpointError, match=r"no state of 1\.weight") as told, checkpoints.reading(folder):
        Trained().load(folder)
    assert "go on from an older one" not in str(told.value)
    (folder / split_checkpoints.WHOLE).unlink()
    with pytest.raises(CheckpointError, match=r"has neither optimizer_split nor optimizer\.pt"):
        other.load(folder)


def test_groups_and_counts_of_steps_of_zero_3_are_given_back(tmp_path):
    """DeepSpeed's loader of the universal form leaves the first group's settings in each, and one count for all."""
    saved, loaded = Trained(), Trained()
    saved.step()
    saved.optimizer.param_groups[1]["lr"] = 0.03
    folder = tmp_path / "global_step1_universal" / "zero"
    folder.mkdir(parents=True)
    (tmp_path / zero_checkpoints.LATEST).write_text("global_step1_universal")
    torch.save({"optimizer_state_dict": saved.optimizer.state_dict()}, folder / "optimizer_state.pt")
    loaded.step()
    one = torch.tensor(1.0)
    for state in loaded.optimizer.state.values():
        state["step"] = one
    for group in loaded.optimizer.param_groups:
        group |= {"weight_decay": 0.1, "lr": 0.7}
    zero_checkpoints.give_back_groups(loaded.optimizer, tmp_path)
    assert [(group["weight_decay"], group["lr"]) for group in loaded.optimizer.param_groups] == [
        (group["weight_decay"], group["lr"]) for group in saved.optimizer.param_groups
    ]
    loaded.step()
    assert {float(state["step"]) for state in loaded.optimizer.state.values()} == {2.0}
