"""What is right: the exact answer of a case in float64, and how far from it a result may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import IGNORE, Case, Inputs, other_order, row_blocks
from dpo_kernels import reference

BETA = 0.1  # DPO's, in every case
# A peer is right if its error is at most FACTOR x that of plain PyTorch in the same dtype + ULPS x the dtype's eps,
# the latter times the largest exact value for log-probs and times 1 for relative gradient errors.
FACTOR, ULPS = 4.0, 2.0
# Ours is held to what the package promises: an absolute error of log-probs by dtype, and gradients as good as
# OUR_FACTOR x plain PyTorch's error, or as OUR_ULPS x the dtype's eps where that is more.
PROMISED = {torch.bfloat16: 1e-4, torch.float32: 1e-5}
OUR_FACTOR, OUR_ULPS = 2.0, 2.0
# The loss is a difference of float32 sums of some hundred log-probs: this is what those round by.
LOSS_FLOOR = 1e-5

Outcome = dict[str, Tensor]  # "log_probs" (R, S) or "loss" (), and the gradients by the input's name


class Answer(NamedTuple):
    """An outcome, and what its loss rests on: log_probs (R, S), and slopes (R, S), the loss's derivatives by them."""

    outcome: Outcome
    log_probs: Tensor
    slopes: Tensor


def by_rows(case: Case, inputs: Inputs, dtype: torch.dtype) -> Answer:
    """The answer of plain PyTorch in a dtype, in blocks of rows that fit into memory; in float64 the exact one."""

    def leaf(t: Tensor, name: str) -> Tensor:
        return t.detach().to(dtype).requires_grad_(name in case.wanted)

    labels, counts = inputs.labels.flatten(), inputs.labels != IGNORE
    if inputs.logits is not None:
        source, head = leaf(inputs.logits.flatten(0, 1), "logits"), None
    else:
        source, head = leaf(inputs.hidden.flatten(0, 1), "hidden"), leaf(inputs.weight, "weight")

    def log_probs(rows: slice, source: Tensor, head: Tensor | None) -> Tensor:
        if head is None:
            return reference.logits_to_log_probs(source[rows], labels[rows])
        return reference.hidden_to_log_probs(source[rows], head, labels[rows])

    def all_rows(source: Tensor, head: Tensor | None, cotangent: Tensor | None = None) -> Tensor:
        """Log-probs (R, S); with a cotangent gradients too."""
        parts = []
        for rows in row_blocks(len(labels), case.vocab_size):
            with torch.set_grad_enabled(cotangent is not None):
                part = log_probs(rows, source, head)
            if cotangent is not None:
                part.backward(cotangent.flatten()[rows].to(part.dtype))
            parts.append(part.detach())
        return torch.cat(parts).view(counts.shape)

    if case.level == "dpo":
        frozen = inputs.reference()
        of_reference = all_rows(leaf(frozen.hidden.flatten(0, 1), ""), leaf(frozen.weight, ""))
        values = all_rows(source, head).requires_grad_()
        loss = reference.dpo_loss(of_reference, values, counts, BETA)[0]
        (cotangent,) = torch.autograd.grad(loss, values)
        values = all_rows(source, head, cotangent if case.wanted else None)
        outcome = {"loss": loss.detach()}
    else:
        cotangent = inputs.cotangent
        values = all_rows(source, head, cotangent if case.wanted else None)
        outcome = {"log_probs": values}
    grads = {"logits": source.grad} if head is None else {"hidden": source.grad, "weight": head.grad}
    outcome |= {name: g.view(inputs.leaves()[name].shape) for name, g in grads.items() if g is not None}
    return Answer(outcome, values, cotangent)


def errors_of(outcome: Outcome, exact: Outcome, counts: Tensor) -> dict[str, float]:
    """Against float64: absolute (the largest) for log_probs where they count and loss, relative for gradients.

    Infinite where an answer is missing, of the wrong shape, or NaN.
    """
    errors = {}
    for name, truth in exact.items():
        got = outcome.get(name)
        if got is None or got.shape != truth.shape:
            errors[name] = float("inf")
            continue
        difference = got.double() - truth
        if name == "log_probs":
            difference = difference[counts]
        error = difference.abs().max() if name in ("log_probs", "loss") else difference.norm() / truth.norm()
        errors[name] = error.item() if error.isfinite() else float("inf")
    return errors


@dataclass(frozen=True)
class Judge:
    """Knows the exact answer of a case, and the errors that peers and ours may have. counts: which labels count."""

    exact: Outcome
    allowed: dict[str, float]
    allowed_ours: dict[str, float]
    counts: Tensor

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Judge:
        dtype = case.torch_dtype
        exact, plain = by_rows(case, inputs, torch.float64), by_rows(case, inputs, dtype)
        slopes = exact.slopes.abs().double()
        # What the loss moves by if log-probs, the policy's and the reference's, are rounded to the dtype, as some
        # peers return them; and if each is off by what is promised.
        rounded = torch.finfo(dtype).eps * (slopes * exact.log_probs.abs()).sum().item()
        promised = 2 * PROMISED[dtype] * slopes.sum().item()
        return cls.beside(exact.outcome, plain.outcome, dtype, inputs.labels != IGNORE, rounded, promised)

    @classmethod
    def beside(
        cls, exact: Outcome, plain: Outcome, dtype: torch.dtype, counts: Tensor, rounded: float, promised: float
    ) -> Judge:
        """From the exact outcome and plain PyTorch's in the dtype. rounded, promised: what moves the loss, see `of`."""
        eps = torch.finfo(dtype).eps
        allowed, ours = {}, {}
        for name, error in errors_of(plain, exact, counts).items():
            if name == "log_probs":
                floor, ours[name] = ULPS * eps * exact[name][counts].abs().max().item(), PROMISED[dtype]
            elif name == "loss":
                floor, ours[name] = LOSS_FLOOR + rounded, LOSS_FLOOR + promised
            else:
                floor, ours[name] = ULPS * eps, max(OUR_FACTOR * error, OUR_ULPS * eps)
            allowed[name] = FACTOR * error + floor
        return cls(exact, allowed, ours, counts)

    def changed(self, case: Case) -> Judge:
        """Of the same inputs after `Inputs.change`: every token's numbers move with it, gradients are halved."""

        def moved(name: str, t: Tensor) -> Tensor:
            t = other_order(t) if name in ("log_probs", "logits", "hidden") else t
            return t if name in ("log_probs", "loss") or case.level == "dpo" else 0.5 * t

        exact = {name: moved(name, t) for name, t in self.exact.items()}
        return replace(self, exact=exact, counts=other_order(self.counts))

    def verdict(self, outcome: Outcome, ours: bool) -> tuple[dict[str, float], str]:
        """The errors, and "" or what is wrong."""
        errors, allowed = errors_of(outcome, self.exact, self.counts), self.allowed_ours if ours else self.allowed
        wrong = [
            f"error of {name} {error:.1e}, allowed {allowed[name]:.1e}"
            for name, error in errors.items()
            if not error <= allowed[name]
        ]
        return errors, "; ".join(wrong)
