"""The implementations, fastest first, and the choice among them.

An implementation is a module with `unavailable(device)` (None if it can run there, else the reason), `facts(device,
tokens, features)` for the plan, `hidden_forward`, `hidden_backward`, `logits_forward` and `logits_backward`;
`torch_impl` shows their signatures.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from dpo_kernels.impls import cpp_impl, torch_impl, triton_impl

NAMES = ("triton", "cpp", "torch")
MODULES: dict[str, ModuleType] = {"triton": triton_impl, "cpp": cpp_impl, "torch": torch_impl}


def available_impls(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Name of each implementation -> None if it can run on `device`, else the reason why not.

    Nothing is built: "cpp" can run where it is built already, or where a compiler and ninja are there to build it.
    """
    device = torch.device(device)
    return {name: module.unavailable(device) for name, module in MODULES.items()}


def empty_cache() -> int:
    """Gives the memory that waits for its next use back to the system, and returns its bytes.

    On CPUs the "cpp" implementation lets large buffers (what forward keeps for backward, and gradients that nobody
    holds any more) wait for the next call, one of each kind: fresh memory costs page faults. The system may take what
    waits whenever it needs memory, so no budget counts it. On GPUs PyTorch's allocator does the like; see
    `torch.cuda.empty_cache`.
    """
    return cpp_impl.release()


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of the implementation asked for, or of the fastest that can run; "torch" for float64, which no other
    computes.

    Where the fastest made for this kind of device cannot run, another takes over, and a warning says once what would
    make it fast.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: it cannot run on this device; says why.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"impl is {name!r}; expected None or one of {NAMES}")
    if dtype == torch.float64:
        return torch_impl
    if name is not None:
        reason = MODULES[name].cannot_run(device)
        if reason is not None:
            raise RuntimeError(f"impl {name!r} cannot run on {device}: {reason}")
        return MODULES[name]
    for candidate in (module for known, module in MODULES.items() if device.type in module.DEVICES):
        reason = candidate.cannot_run(device)
        if reason is None:
            return candidate
        _warn(reason)
    return torch_impl


@functools.cache  # once a reason
def _warn(reason: str) -> None:
    warnings.warn(f"dpo_kernels falls back to PyTorch operations, which are slower: {reason}", stacklevel=3)
