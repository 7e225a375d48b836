"""What is right: the exact answer of a case in float64, and how far from it a result may be.

The answer is that of `dpo_kernels.reference`. Of large cases it is known for a part of the tokens, spread over all: it
is then compared with a gradient that is 0 at all other tokens.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.floors import make_floor
from benchmarks.inputs import IGNORE, Inputs, Outcome, Step, make_inputs, row_blocks
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

PER_TOKEN = ("log_probs", "logits", "hidden")  # of an outcome, what is (R, S, ...)


class Answer(NamedTuple):
    """An outcome, and what its loss rests on: log_probs (R, S), and slopes (R, S), the loss's derivatives by them."""

    outcome: Outcome
    log_probs: Tensor
    slopes: Tensor


def answer(case: Case, inputs: Inputs, dtype: torch.dtype) -> Answer:
    """The answer of plain PyTorch in a dtype, in blocks of rows that fit into memory; in float64 the exact one."""

    def leaf(t: Tensor, name: str) -> Tensor:
        return t.detach().to(dtype).requires_grad_(name in case.wanted)

    labels, counts = inputs.labels.flatten(), inputs.labels != IGNORE

    def all_rows(source: Tensor, head: Tensor | None, cotangent: Tensor | None = None) -> Tensor:
        parts = []
        for rows in row_blocks(len(labels), case.vocab_size):
            with torch.set_grad_enabled(cotangent is not None):
                if head is None:
                    part = reference.logits_to_log_probs(source[rows], labels[rows])
                else:
                    part = reference.hidden_to_log_probs(source[rows], head, labels[rows])
            if cotangent is not None:
                part.backward(cotangent.flatten()[rows].to(part.dtype))
            parts.append(part.detach())
        return torch.cat(parts).view(counts.shape)

    if inputs.logits is not None:
        source, head = leaf(inputs.logits.flatten(0, 1), "logits"), None
    else:
        source, head = leaf(inputs.hidden.flatten(0, 1), "hidden"), leaf(inputs.weight, "weight")
    outcome, cotangent = {}, inputs.cotangent
    if case.level == "dpo":
        frozen = inputs.reference()
        of_reference = all_rows(leaf(frozen.hidden.flatten(0, 1), ""), leaf(frozen.weight, ""))
        values = all_rows(source, head).requires_grad_()
        loss = reference.dpo_loss(of_reference, values, counts, BETA)[0]
        (cotangent,) = torch.autograd.grad(loss, values)
        outcome["loss"] = loss.detach()
    values = all_rows(source, head, cotangent if case.wanted else None)
    if case.level != "dpo":
        outcome["log_probs"] = values
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
class Truth:
    """The exact outcome of a case, and the errors that peers and ours may have.

    counts: which labels count. rows: the tokens that are verified; None for all. cotangent (R, S): what comes into the
    log-probs while they are; None for the inputs' own.
    """

    exact: Outcome
    allowed: dict[str, float]
    allowed_ours: dict[str, float]
    counts: Tensor
    rows: Tensor | None = None
    cotangent: Tensor | None = None

    @classmethod
    def of(cls, case: Case, inputs: Inputs, first: int = 0) -> Truth:
        """first: where a part of the tokens starts."""
        rows = cotangent = None
        if case.verified:
            tokens = inputs.labels.numel()
            rows = torch.arange(first, tokens, max(1, tokens // case.verified), device=inputs.labels.device)
            cotangent = torch.zeros_like(inputs.cotangent)
            cotangent.view(-1)[rows] = inputs.cotangent.flatten()[rows]
            per_token: dict[str, Any] = {name: _part(t.detach(), rows) for name, t in inputs.per_token().items()}
            inputs = replace(inputs, **per_token)
        dtype = case.torch_dtype
        exact, plain = answer(case, inputs, torch.float64), answer(case, inputs, dtype)
        slopes = exact.slopes.abs().double()
        # What the loss moves by if log-probs, the policy's and the reference's, are rounded to the dtype, as some
        # peers return them; and if each is off by what is promised.
        rounded = torch.finfo(dtype).eps * (slopes * exact.log_probs.abs()).sum().item()
        promised = 2 * PROMISED[dtype] * slopes.sum().item()
        truth = cls.beside(exact.outcome, plain.outcome, dtype, inputs.labels != IGNORE, rounded, promised)
        return replace(truth, rows=rows, cotangent=cotangent)

    @classmethod
    def beside(
        cls, exact: Outcome, plain: Outcome, dtype: torch.dtype, counts: Tensor, rounded: float, promised: float
    ) -> Truth:
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

    def check(self, outcome: Outcome, ours: bool) -> tuple[dict[str, float], str]:
        if self.rows is not None:
            outcome = {name: _part(t, self.rows) if name in PER_TOKEN else t for name, t in outcome.items()}
        errors, allowed = errors_of(outcome, self.exact, self.counts), self.allowed_ours if ours else self.allowed
        wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
        return errors, "; ".join(f"error of {n} {error:.1e}, allowed {allowed[n]:.1e}" for n, error in wrong.items())


def _part(t: Tensor, rows: Tensor) -> Tensor:
    """(R, S, ...) -> (1, rows, ...)."""
    return t.flatten(0, 1)[rows].unsqueeze(0)


class Problem:
    """The inputs of a case, which its peers share, and the truth. Nothing is computed before it is asked for."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.first = 0  # of the tokens that are verified

    @cached_property
    def inputs(self) -> Inputs:
        return make_inputs(self.case, self.device)

    @cached_property
    def truth(self) -> Truth:
        return Truth.of(self.case, self.inputs, self.first)

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.inputs.tensors().items()}

    def step(self, peer: Any) -> Step:
        """One forward, and a backward where the case wants gradients."""
        case, inputs, leaves, own = self.case, self.inputs, self.inputs.leaves(), peer.configuration
        planned = own and peer.plan(case, self.device)
        given = replace(inputs, memory_budget=planned.memory_budget) if planned else inputs

        def run() -> Outcome:
            self.clear()
            with own.applied(self.device) if own else contextlib.nullcontext():
                with torch.set_grad_enabled(bool(case.wanted)):
                    out = peer.adapters[case.level](given)
                if case.wanted:
                    out.backward(None if case.level == "dpo" else inputs.cotangent.to(out.dtype))
            grads = {name: leaves[name].grad for name in case.wanted}
            value = {"loss" if case.level == "dpo" else "log_probs": out.detach()}
            return value | {name: g for name, g in grads.items() if g is not None}

        return run

    def floor(self, name: str) -> Step:
        return make_floor(name, self.case, self.inputs)

    def run(self, step: Step) -> Outcome:
        """As it is verified."""
        assert self.saved  # before a step can change anything
        own = self.inputs.cotangent
        self.inputs.cotangent = own if self.truth.cotangent is None else self.truth.cotangent
        try:
            return step()
        finally:
            self.inputs.cotangent = own

    def restore(self) -> bool:
        """Puts the inputs back as they were; whether a step had changed them."""
        tensors = self.inputs.tensors()
        changed = [name for name, t in tensors.items() if not torch.equal(t, self.saved[name])]
        for name in changed:
            tensors[name].detach().copy_(self.saved[name])
        return bool(changed)

    def change(self) -> None:
        """Other values, so that a result that was kept is wrong. Of a part of the tokens, another part from now on."""
        self.inputs.change()
        self.forget()
        self.first = 1 if self.case.tokens > self.case.verified else 0

    def forget(self) -> None:
        """Frees what only verification needs; it is made anew when it is asked for."""
        for name in ("truth", "saved"):
            self.__dict__.pop(name, None)

    def clear(self) -> None:
        for leaf in self.inputs.leaves().values():
            leaf.grad = None
