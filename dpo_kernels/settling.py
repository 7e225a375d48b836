"""Saved exponentials that products read as they are: relative to one number a row, on a GPU.

Exponentials that forward saves relative to the maximum of each block of columns have to become d loss / d a before they
are multiplied: a pass over all of them, 4 bytes a logit in half precision, which grows beside the products the fewer
features there are. Relative to one base a row, with the label's entry in its place, they are d loss / d a but for one
number a row. That number goes into the other side of each product: into the sum of e W for the hidden states'
gradient, into the hidden states for the weight's. So backward is its two products.

The base has to be known before any logit is. A row's label has a logit that is no larger than the logarithm of the sum,
so nothing that counts becomes 0; and that it is far smaller is rare, so that exponentials seldom leave the range of
bfloat16. A block too far above the base keeps its own, and such a row is brought to another base when its sum is known.
Rounding does not grow: the label's entry, the largest by far of most rows, becomes exact by the scale.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor

from dpo_kernels.backends.base import Saved, TileOps
from dpo_kernels.call import TokenGrads
from dpo_kernels.layout import rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished


class SettlingOps(TileOps, Protocol):
    """What a back end needs beside `TileOps`. With a plan of one base a row `gradient_products` multiplies saved rows
    as they are, without their scales, unless the product is by_vocab."""

    def settle(self, state: Any, done: Finished, exps: Tensor, maxima: Tensor) -> Tensor:
        """Once all is accumulated: exps (K, V) become d loss / d a but for a number a row. Returns bases, (K, 1)."""

    def row_scales(self, grads: TokenGrads, bases: Tensor) -> Tensor:
        """Those numbers, (K, 1), before any product."""


def settle(ops: TileOps, state: Any, done: Finished, exps: Tensor, maxima: Tensor) -> Tensor:
    """What `Saved.maxima` is of a plan with one base a row."""
    return cast("SettlingOps", ops).settle(state, done, exps, maxima)


class RowScales:
    """The numbers of rows in one backward."""

    def __init__(self, plan: Plan, ops: TileOps, grads: TokenGrads, saved: Saved) -> None:
        self.kept = plan.kept_tokens
        of_kept = grads.rows(slice(0, self.kept))
        self.of_rows = cast("SettlingOps", ops).row_scales(of_kept, saved.maxima.contiguous())

    def complete(self, rows: slice, total: Tensor) -> None:
        """total (n, D), the sum of a tile's saved exponentials times W, becomes the hidden states' gradient."""
        if rows.start < self.kept:
            total.mul_(rows_of(self.of_rows, rows))
