"""The driver: multiply a tile of logits, fold it, forget it. It does what the plan says, in any mode.

Forward walks the vocabulary outside and the tokens inside, so that each slice of the weight is converted once and the
running statistics of every token are vectors. Backward makes the sweeps of the plan. How a tile is folded is the
implementation's business (`Folds`); which products are formed, in what order and into which accumulator, is decided
here, once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpo_kernels.head import Call, TokenStats, accumulate_dtype
from dpo_kernels.plan import Plan, Sweep


class RowGrads(NamedTuple):
    """What backward knows of each token that counts, (M,) each: the incoming gradients and the forward's results."""

    labels: Tensor
    log_probs: Tensor
    max: Tensor
    log_sum: Tensor
    grad_log_probs: Tensor
    entropy: Tensor | None
    grad_entropy: Tensor | None

    def block(self, rows: slice) -> RowGrads:
        return RowGrads(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


class RowStats(Protocol):
    """Running statistics of all tokens that count; an implementation keeps whatever vectors it needs."""

    def finish(self) -> tuple[TokenStats, Tensor, Tensor]:
        """The statistics, m = max z and log sum exp(z - m), (M,) each."""


class Folds(Protocol):
    """How an implementation folds one tile of products a = h W^T + b, (n, v) in the accumulation dtype.

    Every method may overwrite the tile. `first` is the tile's first vocabulary index.
    """

    def stats(self, call: Call, labels: Tensor) -> RowStats: ...

    def score(self, call: Call, stats: Any, rows: slice, tile: Tensor, first: int) -> None:
        """Folds the tile into the statistics."""

    def keep(
        self, call: Call, stats: Any, rows: slice, tile: Tensor, first: int, kept: Tensor, tile_max: Tensor
    ) -> None:
        """Like score; writes exp(z - tile_max), times the cap's derivative, to kept (n, v), the maxima to tile_max."""

    def jacobian(self, call: Call, stats: Any, rows: slice, tile: Tensor, first: int, total: Tensor) -> Tensor:
        """Like score; rescales total (n, D) to the new maximum; returns the factors (n, v) of W's rows."""

    def finish_jacobian(self, call: Call, stats: Any, rows: slice, total: Tensor, label_weight: Tensor) -> None:
        """Turns total (n, D) = sum exp(z - m) W into d log_prob / d hidden; label_weight (n, D): W at the labels."""

    def dz(self, call: Call, grads: RowGrads, tile: Tensor, first: int) -> Tensor:
        """d loss / d a from the products, as an operand of the next product."""

    def dz_from_kept(
        self, call: Call, grads: RowGrads, kept: Tensor, tile_max: Tensor, out: Tensor, first: int
    ) -> Tensor:
        """d loss / d a from what keep wrote; may use out (n, v) for it."""


class Forward(NamedTuple):
    """For rows that count: stats, max and log_sum (M,), and what the mode holds: kept (K, V), tile_max (K, tiles),
    jacobian (M, D).

    The maximum and the logarithm of the sum stay apart: their sum would cost digits of every probability in backward.
    """

    stats: TokenStats
    max: Tensor
    log_sum: Tensor
    kept: Tensor
    tile_max: Tensor
    jacobian: Tensor


def forward(call: Call, plan: Plan, folds: Folds, index: Tensor | None) -> Forward:
    """index (M,): flat positions of the rows that count; None where all do."""
    operands = _Operands(call, plan, index)
    stats = folds.stats(call, operands.labels)
    wide = operands.wide
    keep = plan.kept_tokens
    kept = call.hidden.new_empty((keep, plan.vocab_size), dtype=call.compute_dtype)
    tile_max = wide.new_empty((keep, plan.vocab_tiles if keep else 0))
    jacobian = wide.new_zeros((plan.tokens if plan.mode == "frozen" else 0, plan.hidden_size))
    for t, columns in enumerate(_spans(plan.vocab_size if plan.tokens else 0, plan.tile_vocab)):
        weight = operands.weight(columns)
        for rows in _spans(plan.tokens, plan.tile_tokens):
            tile = operands.product(operands.hidden(rows), weight, columns)
            if rows.start < keep:
                folds.keep(call, stats, rows, tile, columns.start, kept[rows, columns], tile_max[rows, t])
            elif plan.mode == "frozen":
                share = folds.jacobian(call, stats, rows, tile, columns.start, jacobian[rows])
                _add_product(jacobian[rows], share, weight)
            else:
                folds.score(call, stats, rows, tile, columns.start)
    if plan.mode == "frozen":
        for rows in _spans(plan.tokens, plan.tile_tokens):
            # A label beyond the vocabulary (its log-prob is NaN already) must not reach past the weight.
            label = operands.labels[rows].clamp(0, plan.vocab_size - 1)
            label_weight = operands.convert(call.weight.index_select(0, label))
            folds.finish_jacobian(call, stats, rows, jacobian[rows], label_weight)
    return Forward(*stats.finish(), kept, tile_max, jacobian)


class InputGrads(NamedTuple):
    """Gradients in the inputs' own shapes and dtypes; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward(call: Call, plan: Plan, folds: Folds, index: Tensor | None, grads: RowGrads, saved: Forward) -> InputGrads:
    """call.grads names the gradients wanted now, some of those that the plan was made for."""
    if plan.mode == "frozen":
        return InputGrads(_scale_jacobian(call, plan, index, grads, saved.jacobian), None, None)
    operands = _Operands(call, plan, index)
    hidden = _Gradient(call.hidden, operands.wide, index) if call.grads.hidden else None
    weight = _Gradient(call.weight, operands.wide, None) if call.grads.weight else None
    bias = operands.wide.new_zeros(plan.vocab_size) if call.grads.bias else None
    for i, sweep in enumerate(plan.sweeps):
        _sweep(sweep, call, plan, folds, operands, grads, saved, hidden, weight, bias if i == 0 else None)
    return InputGrads(
        None if hidden is None else hidden.out.view(call.hidden.shape),
        None if weight is None else weight.out,
        bias if bias is None or call.bias is None else bias.to(call.bias.dtype),
    )


def _sweep(
    sweep: Sweep,
    call: Call,
    plan: Plan,
    folds: Folds,
    operands: _Operands,
    grads: RowGrads,
    saved: Forward,
    grad_hidden: _Gradient | None,
    grad_weight: _Gradient | None,
    grad_bias: Tensor | None,
) -> None:
    hidden_total = grad_hidden if sweep.hidden else None
    weight_total = grad_weight if sweep.weight else None
    if hidden_total is None and weight_total is None and grad_bias is None:
        return
    vocab_outside = sweep.outer == "vocab"
    if hidden_total is not None:
        hidden_total.start(list(_spans(plan.tokens, plan.tile_tokens)), whole=vocab_outside)
    if weight_total is not None:
        weight_total.start(list(_spans(plan.vocab_size, plan.tile_vocab)), whole=not vocab_outside)
    for rows, columns in _tiles(plan, vocab_outside):
        h, w = operands.hidden(rows), operands.weight(columns)
        some = grads.block(rows)
        if rows.start < plan.kept_tokens:
            t = columns.start // plan.tile_vocab
            out = operands.buffer(rows, columns)
            dz = folds.dz_from_kept(
                call, some, saved.kept[rows, columns], saved.tile_max[rows, t], out, columns.start
            )  # fmt: skip
        else:
            dz = folds.dz(call, some, operands.product(h, w, columns), columns.start)
        if hidden_total is not None:
            hidden_total.add(rows, dz, w)
        if weight_total is not None:
            weight_total.add(columns, dz.T, h)
        if grad_bias is not None:
            grad_bias[columns] += dz.sum(0, dtype=grad_bias.dtype)
    for total in (hidden_total, weight_total):
        if total is not None:
            total.finish()


def _scale_jacobian(call: Call, plan: Plan, index: Tensor | None, grads: RowGrads, jacobian: Tensor) -> Tensor | None:
    if not call.grads.hidden:
        return None
    gradient = _Gradient(call.hidden, jacobian, index)
    for rows in _spans(plan.tokens, plan.tile_tokens):
        gradient.write(rows, jacobian[rows] * grads.grad_log_probs[rows, None])
    return gradient.out.view(call.hidden.shape)


class _Operands:
    """The rows that count and slices of the weight, converted for the product; at most one slice of each is held."""

    def __init__(self, call: Call, plan: Plan, index: Tensor | None) -> None:
        self.call, self.plan, self.index = call, plan, index
        self.wide = torch.empty(0, dtype=accumulate_dtype(call.hidden.dtype), device=call.hidden.device)
        # Only CUDA multiplies bfloat16 or float16 into float32; elsewhere operands are widened first.
        self.dtype = call.compute_dtype if call.hidden.device.type == "cuda" else self.wide.dtype
        flat = call.labels.reshape(-1)
        self.labels = (flat if index is None else flat.index_select(0, index)).to(torch.int64)
        self._tile: Tensor | None = None
        self._weight, self._hidden = _Slice(), _Slice()
        self._all = self._all_rows() if plan.hold_hidden else None

    def convert(self, source: Tensor, out: Tensor | None = None) -> Tensor:
        """Rounds to the compute dtype, then widens to the dtype of the product's operands."""
        rounded = source.to(self.call.compute_dtype)
        if rounded.dtype == self.dtype:
            return rounded
        return rounded.to(self.dtype) if out is None else out.copy_(rounded)

    def hidden(self, rows: slice) -> Tensor:
        if self._all is not None:
            return self._all[rows]
        return self._hidden.get(rows, lambda: take_rows(self.call.hidden, self.index, rows), self.convert)

    def weight(self, columns: slice) -> Tensor:
        return self._weight.get(columns, lambda: self.call.weight[columns], self.convert)

    def buffer(self, rows: slice, columns: slice) -> Tensor:
        n, v = rows.stop - rows.start, columns.stop - columns.start
        if self._tile is None:
            self._tile = self.wide.new_empty(self.plan.tile_tokens * self.plan.tile_vocab)
        return self._tile[: n * v].view(n, v)

    def product(self, h: Tensor, w: Tensor, columns: slice) -> Tensor:
        """a = h W^T + b of one tile, in the accumulation dtype."""
        tile = self.buffer(slice(0, len(h)), columns)
        if h.dtype == self.wide.dtype:
            torch.mm(h, w.T, out=tile)
        else:
            torch.mm(h, w.T, out_dtype=self.wide.dtype, out=tile)
        if self.call.bias is not None:
            tile += self.call.bias[columns].to(self.call.compute_dtype)
        return tile

    def _all_rows(self) -> Tensor:
        result = self.wide.new_empty((self.plan.tokens, self.plan.hidden_size), dtype=self.dtype)
        for rows in _spans(self.plan.tokens, self.plan.tile_tokens):
            result[rows] = self.convert(take_rows(self.call.hidden, self.index, rows))
        return result


class _Slice:
    """The last slice of an operand that was asked for, converted into one buffer that the next slice reuses."""

    def __init__(self) -> None:
        self.at: slice | None = None
        self.value: Tensor | None = None
        self.buffer: Tensor | None = None

    def get(
        self, at: slice, source: Callable[[], Tensor], convert: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        if self.value is None or self.at != at:
            self.value = None  # frees the last slice before the next is made
            taken = source()
            self.value = convert(taken, None if self.buffer is None else self.buffer[: len(taken)])
            if self.buffer is None and self.value is not taken:
                self.buffer = self.value
            self.at = at
        return self.value


class _Gradient:
    """Sums products in the accumulation dtype into a gradient and casts once, when a row is complete.

    out has the input's dtype, flattened to (rows, D); index (M,) places the summed rows in it, None is in order.
    """

    def __init__(self, like: Tensor, wide: Tensor, index: Tensor | None) -> None:
        self.out = torch.zeros(like.shape, dtype=like.dtype, device=like.device).view(-1, like.shape[-1])
        self.index = index
        self.wide = wide
        self.direct = like.dtype == wide.dtype  # the gradient is its own accumulator
        self.total = wide
        self.spans: list[slice] = []  # the rows that `total` holds

    def start(self, spans: list[slice], whole: bool) -> None:
        """spans: the slices of rows to come. whole: they come again and again, so all are summed before any is cast."""
        self.whole = whole
        self.spans = spans if whole else []
        if not self.direct:
            height = 0 if not spans else spans[-1 if whole else 0].stop
            self.total = self.wide.new_zeros((height, self.out.shape[1]))

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """Adds a @ b to the given rows."""
        if self.direct and self.index is None:
            _add_product(self.out[rows], a, b)
        elif self.direct and self.index is not None:
            at = self.index[rows]  # distinct rows: gather, add, scatter is exact and deterministic
            total = self.out.index_select(0, at)
            _add_product(total, a, b)
            self.out.index_copy_(0, at, total)
        elif self.whole:
            _add_product(self.total[rows], a, b)
        else:
            if self.spans != [rows]:
                self.finish()
                self.spans = [rows]
                self.total.zero_()
            _add_product(self.total[: rows.stop - rows.start], a, b)

    def finish(self) -> None:
        """Casts what is summed."""
        if not self.direct:
            for rows in self.spans:
                self.write(rows, self.total[rows] if self.whole else self.total[: rows.stop - rows.start])
        self.spans = []

    def write(self, rows: slice, values: Tensor) -> None:
        if self.index is None:
            self.out[rows] = values
        else:
            self.out.index_copy_(0, self.index[rows], values.to(self.out.dtype))


def take_rows(tensor: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    """Rows `rows` of those that count, of a tensor (..., C) of any strides; never copies the whole tensor."""
    try:
        flat = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:  # no single stride: index the leading dimensions one by one
        where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
        return tensor[torch.unravel_index(where, tensor.shape[:-1])]
    return flat[rows] if index is None else flat.index_select(0, index[rows])


def put_rows(tensor: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
    """The counterpart of take_rows: writes values (n, C) to those rows."""
    where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
    tensor[torch.unravel_index(where, tensor.shape[:-1])] = values.to(tensor.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def _tiles(plan: Plan, vocab_outside: bool) -> Iterator[tuple[slice, slice]]:
    if vocab_outside:
        for columns in _spans(plan.vocab_size, plan.tile_vocab):
            yield from ((rows, columns) for rows in _spans(plan.tokens, plan.tile_tokens))
    else:
        for rows in _spans(plan.tokens, plan.tile_tokens):
            yield from ((rows, columns) for columns in _spans(plan.vocab_size, plan.tile_vocab))
