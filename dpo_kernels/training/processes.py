"""What all processes of a run agree on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from dpo_kernels.training import mlp_tiles, partitioned
from dpo_kernels.training.model import FusedHead

WAIT = 600.0  # seconds that a process that has ended well waits for the others: the main one writes a report
LEAVE = 20.0  # seconds that leaving may take


@contextmanager
def together(wait: float = WAIT, in_group: Callable[[], None] | None = None) -> Iterator[None]:
    """What runs inside ends its part in the group of processes, if one was made, before Python ends.

    Threads of gloo that are still there when a process ends may abort it (torch 2.13). After an ordinary end all wait
    for each other, at most `wait` seconds, so that none takes away what another still needs; after an error or a signal
    a process leaves at once, and the others hear of it: with gloo from the broken connection, else from the launcher.

    Args:
        in_group: called at the end, before a group that was made is left.
    """
    in_time = 0.0
    try:
        yield
        in_time = wait
    finally:
        if in_group is not None and dist.is_available() and dist.is_initialized():
            in_group()
        leave(in_time)


def leave(wait: float = 0.0) -> None:
    """Ends this process' part in the group of processes; nothing where there is none.

    Args:
        wait: seconds to wait until all others are here too; one that has died, or does not come, is waited for no
            longer.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if wait > 0:
        with suppress(RuntimeError):  # what all backends raise of a peer that is gone, and of a time that is over
            waiting = dist.barrier(async_op=True)
            if waiting is not None:
                waiting.wait(timedelta(seconds=wait))
    # Messages that will never come may keep NCCL here, and an error shall be an end.
    leaving = threading.Thread(target=_destroy, daemon=True)
    leaving.start()
    leaving.join(LEAVE)


def _destroy() -> None:
    with suppress(RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group()


def is_partitioned(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed keeps parameters in parts (ZeRO-3)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def save_whole_models(accelerator: Accelerator) -> None:
    """Lets DeepSpeed put the parts of a model together where it is saved, also where its config does not say so."""
    if is_partitioned(accelerator):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def on_models(accelerator: Accelerator, compute: Callable[[], Any], *models: Any) -> Any:
    """`from_main`, for what runs models forward or reads their weights. Where weights are in parts all processes
    compute (of ZeRO-3's each module's are whole for as long as it runs), and the main one's word counts."""
    if not partitioned.runs_together(*models):
        return from_main(accelerator, compute)
    with partitioned.by_module(*models):
        try:
            own: Any = compute()
        except ValueError as error:
            own = error

    def word() -> Any:
        if isinstance(own, ValueError):
            raise own
        return own

    return from_main(accelerator, word)


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on any process; all of them get the same answer."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def from_main(accelerator: Accelerator, compute: Callable[[], Any]) -> Any:
    """What `compute` gives on the main process, on all of them; a ValueError (a HeadError is one) too."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [compute()]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


def find_mlps(accelerator: Accelerator, model: nn.Module) -> mlp_tiles.Found:
    """`mlp_tiles.find_mlps` on the main process, for all of them.

    Raises:
        TilingError: nothing in the model can be run in slices.
        ValueError: ZeRO-3, or FSDP around layers within an MLP: processes would gather weights once a slice, and each
            may have another number of slices.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if is_partitioned(accelerator) or (plugin is not None and plugin.min_num_params):
        raise ValueError(
            "mlp_tiles does not work where an MLP's layers are gathered one by one (ZeRO-3, FSDP by min_num_params): "
            "processes with other numbers of slices would wait for each other; use ZeRO-2, or FSDP around whole layers"
        )
    return from_main(accelerator, lambda: mlp_tiles.find_mlps(model))


def check_head(accelerator: Accelerator, head: FusedHead, model: nn.Module, deterministic: bool) -> None:
    """`FusedHead.check` on the main process, which may be the only one that has loaded the weights; the others take its
    word. Of weights in parts on all processes, which have to gather them together."""

    def check() -> Any:
        head.check(model, deterministic)
        return head.transform

    head.transform = on_models(accelerator, check, model)
