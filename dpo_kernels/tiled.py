"""The driver: multiply a tile of logits, fold it, forget it. It does what the plan says, in any mode.

Forward walks the vocabulary outside and the tokens inside, so that each slice of the weight is converted once and the
running statistics of every token are vectors. Backward makes the sweeps of the plan. How a tile is multiplied and
folded is the implementation's business (`Folds`); which products are formed, in what order and into which accumulator,
is decided here, once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpo_kernels.head import Call, Grads, TokenStats, accumulate_dtype
from dpo_kernels.plan import Facts, Plan, Sweep, plan


class Tile(NamedTuple):
    """Rows and columns of the logits, and the operands that make them: hidden (n, D), weight (v, D)."""

    rows: slice
    columns: slice
    hidden: Tensor
    weight: Tensor


class Kept(NamedTuple):
    """What forward keeps of a tile's probabilities: exp (n, v), relative to bases (n, v / base_columns)."""

    exp: Tensor
    bases: Tensor


class Dz(NamedTuple):
    """d loss / d a of a tile as left operands of the products that follow; a side that is not wanted may be None."""

    by_token: Any  # (n, v)
    by_vocab: Any  # (v, n)


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
    """How an implementation multiplies a tile, a = h W^T + b, and folds it; made for one call and one plan.

    operand: the dtype that operands are converted to.
    rounds: multiply writes a dtype narrower than it sums in.
    """

    operand: torch.dtype
    rounds: bool

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised (rows, columns); an implementation may hand out the last buffer of this purpose again, once
        nobody holds it any more."""

    def stats(self, labels: Tensor) -> RowStats: ...

    def score(self, stats: Any, tile: Tile) -> None:
        """Folds the tile into the statistics."""

    def keep(self, stats: Any, tile: Tile, kept: Kept) -> None:
        """Like score; also writes exp(z - base), times the cap's derivative, and the bases."""

    def jacobian(self, stats: Any, tile: Tile, total: Tensor) -> None:
        """Like score; total (n, D) = sum exp(z - m) W (times the cap's derivative) so far, m the maximum so far."""

    def finish_jacobian(self, stats: Any, rows: slice, total: Tensor, label_weight: Tensor) -> None:
        """Turns total into d log_prob / d hidden; label_weight (n, D): W at the labels."""

    def dz(self, grads: RowGrads, tile: Tile, kept: Kept | None, wanted: Sweep, bias: Tensor | None) -> Dz:
        """d loss / d a, from what keep wrote if given, which stays as it is: backward may run again. Its sums over
        tokens are added to bias."""

    def multiply(self, out: Tensor, a: Any, b: Tensor, add: bool) -> None:
        """out = a @ b, or out += a @ b, in at least the accumulation dtype, rounded once to out's."""


class Forward(NamedTuple):
    """For rows that count: stats, max and log_sum (M,), and what the mode holds: kept (K, V and up), its bases
    (K, ...), jacobian (M, D). Where the plan keeps by vocabulary, the memory of kept and bases is transposed.

    The maximum and the logarithm of the sum stay apart: their sum would cost digits of every probability in backward.
    """

    stats: TokenStats
    max: Tensor
    log_sum: Tensor
    kept: Tensor
    bases: Tensor
    jacobian: Tensor

    def kept_tile(self, plan: Plan, rows: slice, columns: slice) -> Kept | None:
        if rows.start >= plan.kept_tokens:
            return None
        first, last = columns.start // plan.base_columns, -(-columns.stop // plan.base_columns)
        kept, bases = (_by_token(t, plan) for t in (self.kept, self.bases))
        return Kept(kept[rows, columns], bases[rows, first:last])


