"""Random calls of the public functions: how one is drawn from its number, made and run (see fuzz.py)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dpo_kernels
from dpo_kernels import (
    FusedLinearDPOLoss,
    LowRank,
    gathering,
    hidden_to_log_probs,
    logits_to_log_probs,
    sparse,
    token_stats,
)
from dpo_kernels.workload import aligned

EPS = torch.finfo(torch.float32).eps
LARGEST = torch.finfo(torch.float32).max
LAYOUTS = ("contiguous", "strided", "transposed", "offset", "expanded")
SPECIALS = ("none", "banned", "banned label", "far", "lowest label", "nan row", "inf row", "huge row")
HOOKS = ("none", "strided", "moved")


@dataclass(frozen=True)
class CallSpec:
    """One call; everything random in it follows from `seed`."""

    seed: int = 0
    level: str = "hidden"  # "hidden", "stats", "logits" or "losses"
    shape: tuple[int, ...] = (3,)
    features: int = 4
    vocab: int = 5
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # of hidden states or logits
    weight_layout: str = "contiguous"
    bias: str = "none"  # or a layout
    special: str = "none"
    magnitude: float = 1.0  # about the largest logit
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignored: float = 0.0
    ignore_index: int | None = -100
    outputs: tuple[str, ...] = ()
    grads: tuple[str, ...] = ("hidden", "weight")
    budget: float | None = None  # None: the default; else from 0, the least that works, to 1, all that is of use
    upstream: str = "random"  # or "expanded", "strided", "zero"
    autocast: bool = False
    hooks: str = "none"
    inplace: bool = False
    compiled: bool = False
    beta: float = 0.1  # of a loss, as `aggregate`
    aggregate: str = "sum"
    label_dtype: torch.dtype = torch.int64
    threads: int = 1
    crowded: bool = False  # which threads the C++ kernels take
    rank: int = 0  # of a low-rank adapter of the weight
    adapter_dtype: torch.dtype = torch.float32
    counted: bool = False  # the caller says how many labels count
    filter: float | None = None
    trend: bool = False  # the first entries of the vocabulary are the likely ones

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "logit_scale": self.logit_scale, "softcap": self.softcap}


def draw(number: int, sizes: tuple[int, int, int]) -> CallSpec:
    """The call of this number; sizes: the most tokens, features and vocabulary."""
    r = random.Random(number)

    def size(most: int) -> int:
        return max(1, round(most ** r.random()) if r.random() < 0.7 else r.randint(1, most))

    tokens = size(sizes[0])
    shape = r.choice([(tokens,), (tokens,), (1, tokens), (2, max(1, tokens // 2))])
    level = r.choice(["hidden", "hidden", "stats", "logits", "losses"])
    if level == "losses":
        shape = (2 * r.randint(1, 3), max(1, tokens // 4))
    if r.random() < 0.01:
        shape = (*shape[:-1], 0)
    inputs = ("hidden", "weight", "bias", "low_rank")
    chosen = r.choice([(), ("hidden",), ("hidden", "weight"), tuple(n for n in inputs if r.random() < 0.5)])
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    features = size(sizes[1])
    made = CallSpec(
        seed=number,
        level=level,
        shape=shape,
        features=features if r.random() < 0.5 else aligned(features),  # "triton" has kernels for multiples of 16
        vocab=size(sizes[2]),
        dtype=dtype,
        layout=r.choice(LAYOUTS[:4] if r.random() < 0.5 else LAYOUTS[:1]),
        weight_layout=r.choice(LAYOUTS[:4] if r.random() < 0.3 else LAYOUTS[:1]),
        bias=r.choice(["none", "none", "contiguous", "strided", "expanded"]),
        special=r.choice(SPECIALS) if r.random() < 0.3 and level != "losses" else "none",
        magnitude=r.choice([0.1, 1.0, 10.0, 10.0, 60.0, 1e3, 1e5, 1e7][: 4 if level == "losses" else 8]),
        temperature=r.choice([1.0, 1.0, 0.5, 2.0, 1e-2, 1e2, 1e-6, 1e6]),
        logit_scale=r.choice([1.0, 1.0, 0.25, -1.0, 0.0, 3.0]),
        softcap=r.choice([None, None, None, 30.0, 1.0, 0.01, 1e4]),
        ignored=r.choice([0.0, 0.0, 0.3, 0.9, 1.0]),
        ignore_index=r.choice([-100, -100, -1, 0] + [None] * (level != "losses")),
        outputs=tuple(n for n in names if r.random() < 0.5) if level == "stats" else (),
        grads=chosen,
        budget=r.choice([None, None, 0.0, r.random(), 1.0]),
        upstream=r.choice(["random", "random", "expanded", "strided", "zero"]),
        autocast=level != "logits" and r.random() < 0.1,
        hooks=r.choice(HOOKS) if r.random() < 0.2 else "none",
        inplace=level == "logits" and r.random() < 0.4,
        compiled=r.random() < 0.01,
        beta=r.choice([0.1, 0.1, 0.01, 2.0, 0.0]),
        aggregate=r.choice(["sum", "sum", "mean"]),
        label_dtype=r.choice([torch.int64, torch.int64, torch.int32, torch.int16]),
        threads=r.choice([1, 1, 2, 3, 8]),
        crowded=r.random() < 0.5,
        rank=size(20) if level in ("hidden", "stats") and r.random() < 0.25 else 0,
        adapter_dtype=r.choice([torch.float32, dtype]),
        counted=r.random() < 0.2,
    )
    if level != "logits" and r.random() < 0.15:  # "triton" may keep exponentials that products read as they are
        return replace(
            made, dtype=torch.bfloat16, features=aligned(features), softcap=None, rank=0, autocast=False,
            outputs=tuple(n for n in made.outputs if n != "entropy"), vocab=r.choice([made.vocab, sizes[2]]),
            grads=r.choice([("hidden", "weight"), ("weight",)]), budget=r.choice([None, 1.0, r.random()]),
            adapter_dtype=torch.float32,
        )  # fmt: skip
    if level == "logits" or r.random() < 0.6:
        return made
    # An entropy's gradient does not go with it; what tells that it does its work is a softmax that has a tail.
    outputs = tuple(n for n in made.outputs if n != "entropy")
    outputs = (*outputs, "dropped_mass") if level == "stats" else outputs
    share = r.choice([0.0, 0.3, 2**-4, 2**-7, 2**-12, 2**-12, 2**-20])
    features = r.choice([made.features, aligned(made.features)])  # "triton" has a filter for multiples of 16 alone
    magnitude = r.choice([made.magnitude, 10.0, 30.0])
    vocab = r.choice([made.vocab, sizes[2] // r.randint(1, 3)])
    return replace(
        made, outputs=outputs, filter=share, features=features, magnitude=magnitude, vocab=vocab,
        trend=r.random() < 0.7, grads=made.grads or ("hidden", "weight"),
        budget=r.choice([made.budget, None, r.random(), r.random()]),
    )  # fmt: skip


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory."""
    if layout == "strided":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), torch.nan, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        flat = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(values.shape)
    if layout == "expanded":
        return values.reshape(-1)[:1].expand(values.shape)
    return values.contiguous()


