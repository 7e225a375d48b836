"""Gradients that leave out what the softmax hardly holds: `gradient_filter` on a GPU.

Keeping the exponentials of columns that stay alone (`dpo_kernels.sparse`) would have the host wait for their numbers at
every tile. Here forward leaves a flag for each column and group of tokens, and backward multiplies the columns whose
flag is 1, after lists that are made on the device.

Where the budget has room for a token's exponentials, forward saves them, as without a filter. When all sums are known,
one pass over them finds exactly which columns have an entry of at least the filter; backward takes those from what is
saved. So it is 1 product, and of what stays one for each gradient.

Of the other tokens backward makes the logits of what stays again, from the rows of W that a group needs: one product
more of those. Forward has to mark while it multiplies. It takes the vocabulary in parts, and a column stays if some
token of the group has at least the filter's share in it of what is known of its row: the label, the parts before, and
what the program has walked itself. Sums only grow, so early columns are kept too generously, never too sparingly; most
tokenizers have the likely tokens first.

Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) skips whole blocks, when it has multiplied them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dpo_kernels.backends.base import Product, Saved, SavedTile, Tile, TileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.layout import rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.workload import LABELS, aligned

# A tile of which more stays is computed whole: the library multiplies whole tiles faster (waits for a measurement).
DENSEST = 0.7
MARGIN = 0.99  # the bound is this much lower: sums are rounded
ROUNDING = 1e-5  # of a label's logit, which is summed in another order here


class Marks(NamedTuple):
    """What forward knows of columns, for all tokens or a tile; (M,) float32 but the first.

    flags: (groups, V and up) int8, 1 where a group keeps a column. label_logits: a little less. maxima, totals: each
    row's maximum and sum of exponentials relative to it so far, the label's included. dropped: what each row has in
    columns whose flag is 0, times the cap's derivative, relative to its maximum.
    """

    flags: Tensor
    label_logits: Tensor
    maxima: Tensor
    totals: Tensor
    dropped: Tensor


class GatheringOps(TileOps, Protocol):
    """What a back end needs beside `TileOps`."""

    def accumulate_marked(self, state: Any, tile: Tile, marks: Marks, bound: float) -> None:
        """As `accumulate`; sets flags of columns in which a token of the group has a share of at least the bound, or is
        no number, and brings the rest of the marks up to date. marks: of the tile."""

    def mark_saved(
        self, saved: SavedTile, flags: Tensor, maximum: Tensor, log_sum: Tensor, bound: float
    ) -> Tensor:  # fmt: skip
        """Sets the flags of n tokens whose exponentials are saved and whose sums are known, over the whole vocabulary.
        Returns what each has in columns that do not stay, as a share of the row, (n,)."""

    def count(self, flags: Tensor, tile: int) -> Tensor:
        """How many of each tile of columns stay, (groups, tiles) int32."""

    def gathered_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, flags: Tensor, products: Sequence[Product],
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        """As `gradient_products`, of columns alone whose flag is 1; flags: of the tile, (groups, v)."""

    def masked_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, flags: Tensor, products: Sequence[Product],
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        """The same, computed as if all columns stayed."""


class Marker:
    """Forward: accumulates tiles, and finds the columns that stay. Those of a group's labels do in any case.

    saved: of the tokens whose exponentials are saved; label_logits: of some tokens, (n,).
    """

    def __init__(
        self, call: Call, plan: Plan, ops: TileOps, saved: SavedTile | None, wide: Tensor,
        label_logits: Callable[[slice], Tensor],
    ) -> None:  # fmt: skip
        self.plan, self.ops, self.saved = plan, cast(GatheringOps, ops), saved
        self.bound = MARGIN * (call.options.gradient_filter or 0.0)
        labels, n = call.tokens.labels, plan.tokens
        size = _flags_shape(plan)[0] * _flags_shape(plan)[1] // 8
        self.table = labels.new_zeros(size + n)
        flags = self.table[:size].view(torch.int8).view(_flags_shape(plan))
        groups = torch.arange(n, device=labels.device) // plan.group
        flags[groups, labels.clamp(0, max(0, plan.vocab_size - 1))] = 1
        vectors = wide.new_zeros((4, aligned(n)))[:, :n]  # rows start aligned
        self.marks = Marks(flags, *vectors)
        for first in range(plan.kept_tokens, n, LABELS):
            rows = slice(first, min(first + LABELS, n))
            made = label_logits(rows)
            self.marks.label_logits[rows] = made - ROUNDING * made.abs()
        self.marks.maxima.copy_(self.marks.label_logits)
        self.marks.totals.fill_(1)

    def accumulate(self, state: object, tile: Tile, saved: SavedTile | None) -> None:
        """As `TileOps.accumulate`."""
        if saved is not None:
            self.ops.accumulate(state, tile, saved)
            return
        flags, *vectors = self.marks
        of_tile = Marks(_flags_of(flags, self.plan, tile), *(rows_of(each, tile.rows) for each in vectors))
        self.ops.accumulate_marked(state, tile, of_tile, self.bound)

    def finish(self, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """What each row leaves out, as a share of the row, (M,); and what `Gathered` reads, int64."""
        marks, kept = self.marks, self.plan.kept_tokens
        dropped = marks.dropped * (marks.maxima - maximum - log_sum).exp()
        dropped.masked_fill_(marks.dropped == 0, 0)  # of a row that is no number too
        if self.saved is not None:
            flags = marks.flags[: -(-kept // self.plan.group), : self.plan.vocab_size]
            dropped[:kept] = self.ops.mark_saved(self.saved, flags, maximum[:kept], log_sum[:kept], self.bound)
        self.table[len(self.table) - self.plan.tokens :].view(torch.float64).copy_(dropped)
        return dropped, self.table


class Gathered:
    """Backward: computes the columns that stay. dropped: what rows leave out, (M,) float64; None if none does."""

    def __init__(self, plan: Plan, ops: TileOps, saved: Saved) -> None:
        self.plan, self.ops = plan, cast(GatheringOps, ops)
        size = len(saved.table) - plan.tokens
        self.flags = saved.table[:size].view(torch.int8).view(_flags_shape(plan))
        dropped = saved.table[size:].view(torch.float64)
        counts = self.ops.count(self.flags[:, : plan.vocab_size], plan.tile_vocab)
        *stays, some = torch.cat([counts.flatten(), dropped.any().view(1)]).tolist()  # the host waits, once
        tiles, self.whole = counts.shape[1], set[tuple[int, int]]()
        for rows in plan.token_spans:
            groups = range(rows.start // plan.group, -(-rows.stop // plan.group))
            for i, columns in enumerate(plan.vocab_spans):
                size = len(groups) * (columns.stop - columns.start)
                if sum(stays[group * tiles + i] for group in groups) > DENSEST * size:
                    self.whole.add((rows.start, columns.start))
        self.dropped = dropped if some else None

    def multiply(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """As `TileOps.gradient_products`. grads: of the tile's tokens."""
        whole = (tile.rows.start, tile.columns.start) in self.whole
        multiply = self.ops.masked_products if whole else self.ops.gathered_products
        multiply(grads, tile, saved, _flags_of(self.flags, self.plan, tile), products, bias)


def _flags_shape(plan: Plan) -> tuple[int, int]:
    return -(-plan.tokens // plan.group), aligned(plan.vocab_size)


def _flags_of(flags: Tensor, plan: Plan, tile: Tile) -> Tensor:
    rows, columns = tile.rows, tile.columns
    return flags[rows.start // plan.group : -(-rows.stop // plan.group), columns]
