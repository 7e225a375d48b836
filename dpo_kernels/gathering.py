"""Gradients that leave out what the softmax hardly holds: `gradient_filter` on a GPU.

Keeping the exponentials of columns that stay (`dpo_kernels.sparse`) would have the host wait for their numbers at every
tile. Here forward leaves a flag for each column and group of tokens; backward gathers the rows of W that a group needs,
makes their logits again and multiplies those alone, after lists that are made on the device. So it is 1 product, and of
what stays 1 + a product a gradient. Where the budget has room for exponentials, of some tokens or of all, forward saves
them too, as without a filter: then their logits are not made again.

Forward takes the vocabulary in parts, each as long as all before it: a column stays if some token of the group has at
least the filter's share in it of what its row has so far. Sums only grow, so early columns are kept too generously,
never too sparingly; most tokenizers have the likely tokens first.

Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) skips whole blocks, when it has multiplied them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dpo_kernels.backends.base import Product, Saved, SavedTile, Tile, TileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.layout import rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.workload import aligned

# A tile of which more stays is computed whole: the library multiplies whole tiles faster (waits for a measurement).
DENSEST = 0.7
MARGIN = 0.99  # the bound is this much lower: sums are rounded


class Marks(NamedTuple):
    """What forward knows of columns, for all tokens or a tile.

    flags: (groups, V and up) int8, 1 where a group keeps a column. known: (M,) float32, the logarithm of each row's sum
    so far. dropped: (M,) float32, what each row has in columns whose flag is 0, times the cap's derivative, relative to
    exp(bases), (M,) float32.
    """

    flags: Tensor
    known: Tensor
    bases: Tensor
    dropped: Tensor


class GatheringOps(TileOps, Protocol):
    """What a back end needs beside `TileOps`."""

    def accumulate_marked(self, state: Any, tile: Tile, saved: SavedTile | None, marks: Marks, bound: float) -> None:
        """As `accumulate`; sets flags of columns in which a token of the group has a share of at least the bound, or is
        no number, and brings the rest of the marks up to date. marks: of the tile."""

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
    """Forward: accumulates tiles, and finds the columns that stay. Those of a group's labels do in any case."""

    def __init__(self, call: Call, plan: Plan, ops: TileOps, wide: Tensor) -> None:
        self.plan, self.ops = plan, cast(GatheringOps, ops)
        self.bound = MARGIN * (call.options.gradient_filter or 0.0)
        labels = call.tokens.labels
        size = _flags_shape(plan)[0] * _flags_shape(plan)[1] // 8
        self.table = labels.new_zeros(size + plan.tokens)
        flags = self.table[:size].view(torch.int8).view(_flags_shape(plan))
        groups = torch.arange(plan.tokens, device=labels.device) // plan.group
        flags[groups, labels.clamp(0, max(0, plan.vocab_size - 1))] = 1
        known, bases, dropped = wide.new_zeros((3, plan.tokens))
        self.marks = Marks(flags, known.fill_(-torch.inf), bases, dropped)

    def accumulate(self, state: object, tile: Tile, saved: SavedTile | None) -> None:
        flags, *vectors = self.marks
        of_tile = Marks(_flags_of(flags, self.plan, tile), *(rows_of(each, tile.rows) for each in vectors))
        self.ops.accumulate_marked(state, tile, saved, of_tile, self.bound)

    def finish(self, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """What each row leaves out, as a share of the row, (M,); and what `Gathered` reads, int64."""
        marks = self.marks
        dropped = marks.dropped * (marks.bases - maximum - log_sum).exp()
        dropped.masked_fill_(marks.dropped == 0, 0)  # of a row that is no number too
        self.table[len(self.table) - self.plan.tokens :].view(torch.float64).copy_(dropped)
        return dropped, self.table


class Gathered:
    """Backward: computes the columns that stay. dropped: what rows leave out, (M,) float64; None if none does."""

    def __init__(self, plan: Plan, ops: TileOps, saved: Saved) -> None:
        self.plan, self.ops = plan, cast(GatheringOps, ops)
        size = len(saved.table) - plan.tokens
        self.flags = saved.table[:size].view(torch.int8).view(_flags_shape(plan))
        dropped = saved.table[size:].view(torch.float64)
        shares = [_shares(self.flags, plan, rows) for rows in plan.token_spans]
        *facts, some = torch.cat([*(s > DENSEST for s in shares), dropped.any().view(1)]).tolist()  # the host waits
        places = [(rows.start, columns.start) for rows in plan.token_spans for columns in plan.vocab_spans]
        self.whole = {place for place, fact in zip(places, facts, strict=True) if fact}
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


def _shares(flags: Tensor, plan: Plan, rows: slice) -> Tensor:
    """What share of each tile's columns stays, (tiles of the vocabulary,), of a tile's tokens."""
    of_rows = flags[rows.start // plan.group : -(-rows.stop // plan.group)]
    stays = of_rows.new_zeros(len(plan.vocab_spans) * plan.tile_vocab, dtype=torch.int32)
    stays[: plan.vocab_size] = of_rows[:, : plan.vocab_size].sum(0, dtype=torch.int32)
    widths = [columns.stop - columns.start for columns in plan.vocab_spans]
    return stays.view(-1, plan.tile_vocab).sum(1) / (len(of_rows) * stays.new_tensor(widths))
