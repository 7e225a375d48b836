"""What no peer can be expected to undercut: the products of rows that count, or copies of the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs

FLOOR_ROWS = 8192  # tokens whose logits the floor holds at once


def make_floor(name: str, case: Case, inputs: Inputs) -> Callable[[], None]:
    """A floor's step; name: one of `Case.floors`. Its tensors are made here, so that none is new when it is timed."""
    return {"bare GEMMs": bare_gemms, "bare copy": bare_copy, "a large copy": large_copy}[name](case, inputs)


def bare_copy(case: Case, inputs: Inputs) -> Callable[[], None]:
    """Of the logits: once forward, twice with the gradient."""
    assert inputs.logits is not None
    source, target = inputs.logits.detach(), torch.empty_like(inputs.logits)

    def copy() -> None:
        for _ in range(1 if case.mode == "score" else 2):
            target.copy_(source)

    return copy


def large_copy(case: Case, inputs: Inputs) -> Callable[[], None]:
    source = torch.ones(case.copied, dtype=torch.uint8, device=inputs.labels.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy


def bare_gemms(case: Case, inputs: Inputs) -> Callable[[], None]:
    """`Case.needed_gemms` of them in the inputs' dtype, in blocks of rows that share one buffer."""
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach().flatten(0, 1)[: case.counted_tokens]
    blocks = [slice(i, min(i + FLOOR_ROWS, len(hidden))) for i in range(0, len(hidden), FLOOR_ROWS)]
    logits = hidden.new_empty(min(FLOOR_ROWS, len(hidden)), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def multiply() -> None:
        for rows in blocks:
            z = logits[: rows.stop - rows.start]
            for _ in range(2 if case.level == "dpo" else 1):
                torch.mm(hidden[rows], weight.T, out=z)
            if "hidden" in case.wanted:
                torch.mm(z, weight, out=grad_hidden[rows])
            if "weight" in case.wanted:
                grad_weight.addmm_(z.T, hidden[rows], beta=float(rows.start > 0))

    return multiply
