"""What a call holds beside the plan, storage by storage, on any back end: Triton's kernels need not run for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import slow

from dpo_kernels import VocabShard, dispatch, ops
from dpo_kernels.call import Grads, LowRank, Options, TokenGrads, Tokens, Transform
from dpo_kernels.functional import least_budget
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.overrides import override
from dpo_kernels.training.memory.live_bytes import LiveBytes

LIBRARIES = "libraries and threads"  # of which no storage is part
# How a back end is asked for. The C++ kernels are not here, whose own buffers nobody sees:
# tests/conformance/test_memory.py looks at the process for them.
TARGETS: dict[str, dict[str, Any]] = {
    "torch": {},
    "torch, filtered": {},
    "triton, fused": {"arch": Arch("cuda", 9), "kernels": {"strategy": "fused"}},
    "triton, one base": {"arch": Arch("cuda", 9), "kernels": {"strategy": "fused"}, "tiles": ((256, 512), (128, 256))},
    "triton, tiles": {"arch": Arch("cuda", 9), "kernels": {"strategy": "tiles"}},
    "triton, fused, wide": {
        "arch": Arch("cuda", 9),
        "kernels": {"strategy": "fused"},
        "wide": ((300, 8192), (1200, 4096)),
    },
    "triton, fused, filtered": {"arch": Arch("cuda", 9), "kernels": {"strategy": "fused"}},
    "torch, a rank": {},
    "triton, fused, a rank": {"arch": Arch("cuda", 9), "kernels": {"strategy": "fused"}},
}


@dataclass(frozen=True)
class Case:
    target: str
    labels: int
    counted: int
    features: int
    vocab: int
    dtype: torch.dtype
    autocast: torch.dtype | None
    grads: tuple[str, ...]
    entropy: bool
    softcap: bool
    rank: int
    room: float  # of the budget, between the least that works and more than enough

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.dtype

    @property
    def impl(self) -> str:
        return self.target.split(",")[0]

    @property
    def share(self) -> float:
        return 2e-3 if "filtered" in self.target and not self.entropy else 0.0

    @property
    def ranks(self) -> int | None:
        return 1 if "a rank" in self.target else None


def drawn(target: str, seed: int) -> Case:
    draw = random.Random(f"{target} {seed}")
    labels = draw.choice([64, 300, 1000, 2000])
    names = ["hidden", "weight", "bias"] if draw.random() < 0.7 else ["hidden"]
    rank = draw.choice([0, 0, 0, 8])
    case = Case(
        target, labels, draw.choice([labels, labels * 3 // 5]), draw.choice([32, 96, 256, 1040]),
        draw.choice([300, 2003, 6000]), draw.choice([torch.float32, torch.bfloat16, torch.float16]), None,
        tuple(name for name in names if draw.random() < 0.8) + (("low_rank",) if rank else ()),
        draw.random() < 0.25, draw.random() < 0.3, rank, draw.choice([0.0, 0.1, 0.3, 0.6, 1.0, 2.0]),
    )  # fmt: skip
    if "one base" in target:  # whose exponentials products read as they are
        case = replace(
            case, dtype=torch.bfloat16, entropy=False, softcap=False, rank=0,
            grads=draw.choice([("hidden", "weight"), ("hidden", "weight"), ("weight",)]),
        )  # fmt: skip
        return replace(case, room=draw.choice([0.2, 0.5, 0.8, 2.0]))
    autocasts = draw.random() < 0.3 and case.dtype == torch.float32
    return replace(case, autocast=torch.bfloat16) if autocasts else case


class Peak(LiveBytes):
    """Knows which storages were there at the peak."""

    alive: frozenset[int] = frozenset()

    def look(self, scratch: dict[str, int] | None = None) -> None:
        before = self.peak
        super().look(scratch)
        if self.peak > before:
            self.alive = frozenset(self._storages)

    def without(self, given_back: Any) -> int:
        """The peak, less what the caller is given of what was there."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in given_back if t is not None}
        return self.peak - sum(size for key, size in storages.items() if key in self.alive)


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
    return mock.patch("dpo_kernels.backends.triton_tiles.library_multiply", nothing)


def nothing(*_: Any) -> None:
    """A mock would remember what it is given, and so keep it."""


def no_launch(_module: str, name: str, _programs: int, _warps: int, _stages: int | None, given: dict[str, Any]) -> None:
    """But for what the host reads: of some columns that they stay, of some tokens that they leave something out."""
    if name in ("forward_kernel", "known_kernel", "mark_kernel", "count_kernel"):
        from benchmarks.compiled import stand_in

        stand_in(name, given, share=float(0.3 + 0.6 * torch.rand(())))


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
        "rank": case.rank, "ranks": case.ranks, "compute_dtype": case.compute, "gradient_filter": case.share,
    }  # fmt: skip
    changes = dict(TARGETS[case.target])
    wide = {"wide_tiles": changes.pop("wide")} if "wide" in changes else {}
    wide |= {"tiles": changes.pop("tiles")} if "tiles" in changes else {}
    with override(launch=no_launch, **changes, capabilities=wide), without_products(case):
        least = least_budget(*sizes, **options)
        budget = least + int(case.room * (4 * case.counted * case.vocab))
        told = Options(
            transform=Transform(softcap=softcap), outputs=outputs, grads=grads, compute_dtype=case.compute,
            memory_budget=budget, impl=case.impl, shard=VocabShard(None, 0, case.vocab) if case.ranks else None,
            gradient_filter=case.share,
        )  # fmt: skip
        with Peak() as live:
            found = Tokens.of(labels, -100).seen_from(told.shard)
            call = ops._call((hidden, weight, bias, low_rank), labels, found, told)
            execution, saved = dispatch.forward(call)
        forward, kept = live.peak, live.live.total()
        upstream = torch.randn(case.labels)
        rows = TokenGrads(
            found.labels, saved.stats.log_probs, saved.maximum, saved.log_sum, saved.label_logit, found.take(upstream),
            saved.stats.entropy, found.take(upstream) if case.entropy else None,
        )  # fmt: skip
        made: Any = []
        with Peak() as live:
            if grads:
                made = dispatch.backward(call, grads, execution, rows, saved)
    assert execution.plan is not None
    planned = execution.plan.bytes - execution.plan.memory[LIBRARIES]
    return Held(forward, kept + live.without(made), planned, execution.plan)


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("target", "calls"),
    [(target, {"torch": 30, "torch, a rank": 22, "torch, filtered": 16}.get(target, 67)) for target in TARGETS]
    + [slow(target, 67) for target in TARGETS if target.startswith("torch")],
)
def test_no_call_holds_more_than_its_plan(target, calls):
    """Random ones, 470 of all targets: shapes, dtypes, ignored labels, gradients, statistics, adapters, budgets."""
    seen, held_scaled = set(), set()
    for seed in range(calls):
        case = drawn(target, seed)
        found = held(case)
        seen.add(found.plan.mode)
        held_scaled.add(found.plan.hold_scaled)
        assert found.plan.one_base or "one base" not in target or found.plan.mode == "recompute"
        assert max(found.forward, found.backward) <= found.planned, (
            f"seed {seed}: forward {found.forward:,}, backward {found.backward:,}, planned {found.planned:,}\n"
            f"{case}\n{found.plan}"
        )
    if "one base" in target:
        assert {"keep", "mixed"} <= seen
        assert held_scaled == {False, True}
    elif "filtered" in target:
        assert {"score", "gather" if "triton" in target else "sparse"} <= seen
    else:
        assert seen == {"score", "frozen", "keep", "mixed", "recompute"}
