"""Pure: what the plan has to know of a back end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpo_kernels.splits import Splits

DEFAULT_BUDGET = 2**30  # bytes


@dataclass(frozen=True)
class Capabilities:
    """What the plan has to know of a back end on a device; the values are in `dpo_kernels.backends`.

    tiles: (tokens, vocabulary) of a tile, best first; small ones are for small budgets.
    wide_tiles: the like for calls of few tokens, all of which a tile has to hold; the first that fits goes before the
        others, where it leaves room for all that they would keep.
    widest_copy: bytes of the weight's columns of a wide tile, at most, where operands are packed.
    scratch: bytes that library calls, or all threads together, may hold inside a call; the first call of a process also
        loads and generates code.
    widens: dtypes whose operands products need in the accumulation dtype.
    packs: operands are packed for the kernels, and of a tile only the gradient of its logits is held.
    one_pass: forward needs no tile in memory unless it accumulates a Jacobian: it takes the vocabulary in one piece.
    no_temporaries: a tile is accumulated in one pass, with nothing beside it but the gradient of its logits.
    rounds: a product can be written in a dtype narrower than it is summed in.
    maxima_columns: vocabulary entries of saved exponentials that share a block maximum; None: those of a tile.
    saved_by_vocab: saved exponentials lie in rows of one vocabulary entry each, not in rows of one token.
    saved_multiple: saved tokens are a multiple of it; None: of the tile's tokens. A number of its own needs
        accumulation whose result for a token does not depend on the tokens beside it.
    splits: of the kernels that forward may take; none: they merge as they go.
    filters: how gradients can leave out what the softmax hardly holds: forward can "keep" columns
        (`dpo_kernels.sparse`), or backward "gather" them (`dpo_kernels.gathering`), or not at all.
    group: tokens that share the columns which backward gathers.
    one_base: exponentials can be saved relative to one number a row, so that products read them as they are.
    default_budget: bytes of a memory budget where none is given, at the least.
    """

    tiles: tuple[tuple[int, int], ...]
    scratch: int
    widens: tuple[torch.dtype, ...] = ()
    packs: bool = False
    one_pass: bool = False
    no_temporaries: bool = False
    rounds: bool = False
    maxima_columns: int | None = None
    saved_by_vocab: bool = False
    saved_multiple: int | None = None
    splits: tuple[Splits, ...] = ()
    wide_tiles: tuple[tuple[int, int], ...] = ()
    widest_copy: int = 0
    filters: str = ""
    group: int = 0
    one_base: bool = False
    default_budget: int = DEFAULT_BUDGET