def forward(
    call: Call, tokens: int, index: Tensor | None, facts: Facts, make_folds: Callable[[Call, Plan], Folds]
) -> Forward:
    """index (M,): flat positions of the `tokens` rows that count; None where all do."""
    plan = _plan_for(call, tokens, facts)
    folds = make_folds(call, plan)
    operands = _Operands(call, plan, index, folds.operand)
    stats = folds.stats(operands.labels)
    wide = operands.wide
    made = Forward(
        TokenStats(wide), wide, wide,
        kept=folds.empty("kept", plan.kept_tokens, plan.kept_columns, call.compute_dtype),
        bases=wide.new_zeros((plan.kept_tokens, plan.bases)),
        jacobian=wide.new_zeros((plan.tokens if plan.mode == "frozen" else 0, plan.hidden_size)),
    )  # fmt: skip
    _by_token(made.kept, plan)[:, plan.vocab_size :].zero_()  # no column's, but an output of the op
    for columns in plan.forward_spans:
        for rows in plan.token_spans:
            tile = Tile(rows, columns, operands.hidden(rows), operands.weight(columns))
            kept = made.kept_tile(plan, rows, columns)
            if kept is not None:
                folds.keep(stats, tile, kept)
            elif plan.mode == "frozen":
                folds.jacobian(stats, tile, made.jacobian[rows])
            else:
                folds.score(stats, tile)
    if plan.mode == "frozen":
        for rows in plan.token_spans:
            # A label beyond the vocabulary (its log-prob is NaN already) must not reach past the weight.
            label = operands.labels[rows].clamp(0, plan.vocab_size - 1)
            label_weight = operands.convert(call.weight.index_select(0, label))
            folds.finish_jacobian(stats, rows, made.jacobian[rows], label_weight)
    token_stats, maximum, log_sum = stats.finish()
    return made._replace(stats=token_stats, max=maximum, log_sum=log_sum)


