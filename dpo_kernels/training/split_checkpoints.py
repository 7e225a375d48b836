"""Checkpoints of a model that transformers has split as it loaded it (tp_size), which its Trainer does not resume.

The weights are saved whole, as of any model; the optimizer's state by torch.distributed.checkpoint, which fits it to
any number of processes, and to none that share a layer. What one process or DDP has saved is gone on from too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dpo_kernels.training.checkpoints import CheckpointError

OPTIMIZER = "optimizer_split"  # a folder
WHOLE = "optimizer.pt"  # of one process, or of DDP
SCHEDULER = "scheduler.pt"


@contextmanager
def unrefused(args: Any, is_split: bool) -> Iterator[None]:
    """Within it transformers' Trainer is made of a split model, whose optimizer is saved here."""
    before = args.save_only_model
    args.save_only_model = before or is_split
    try:
        yield
    finally:
        args.save_only_model = before


def is_split(checkpoint: str) -> bool:
    return (Path(checkpoint) / OPTIMIZER).is_dir()


def save_optimizer(folder: str, model: nn.Module, optimizer: Any, scheduler: Any, is_main: bool) -> None:
    """Of all processes together.

    Args:
        optimizer, scheduler: accelerate's, or what they are around.
        is_main: whether this process writes what all have.
    """
    state = get_optimizer_state_dict(model, _inner(optimizer))
    dcp.save({"optimizer": state}, checkpoint_id=Path(folder) / OPTIMIZER)
    if is_main:
        torch.save(scheduler.state_dict(), Path(folder) / SCHEDULER)


def load_optimizer(folder: str, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Of all processes together, however many there are, and whether the model is split or not; what one process has
    saved too.

    Raises:
        CheckpointError: the folder has no optimizer's state that can be loaded here, or that of another model.
    """
    own = _inner(optimizer)
    if is_split(folder):
        state = {"optimizer": get_optimizer_state_dict(model, own)}
        dcp.load(state, checkpoint_id=Path(folder) / OPTIMIZER)
        set_optimizer_state_dict(model, own, state["optimizer"])
    else:
        whole = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, own, _by_name(Path(folder), model, own), options=whole)
    scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER, weights_only=True))


def load_weights(folder: str, model: nn.Module) -> None:
    """Whole weights into a split model; each process reads them.

    Raises:
        CheckpointError: the folder has none, or those of another model.
    """
    whole: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        whole |= load_file(path)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = dict(model.named_parameters()).keys() - whole.keys() - tied
    if missing or not whole:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {sorted(missing)[:3]}")
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=False))


def _by_name(folder: Path, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The state of a whole model's optimizer, which knows parameters by their number, by their names."""
    if not (folder / WHOLE).is_file():
        raise CheckpointError(
            f"{folder} has neither {OPTIMIZER} nor {WHOLE}: it was not saved with tp_size, nor by one process or DDP; "
            "go on with what saved it, or start from its weights with --ref_weight and --from_weight"
        )
    saved = torch.load(folder / WHOLE, map_location="cpu", weights_only=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    numbers = [group["params"] for group in saved["param_groups"]]
    if [len(group) for group in groups] != [len(group) for group in numbers]:
        raise CheckpointError(
            f"{folder / WHOLE} is of {sum(map(len, numbers))} parameters in {len(numbers)} groups, and this run trains "
            f"{sum(map(len, groups))} in {len(groups)}; go on with the options that it was saved with"
        )
    state = {
        name: saved["state"].get(number, {})
        for group, of_group in zip(groups, numbers, strict=True)
        for name, number in zip(group, of_group, strict=True)
    }
    for parameter, name in names.items():
        moments = [value for value in state.get(name, {}).values() if isinstance(value, torch.Tensor) and value.ndim]
        if name in state and (not state[name] or any(moment.shape != parameter.shape for moment in moments)):
            raise CheckpointError(
                f"{folder / WHOLE} has no state of {name}, or one of another shape than {tuple(parameter.shape)}; go "
                "on with the options that it was saved with"
            )
    return {
        "state": state,
        "param_groups": [
            group | {"params": of_group} for group, of_group in zip(saved["param_groups"], groups, strict=True)
        ],
    }


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