@dataclass
class Inputs:
    rows: Tensor  # hidden states (..., D) or logits (..., V)
    weight: Tensor | None
    bias: Tensor | None
    labels: Tensor
    upstream: dict[str, Tensor]
    ref_log_probs: Tensor  # of the labels' shape, for a loss
    low_rank: LowRank | None


def make_inputs(spec: CallSpec) -> Inputs:
    g = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(spec.vocab, spec.shape, generator=g)
    if spec.ignore_index is not None:
        # A stand-in that may be a token too: then it counts nowhere.
        labels[torch.rand(spec.shape, generator=g) < spec.ignored] = spec.ignore_index
    scale = spec.magnitude * abs(spec.temperature / (spec.logit_scale or 1.0)) / 3
    scale = min(scale, 3e3 if spec.dtype == torch.float16 else 1e30)
    weight = bias = None
    if spec.level == "logits":
        rows = randn(*spec.shape, spec.vocab) * scale
    else:
        rows = randn(*spec.shape, spec.features) * scale**0.5
        weight = randn(spec.vocab, spec.features) * scale**0.5 / spec.features**0.5
        if spec.trend:
            rows[..., 0] = scale**0.5
            weight[:, 0] = scale**0.5 * torch.linspace(3, -3, spec.vocab)
        weight = lay_out(weight.to(spec.dtype), spec.weight_layout)
        if spec.bias != "none":
            bias = (randn(spec.vocab) * scale / 3).to(spec.dtype)
    flat = rows.view(-1, rows.shape[-1])
    first_label = int(labels.view(-1)[0].clamp(0, spec.vocab - 1)) if labels.numel() else 0
    special = spec.special if labels.numel() else "none"
    if special == "nan row":
        flat[0] = torch.nan
    elif special == "inf row":
        flat[0, 0] = torch.inf
    elif special == "huge row":
        flat[0] *= 1e4
    elif special == "banned" and spec.level == "logits":
        flat[torch.rand(flat.shape, generator=g) < 0.3] = -torch.inf
    elif special == "far":
        flat[0] += 1e5 if spec.dtype == torch.float32 else 0.0
    elif special == "lowest label" and spec.level == "logits" and spec.dtype == torch.float32:
        flat[0, first_label] = -LARGEST
    elif special == "banned label" and spec.level == "logits":
        flat[0, first_label] = -torch.inf
    if bias is not None:
        if special == "banned":
            bias[torch.rand(spec.vocab, generator=g) < 0.3] = -torch.inf
        elif special == "banned label":
            bias[first_label] = -torch.inf
        bias = lay_out(bias, spec.bias)
    upstream = {}
    for name in ("log_probs", "entropy"):
        values = torch.randn(spec.shape, generator=g)
        if spec.upstream == "zero":
            values = torch.zeros(spec.shape)
        elif spec.upstream in ("expanded", "strided"):
            values = lay_out(values, spec.upstream)
        upstream[name] = values
    ref_log_probs = -torch.rand(spec.shape, generator=g) * 5
    low_rank = None
    if spec.rank:
        a = randn(spec.rank, spec.features) / spec.features**0.5
        b = randn(spec.vocab, spec.rank) * min(scale, 1e3) ** 0.5 / spec.rank**0.5
        a, b = (lay_out(t.to(spec.adapter_dtype), spec.weight_layout) for t in (a, b))
        low_rank = LowRank(a, b, 0.5)
    rows, labels = lay_out(rows.to(spec.dtype), spec.layout), labels.to(spec.label_dtype)
    return Inputs(rows, weight, bias, labels, upstream, ref_log_probs, low_rank)


