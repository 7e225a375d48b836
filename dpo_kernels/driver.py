"""The driver: multiply a tile of logits, accumulate its statistics, forget it. It does what the plan says, in any mode.

Forward walks the vocabulary outside and the tokens inside, so that each slice of the weight is converted once and the
states of all tokens are vectors. Backward makes the sweeps of the plan. How a tile is multiplied and accumulated is the
back end's business (`TileOps` in backends/base.py). Which products are formed, in what order and into which sum, is
decided here, once for all back ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels import gathering, settling, sparse
from dpo_kernels.backends.base import Product, Saved, SavedTile, Tile, TileOps
from dpo_kernels.call import Call, Grads, TokenGrads
from dpo_kernels.layout import Slice, first_columns, rows_of, take_rows
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished
from dpo_kernels.workload import Sweep


def forward(call: Call, plan: Plan, ops: TileOps, join: Callable[[Any], Finished] | None = None) -> Saved:
    """Statistics of the tokens that count, and what the mode saves for backward.

    join: from the state of a part of the vocabulary to rows that know all of it, where the others are on other ranks.
    """
    maxima = wide = call.hidden.new_zeros((plan.saved_rows, plan.blocks), dtype=call.accumulate_dtype)
    operands = _Operands(call, plan, ops, wide)
    state = ops.new_state(operands.labels)
    exps = ops.empty("saved exponentials", plan.saved_rows, plan.saved_columns, call.compute_dtype)
    jacobian = wide.new_zeros((plan.tokens if plan.mode == "frozen" else 0, plan.hidden_size))
    keeper: sparse.Keeper | gathering.Marker | None = None
    if plan.sparse:
        keeper = sparse.Keeper(call, plan, ops, exps, maxima, operands.label_logits)
    elif plan.marks:
        whole = saved_tile(exps, maxima, plan, slice(0, plan.kept_tokens), slice(0, plan.vocab_size))
        keeper = gathering.Marker(call, plan, ops, whole, wide, operands.label_logits)
    if not plan.sparse and plan.kept_tokens and plan.saved_columns > plan.vocab_size:
        by_token(exps, plan)[:, plan.vocab_size :].zero_()  # no vocabulary entry's, but an output of the operator
    for columns in plan.forward_spans:
        for rows in plan.token_spans:
            tile = Tile(rows, columns, operands.hidden(rows), operands.weight(columns))
            if plan.mode == "frozen":
                ops.accumulate_jacobian(state, tile, rows_of(jacobian, rows))
            else:
                accumulate = ops.accumulate if keeper is None else keeper.accumulate
                accumulate(state, tile, saved_tile(exps, maxima, plan, rows, columns))
            del tile  # or its slices would live while the next are made
    operands.release()
    if isinstance(keeper, sparse.Keeper):
        keeper.look_again(state)
    done = state.finish() if join is None else join(state)
    if plan.one_base:
        maxima = settling.settle(ops, state, done, exps, maxima)
    if plan.mode == "frozen":
        for rows in plan.token_spans:
            label_weight = partial(operands.label_weight, rows)
            ops.finish_jacobian(state, rows, done.rows(rows), rows_of(jacobian, rows), label_weight)
    stats, dropped, table = done.stats, None, call.tokens.labels.new_empty(0)
    if keeper is not None:
        dropped, table = keeper.finish(done.maximum, done.log_sum)
    if "dropped_mass" in call.options.outputs:
        none = torch.zeros_like(done.maximum)
        stats = stats._replace(dropped_mass=none if dropped is None else dropped.to(none.dtype))
    return Saved(stats, done.maximum, done.log_sum, done.label_logit, exps, maxima, jacobian, table)


class InputGrads(NamedTuple):
    """Gradients in the inputs' own shapes and dtypes; None where not wanted.

    Where the vocabulary is split over ranks, those of hidden (M, D) and of low_rank_a are this rank's parts of a sum,
    in the accumulation dtype.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low_rank_a: Tensor | None = None
    low_rank_b: Tensor | None = None


