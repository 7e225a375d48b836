"""What one call computes: the tensors, the transform from product to logit, and which outputs and gradients are wanted.

Options travel through the package as these small frozen objects, never as loose flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TokenStats(NamedTuple):
    """Per-token statistics of p = softmax(z), each of the labels' shape, 0 (False) where the label is ignored.

    log_probs: log p[label]; differentiable.
    entropy: -sum p log p, in nats; differentiable. None unless asked for, like all that follow.
    log_sum_sq_probs: log sum p^2 (minus the Renyi-2 entropy); not differentiable.
    mean_logits: the mean of z over the vocabulary; not differentiable.
    is_top1: bool, whether the label is the first maximum of z; not differentiable.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass(frozen=True)
class Transform:
    """z = cap(logit_scale * a) / temperature of a product a = h W^T + b; cap(u) = softcap * tanh(u / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def slope(self) -> float:
        """dz/da without the cap's own derivative, which is 1 - (z * temperature / softcap)^2."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class Grads:
    """Which inputs want a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Call:
    """One checked call. hidden (..., D), weight (V, D), bias (V,) or None, labels (...) of any integer dtype.

    compute_dtype is what the operands of every product are rounded to (autocast's dtype, else the inputs' own);
    products, statistics and sums are float32, or float64 for float64.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    transform: Transform
    outputs: tuple[str, ...]
    grads: Grads
    compute_dtype: torch.dtype
    memory_budget: int | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of logits, statistics and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a matrix product computes in: autocast's where it is on, which leaves float64 alone."""
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
