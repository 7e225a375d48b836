"""Gradients that leave out blocks of what the softmax hardly holds: `gradient_filter` on a GPU.

Columns of one's own for each group of tokens (`dpo_kernels.sparse`) would have the host wait for their numbers, and
take products of many shapes. Here forward leaves a row's maximum and sum over each block of the vocabulary that a
program multiplies. When the rows' sums are known, it is exact which blocks of tokens and vocabulary have an entry of at
least the filter's probability; backward makes the logits of those again, and of their gradients alone products. A block
with a label stays. So it is 1 product, and 1 + a product a gradient of what stays. An order by frequency, as most
tokenizers have it, leaves most blocks nothing.

Cut Cross-Entropy skips blocks too (Wijmans et al. 2024, arXiv:2411.09009), when it has multiplied them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dpo_kernels.backends.base import Product, Saved, Tile, TileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.planner import Plan
from dpo_kernels.workload import aligned

# A tile of which more stays is computed whole: the library multiplies whole tiles faster (waits for a measurement).
DENSEST = 0.7
MARGIN = 0.99  # the bound is this much lower: sums are rounded


class Marks(NamedTuple):
    """Of each row over each block of the vocabulary, (blocks, M and up) float32: the maximum, made finite, and the sum
    of exp(z - maximum), times the cap's derivative; labels are in neither."""

    maxima: Tensor
    sums: Tensor


class SkippingOps(TileOps, Protocol):
    """What a back end needs beside `TileOps`."""

    def accumulate_marked(self, state: Any, tile: Tile, marks: Marks) -> None:
        """As `accumulate`; writes the tile's part of the marks."""

    def passing(self, marks: Marks, labels: Tensor, maximum: Tensor, log_sum: Tensor, bound: float) -> Tensor:
        """(blocks of tokens, blocks of the vocabulary) int8: 1 where a row has a share of at least the bound in some
        entry, or its label, or is no number."""

    def left_out(self, marks: Marks, flags: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
        """(M,) float32: what each row has in the blocks whose flag is 0, as a share of the row."""

    def block_products(
        self, grads: TokenGrads, tile: Tile, flags: Tensor, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """As `gradient_products`, of the blocks alone whose flag is 1; flags: those of the tile."""


class Marker:
    """Forward: accumulates tiles, and finds the blocks that stay."""

    def __init__(self, call: Call, plan: Plan, ops: TileOps, wide: Tensor) -> None:
        self.call, self.plan, self.ops = call, plan, cast(SkippingOps, ops)
        blocks = -(-plan.vocab_size // plan.block[1])
        self.marks = Marks(*wide.new_empty((2, blocks, aligned(plan.tokens))))

    def accumulate(self, state: object, tile: Tile) -> None:
        self.ops.accumulate_marked(state, tile, self.marks)

    def finish(self, maximum: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """What each row leaves out, as a share of the row, (M,); and what `Skipping` reads, int64."""
        bound = MARGIN * self.call.options.gradient_filter
        flags = self.ops.passing(self.marks, self.call.tokens.labels, maximum, log_sum, bound)
        stays, blocks = _by_tile(flags, self.plan)
        whole = (stays > DENSEST * blocks).to(flags.dtype)
        tokens, entries = _tile_blocks(self.plan)
        flags |= whole.repeat_interleave(tokens, 0).repeat_interleave(entries, 1)[: len(flags), : flags.shape[1]]
        dropped = self.ops.left_out(self.marks, flags, maximum, log_sum)
        return dropped, torch.cat([flags.flatten().long(), dropped.double().view(torch.int64)])


class Skipping:
    """Backward: computes the blocks that stay. dropped: what rows leave out, (M,) float64; None if none does."""

    def __init__(self, plan: Plan, ops: TileOps, saved: Saved) -> None:
        self.plan, self.ops = plan, cast(SkippingOps, ops)
        size = len(saved.table) - plan.tokens
        shape = (-(-plan.tokens // plan.block[0]), -(-plan.vocab_size // plan.block[1]))
        self.flags = saved.table[:size].to(torch.int8).view(shape)
        dropped = saved.table[size:].view(torch.float64)
        stays, blocks = _by_tile(self.flags, plan)
        *facts, some = torch.cat([(stays == blocks).flatten(), dropped.any().view(1)]).tolist()  # the host waits, once
        places = [(rows.start, columns.start) for rows in plan.token_spans for columns in plan.vocab_spans]
        self.whole = {place for place, fact in zip(places, facts, strict=True) if fact}
        self.dropped = dropped if some else None

    def multiply(self, grads: TokenGrads, tile: Tile, products: Sequence[Product], bias: Tensor | None) -> None:
        """As `TileOps.gradient_products`. grads: of the tile's tokens."""
        if (tile.rows.start, tile.columns.start) in self.whole:
            self.ops.gradient_products(grads, tile, None, products, bias)
        else:
            flags = _blocks_of(self.flags, self.plan, tile.rows, tile.columns)
            self.ops.block_products(grads, tile, flags, products, bias)


def _tile_blocks(plan: Plan) -> tuple[int, int]:
    """Blocks of a tile, down and across."""
    return -(-plan.tile_tokens // plan.block[0]), -(-plan.tile_vocab // plan.block[1])


def _by_tile(flags: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """How many blocks of each tile stay, and how many it has; (tiles of tokens, tiles of the vocabulary)."""
    tokens, entries = _tile_blocks(plan)
    down, across = len(plan.token_spans), len(plan.vocab_spans)
    found = []
    for each in (flags, torch.ones_like(flags)):
        room = each.new_zeros((down * tokens, across * entries))
        room[: len(each), : each.shape[1]] = each
        found.append(room.view(down, tokens, across, entries).sum((1, 3)))
    return found[0], found[1]


def _blocks_of(flags: Tensor, plan: Plan, rows: slice, columns: slice) -> Tensor:
    tokens, entries = plan.block
    return flags[rows.start // tokens : -(-rows.stop // tokens), columns.start // entries : -(-columns.stop // entries)]
