"""What a call holds beside the plan, storage by storage, on any back end: Triton's kernels need not run for it."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from dpo_kernels import dispatch, ops
from dpo_kernels.call import Grads, LowRank, Options, TokenGrads, Tokens, Transform
from dpo_kernels.functional import least_budget
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.overrides import override
from dpo_kernels.training.memory.live_bytes import LiveBytes

LIBRARIES = "libraries and threads"  # of which no storage is part
# How a back end is asked for, and what of it is seen: the C++ kernels' own buffers are not.
TARGETS: dict[str, dict[str, Any]] = {
    "torch": {},
    "triton, fused": {"arch": Arch("cuda", 9), "kernels": {"strategy": "fused"}},
    "triton, tiles": {"arch": Arch("cuda", 9), "kernels": {"strategy": "tiles"}},
}


@dataclass(frozen=True)
class Case:
    target: str
    labels: int
    counted: int
    features: int
    vocab: int
    dtype: torch.dtype
    grads: tuple[str, ...]
    entropy: bool
    softcap: bool
    rank: int
    room: float  # of the budget, between the least that works and more than enough

    @property
    def impl(self) -> str:
        return self.target.split(",")[0]


def drawn(target: str, seed: int) -> Case:
    draw = random.Random(f"{target} {seed}")
    labels = draw.choice([64, 300, 1000, 2000])
    names = ["hidden", "weight", "bias"] if draw.random() < 0.7 else ["hidden"]
    rank = draw.choice([0, 0, 0, 8])
    return Case(
        target, labels, draw.choice([labels, labels * 3 // 5]), draw.choice([32, 96, 256]),
        draw.choice([500, 2003, 6000]), draw.choice([torch.float32, torch.bfloat16]),
        tuple(name for name in names if draw.random() < 0.8) + (("low_rank",) if rank else ()),
        draw.random() < 0.25, draw.random() < 0.3, rank, draw.choice([0.0, 0.1, 0.3, 0.6, 1.0, 2.0]),
    )  # fmt: skip


@dataclass
class Held:
    """Bytes beyond what is given and given back."""

    forward: int
    backward: int
    planned: int
    plan: Any


def without_products(case: Case) -> Any:
    """cuBLAS' product of half-precision operands in float32, which holds nothing, is not there on a CPU."""
    if case.impl != "triton":
        return nullcontext()
    return mock.patch("dpo_kernels.backends.triton.library_multiply", nothing)


def nothing(*_: Any) -> None:
    """A mock would remember what it is given, and so keep it."""


def held(case: Case) -> Held:
    torch.manual_seed(0)
    hidden = torch.randn(case.labels, case.features).to(case.dtype)
    weight = torch.randn(case.vocab, case.features).to(case.dtype)
    bias = torch.randn(case.vocab).to(case.dtype) if "bias" in case.grads else None
    low_rank = LowRank(torch.randn(case.rank, case.features), torch.randn(case.vocab, case.rank)) if case.rank else None
    labels = torch.randint(case.vocab, (case.labels,))
    labels[torch.randperm(case.labels)[case.counted :]] = -100
    outputs = ("entropy",) if case.entropy else ()
    grads = Grads.of(case.grads)
    softcap = 30.0 if case.softcap else None
    sizes = (case.counted, case.features, case.vocab, case.dtype)
    options: dict[str, Any] = {
        "grads": case.grads, "outputs": outputs, "softcap": softcap, "impl": case.impl, "labels": case.labels,
        "rank": case.rank,
    }  # fmt: skip
    with override(launch=nothing, **TARGETS[case.target]), without_products(case):
        least = least_budget(*sizes, **options)
        budget = least + int(case.room * (4 * case.counted * case.vocab))
        told = Options(
            transform=Transform(softcap=softcap), outputs=outputs, grads=grads, compute_dtype=case.dtype,
            memory_budget=budget, impl=case.impl,
        )  # fmt: skip
        with LiveBytes() as live:
            found = Tokens.of(labels, -100)
            call = ops._call((hidden, weight, bias, low_rank), labels, found, told)
            execution, saved = dispatch.forward(call)
            stats = [found.spread(s, labels, -100) for s in saved.stats if s is not None]
        forward = live.peak - sum(s.nbytes for s in stats)
        kept = live.live.total() - sum(s.nbytes for s in stats)
        upstream = torch.randn(case.labels)
        rows = TokenGrads(
            found.labels, saved.stats.log_probs, saved.maximum, saved.log_sum, saved.label_logit, found.take(upstream),
            saved.stats.entropy, found.take(upstream) if case.entropy else None,
        )  # fmt: skip
        made: Any = []
        with LiveBytes() as live:
            if grads:
                made = dispatch.backward(call, grads, execution, rows, saved)
        returned = sum(g.nbytes for g in made if g is not None)
    assert execution.plan is not None
    planned = execution.plan.bytes - execution.plan.memory[LIBRARIES]
    return Held(forward, kept + live.peak - returned, planned, execution.plan)


@pytest.mark.parametrize("target", TARGETS)
def test_no_call_holds_more_than_its_plan(target):
    """200 random ones of all: shapes, dtypes, ignored labels, gradients, statistics, adapters, budgets."""
    seen = set()
    for seed in range(67):
        case = drawn(target, seed)
        found = held(case)
        seen.add(found.plan.mode)
        assert max(found.forward, found.backward) <= found.planned, (
            f"seed {seed}: forward {found.forward:,}, backward {found.backward:,}, planned {found.planned:,}\n"
            f"{case}\n{found.plan}"
        )
    assert seen == {"score", "frozen", "keep", "mixed", "recompute"}
