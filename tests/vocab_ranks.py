"""What the ranks of a split vocabulary do in tests: the calls of one process, their differences, what they send."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from helpers import ALL, make_head
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dpo_kernels import LowRank, TokenStats, VocabShard, plan, reference, token_stats
from dpo_kernels.collectives import GREETING
from dpo_kernels.functional import least_budget
from dpo_kernels.planner import Plan
from dpo_kernels.vocab_shard import chunk

IMPLS = ("cpp", "torch")
V = 131  # of `Here`
FEW = ("log_sum_sq_probs", "mean_logits", "is_top1")
EVERY = ("entropy", *FEW)
GRADS = {"score": "", "frozen": "hidden"}  # other modes: all


@dataclass(frozen=True)
class Case:
    """One call. shape: tokens, features, vocabulary. hidden: "whole", or "split" over the ranks too.

    form: how a rank is told of its part, "shard" (a VocabShard and plain tensors) or "dtensor".
    """

    impl: str
    mode: str
    dtype: torch.dtype = torch.float32
    outputs: tuple[str, ...] = ()
    form: str = "shard"
    hidden: str = "whole"
    rank: int = 0  # of a low-rank adapter
    shape: tuple[int, int, int] = (200, 48, 1003)

    @property
    def grads(self) -> tuple[str, ...]:
        if self.mode in GRADS:
            return tuple(GRADS[self.mode].split(",")) if GRADS[self.mode] else ()
        return ("hidden", "weight", "bias") + (("low_rank",) if self.rank else ())

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        made = f"{self.impl} {self.mode} {name}" + (f" {'+'.join(self.outputs)}" if self.outputs else "")
        made += " dtensor" if self.form == "dtensor" else ""
        return made + (" hidden split" if self.hidden == "split" else "") + (" low rank" if self.rank else "")


@dataclass
class Inputs:
    """Of one case, whole, on every rank the same."""

    hidden: Tensor  # (1, N, D)
    weight: Tensor
    bias: Tensor
    labels: Tensor
    a: Tensor | None
    b: Tensor | None


def inputs_of(case: Case) -> Inputs:
    torch.manual_seed(0)
    tokens, features, vocab = case.shape
    head = make_head((1, tokens), features, vocab, case.dtype, bias=True, grads="")
    a = b = None
    if case.rank:
        a, b = (torch.randn(s).mul(0.2).to(case.dtype) for s in ((case.rank, features), (vocab, case.rank)))
    assert head.bias is not None
    return Inputs(head.hidden, head.weight, head.bias, head.labels, a, b)


def plan_of(case: Case, budget: int | None, ranks: int | None) -> Plan:
    given = inputs_of(case)
    return plan(*_sizes(case, given), memory_budget=budget, **_plan_options(case, given, ranks))


def budget_of(case: Case, ranks: int) -> int | None:
    """One that leads to the case's mode on each rank."""
    if case.mode in ("score", "frozen", "keep"):
        return None
    given = inputs_of(case)
    options = _plan_options(case, given, ranks)
    least = least_budget(*_sizes(case, given), **options)
    if case.mode == "recompute":
        return least
    most = plan(*_sizes(case, given), memory_budget=2**40, **options).bytes
    made = [plan(*_sizes(case, given), memory_budget=least + (most - least) * i // 60, **options) for i in range(61)]
    fit = [p.bytes for p in made if p.mode == case.mode]
    assert fit, f"no budget leads to {case}"
    return fit[len(fit) // 2]


def _sizes(case: Case, given: Inputs) -> tuple[Any, ...]:
    return int((given.labels != -100).sum()), case.shape[1], case.shape[2], case.dtype


def _plan_options(case: Case, given: Inputs, ranks: int | None) -> dict[str, Any]:
    return {
        "grads": case.grads, "outputs": case.outputs, "softcap": ALL["softcap"], "impl": case.impl,
        "labels": given.labels.numel(), "rank": case.rank, "ranks": ranks,
        "hidden_split": case.hidden == "split" and ranks is not None,
    }  # fmt: skip


def call(
    case: Case, given: Inputs, part: slice, shard: VocabShard | None, budget: int | None
) -> tuple[TokenStats, dict[str, Tensor]]:
    """Statistics, and gradients of `part` of the vocabulary and of all hidden states, or a rank's piece of them."""
    given = replace(given)
    split = case.hidden == "split" and (shard is not None or case.form == "dtensor")
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if split else (1, 0)
    piece = chunk(given.hidden.shape[1], ranks, rank)
    leaves = {"hidden": given.hidden[:, piece], "weight": given.weight[part], "bias": given.bias[part]}
    if given.a is not None and given.b is not None:
        leaves |= {"low_rank.a": given.a, "low_rank.b": given.b[part]}
    leaves = {
        name: t.detach().clone().requires_grad_(name.partition(".")[0] in case.grads) for name, t in leaves.items()
    }
    used: dict[str, Any] = dict(leaves)
    if case.form == "dtensor" and shard is not None:
        used, shard = _as_dtensors(leaves, given), None
    low_rank = LowRank(used["low_rank.a"], used["low_rank.b"], 0.5) if case.rank else None
    stats = token_stats(
        used["hidden"], used["weight"], given.labels, used["bias"], outputs=case.outputs, low_rank=low_rank,
        impl=case.impl, memory_budget=budget, shard=shard, **ALL,
    )  # fmt: skip
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    if not wanted:
        return stats, {}
    torch.manual_seed(7)
    loss = (stats.log_probs * torch.randn(stats.log_probs.shape)).sum()
    if stats.entropy is not None:
        loss = loss + (stats.entropy * torch.randn(stats.log_probs.shape)).sum()
    return stats, dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def _as_dtensors(leaves: dict[str, Tensor], given: Inputs) -> dict[str, Any]:
    """From local leaves, so that gradients come back to them."""
    mesh = mesh_of_all()
    made: dict[str, Any] = {}
    for name, local in leaves.items():
        whole = {"hidden": given.hidden, "weight": given.weight, "bias": given.bias, "low_rank.b": given.b}.get(name)
        placement: Any = Shard(0)
        if name == "hidden":
            placement = Shard(1) if local.shape != given.hidden.shape else Replicate()
        if whole is None:
            placement, whole = Replicate(), local
        made[name] = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )
    return made


@functools.cache
def mesh_of_all() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@dataclass
class Differences:
    """Of this rank from one process: of log-probs and statistics absolute, of gradients relative to the largest."""

    values: dict[str, float]
    same_bits: bool

    def worst(self, kind: str) -> float:
        return max((v for name, v in self.values.items() if kind_of(name) == kind), default=0.0)


def kind_of(name: str) -> str:
    if name == "log_probs":
        return name
    return "statistics" if name in EVERY else f"d {name}"


def compare(case: Case) -> Differences:
    """The case on these ranks, and in one process."""
    given, ranks = inputs_of(case), dist.get_world_size()
    budget = budget_of(case, ranks)
    vocab = case.shape[2]
    part = chunk(vocab, ranks, dist.get_rank())
    shard = VocabShard(None, part.start, vocab, 1 if case.hidden == "split" else None)
    mode = plan_of(case, budget, ranks).mode
    assert mode == ("recompute" if case.mode == "mixed" and "entropy" in case.outputs else case.mode), (case, mode)
    stats, grads = call(case, given, part, shard, budget)
    alone, exact = call(replace(case, form="shard"), given, slice(0, vocab), None, None)
    values = {}
    for name, got, one in zip(TokenStats._fields, stats, alone, strict=True):
        if one is not None:
            assert type(got) is Tensor, f"{name} is {type(got)}"
            values[name] = (got.double() - one.double()).abs().max().item()
    piece = chunk(given.hidden.shape[1], ranks, dist.get_rank()) if case.hidden == "split" else slice(None)
    for name, whole in exact.items():
        own = whole[:, piece] if name == "hidden" else whole if name == "low_rank.a" else whole[part]
        assert grads[name].shape == own.shape
        error = (grads[name].double() - own.double()).abs().max().item() if own.numel() else 0.0
        values[name] = error / max(whole.double().abs().max().item(), 1e-30)
    return Differences(values, all(same_on_ranks(t) for t in stats if t is not None))


def same_on_ranks(tensor: Tensor) -> bool:
    """To the last bit, NaN included."""
    own = tensor.detach().contiguous().view(-1).view(torch.uint8)
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    return all(torch.equal(own, other) for other in others)


@contextmanager
def counted(sizes: dict[str, int]) -> Iterator[None]:
    """Counts the bytes that collectives are given, or make, whichever is more, by kind; DTensors' own too.

    The first message of a call is left out, which the plan does not tell: GPUs do not send it.
    """
    kept: list[tuple[Any, str, Any]] = []

    def wrapped(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*tensors: Any, **options: Any) -> Any:
            made = function(*tensors, **options)
            largest = max(t.nbytes for t in (*tensors, made) if isinstance(t, Tensor))
            if kind != "all_reduce" or tensors[0].shape != (GREETING,) or tensors[0].dtype != torch.int64:
                sizes[kind] = sizes.get(kind, 0) + largest
            return made

        return counting

    for kind, names in (
        ("all_reduce", ("all_reduce",)),
        ("all_gather", ("all_gather_single", "all_gather_into_tensor", "all_gather_tensor")),
        ("reduce_scatter", ("reduce_scatter_single", "reduce_scatter_tensor")),
    ):
        for module, name in itertools.product((dist, functional), names):
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, wrapped(kind, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def on_a_ring(sizes: dict[str, int], ranks: int) -> float:
    """Bytes that a rank sends."""
    turns = {"all_reduce": 2}
    return sum(turns.get(kind, 1) * (ranks - 1) / ranks * size for kind, size in sizes.items())


def as_rank(rank: int, ranks: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One of some processes: joins the others, runs, and ends at once (gloo's threads may abort an ordinary end)."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # poisons fresh memory
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=120))  # fmt: skip
    function(*arguments)
    dist.barrier()
    os._exit(0)


def shard_weight(weight: Tensor) -> Any:
    return distribute_tensor(weight, mesh_of_all(), [Shard(0)])


def near(got: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == exact.shape, f"{tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(got.isnan(), exact.isnan()), "NaN elsewhere"
    error = (got.double() - exact.double()).nan_to_num().abs().max().item() if got.numel() else 0.0
    assert error <= tolerance, f"error {error:.1e}"


def raises(kind: type[Exception], text: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        function(*args, **options)


class Here:
    """A head in one piece, and this rank's part of it."""

    def __init__(
        self, tokens: int = 21, features: int = 12, cut: int | None = None, dtype: torch.dtype = torch.float32
    ):
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, features)
        self.weight, self.bias = torch.randn(V, features), torch.randn(V)
        self.labels = torch.randint(V, (tokens,))
        cut = -(-V // 2) if cut is None else cut
        self.part = (slice(0, cut), slice(cut, V))[dist.get_rank()]
        self.shard = VocabShard(None, self.part.start, V)

    def local(self, **options: Any) -> Any:
        options = {"outputs": FEW, "shard": self.shard} | options
        return token_stats(self.hidden, self.weight[self.part], self.labels, self.bias[self.part], **options)

    def exact(self, **options: Any) -> Any:
        return reference.token_stats(
            self.hidden.double(), self.weight.double(), self.labels, self.bias.double(), **({"outputs": FEW} | options)
        )

    def check(self, tolerance: float = 1e-5, **options: Any) -> None:
        for impl in IMPLS:
            got, exact = self.local(impl=impl, **options), self.exact(**options)
            for value, truth in zip(got, exact, strict=True):
                if truth is not None:
                    near(value.double(), truth.double(), tolerance)
                    assert same_on_ranks(value)
