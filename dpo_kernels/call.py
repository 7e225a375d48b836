"""What one call computes: its tensors, its options, and the tokens whose label counts.

Options travel through the package as one frozen object, never as loose flags. An operator of torch.library takes
tensors, numbers and strings only: `Options.encode` and `Options.decode` are the two sides of that door.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.layout import rows_of
from dpo_kernels.vocab_shard import VocabShard

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NOWHERE = -1  # a label that is no token: its row becomes NaN, and so does every gradient that it is in
# What may want a gradient, in the order of `Grads`.
INPUTS = ("hidden", "weight", "bias", "low_rank")


@dataclass(frozen=True)
class Transform:
    """z = cap(logit_scale * a) / temperature of a product a = h W^T + b; cap(u) = softcap * tanh(u / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def slope(self) -> float:
        """dz/da without the cap's own derivative, which is 1 - (z * temperature / softcap)^2."""
        return self.logit_scale / self.temperature

    def logits(self, product: Tensor) -> Tensor:
        """z from a, in place."""
        if self.softcap is None:
            return product.mul_(self.slope) if self.slope != 1 else product
        product.mul_(self.logit_scale / self.softcap).tanh_()
        return product.mul_(self.softcap / self.temperature)

    def cap_derivative(self, z: Tensor) -> Tensor | None:
        """1 - tanh^2(u / softcap) from z, a new tensor; None without a cap."""
        if self.softcap is None:
            return None
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1)


class LowRank(NamedTuple):
    """What a low-rank adapter (LoRA, arXiv:2106.09685) adds to a head's weight: W + scale * b a, which is never held.

    a: (r, D). b: (V, r). Both of any floating dtype that the hidden states are not too narrow for: float64 goes with
    float64 alone. scale: alpha / r, or whatever the adapter has.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Grads:
    """Which inputs want a gradient; low_rank: either of its matrices."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low_rank: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias or self.low_rank

    @staticmethod
    def of(names: Sequence[str]) -> Grads:
        return Grads(*(name in names for name in INPUTS))

    def as_list(self) -> list[bool]:
        """As an argument of an operator; `Grads(*these)` is the way back."""
        return [self.hidden, self.weight, self.bias, self.low_rank]


@dataclass(frozen=True)
class Options:
    """Everything that a call is told beside its tensors. All of it was checked (`dpo_kernels.checks`).

    ignore_index: None where every label counts.
    tokens: how many labels count, as the caller says; None: it is counted.
    compute_dtype: what the operands of every product are rounded to (autocast's dtype, else the inputs' own);
        products, statistics and sums are float32, or float64 for float64.
    shard: the part of the vocabulary that this rank holds; None: it holds all of it.
    gradient_filter: the probability from which on entries are in the gradients in any case.
    """

    ignore_index: int | None = -100
    # Factories: torch.compile of 2.10 cannot wrap a default that is an object.
    transform: Transform = field(default_factory=Transform)
    outputs: tuple[str, ...] = ()
    grads: Grads = field(default_factory=Grads)
    compute_dtype: torch.dtype = torch.float32
    memory_budget: int | None = None
    tokens: int | None = None
    impl: str | None = None
    inplace_backward: bool = False
    shard: VocabShard | None = None
    gradient_filter: float = 0.0

    def encode(self) -> tuple[list[float], list[int], list[bool], str]:
        """As the last four arguments of an operator. Numbers stay numbers: torch.compile can keep them symbolic."""
        t = self.transform
        numbers = [self.gradient_filter, t.temperature, t.logit_scale] + ([] if t.softcap is None else [t.softcap])
        # Always both, with a stand-in for None: autograd of torch.library takes an empty list for a list of tensors.
        limits = {"ignore_index": self.ignore_index, "memory_budget": self.memory_budget, "tokens": self.tokens}
        given = [name for name, value in limits.items() if value is not None]
        flags = "inplace_backward" if self.inplace_backward else ""
        values = [0 if value is None else value for value in limits.values()]
        where, group = ([], "") if self.shard is None else self.shard.encode()
        parts = (
            ",".join(self.outputs), DTYPE_NAMES[self.compute_dtype], self.impl or "", flags, ",".join(given), group,
        )  # fmt: skip
        return numbers, values + where, self.grads.as_list(), ";".join(parts)

    @staticmethod
    def decode(numbers: Sequence[float], limits: Sequence[int], wants_grad: Sequence[bool], spec: str) -> Options:
        known, given, group = _decode(spec)
        gradient_filter, *of_transform = numbers
        ignore_index, memory_budget, tokens, *where = limits
        return replace(
            known, transform=Transform(*of_transform), gradient_filter=gradient_filter, grads=Grads(*wants_grad),
            ignore_index=ignore_index if "ignore_index" in given else None,
            memory_budget=memory_budget if "memory_budget" in given else None,
            tokens=tokens if "tokens" in given else None,
            shard=VocabShard.decode(where, group) if where else None,
        )  # fmt: skip


@functools.cache
def _decode(spec: str) -> tuple[Options, tuple[str, ...], str]:
    *lists, group = spec.split(";", 5)  # torch may put anything into a group's name
    outputs, compute_dtype, impl, flags, given = (part.split(",") if part else [] for part in lists)
    options = Options(
        outputs=tuple(outputs), compute_dtype=DTYPES[compute_dtype[0]], impl=impl[0] if impl else None,
        inplace_backward=bool(flags),
    )  # fmt: skip
    return options, tuple(given), group