@dataclass
class Result:
    """kept: (..., V), what a filter left in the gradients; None where it left all."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    kept: Tensor | None = None


def wanted(spec: CallSpec, inputs: Inputs) -> tuple[str, ...]:
    if spec.level == "logits":
        return ("hidden",) if spec.grads else ()
    absent = {"bias": inputs.bias is None, "low_rank": inputs.low_rank is None}
    return tuple(n for n in spec.grads if not absent.get(n, False))


def leaf_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the tensors that want a gradient."""
    return tuple(leaf for n in names for leaf in (("low_rank_a", "low_rank_b") if n == "low_rank" else (n,)))


def usable(spec: CallSpec, impl: str) -> float | None:
    """The filter; None where the implementation has none for such features."""
    return None if impl == "triton" and spec.features % 16 else spec.filter


def budget_of(spec: CallSpec, inputs: Inputs, impl: str) -> int | None:
    if spec.budget is None or spec.level == "logits":
        return None
    assert inputs.weight is not None
    counted = inputs.labels.numel() if spec.ignore_index is None else int((inputs.labels != spec.ignore_index).sum())

    def of(budget: int) -> dpo_kernels.Plan:
        return dpo_kernels.plan(
            counted, spec.features, spec.vocab, spec.dtype, grads=wanted(spec, inputs), outputs=spec.outputs,
            softcap=spec.softcap, compute_dtype=torch.bfloat16 if spec.autocast else None, memory_budget=budget,
            impl=impl, labels=inputs.labels.numel(), rank=spec.rank, gradient_filter=usable(spec, impl),
        )  # fmt: skip

    planned = of(2**50)
    most, share = planned.bytes, spec.budget
    try:
        of(1)
        least = 1
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(" ")[0].replace(",", ""))
    if planned.marks and share < 0.8:  # from room for marks alone on: forward marks what it multiplies
        least, share = most - planned.memory["kept probabilities"], max(0.0, (share - 0.2) / 0.6)
    return max(least, round(least + share * (most - least)))


@contextlib.contextmanager
def hooked(kind: str) -> Iterator[None]:
    def unpack(saved: Tensor) -> Tensor:
        if kind == "moved" or saved.ndim == 0:
            return saved.clone(memory_format=torch.contiguous_format)
        wide = saved.new_empty((*saved.shape, 2))
        return wide[..., 0].copy_(saved)

    if kind == "none":
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            yield