def backward(call: Call, wanted: Grads, plan: Plan, ops: TileOps, grads: TokenGrads, saved: Saved) -> InputGrads:
    """plan: forward's. wanted: the gradients wanted now, some of those that it planned for."""
    if plan.mode == "frozen":
        return InputGrads(_scale_jacobian(call, wanted, plan, grads, saved.jacobian), None, None)
    wide = grads.log_probs
    operands = _Operands(call, plan, ops, wide)
    through = call.low_rank is not None and (wanted.hidden or wanted.low_rank)
    low_rank = _LowRankGradient(call, plan, operands, ops) if through else None
    hidden = _hidden_gradient(call, plan, wide, ops) if wanted.hidden else None
    if hidden is not None and low_rank is not None:
        hidden.complete = low_rank.add_to_hidden
    weight = (
        _Gradient("weight", call.weight, wide, None, ops, plan.tokens if plan.vocab_size else 0)
        if wanted.weight
        else None
    )
    kept: sparse.Pieces | gathering.Gathered | None = None
    if plan.sparse:
        kept = sparse.Pieces(call, plan, ops, saved)
    elif plan.marks:
        kept = gathering.Gathered(plan, ops, saved)
    if plan.one_base:
        scales = settling.RowScales(plan, ops, grads, saved)
        if hidden is not None:
            hidden.complete = scales.complete
    sums = _Sums(hidden, weight, wide.new_zeros(plan.vocab_size) if wanted.bias else None, low_rank)
    if kept is not None and kept.dropped is not None:
        _give_back(call, sums, kept.dropped.to(wide.dtype) * grads.grad_log_probs * -call.transform.slope)
    for i, sweep in enumerate(plan.sweeps):
        first = i == 0
        part = Sweep(sweep.outer, sweep.hidden and wanted.hidden, sweep.weight and wanted.weight, first and through)
        now = sums if first else sums._replace(bias=None)
        _sweep(part, plan, ops, operands, grads, saved, now, kept)
    return InputGrads(
        None if hidden is None else _in_shape(call, hidden),
        None if weight is None else weight.out,
        sums.bias if sums.bias is None or call.bias is None else sums.bias.to(call.bias.dtype),
        *(low_rank.finish() if low_rank is not None and wanted.low_rank else ()),
    )


class _Sums(NamedTuple):
    """What tiles of backward are added to; None where not wanted."""

    hidden: _Gradient | None
    weight: _Gradient | None
    bias: Tensor | None
    low_rank: _LowRankGradient | None


def _give_back(call: Call, sums: _Sums, tail: Tensor) -> None:
    """Spreads what rows leave out, tail (M,) of d loss / d a, evenly over the vocabulary, for the hidden states: a term
    of rank one, with the weight's mean row. Their gradient is off by 6 to 120 times less with it; the weight's hardly
    changes, for a pass over it, and goes without (benchmarks/gradient_filter.py).
    """
    if sums.low_rank is not None:
        sums.low_rank.of_rows.addr_(tail, sparse.mean_row(sums.low_rank.given.b, tail.dtype))
    if sums.hidden is None:
        return
    before, mean = sums.hidden.complete, sparse.mean_row(call.weight, tail.dtype)

    def complete(rows: slice, total: Tensor) -> None:
        total.addr_(tail[rows], mean)
        if before is not None:
            before(rows, total)

    sums.hidden.complete = complete


def _sweep(
    sweep: Sweep,
    plan: Plan,
    ops: TileOps,
    operands: _Operands,
    grads: TokenGrads,
    saved: Saved,
    sums: _Sums,
    kept: sparse.Pieces | gathering.Gathered | None,
) -> None:
    hidden, weight, bias, low_rank = sums
    if not (sweep.hidden or sweep.weight or sweep.low_rank) and bias is None:
        return
    vocab_outside = sweep.outer == "vocab"
    totals = []
    if sweep.hidden and hidden is not None:
        hidden.start(plan.token_spans, whole=vocab_outside, terms=len(plan.vocab_spans) + plan.sparse)
        totals.append(hidden)
    if sweep.weight and weight is not None:
        weight.start(plan.vocab_spans, whole=not vocab_outside, terms=len(plan.token_spans) + plan.sparse)
        totals.append(weight)
    for rows, columns in _tiles(plan, vocab_outside):
        tile = Tile(rows, columns, operands.hidden(rows), operands.weight(columns))
        products = []
        if sweep.hidden and hidden is not None:
            products.append(hidden.next_product(rows, first_columns(tile.weight, plan.hidden_size), by_vocab=False))
        if sweep.weight and weight is not None:
            products.append(weight.next_product(columns, first_columns(tile.hidden, plan.hidden_size), by_vocab=True))
        if sweep.low_rank and low_rank is not None:
            products += low_rank.products(tile)
        of_bias = None if bias is None else bias[columns]
        multiply = ops.gradient_products if kept is None else kept.multiply
        of_tile = saved_tile(saved.exps, saved.maxima, plan, rows, columns)
        multiply(grads.rows(rows), tile, of_tile, products, of_bias)
        del tile, products  # or their slices would live while the next are made
    for total in totals:
        total.end()


