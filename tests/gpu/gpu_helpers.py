"""Exact answers in blocks of rows, and an error relative to the whole."""

from __future__ import annotations

import functools

import helpers
import torch
from helpers import Head, Result
from torch import Tensor

from dpo_kernels import reference

planned = functools.partial(helpers.planned, impl="triton")
step = functools.partial(helpers.step, impl="triton")


def exact(head: Head, cotangent: Tensor, block: int = 512) -> Result:
    """The answer in float64 in blocks of rows, of a head without bias and flat labels; both gradients."""
    weight = head.weight.detach().double().requires_grad_()
    log_probs, grads = [], []
    total = torch.zeros_like(weight)
    for i in range(0, len(head.labels), block):
        hidden = head.hidden.detach()[i : i + block].double().requires_grad_()
        part = reference.hidden_to_log_probs(hidden, weight, head.labels[i : i + block])
        of_hidden, of_weight = torch.autograd.grad(part, (hidden, weight), cotangent[i : i + block].double())
        log_probs.append(part.detach())
        grads.append(of_hidden)
        total += of_weight
    return Result(torch.cat(log_probs), (torch.cat(grads), total))


def assert_relative(got: Tensor, truth: Tensor, tolerance: float, what: str = "") -> None:
    """Frobenius norm of the error over that of the truth; NaN fails."""
    error = ((got.double() - truth.double()).norm() / truth.double().norm()).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.2e}"
