"""Gradients that leave out what the softmax hardly holds: `gradient_filter`.

A trained model puts nearly all probability on few tokens. While forward accumulates a tile, it keeps the exponentials
of the columns in which any token of a group is worth it, with the columns' numbers, in one arena under the memory
budget. Backward gathers those rows of the weight and adds to those rows of its gradient: no logits again, and products
as thin as what is kept. A tile with more than a third to keep goes the dense way: it is kept whole, or multiplied again
where the arena is full. Cut Cross-Entropy filters too (Wijmans et al. 2024, arXiv:2411.09009), in backward, from
logits made anew.

An entry is left out if its probability (times the cap's derivative, where logits are capped) is below the filter for
every token of its group. Forward knows a row's sum only so far: it keeps too much, never too little. Labels' entries
are added apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dpo_kernels.backends.base import Product, Saved, SavedTile, Tile, TileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.planner import Plan
from dpo_kernels.workload import GROUP, LARGEST_SHARE, THIN_COLUMNS


class SelectingOps(TileOps, Protocol):
    """What a back end needs beside `TileOps`.

    unit: of what saved exponentials are relative to, in natural logarithms.
    """

    unit: float

    def select(
        self, state: Any, rows: slice, saved: SavedTile, rule: Rule, room: Tensor
    ) -> tuple[Tensor, list[int]] | None:
        """What of a tile that was accumulated is worth a product; None if that is more than `room` holds.

        A column is kept for GROUP tokens if any of them has a share of at least the rule's bound in it. Their
        exponentials (k, m), 0 at the labels, go to `room`, group after group, relative to what rule.relative says then.
        Returns the columns, int64, group after group, and how many each has.
        """


class Rule(NamedTuple):
    """What of a tile's exponentials is worth a product, and what becomes of the rest, (n,) each.

    bound: a share of the row's sum so far. label_logits: which no sum has. relative: what `dropped`, the sums of what
    was left out, are relative to, in units of the back end; both are brought up to date.
    """

    bound: float
    label_logits: Tensor
    relative: Tensor
    dropped: Tensor


AGAIN, DENSE, SPARSE = range(3)  # what becomes of a tile
EARLY = 4  # the first of so many parts of the vocabulary: sums may grow so many times after it
# Bounds are this much lower: the label's logit, and what is saved in 16 bits, are rounded otherwise than the log-probs.
MARGIN = 0.99
ROUNDING = 1e-5  # of a large logit


class _Piece(NamedTuple):
    """Of a tile of `entries` of the vocabulary: where in the arenas it is, and its columns of each group of tokens."""

    kind: int
    rows: slice
    entries: int
    place: int
    place_maxima: int
    columns: Tensor | None = None
    counts: Sequence[int] = ()


class Keeper:
    """Forward: sorts tiles into an arena of exponentials and one of what they are relative to.

    From the front come the kept columns of sparse tiles, from the back whole tiles; between them a tile is computed.
    exps, maxima: the arenas, of any shape. label_logits: of some tokens, (n,), before forward has met them.
    """

    def __init__(
        self, call: Call, plan: Plan, ops: TileOps, exps: Tensor, maxima: Tensor,
        label_logits: Callable[[slice], Tensor],
    ) -> None:  # fmt: skip
        self.plan, self.ops, self.label_logits = plan, cast(SelectingOps, ops), label_logits
        self.bound = MARGIN * (call.options.gradient_filter or 0.0)
        self.exps, self.maxima = exps.view(-1), maxima.view(-1)
        self.front = self.front_maxima = 0
        self.back, self.back_maxima = len(self.exps), len(self.maxima)
        self.pieces: list[_Piece] = []  # of each tile, in the order of forward
        # Sums of what is left out, and what they are relative to, in the back end's units.
        self.dropped = maxima.new_zeros(plan.tokens, dtype=torch.float64)
        self.relative = maxima.new_full((plan.tokens,), -torch.inf)
        self.known: dict[int, Tensor] = {}

    def accumulate(self, state: object, tile: Tile, saved: SavedTile | None) -> None:
        """As `TileOps.accumulate`; the arena holds what is saved."""
        n, v = len(tile.hidden), len(tile.weight)
        size, blocks = n * v, n * -(-v // self.plan.maxima_columns)
        back, back_maxima = self.back - size, self.back_maxima - blocks
        if back < self.front or back_maxima < self.front_maxima + n:
            self.ops.accumulate(state, tile, None)
            self.pieces.append(_Piece(AGAIN, tile.rows, v, 0, 0))
            return
        piece = _Piece(DENSE, tile.rows, v, back, back_maxima)
        self.ops.accumulate(state, tile, self._saved(piece))
        self.pieces.append(self._selected(state, piece) or piece)
        if self.pieces[-1] is piece:
            self.back, self.back_maxima = back, back_maxima

    def look_again(self, state: object) -> None:
        """Forward is over and all sums are known: of an early tile that was kept whole less may be worth it now. The
        last is the first, whose room lies in front of the others'. Later tiles knew most of the sums, and of columns
        that were kept 1% would go: those are not looked at again.
        """
        early = -(-len(self.pieces) // EARLY)  # forward walks the vocabulary outside
        for i in reversed(range(early)):
            piece = self.pieces[i]
            if piece.kind == DENSE and piece.place_maxima >= self.front_maxima + _size(piece.rows):
                self.pieces[i] = self._selected(state, piece) or piece

    def _saved(self, piece: _Piece) -> SavedTile:
        exps, maxima = self.exps[piece.place :], self.maxima[piece.place_maxima :]
        return whole_tile(self.plan, exps, maxima, _size(piece.rows), piece.entries)

    def _selected(self, state: object, piece: _Piece) -> _Piece | None:
        """A whole tile's columns at the front; None if that is more than a tile may have, or than there is room for."""
        n, rows = _size(piece.rows), piece.rows
        most = min(n * piece.entries // LARGEST_SHARE, piece.place - self.front)
        room = self.exps[self.front : self.front + most]
        found = self.ops.select(state, rows, self._saved(piece), self._rule(rows), room)
        if found is None:
            return None
        columns, counts = found
        made = _Piece(SPARSE, rows, piece.entries, self.front, self.front_maxima, columns, counts)
        self.maxima[self.front_maxima : self.front_maxima + n] = self.relative[rows]
        self.front_maxima += n
        self.front += sum(count * min(GROUP, n - i * GROUP) for i, count in enumerate(counts))
        return made

    def _rule(self, rows: slice) -> Rule:
        if rows.start not in self.known:
            made = self.label_logits(rows)
            self.known[rows.start] = made - ROUNDING * made.abs()
        return Rule(self.bound, self.known[rows.start], self.relative[rows], self.dropped[rows])

    def finish(self, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """What each row leaves out, as a share of the row, (M,) float64; and what `Pieces` reads, int64: the length of
        the header, the header, all columns, and the bits of the former."""
        below = self.relative.double() * self.ops.unit - maximum.double() - log_sum.double()
        # -inf: of rows in which nothing was left out
        dropped = torch.where(self.dropped > 0, self.dropped.log() + below, -torch.inf).exp()
        header = [number for p in self.pieces for number in (p.kind, p.place, p.place_maxima, *p.counts)]
        columns = [p.columns for p in self.pieces if p.columns is not None]
        known = torch.tensor([len(header), *header], device=self.exps.device)
        return dropped, torch.cat([known, *columns, dropped.view(torch.int64)])


class Sparse(NamedTuple):
    """What is kept of a tile. columns, exps: of each group of tokens, (k,) and (k, m). relative_to: (n,)."""

    columns: list[Tensor]
    exps: list[Tensor]
    relative_to: Tensor


class Pieces:
    """Backward: what forward's `Keeper` left of each tile. dropped: what rows leave out, (M,) float64; None if none
    does."""

    def __init__(self, call: Call, plan: Plan, ops: TileOps, saved: Saved) -> None:
        self.call, self.plan, self.ops, table = call, plan, ops, saved.table
        self.exps, self.maxima = saved.exps.view(-1), saved.maxima.view(-1)
        size, end = int(table[0]), len(table) - plan.tokens
        header, self.columns = iter(table[1 : 1 + size].tolist()), table[1 + size : end]
        dropped = table[end:].view(torch.float64)
        self.dropped = dropped if dropped.any() else None
        self.at: dict[tuple[int, int], tuple[int, int, int, list[int], int]] = {}
        begin = 0
        for columns in plan.forward_spans:
            for rows in plan.token_spans:
                kind, place, place_maxima = (next(header) for _ in range(3))
                groups = -(-(rows.stop - rows.start) // GROUP)
                counts = [next(header) for _ in range(groups)] if kind == SPARSE else []
                self.at[rows.start, columns.start] = kind, place, place_maxima, counts, begin
                begin += sum(counts)

    def multiply(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """As `TileOps.gradient_products`; the arena holds what is saved."""
        kept = self._of(tile)
        if isinstance(kept, Sparse):
            multiply(self.call, self.ops, grads, tile, kept, products, bias)
        else:
            self.ops.gradient_products(grads, tile, kept, products, bias)

    def _of(self, tile: Tile) -> SavedTile | Sparse | None:
        """What is kept of a tile: all, some columns, or nothing."""
        kind, place, place_maxima, counts, begin = self.at[tile.rows.start, tile.columns.start]
        n, v = len(tile.hidden), len(tile.weight)
        if kind == AGAIN:
            return None
        if kind == DENSE:
            return whole_tile(self.plan, self.exps[place:], self.maxima[place_maxima:], n, v)
        columns = list(self.columns[begin : begin + sum(counts)].split(counts))
        exps = []
        for i, count in enumerate(counts):
            tokens = min(GROUP, n - i * GROUP)
            exps.append(self.exps[place : place + count * tokens].view(count, tokens))
            place += count * tokens
        return Sparse(columns, exps, self.maxima[place_maxima : place_maxima + n])


def _size(span: slice) -> int:
    return int(span.stop - span.start)


def whole_tile(plan: Plan, exps: Tensor, maxima: Tensor, n: int, v: int) -> SavedTile:
    """The beginning of an arena as a tile's."""
    blocks = -(-v // plan.maxima_columns)
    if plan.saved_by_vocab:
        return SavedTile(exps[: n * v].view(v, n).T, maxima[: n * blocks].view(blocks, n).T)
    return SavedTile(exps[: n * v].view(n, v), maxima[: n * blocks].view(n, blocks))


def multiply(
    call: Call, ops: TileOps, grads: TokenGrads, tile: Tile, kept: Sparse, products: Sequence[Product],
    bias: Tensor | None,
) -> None:  # fmt: skip
    """The products of the columns that are kept."""
    for product in products:
        if not product.add:
            product.out.zero_()
    upstream = grads.grad_log_probs * -call.transform.slope
    below = kept.relative_to.double() * cast(SelectingOps, ops).unit - grads.maximum.double() - grads.log_sum
    factor = below.exp_().to(upstream.dtype) * upstream
    for i, (columns, exps) in enumerate(zip(kept.columns, kept.exps, strict=True)):
        tokens = slice(i * GROUP, i * GROUP + exps.shape[1])
        for begin in range(0, len(columns), THIN_COLUMNS):
            some = slice(begin, begin + THIN_COLUMNS)
            dz = exps[some].to(factor.dtype) * factor[tokens]  # (k, m)
            if bias is not None:
                bias.index_add_(0, columns[some], dz.sum(1))
            _multiply_some(ops, dz.to(ops.operand), columns[some], tokens, products)
    at_label = torch.expm1(grads.log_probs) * upstream
    if (derivative := call.transform.cap_derivative(grads.label_logit)) is not None:
        at_label *= derivative
    _add_labels(at_label, grads.labels - tile.columns.start, len(tile.weight), products, bias)


def _multiply_some(ops: TileOps, dz: Tensor, columns: Tensor, tokens: slice, products: Sequence[Product]) -> None:
    for out, right, by_vocab, _ in products:
        if by_vocab:
            made = torch.empty(len(columns), right.shape[1], dtype=out.dtype, device=out.device)
            ops.multiply(made, dz, right[tokens], add=False)
            out.index_add_(0, columns, made)
        else:
            ops.multiply(out[tokens], dz.T.contiguous(), right.index_select(0, columns), add=True)


def _add_labels(at_label: Tensor, local: Tensor, size: int, products: Sequence[Product], bias: Tensor | None) -> None:
    """The labels' entries, which are the largest: in the accumulation dtype, of those that are in the tile."""
    inside = ((local >= 0) & (local < size)).nonzero().squeeze(1)
    for part in inside.split(THIN_COLUMNS):
        columns, dz = local[part], at_label[part]
        if bias is not None:
            bias.index_add_(0, columns, dz)
        for out, right, by_vocab, _ in products:
            to, of = (columns, part) if by_vocab else (part, columns)
            out.index_add_(0, to, right.index_select(0, of).to(out.dtype) * dz[:, None])


def mean_row(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(D,) of (V, D), with no copy of the matrix: a mean in another dtype would make one on a CPU."""
    if matrix.is_cuda:
        return matrix.mean(0, dtype=dtype)
    total = matrix.new_zeros(matrix.shape[1], dtype=dtype)
    for begin in range(0, len(matrix), THIN_COLUMNS):
        total += matrix[begin : begin + THIN_COLUMNS].to(dtype).sum(0)
    return total / len(matrix)
