"""What torch.utils.flop_counter.FlopCounterMode counts of a call: products, 2 * tokens * features * vocabulary each.

Registered once the counter has been imported by whoever counts: importing it takes as long as importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from dpo_kernels.ops import SAVED, STATS

Shape = Sequence[int]
_registered = False


def register() -> None:
    """Called before every call: a counter that runs already has copied what was registered when it was made."""
    global _registered
    if _registered or torch.compiler.is_compiling() or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.dpo_kernels
    for op, formula in ((ops.token_stats, forward), (ops.token_stats_backward, backward)):
        if op not in flop_registry:
            register_flop_formula(op)(formula)
        for mode in _get_current_dispatch_mode_stack():
            counter = getattr(mode, "counter", mode)
            if hasattr(counter, "flop_registry"):
                counter.flop_registry.setdefault(op, flop_registry[op])
    _registered = True


def forward(
    hidden: Shape, weight: Shape, bias: Shape | None, a: Shape | None, *_: Any, out_shape: Sequence[Shape], **__: Any
) -> int:
    """Logits, and a frozen head's Jacobian; a low-rank adapter's columns lie beside the features."""
    saved = dict(zip(SAVED, out_shape[STATS:], strict=True))
    products = 1 + (saved["jacobian"][0] > 0)
    return 2 * saved["maximum"][0] * weight[0] * (weight[1] + _rank(a)) * products


def backward(
    _: Any, made: Sequence[Shape], wanted: Sequence[bool], hidden: Shape, weight: Shape, bias: Shape | None,
    a: Shape | None, *__: Any, **___: Any,
) -> int:  # fmt: skip
    """Logits of the tokens whose exponentials were not saved, and the gradient of each matrix. What a filter leaves out
    counts: shapes do not tell it."""
    saved = dict(zip(SAVED, made, strict=True))
    if saved["jacobian"][0]:
        return 0
    tokens = saved["maximum"][0]
    kept = min(tokens, saved["exps"][0])
    matrices = sum(wanted[:2]) * weight[1]
    through = 2 * _rank(a) * (wanted[0] or any(wanted[3:]))
    return 2 * weight[0] * ((tokens - kept) * (weight[1] + _rank(a)) + tokens * (matrices + through))


def _rank(a: Shape | None) -> int:
    return 0 if a is None else a[0]
