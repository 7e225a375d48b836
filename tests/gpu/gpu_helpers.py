"""Heads on a device, budgets that lead to each mode, and exact answers in blocks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers import Head, make_head
from torch import Tensor

from dpo_kernels import hidden_to_log_probs, plan, reference
from dpo_kernels.planner import Plan

# The gradients that lead to a mode, given the budget of `planned`.
MODES = {
    "score": "none",
    "frozen": "hidden",
    "keep": "hidden,weight",
    "mixed": "hidden,weight",
    "recompute": "hidden,weight",
}
PLAIN: dict = {}
ALL = {"softcap": 9.0, "temperature": 1.5, "logit_scale": 0.7}


def head_on(device: torch.device, *shape, **options) -> Head:
    head = make_head(*shape, **options)

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)

    return Head(leaf(head.hidden), leaf(head.weight), head.labels.to(device), leaf(head.bias))


def planned(head: Head, mode: str) -> Plan:
    """The plan of a call on this head in this mode; its bytes, as a budget, lead to it."""
    tokens, labels = int((head.labels != -100).sum()), head.labels.numel()
    vocab, features = head.weight.shape
    given = (("hidden", head.hidden), ("weight", head.weight), ("bias", head.bias))
    grads = tuple(name for name, t in given if t is not None and t.requires_grad)

    def of(budget: int | None) -> Plan:
        return plan(
            tokens, features, vocab, head.hidden.dtype, grads=grads, memory_budget=budget, device=head.hidden.device,
            impl="triton", labels=labels,
        )  # fmt: skip

    most = of(2**50)
    if mode in ("mixed", "recompute"):
        kept, held = (most.memory[n] for n in ("kept probabilities", "hidden states, gathered and converted once"))
        most = of(most.bytes - held - (kept if mode == "recompute" else kept // 2))
    assert most.mode == mode, most
    return most


class Result(NamedTuple):
    log_probs: Tensor
    grads: tuple[Tensor, ...]


def inputs_of(head: Head) -> list[Tensor]:
    return [t for t in (head.hidden, head.weight, head.bias) if t is not None and t.requires_grad]


def step(head: Head, cotangent: Tensor | None, budget: int | None = None, **options) -> Result:
    """Log-probs, and the gradients of what wants one."""
    log_probs = hidden_to_log_probs(
        head.hidden, head.weight, head.labels, head.bias, memory_budget=budget, impl="triton", **options
    )
    leaves = inputs_of(head)
    return Result(log_probs.detach(), torch.autograd.grad(log_probs, leaves, cotangent) if leaves else ())


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
