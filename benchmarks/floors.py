"""What no peer can be expected to undercut: the products of rows that count, or copies of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, Outcome, Step

FLOOR_ROWS = 8192  # tokens whose logits the floor holds at once


def make_floor(name: str, case: Case, inputs: Inputs) -> Step:
    """A floor's step; name: one of `Case.floors`. Its tensors are made here, so that none is new when it is timed."""
    if name == "bare GEMMs":
        return bare_gemms(case, inputs)
    if name == "a large copy":
        return copy_of(torch.ones(case.copied, dtype=torch.uint8, device=inputs.labels.device), times=1)
    assert inputs.logits is not None
    return copy_of(inputs.logits.detach(), times=1 if case.mode == "score" else 2)


def copy_of(source: Tensor, times: int) -> Step:
    target = torch.empty_like(source)

    def copy() -> Outcome:
        for _ in range(times):
            target.copy_(source)
        return {}

    return copy


def bare_gemms(case: Case, inputs: Inputs) -> Step:
    """`Case.needed_gemms` of them in the inputs' dtype, in blocks of rows that share one buffer."""
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach().flatten(0, 1)[: case.counted_tokens]
    blocks = [slice(i, min(i + FLOOR_ROWS, len(hidden))) for i in range(0, len(hidden), FLOOR_ROWS)]
    logits = hidden.new_empty(min(FLOOR_ROWS, len(hidden)), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def multiply() -> Outcome:
        for rows in blocks:
            z = logits[: rows.stop - rows.start]
            for _ in range(2 if case.level == "dpo" else 1):
                torch.mm(hidden[rows], weight.T, out=z)
            if "hidden" in case.wanted:
                torch.mm(z, weight, out=grad_hidden[rows])
            if "weight" in case.wanted:
                grad_weight.addmm_(z.T, hidden[rows], beta=float(rows.start > 0))
        return {}

    return multiply