@contextlib.contextmanager
def threads_of(spec: CallSpec, impl: str) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    crowded = spec.crowded and impl == "cpp" and hasattr(torch.ops.dpo_kernels_cpp, "set_crowded")
    if crowded:
        torch.ops.dpo_kernels_cpp.set_crowded(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if crowded:
            torch.ops.dpo_kernels_cpp.set_crowded(False)


def run(spec: CallSpec, inputs: Inputs, impl: str) -> Result:
    leaves = {"hidden": inputs.rows, "weight": inputs.weight, "bias": inputs.bias}
    if inputs.low_rank is not None:
        leaves |= {"low_rank_a": inputs.low_rank.a, "low_rank_b": inputs.low_rank.b}
    names = leaf_names(wanted(spec, inputs))
    leaves = {k: None if t is None else t.detach().requires_grad_(k in names) for k, t in leaves.items()}
    function = call_of(spec, inputs, impl)
    arguments = tuple(leaves.values())
    cast = torch.autocast("cpu", torch.bfloat16) if spec.autocast else contextlib.nullcontext()
    with hooked(spec.hooks), cast, threads_of(spec, impl), watched() as filters:
        if spec.compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
            function(1.5 * spec.temperature, *arguments)  # another number first: it must not stay
        values = function(spec.temperature, *arguments)
        grads = gradients(values, inputs, [leaves[n] for n in names], names)
    return Result(values, grads, kept_by(filters[-1], spec, inputs) if filters else None)


@contextlib.contextmanager
def watched() -> Iterator[list[Any]]:
    """What backward read of filters, in order."""
    found: list[Any] = []
    with contextlib.ExitStack() as stack:
        for module, name in ((sparse, "Pieces"), (gathering, "Gathered")):
            own = getattr(module, name)

            def made(*given: Any, own: Any = own) -> Any:
                found.append(own(*given))
                return found[-1]

            stack.enter_context(mock.patch.object(module, name, made))
        yield found


def kept_by(found: Any, spec: CallSpec, inputs: Inputs) -> Tensor:
    """(..., V): which entries are in the gradients, but for labels, which always are."""
    plan, labels = found.plan, inputs.labels.reshape(-1)
    kept = torch.ones(plan.tokens, spec.vocab, dtype=torch.bool)
    if plan.marks:
        kept &= found.flags.bool().repeat_interleave(plan.group, 0)[: plan.tokens, : spec.vocab]
    else:
        for columns in plan.forward_spans:
            for rows in plan.token_spans:
                kind, _, _, counts, begin = found.at[rows.start, columns.start]
                if kind != sparse.SPARSE:
                    continue
                kept[rows, columns] = False
                for i, some in enumerate(found.columns[begin : begin + sum(counts)].split(counts)):
                    group = slice(rows.start + i * sparse.GROUP, min(rows.start + (i + 1) * sparse.GROUP, rows.stop))
                    kept[group, columns.start + some] = True
    every = torch.ones(labels.numel(), spec.vocab, dtype=torch.bool)
    counts_at = (
        torch.arange(len(labels)) if spec.ignore_index is None else (labels != spec.ignore_index).nonzero()[:, 0]
    )
    every[counts_at] = kept
    return every.view(*inputs.labels.shape, spec.vocab)


def call_of(spec: CallSpec, inputs: Inputs, impl: str) -> Callable[..., dict[str, Tensor]]:
    """From temperature, hidden states (or logits), weight, bias and an adapter's matrices to its results by name."""
    labels = inputs.labels
    options: dict[str, Any] = {**spec.options, "ignore_index": spec.ignore_index, "impl": impl}
    del options["temperature"]
    every = labels.numel()
    known = every if spec.ignore_index is None else every - int((labels == spec.ignore_index).sum())
    if spec.counted and spec.level != "losses":
        options["tokens"] = known
    if spec.level == "logits":
        options["inplace_backward"] = spec.inplace

        def from_logits(temperature: float, rows: Tensor, *_: Any) -> dict[str, Tensor]:
            given = rows * 1 if spec.inplace and rows.requires_grad else rows
            return {"log_probs": logits_to_log_probs(given, labels, temperature=temperature, **options)}

        return from_logits
    options["memory_budget"] = budget_of(spec, inputs, impl)
    options["gradient_filter"] = usable(spec, impl)
    if spec.level == "losses":
        loss = FusedLinearDPOLoss(spec.beta, spec.aggregate, temperature=spec.temperature, **options)

        def to_loss(_: float, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
            return {"loss": loss(hidden, weight, labels, bias=bias, ref_log_probs=inputs.ref_log_probs).loss}

        return to_loss

    def from_hidden(
        temperature: float, hidden: Tensor, weight: Tensor, bias: Tensor | None, *matrices: Tensor
    ) -> dict[str, Tensor]:
        given = (hidden, weight, labels, bias)
        options["low_rank"] = LowRank(*matrices, inputs.low_rank.scale) if inputs.low_rank is not None else None
        if spec.level == "hidden":
            return {"log_probs": hidden_to_log_probs(*given, temperature=temperature, **options)}
        made = token_stats(*given, outputs=spec.outputs, temperature=temperature, **options)
        return {name: value for name, value in made._asdict().items() if value is not None}

    return from_hidden


def gradients(
    values: dict[str, Tensor], inputs: Inputs, leaves: list[Any], names: tuple[str, ...]
) -> dict[str, Tensor]:
    outs = [n for n in ("loss", "log_probs", "entropy") if n in values and values[n].requires_grad]
    if not leaves or not outs:
        return {}
    upstream = [torch.ones_like(values[n]) if n == "loss" else inputs.upstream[n].to(values[n].dtype) for n in outs]
    found = torch.autograd.grad([values[n] for n in outs], leaves, upstream)
    return dict(zip(names, found, strict=True))
