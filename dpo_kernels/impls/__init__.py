"""The implementations, fastest first, and the choice among them.

An implementation is a module with `unavailable(device)` (None if it can run there, else the reason), `hidden_forward`,
`hidden_backward`, `logits_forward` and `logits_backward`; `torch_impl` shows their signatures.
"""

from __future__ import annotations

from types import ModuleType

import torch

from dpo_kernels.impls import torch_impl

NAMES = ("triton", "cpp", "torch")
MODULES: dict[str, ModuleType] = {"torch": torch_impl}


def available_impls(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Name of each implementation -> None if it can run on `device`, else the reason why not."""
    device = torch.device(device)
    absent = "this version of dpo_kernels does not include it; impl='torch' runs anywhere"
    return {name: MODULES[name].unavailable(device) if name in MODULES else absent for name in NAMES}


def choose(name: str | None, device: torch.device) -> ModuleType:
    """The module of the implementation asked for, or of the fastest that can run.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: it cannot run on this device; says why.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"impl is {name!r}; expected None or one of {NAMES}")
    reasons = available_impls(device)
    if name is None:
        name = next(candidate for candidate in NAMES if reasons[candidate] is None)
    elif reasons[name] is not None:
        raise RuntimeError(f"impl {name!r} cannot run on {device}: {reasons[name]}")
    return MODULES[name]