def _scale_jacobian(call: Call, wanted: Grads, plan: Plan, grads: TokenGrads, jacobian: Tensor) -> Tensor | None:
    if not wanted.hidden:
        return None
    gradient = _hidden_gradient(call, plan, jacobian)
    for rows in plan.token_spans:
        gradient.write(rows, rows_of(jacobian, rows) * rows_of(grads.grad_log_probs, rows)[:, None])
    return _in_shape(call, gradient)


def _hidden_gradient(call: Call, plan: Plan, wide: Tensor, ops: TileOps | None = None) -> _Gradient:
    """Of a part of the vocabulary: a row for each token that counts, for ranks to sum."""
    if call.shard is None:
        return _Gradient("hidden", call.hidden, wide, call.tokens.index, ops, plan.tokens)
    rows = wide.new_empty(()).expand(plan.tokens, plan.hidden_size)
    return _Gradient("hidden", rows, wide, None, ops, plan.tokens if plan.vocab_size else 0)


def _in_shape(call: Call, hidden: _Gradient) -> Tensor:
    return hidden.out.view(call.hidden.shape) if call.shard is None else hidden.out


class _Operands:
    """The rows that count and slices of the weight, converted for the product; at most one slice of each is held.

    A low-rank adapter W + b a is the product of operands with r more columns: h (W + b a)^T = [h, h a^T] [W, b]^T. So
    no weight is rounded with it, and it costs r / D of a product, forward and backward.

    wide: any tensor of the accumulation dtype, which others are made like.
    """

    def __init__(self, call: Call, plan: Plan, ops: TileOps, wide: Tensor) -> None:
        self.call, self.plan, self.index, self.ops, self.dtype = call, plan, call.tokens.index, ops, ops.operand
        self.wide = wide
        self.labels = call.tokens.labels
        # An adapter's own numbers are wider than the weight's: rounded to the operand's dtype alone. (D, r)
        self._a = None if call.low_rank is None else call.low_rank.a.to(self.dtype).T.contiguous()
        self._weight, self._hidden = Slice(), Slice()
        self._all = self._all_rows() if plan.hold_hidden else None

    def convert(self, source: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rounds to the compute dtype, then widens to a dtype, by default the operands'; into `out` if given, unless
        the source itself will do."""
        to = dtype or self.dtype
        if source.dtype == to == self.call.compute_dtype:
            return source
        rounded = source if to == self.call.compute_dtype else source.to(self.call.compute_dtype)
        return rounded.to(to) if out is None else out.copy_(rounded)

    def hidden(self, rows: slice) -> Tensor:
        if self._all is not None:
            return rows_of(self._all, rows)
        convert = self.convert if self._a is None else self._hidden_beside
        return self._hidden.get(rows, lambda: self.taken(rows), convert)

    def weight(self, columns: slice) -> Tensor:
        low_rank = self.call.low_rank

        def beside(source: Tensor, out: Tensor | None) -> Tensor:
            assert low_rank is not None
            made = self._with_room(source, out)
            made[:, self.plan.hidden_size :] = low_rank.b[columns]
            return made

        read = partial(self.convert, dtype=self.ops.weight_dtype)
        return self._weight.get(
            columns, lambda: rows_of(self.call.weight, columns), read if low_rank is None else beside
        )

    def release(self) -> None:
        """Frees the slices that are held, which a loop of its own then makes anew."""
        self._weight, self._hidden = Slice(), Slice()

    def label_weight(self, rows: slice) -> Tensor:
        """W at the labels, (n, D); 0 where a label is not here: on another rank, or beyond the vocabulary, where its
        log-prob is NaN already."""
        label, last = rows_of(self.labels, rows), self.plan.vocab_size - 1
        if last < 0:
            return self.wide.new_zeros((len(label), self.plan.hidden_size), dtype=self.dtype)
        taken = self.convert(self.call.weight.index_select(0, label.clamp(0, last)))
        return taken.masked_fill_(((label < 0) | (label > last))[:, None], 0)

    def label_logits(self, rows: slice) -> Tensor:
        """(n,), in the accumulation dtype; a sum in another order than the products'."""
        hidden, label = self.hidden(rows).to(self.wide.dtype), rows_of(self.labels, rows)
        label = label.clamp(0, self.plan.vocab_size - 1)
        made = (hidden[:, : self.plan.hidden_size] * self.label_weight(rows)).sum(1)
        if self.call.low_rank is not None:
            made += (
                hidden[:, self.plan.hidden_size :] * self.convert(self.call.low_rank.b[label], dtype=self.dtype)
            ).sum(1)
        if self.call.bias is not None:
            made += self.call.bias[label].to(self.call.compute_dtype)
        return self.call.transform.logits(made)

    def taken(self, rows: slice) -> Tensor:
        """Hidden states (n, D) as they were given."""
        return take_rows(self.call.hidden, self.index, rows)

    def _all_rows(self) -> Tensor:
        if self._a is None and self.index is not None and len(self.plan.token_spans) == 1:
            return self.convert(self.taken(slice(0, self.plan.tokens)))  # is gathered in new memory
        result = self.wide.new_empty((self.plan.tokens, self.plan.hidden_size + self.plan.rank), dtype=self.dtype)
        for rows in self.plan.token_spans:
            if self._a is None:
                result[rows] = self.convert(self.taken(rows))
            else:
                self._hidden_beside(self.taken(rows), result[rows])
        return result

    def _hidden_beside(self, source: Tensor, out: Tensor | None) -> Tensor:
        """(n, D + r): hidden states, and their products with an adapter's a."""
        assert self._a is not None
        made = self._with_room(source, out)
        product = self.wide.new_empty((len(made), self.plan.rank))
        self.ops.multiply(product, made[:, : self.plan.hidden_size], self._a, add=False)
        made[:, self.plan.hidden_size :] = product
        return made

    def _with_room(self, source: Tensor, out: Tensor | None) -> Tensor:
        shape = (len(source), self.plan.hidden_size + self.plan.rank)
        made = self.wide.new_empty(shape, dtype=self.dtype) if out is None else out
        made[:, : self.plan.hidden_size] = source.to(self.call.compute_dtype)
        return made


class _LowRankGradient:
    """Sums du = dz b (M, r) and db = dz^T u (V, r) for u = h a^T, from which da = du^T h and dh += du a follow."""

    def __init__(self, call: Call, plan: Plan, operands: _Operands, ops: TileOps) -> None:
        assert call.low_rank is not None
        self.given, self.plan, self.operands, self.ops = call.low_rank, plan, operands, ops
        wide = operands.wide
        self.a = self.given.a.to(wide.dtype)
        self.of_rows = wide.new_zeros((plan.tokens, plan.rank))
        self.of_b = wide.new_zeros((plan.vocab_size, plan.rank))

    def products(self, tile: Tile) -> list[Product]:
        more = slice(self.plan.hidden_size, None)
        return [
            Product(self.of_rows[tile.rows], tile.weight[:, more], by_vocab=False, add=True),
            Product(self.of_b[tile.columns], tile.hidden[:, more], by_vocab=True, add=True),
        ]

    def add_to_hidden(self, rows: slice, total: Tensor) -> None:
        """total (n, D): the sum of dz W over the whole vocabulary."""
        total.addmm_(self.of_rows[rows], self.a)

    def finish(self) -> tuple[Tensor, Tensor]:
        of_a = torch.zeros_like(self.a)
        for rows in self.plan.token_spans:
            hidden = self.operands.taken(rows).to(self.operands.call.compute_dtype)
            of_a.addmm_(self.of_rows[rows].T, hidden.to(of_a.dtype))
        of_a = of_a if self.operands.call.shard is not None else of_a.to(self.given.a.dtype)
        return of_a, self.of_b.to(self.given.b.dtype)


class _Gradient:
    """Sums products in the accumulation dtype into a gradient and casts once, when a row is complete.

    out has the input's dtype, flattened to (rows, D); index (M,) places the summed rows in it, None is in order.
    """

    def __init__(
        self, name: str, like: Tensor, wide: Tensor, index: Tensor | None, ops: TileOps | None = None, tokens: int = 0
    ) -> None:
        # Every row is written where all of them count, unless there is no token at all.
        rows, columns = like.shape[:-1].numel(), like.shape[-1]
        if ops is not None and index is None and tokens > 0:
            self.out = ops.empty(f"gradient of {name}", rows, columns, like.dtype)
        else:
            self.out = torch.zeros((rows, columns), dtype=like.dtype, device=like.device)
        self.index, self.wide, self.ops = index, wide, ops
        self.direct = like.dtype == wide.dtype and index is None  # the gradient is its own accumulator
        self.total = wide
        self.spans: list[slice] = []  # the rows that `total` holds
        self.complete: Callable[[slice, Tensor], None] | None = None  # adds what is left to complete sums of rows

    def start(self, spans: list[slice], whole: bool, terms: int) -> None:
        """spans: the slices of rows to come, each of them `terms` times. whole: they come again and again, so all are
        summed before any is cast."""
        assert self.ops is not None
        self.whole = whole
        self.spans = spans if whole or (self.direct and self.complete is not None) else []
        self.begun: set[int] = set()
        # A single product is its own sum: it is rounded as it is written.
        alone = terms == 1 and self.complete is None
        self.once = alone and not self.direct and self.index is None and self.ops.rounds
        if not self.direct and not self.once:
            height = max((s.stop if whole else s.stop - s.start for s in spans), default=0)
            self.total = self.wide.new_empty((height, self.out.shape[1]))

    def next_product(self, rows: slice, right: Tensor, by_vocab: bool) -> Product:
        """What adds d loss / d a @ right to the given rows."""
        again = rows.start in self.begun
        self.begun.add(rows.start)
        if self.once or self.direct:
            return Product(rows_of(self.out, rows), right, by_vocab, again)
        if self.whole:
            return Product(rows_of(self.total, rows), right, by_vocab, again)
        if self.spans != [rows]:
            self.finish()
            self.spans = [rows]
        return Product(self._first(rows), right, by_vocab, again)

    def finish(self) -> None:
        """Casts what is summed."""
        for rows in [] if self.once else self.spans:
            all_rows = self.out if self.direct else self.total
            total = rows_of(all_rows, rows) if self.direct or self.whole else self._first(rows)
            if self.complete is not None:
                self.complete(rows, total)
            if not self.direct:
                self.write(rows, total)
        self.spans = []

    def _first(self, rows: slice) -> Tensor:
        """Of sums of a tile's height the part that this tile fills."""
        return rows_of(self.total, slice(0, rows.stop - rows.start))

    def end(self) -> None:
        """Casts what is summed, and frees the sums before the next sweep makes its own."""
        self.finish()
        self.total = self.wide

    def write(self, rows: slice, values: Tensor) -> None:
        if self.index is None:
            rows_of(self.out, rows).copy_(values)
        else:
            self.out.index_copy_(0, rows_of(self.index, rows), values.to(self.out.dtype))


def saved_tile(exps: Tensor, maxima: Tensor, plan: Plan, rows: slice, columns: slice) -> SavedTile | None:
    """What is saved of a tile; None where it is computed again."""
    if rows.start >= plan.kept_tokens:
        return None
    if plan.one_base and maxima.shape[1] == 1:  # settled
        return SavedTile(by_token(exps, plan)[rows, columns], maxima[rows])
    first, last = columns.start // plan.maxima_columns, -(-columns.stop // plan.maxima_columns)
    return SavedTile(by_token(exps, plan)[rows, columns], by_token(maxima, plan)[rows, first:last])


def by_token(saved: Tensor, plan: Plan) -> Tensor:
    """Saved exponentials or block maxima (K, C) as rows of a token, whichever way their memory runs."""
    return saved.view(saved.shape[1], saved.shape[0]).T if plan.saved_by_vocab else saved


def _tiles(plan: Plan, vocab_outside: bool) -> Iterator[tuple[slice, slice]]:
    if vocab_outside:
        for columns in plan.vocab_spans:
            yield from ((rows, columns) for rows in plan.token_spans)
    else:
        for rows in plan.token_spans:
            yield from ((rows, columns) for columns in plan.vocab_spans)