class InputGrads(NamedTuple):
    """Gradients in the inputs' own shapes and dtypes; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def backward(
    call: Call,
    wanted: Grads,
    index: Tensor | None,
    grads: RowGrads,
    saved: Forward,
    facts: Facts,
    make_folds: Callable[[Call, Plan], Folds],
) -> InputGrads:
    """call: as forward got it; wanted: the gradients wanted now, some of those that it planned for."""
    plan = _plan_for(call, len(grads.labels), facts)
    call = replace(call, grads=wanted)
    folds = make_folds(call, plan)
    if plan.mode == "frozen":
        return InputGrads(_scale_jacobian(call, plan, index, grads, saved.jacobian), None, None)
    operands = _Operands(call, plan, index, folds.operand)
    hidden = _Gradient("hidden", call.hidden, operands.wide, index, folds, plan.tokens) if wanted.hidden else None
    weight = _Gradient("weight", call.weight, operands.wide, None, folds, plan.tokens) if wanted.weight else None
    bias = operands.wide.new_zeros(plan.vocab_size) if wanted.bias else None
    for i, sweep in enumerate(plan.sweeps):
        part = Sweep(sweep.outer, sweep.hidden and wanted.hidden, sweep.weight and wanted.weight)
        _sweep(part, call, plan, folds, operands, grads, saved, hidden, weight, bias if i == 0 else None)
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
    hidden: _Gradient | None,
    weight: _Gradient | None,
    bias: Tensor | None,
) -> None:
    if not (sweep.hidden or sweep.weight) and bias is None:
        return
    vocab_outside = sweep.outer == "vocab"
    totals = []
    if sweep.hidden and hidden is not None:
        hidden.start(plan.token_spans, whole=vocab_outside, terms=len(plan.vocab_spans))
        totals.append(hidden)
    if sweep.weight and weight is not None:
        weight.start(plan.vocab_spans, whole=not vocab_outside, terms=len(plan.token_spans))
        totals.append(weight)
    for rows, columns in _tiles(plan, vocab_outside):
        tile = Tile(rows, columns, operands.hidden(rows), operands.weight(columns))
        kept = saved.kept_tile(plan, rows, columns)
        dz = folds.dz(grads.block(rows), tile, kept, sweep, None if bias is None else bias[columns])
        if sweep.hidden and hidden is not None:
            hidden.add(rows, dz.by_token, tile.weight)
        if sweep.weight and weight is not None:
            weight.add(columns, dz.by_vocab, tile.hidden)
    for total in totals:
        total.finish()


def _scale_jacobian(call: Call, plan: Plan, index: Tensor | None, grads: RowGrads, jacobian: Tensor) -> Tensor | None:
    if not call.grads.hidden:
        return None
    gradient = _Gradient("hidden", call.hidden, jacobian, index)
    for rows in plan.token_spans:
        gradient.write(rows, jacobian[rows] * grads.grad_log_probs[rows, None])
    return gradient.out.view(call.hidden.shape)


class _Operands:
    """The rows that count and slices of the weight, converted for the product; at most one slice of each is held."""

    def __init__(self, call: Call, plan: Plan, index: Tensor | None, dtype: torch.dtype) -> None:
        self.call, self.plan, self.index, self.dtype = call, plan, index, dtype
        self.wide = torch.empty(0, dtype=accumulate_dtype(call.hidden.dtype), device=call.hidden.device)
        flat = call.labels.reshape(-1)
        self.labels = (flat if index is None else flat.index_select(0, index)).to(torch.int64).contiguous()
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

    def _all_rows(self) -> Tensor:
        result = self.wide.new_empty((self.plan.tokens, self.plan.hidden_size), dtype=self.dtype)
        for rows in self.plan.token_spans:
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
            if self.buffer is not None and len(self.buffer) < len(taken):
                self.buffer = None  # the first slice may be shorter than the next
            self.value = convert(taken, None if self.buffer is None else self.buffer[: len(taken)])
            if self.buffer is None and self.value is not taken:
                self.buffer = self.value
            self.at = at
        return self.value


class _Gradient:
    """Sums products in the accumulation dtype into a gradient and casts once, when a row is complete.

    out has the input's dtype, flattened to (rows, D); index (M,) places the summed rows in it, None is in order.
    """

    def __init__(
        self, name: str, like: Tensor, wide: Tensor, index: Tensor | None, folds: Folds | None = None, tokens: int = 0
    ) -> None:
        # Every row is written where all of them count, unless there is no token at all.
        rows, columns = like.shape[:-1].numel(), like.shape[-1]
        if folds is not None and index is None and tokens > 0:
            self.out = folds.empty(f"gradient of {name}", rows, columns, like.dtype)
        else:
            self.out = torch.zeros((rows, columns), dtype=like.dtype, device=like.device)
        self.index, self.wide, self.folds = index, wide, folds
        self.direct = like.dtype == wide.dtype and index is None  # the gradient is its own accumulator
        self.total = wide
        self.spans: list[slice] = []  # the rows that `total` holds

    def start(self, spans: list[slice], whole: bool, terms: int) -> None:
        """spans: the slices of rows to come, each of them `terms` times. whole: they come again and again, so all are
        summed before any is cast."""
        assert self.folds is not None
        self.whole = whole
        self.spans = spans if whole else []
        self.begun: set[int] = set()
        # A single product is its own sum: it is rounded as it is written.
        self.once = terms == 1 and not self.direct and self.index is None and self.folds.rounds
        if not self.direct and not self.once:
            height = max((s.stop if whole else s.stop - s.start for s in spans), default=0)
            self.total = self.wide.new_empty((height, self.out.shape[1]))

    def add(self, rows: slice, a: Any, b: Tensor) -> None:
        """Adds a @ b to the given rows."""
        assert self.folds is not None
        again = rows.start in self.begun
        self.begun.add(rows.start)
        if self.once or self.direct:
            self.folds.multiply(self.out[rows], a, b, add=again)
        elif self.whole:
            self.folds.multiply(self.total[rows], a, b, add=again)
        else:
            if self.spans != [rows]:
                self.finish()
                self.spans = [rows]
            self.folds.multiply(self.total[: rows.stop - rows.start], a, b, add=again)

    def finish(self) -> None:
        """Casts what is summed."""
        if not self.direct and not self.once:
            for rows in self.spans:
                self.write(rows, self.total[rows] if self.whole else self.total[: rows.stop - rows.start])
        self.spans = []

    def write(self, rows: slice, values: Tensor) -> None:
        if self.index is None:
            self.out[rows] = values
        else:
            self.out.index_copy_(0, self.index[rows], values.to(self.out.dtype))


def _by_token(kept: Tensor, plan: Plan) -> Tensor:
    """kept or bases (K, C) as rows of a token, whichever way its memory runs."""
    return kept.view(kept.shape[1], kept.shape[0]).T if plan.kept_by_vocab else kept


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


def in_rows(matrix: Tensor) -> bool:
    """Whether the numbers of a row lie side by side; rows may lie any distance apart."""
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def as_matrix(logits: Tensor) -> Tensor | None:
    """(..., V) as a matrix with contiguous rows, without a copy; None if its strides have none."""
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return None
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else None


def _tiles(plan: Plan, vocab_outside: bool) -> Iterator[tuple[slice, slice]]:
    if vocab_outside:
        for columns in plan.vocab_spans:
            yield from ((rows, columns) for rows in plan.token_spans)
    else:
        for rows in plan.token_spans:
            yield from ((rows, columns) for columns in plan.vocab_spans)


def _plan_for(call: Call, tokens: int, facts: Facts) -> Plan:
    grads = tuple(name for name in ("hidden", "weight", "bias") if getattr(call.grads, name))
    return plan(
        tokens, call.hidden.shape[-1], call.weight.shape[0], call.hidden.dtype, grads=grads, outputs=call.outputs,
        softcap=call.transform.softcap, compute_dtype=call.compute_dtype, memory_budget=call.memory_budget,
        facts=facts, labels=call.labels.numel(),
    )  # fmt: skip