@dataclass(frozen=True)
class Tokens:
    """The M tokens whose label counts, of labels of any shape.

    labels: (M,) int64; where the vocabulary is split over ranks, relative to the first row that is here, and out of
        range where the label is elsewhere. index: (M,) their flat positions; None where all count.
    masked: sizes may not depend on data (a CUDA graph is captured). All tokens take part, ignored ones with a stand-in
        label, and their results and gradients are set to 0.
    wrong: () bool, on the device: a caller has said another number of them; None where none has.
    """

    labels: Tensor
    index: Tensor | None
    masked: bool = False
    wrong: Tensor | None = None

    @staticmethod
    def of(labels: Tensor, ignore_index: int | None, count: int | None = None) -> Tokens:
        """Finds them. On a GPU this is the one point of a call at which the host waits for the device; it does not
        where `ignore_index` is None, or it is told how many they are, and that is not 0."""
        if ignore_index is None:
            return Tokens(in_one_dimension(labels).long().contiguous(), None)
        if count:  # where none counts, none could show that it is not so
            return Tokens._as_many(flat_labels(labels), ignore_index, count)
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return Tokens.all_masked(labels, ignore_index)
        flat = flat_labels(labels)
        index = (flat != ignore_index).nonzero().squeeze(1)
        return Tokens.found(flat, None if len(index) == len(flat) else index)

    @staticmethod
    def _as_many(labels: Tensor, ignore_index: int, count: int) -> Tokens:
        """`count` of labels in one dimension. Where another number counts, the device knows: no label is in range."""
        counts = labels != ignore_index
        index = None if count == len(labels) else torch.nonzero_static(counts, size=count, fill_value=0).squeeze(1)
        found = labels if index is None else labels.index_select(0, index)
        wrong = counts.count_nonzero() != count
        return Tokens(found.long().masked_fill(wrong, NOWHERE), index, wrong=wrong)

    @staticmethod
    def all_masked(labels: Tensor, ignore_index: int | None) -> Tokens:
        return Tokens(labels.masked_fill(ignored(labels, ignore_index), 0).reshape(-1).long(), None, masked=True)

    @staticmethod
    def found(labels: Tensor, index: Tensor | None) -> Tokens:
        """Those at `index`, which `of` found before."""
        flat = in_one_dimension(labels)
        index = None if index is None else index.contiguous()  # a hook on saved tensors may have strided it
        return Tokens((flat if index is None else flat.index_select(0, index)).long().contiguous(), index)

    def seen_from(self, shard: VocabShard | None) -> Tokens:
        """The same, their labels relative to a rank's first row."""
        return self if shard is None else replace(self, labels=self.labels - shard.first_row)

    @property
    def count(self) -> int:
        return len(self.labels)

    def take(self, values: Tensor) -> Tensor:
        """Values of the labels' shape -> (M,)."""
        flat = values.reshape(-1)
        return flat.contiguous() if self.index is None else flat.index_select(0, self.index)

    def spread(self, values: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
        """Values (M,) -> the labels' shape, 0 elsewhere; NaN there too where a caller was wrong."""
        # No view of anything: FSDP hangs hooks on what a module returns.
        if self.index is not None:
            out = values.new_zeros(labels.shape)
            if self.wrong is not None and out.is_floating_point():
                out.masked_fill_(self.wrong, float("nan"))
            out.view(-1).index_copy_(0, self.index, values)
        else:
            out = values.view(labels.shape).clone()
            if self.masked:
                out.masked_fill_(ignored(labels, ignore_index), 0)
        return out


@dataclass(frozen=True)
class Call:
    """One checked call. hidden (..., D), weight (V, D), bias (V,) or None; any strides. low_rank: its scale is 1.

    Where the vocabulary is split over ranks, V is of this rank, and hidden is whole.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank: LowRank | None
    tokens: Tokens
    label_count: int  # with those that are ignored
    options: Options

    @property
    def transform(self) -> Transform:
        return self.options.transform

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is computed of logits."""
        return tuple(name for name in self.options.outputs if name != "dropped_mass")

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.options.compute_dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.hidden.dtype)

    @property
    def shard(self) -> VocabShard | None:
        return self.options.shard

    @property
    def vocab_size(self) -> int:
        """Rows of the weight that are here."""
        return self.weight.shape[0]

    @property
    def rank(self) -> int:
        return 0 if self.low_rank is None else len(self.low_rank.a)


class TokenGrads(NamedTuple):
    """What backward knows of each token that counts, (M,) each: the incoming gradients and the forward's results."""

    labels: Tensor
    log_probs: Tensor
    maximum: Tensor
    log_sum: Tensor
    label_logit: Tensor
    grad_log_probs: Tensor
    entropy: Tensor | None = None
    grad_entropy: Tensor | None = None

    def rows(self, rows: slice) -> TokenGrads:
        return TokenGrads(*(None if t is None else rows_of(t, rows) for t in self))  # type: ignore[arg-type]


def ignored(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Which labels do not count; of the labels' shape."""
    return torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index


def flat_labels(labels: Tensor) -> Tensor:
    """Labels in one dimension, of a dtype in which any vocabulary and ignore_index can be compared with them."""
    flat = in_one_dimension(labels)
    return flat.to(torch.int32) if labels.dtype in (torch.uint8, torch.int8, torch.int16) else flat


def in_one_dimension(values: Tensor) -> Tensor:
    """The tensor itself where it has one already: a view costs the host a microsecond."""
    return values if values.dim() == 1 else values.reshape(-1)


def whole(name: str, value: object, least: int) -> int:
    """A whole number as Python's int, from any kind of integer.

    Raises:
        TypeError: it is no whole number, such as a float or a bool.
        ValueError: it is less than `least`.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a whole number")
    if number < least:
        raise ValueError(f"{name} {number} must be >= {least}")
    return number


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of logits, statistics and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a matrix product computes in: autocast's where it is on, which leaves float64 alone."""
    if dtype != torch.float64 and autocasts(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; meta tensors know none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
