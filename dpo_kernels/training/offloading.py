"""What autograd saves in the policy's forward, in host memory until backward asks for it.

Weights, buffers and views of them stay where they are: they are on the device anyway. So does what the output head
saves, which backward asks for first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dpo_kernels.training.output_head import find_head

SMALL = 1024  # bytes that are not worth a copy


class Offloading:
    """`with offloading(): output = model(...)`: what the forward saves is in host memory afterwards.

    With TRL installed its `OffloadActivations` copies beside the computation, else each copy waits in line with it.
    A layer under gradient checkpointing saves its input alone, so that no more than that is moved; what its backward
    computes again stays on the device. Where autocast is on, the copies of weights that it makes are moved like
    activations.

    Args:
        model: the policy, not wrapped; on its device when a forward runs.
        hooks: makes the hooks of a forward from the model; default: TRL's where it can be imported, else `on_host`.
    """

    def __init__(
        self, model: nn.Module, hooks: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.model, self.hooks = model, hooks or _trl_hooks() or on_host

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.hooks(self.model), _left_alone(find_head(self.model)):
            yield


def check_offloading(device: torch.device, is_sharded: bool) -> None:
    """
    Args:
        is_sharded: whether weights are in parts (FSDP, ZeRO-3), and gathered for a forward.

    Raises:
        ValueError: there is nothing to move, or weights would be moved with it.
    """
    if device.type == "cpu":
        raise ValueError(
            "activation_offloading moves what backward needs from a GPU to host memory, and on a CPU it is there "
            "already; leave it out"
        )
    if is_sharded:
        raise ValueError(
            "activation_offloading does not work with FSDP or ZeRO-3, whose gathered weights would be moved like "
            "activations; use DDP, or leave it out"
        )


def on_host(model: nn.Module, to_host: Callable[[Tensor], Tensor] | None = None) -> saved_tensors_hooks:
    """Hooks that keep saved tensors in host memory: those that are none of the model's weights and buffers, nor views
    of them, have at least `SMALL` bytes, and are no expanded views.

    Args:
        to_host: (any tensor) -> its copy; default: into pinned memory.
    """
    move = to_host or _pinned
    own = {_storage(t) for t in chain(model.parameters(), model.buffers())}

    def pack(t: Tensor) -> Any:
        if t.numel() * t.element_size() < SMALL or 0 in t.stride() or _storage(t) in own:
            return t
        return t.device, move(t)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, t = packed
        return t.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


def _pinned(t: Tensor) -> Tensor:
    copy = torch.empty_like(t, device="cpu", pin_memory=True)
    return copy.copy_(t, non_blocking=True)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _trl_hooks() -> Callable[[nn.Module], AbstractContextManager[Any]] | None:
    """TRL's hooks, made at the first forward, when there is a device; None: TRL cannot be imported."""
    try:
        from trl.models.activation_offloading import OffloadActivations
    except ImportError:
        return None
    made: list[Any] = []

    def hooks(model: nn.Module) -> AbstractContextManager[Any]:
        made.extend([] if made else [OffloadActivations()])
        made[0].update_model_params(model)
        return made[0]

    return hooks


@contextmanager
def _left_alone(head: nn.Module) -> Iterator[None]:
    """What the head saves stays where it is."""
    plain: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        plain.append(saved_tensors_hooks(_same, _same))
        plain[-1].__enter__()

    def leave(*_: Any) -> None:
        plain.pop().__exit__()

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(t: Tensor) -> Tensor:
    return t
