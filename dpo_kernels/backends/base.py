"""What a back end is: `Backend`, and `TileOps` for the driver. To add one, write a file beside this one and name its
class in `dispatch.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpo_kernels.call import Call, TokenGrads, Tokens, Transform, accumulate_dtype
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished, SoftmaxState, TokenStats

MIB = 2**20


class Tile(NamedTuple):
    """Tokens and vocabulary entries of a tile of logits, and its operands: hidden (n, D), weight (v, D)."""

    rows: slice
    columns: slice
    hidden: Tensor
    weight: Tensor


class SavedTile(NamedTuple):
    """Of a tile: exp(z - m) (n, v), times the cap's derivative, and m (n, blocks): block maxima, or whatever the back
    end has exponentials relative to; (n, 1) of a plan with one base a row. At the labels they are the back end's own:
    the gradient there is made of the statistics."""

    exps: Tensor
    maxima: Tensor


class Product(NamedTuple):
    """out = left @ right, or out += it, in at least the accumulation dtype, rounded once to out's. left is d loss / d a
    of a tile: (n, v), or by_vocab (v, n)."""

    out: Tensor
    right: Tensor
    by_vocab: bool
    add: bool


class Saved(NamedTuple):
    """What forward leaves, of the M tokens that count: statistics, max z, log sum exp(z - max z) and the label's
    logit, (M,) each, and what the mode saves. exps (K, V and up) of K tokens, their block maxima (K, blocks) or bases
    (K, 1), jacobian (M, D). Where the plan saves by vocabulary, the memory of exps and maxima is transposed. Where it
    is sparse, they are arenas, and table is what `sparse.Keeper` says of them; where it gathers, table is what
    `gathering.Marker` found of columns; else it is empty.
    """

    stats: TokenStats
    maximum: Tensor
    log_sum: Tensor
    label_logit: Tensor
    exps: Tensor
    maxima: Tensor
    jacobian: Tensor
    table: Tensor


@dataclass(frozen=True)
class Execution:
    """What forward decided of a call; backward is given it.

    backend: the name of the one that ran. configuration: the back end's own value, or None. plan: None for a call on
    logits. all_count: no label is ignored. masked: as in `call.Tokens`.
    """

    backend: str
    capabilities: Capabilities
    configuration: Any
    plan: Plan | None
    all_count: bool
    masked: bool = False

    def operand(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The dtype that operands of products are converted to."""
        return accumulate_dtype(compute_dtype) if compute_dtype in self.capabilities.widens else compute_dtype


class State(Protocol):
    """The `SoftmaxState` of all tokens that count, in whatever form the back end keeps it."""

    def finish(self) -> Finished:
        """Joins the label; the state covers the whole vocabulary."""

    def part(self) -> SoftmaxState:
        """As every back end and rank understands it; the state covers a part of the vocabulary."""

    def scale_to(self, maximum: Tensor) -> Tensor:
        """(M,): what brings this state's own sums to those relative to `maximum`, which is no smaller."""


class TileOps(Protocol):
    """How a back end multiplies a tile, a = h W^T + b, and accumulates it; made for one call and one execution.

    operand: the dtype that operands are converted to.
    weight_dtype: the same of the weight, or the compute dtype where products widen it as they read it. With an
        adapter's columns beside it, it has the operands' in any case.
    rounds: `multiply` writes a dtype narrower than it sums in.
    """

    operand: torch.dtype
    weight_dtype: torch.dtype
    rounds: bool

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised (rows, columns); a back end may hand out the last buffer of this purpose again, once nobody
        holds it any more."""

    def new_state(self, labels: Tensor) -> State: ...

    def accumulate(self, state: Any, tile: Tile, saved: SavedTile | None) -> None:
        """Merges the tile into the state; writes its exponentials and block maxima to `saved` if given."""

    def accumulate_jacobian(self, state: Any, tile: Tile, total: Tensor) -> None:
        """Like accumulate; total (n, D) is sum exp(z - m) W, times the cap's derivative, over the vocabulary so far. m
        is a number of the row that the back end knows."""

    def finish_jacobian(
        self, state: Any, rows: slice, done: Finished, total: Tensor, label_weight: Callable[[], Tensor]
    ) -> None:
        """total, as accumulate_jacobian left it, becomes d log_prob / d hidden.

        rows: the tokens of total and of `done`. label_weight: makes W at their labels (n, D), 0 where it is not here.
        """

    def gradient_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """Products with d loss / d a of the tile, which is made from what was saved if given, and that stays as it is:
        backward may run again. Its sums over tokens are added to bias."""

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """out = a @ b, or out += a @ b, in at least the accumulation dtype, rounded once to out's."""


class Backend(Protocol):
    """One way to compute. devices: the kinds of device that it was made for. largest_vocabulary: larger ones are left
    to the PyTorch back end.

    A configuration is a value that `configure` resolves a call to (None where there is nothing to choose). It travels
    with the plan from forward to backward.
    """

    name: str
    devices: tuple[str, ...]
    largest_vocabulary: int

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run there, as far as can be told without building anything; None if it can."""

    def cannot_run(self, device: torch.device) -> str | None:
        """As `unavailable`, but knows: builds and loads what was not tried yet."""

    def declines_head(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether these operands are left to the PyTorch back end, by their layout."""

    def declines_logits(self, logits: Tensor) -> bool: ...

    def configure(self, device: torch.device, features: int, compute_dtype: torch.dtype, extras: bool) -> Any:
        """extras: the call has a bias, a cap or statistics."""

    def capabilities(self, device: torch.device, configuration: Any) -> Capabilities: ...

    def tile_ops(self, call: Call, plan: Plan, execution: Execution) -> TileOps: ...

    def logits_forward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, configuration: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log-probs, max z, log sum exp(z - max z) and the labels' logits, (M,) each, of logits (..., V)."""

    def logits_backward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, grads: TokenGrads, out: Tensor, configuration: Any
    ) -> None:
        """Writes d loss / d logits of the tokens that count to out (..., V), which may be logits itself."""

    def out_of_reach(self, maximum: Tensor) -> bool:
        """Whether forward's numbers are beyond what the kernels hold: then the PyTorch back end computes them again."""

    def empty_cache(self) -> int:
        """Gives memory that waits for its next use back to the system; returns its bytes."""
