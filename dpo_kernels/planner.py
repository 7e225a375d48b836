"""Pure: shapes, dtypes, wanted gradients, capabilities and a memory budget in; mode, tiles, GEMMs and bytes out.

Nothing here touches a device or a tensor. The driver (`driver.py`) does what the plan says and no more, so the plan's
bytes are a promise: they bound what a call, forward and backward together, holds beyond its inputs, its outputs and
the gradients that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from types import MappingProxyType

import torch

from dpo_kernels.call import Grads
from dpo_kernels.splits import parts
from dpo_kernels.workload import Sweep, Workload, aligned

MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What a call will do. Print it.

    mode: "score" (no gradient), "frozen" (only the hidden states want one), "keep", "mixed", "recompute"; with a
        gradient_filter "sparse" or "gather".
    kept_tokens: how many tokens keep their probabilities from forward to backward; the others compute logits again.
    arena_rows: of a sparse plan instead: what forward keeps, column by column, has the room of so many tokens.
    group: of a plan that gathers: tokens that share the columns which backward computes.
    one_base: saved exponentials are relative to one number a row (of a plan that keeps any).
    hold_scaled: of such a plan: the hidden states times their scales are made once, not tile by tile.
    first_part: of such a plan, where not all tokens are kept: vocabulary entries that forward takes first; then as many
        as it has taken, each time.
    gemms: products of 2 * tokens * hidden_size * vocab_size flop that forward and backward take together; with a
        filter forward's alone, since nobody knows yet what is kept.
    rank: of the low-rank adapter of the weight, 0 without one.
    hold_hidden: the hidden states of all tokens are gathered and converted once, not tile by tile.
    one_pass: forward takes the vocabulary in one piece.
    parts: what is held at the peak, in bytes, by name; `memory` is the same as a mapping, `bytes` the sum.
    ranks: over which the vocabulary is split, `vocab_size` of it here; 0 where it is not.
    exchanges: the collectives of forward and backward, by name, and the bytes of what each of them is given or makes,
        whichever is more. An all-reduce on a ring sends 2 (ranks - 1) / ranks of it from each rank, an all-gather or
        reduce-scatter half that.
    """

    mode: str
    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    tile_tokens: int
    tile_vocab: int
    kept_tokens: int
    hold_hidden: bool
    maxima_columns: int
    saved_by_vocab: bool
    one_pass: bool
    sweeps: tuple[Sweep, ...]
    gemms: float
    memory_budget: int
    parts: tuple[tuple[str, int], ...]
    rank: int = 0
    ranks: int = 0
    arena_rows: int = 0
    group: int = 0
    first_part: int = 0
    one_base: bool = False
    hold_scaled: bool = False
    exchanges: tuple[tuple[str, int], ...] = ()

    @property
    def sparse(self) -> bool:
        return self.arena_rows > 0

    @property
    def marks(self) -> bool:
        return self.group > 0

    @property
    def saved_rows(self) -> int:
        """Rows of what is saved of the exponentials."""
        return self.arena_rows or self.kept_tokens

    @property
    def memory(self) -> Mapping[str, int]:
        return MappingProxyType(dict(self.parts))

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def vocab_tiles(self) -> int:
        return len(self.vocab_spans)

    @property
    def token_spans(self) -> list[slice]:
        """The tiles' tokens: those that are kept, then those that are not."""
        return [
            slice(first, min(first + self.tile_tokens, stop))
            for start, stop in ((0, self.kept_tokens), (self.kept_tokens, self.tokens))
            for first in range(start, stop, self.tile_tokens)
        ]

    @property
    def vocab_spans(self) -> list[slice]:
        step, stop = self.tile_vocab, self.vocab_size if self.tokens else 0
        return [slice(first, min(first + step, stop)) for first in range(0, stop, step)]

    @property
    def saved_columns(self) -> int:
        """Numbers from one row of saved exponentials to the next."""
        return aligned(self.vocab_size)

    @property
    def forward_spans(self) -> list[slice]:
        """The columns that forward takes at once."""
        whole = self.one_pass and self.tokens and self.vocab_size
        if self.first_part:
            return [
                slice(*part) for part in parts(self.vocab_size, self.first_part, None if whole else self.tile_vocab)
            ]
        return [slice(0, self.vocab_size)] if whole else self.vocab_spans

    @property
    def blocks(self) -> int:
        """How many block maxima a row of saved exponentials has; 0 where nothing is saved."""
        # In an arena a tile's kept columns are relative to one number more a token.
        of_tiles = -(-self.vocab_size // self.tile_vocab) if self.sparse else 0
        return -(-self.vocab_size // self.maxima_columns) + of_tiles if self.saved_rows else 0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        n, d, v = self.tokens, self.hidden_size, self.vocab_size
        more = "and what is kept " if self.sparse or self.marks else ""
        lines = [
            f"{self.mode}: {n:,} tokens x {d:,} features x {v:,} vocabulary, {name}"
            + (f", low rank {self.rank}" if self.rank else "")
            + (f", one of {self.ranks} ranks" if self.ranks else ""),
            f"  GEMMs   {self.gemms:.3g} {more}(of {2e-9 * n * d * v:,.0f} GFLOP each)",
            f"  tiles   {self.tile_tokens:,} tokens x {self.tile_vocab:,} vocabulary",
        ]
        if self.sparse:
            lines.append(f"  kept    what passes the filter, in the room of {self.arena_rows:,} tokens")
        elif self.marks:
            lines.append(f"  kept    {self.kept_tokens:,} of {self.tokens:,} tokens")
            lines.append(f"  filter  leaves columns that pass it, of every {self.group:,} tokens")
        elif self.mode in ("keep", "mixed", "recompute"):
            how = ", as products read them" if self.one_base else ""
            lines.append(f"  kept    {self.kept_tokens:,} of {self.tokens:,} tokens{how}")
        for sweep in self.sweeps:
            parts = (("hidden", sweep.hidden), ("weight", sweep.weight), ("low rank", sweep.low_rank))
            wanted = " and ".join(n for n, on in parts if on) or "bias"
            lines.append(f"  sweep   {sweep.outer} outside, gradient of {wanted}")
        lines.append(f"  memory  {_mib(self.bytes)} of a budget of {_mib(self.memory_budget)}")
        lines += [f"          {_mib(size):>11}  {what}" for what, size in self.memory.items() if size]
        lines += [f"  ranks   {_mib(size):>11}  {what}" for what, size in self.exchanges]
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def plan(s: Workload, budget: int | None = None, held: int = 0) -> Plan:
    """What a call will do under a memory budget in bytes, of which `held` are taken.

    The default budget is 1 GiB (on CPUs an eighth of the memory, where that is more), or twice the bytes of hidden
    states and weight where that is more.

    Raises:
        ValueError: the budget is too small to run at all; names the least that works.
    """
    if s.filter:
        with suppress(ValueError):
            made = _plan(s, budget, held)
            if made.sparse or made.marks:
                return made
        s = replace(s, filter="")  # no room for what it takes, or for an arena that gains anything
    return _plan(s, budget, held)


def _plan(s: Workload, budget: int | None, held: int) -> Plan:
    given = s.default_budget() if budget is None else budget
    budget = given - held
    of_full_step = _tile_of_a_full_step(s, budget)
    wide = s.tile_sizes()[0] if s.wide_tile() and of_full_step is None else None
    for tile, sweeps in _candidates(s, of_full_step):
        memory = _memory(s, tile, sweeps)
        if sum(memory.values()) <= budget:
            made = _spend(s, budget, tile, sweeps, memory)
            # A wide tile gains less than a product that is not done again.
            if tile != wide or made.kept_tokens == s.tokens or made.sparse or made.marks or not sweeps or s.entropy:
                return made
    least = least_budget(s) + held
    raise ValueError(
        f"memory_budget is {given:,} bytes ({_mib(given)}), but {s.tokens:,} tokens x {s.hidden_size:,} features x "
        f"{s.vocab_size:,} vocabulary in {s.dtype} need at least {least:,} ({_mib(least)})"
    )


def least_budget(s: Workload) -> int:
    """The smallest budget in bytes that a call has a plan for."""
    s = replace(s, filter="")
    return min(sum(_memory(s, tile, sweeps).values()) for tile, sweeps in _candidates(s))


def _candidates(s: Workload, first: tuple[int, int] | None = None) -> list[tuple[tuple[int, int], tuple[Sweep, ...]]]:
    """Tiles and orders of the sweeps, best first; `first` is a tile that comes before all others."""
    sizes = s.tile_sizes()
    # Full GEMM efficiency needs a tile of some size, so small tiles come after the order that needs no accumulator.
    half = -(-len(sizes) // 2)
    choices = s.sweep_choices()
    candidates = [(t, c) for group in (sizes[:half], sizes[half:]) for c in choices for t in group]
    if first is not None:
        candidates = [(first, c) for c in choices] + candidates
    if s.frozen:  # the Jacobian may not fit: then the logits come again in backward, three GEMMs instead of two
        candidates += [(t, (Sweep("tokens", True, False),)) for t in sizes]
    return candidates


def _memory(s: Workload, tile: tuple[int, int], sweeps: tuple[Sweep, ...]) -> dict[str, int]:
    """What a plan holds at the least, in bytes."""
    n, v = tile
    return {
        "libraries and threads": s.capabilities.scratch,
        "vectors, one number a token": s.vectors(),
        "tile and operands": max(s.tile(n, v) + s.states(n, v, sweeps), 0 if sweeps else s.scaled(n)),
        "gradient accumulators": s.accumulators(n, v, sweeps),
        "low-rank adapter": s.low_rank(n, v),
        "between ranks": s.between_ranks(),
        "what is left out, and products of the rest": s.left_out(n, v),
        "d log_prob / d hidden": s.wide * s.tokens * s.hidden_size * s.frozen if not sweeps else 0,
    }


def _tile_of_a_full_step(s: Workload, budget: int) -> tuple[int, int] | None:
    """The tile that a call with all gradients takes under this budget, None if none fits. With the same tiles, policy
    and frozen reference get the same log-probs to the last bit, whatever gradients either wants."""
    full = replace(s, grads=Grads(True, True, s.grads.bias, s.rank > 0), entropy=False)
    if s == full:
        return None
    try:
        made = plan(full, budget)
    except ValueError:
        return None
    return made.tile_tokens, made.tile_vocab


def _spend(s: Workload, budget: int, tile: tuple[int, int], sweeps: tuple[Sweep, ...], memory: dict[str, int]) -> Plan:
    """Spends what is left of the budget: first on hidden states at hand in the compute dtype, then on kept tokens."""
    n, v = tile
    left = budget - sum(memory.values())
    at_hand = s.tokens * s.columns * s.product
    hold = (s.operand > 0 or s.gathers) and at_hand <= left // 4
    memory["hidden states, gathered and converted once"] = at_hand * hold
    left -= at_hand * hold
    more_scaled = s.scaled_rows(s.tokens) - s.scaled_rows(n) if sweeps and not s.entropy else 0
    hold_scaled = 0 < more_scaled <= left // 4
    left -= more_scaled * hold_scaled
    kept = arena = 0
    marks = bool(sweeps) and s.marks(n)
    if sweeps and not s.entropy:
        kept = s.tokens
        unused = s.unused_beside_saved(n, v)
        if s.sparse:
            kept, arena = 0, s.arena_rows(left, n, v)
        elif s.saved_row(v) * s.tokens <= left + unused:
            memory["tile and operands"] -= unused
        else:
            # A gradient that one product makes is made of two where some tokens are kept.
            more = s.accumulators(n, v, sweeps, single=False) - memory["gradient accumulators"] + s.scaled_rows(n)
            step = lcm(s.capabilities.saved_multiple or n, s.capabilities.group if marks else 1)
            kept = max(left - more, 0) // s.saved_row(v) // step * step
            memory["gradient accumulators"] += more if kept else 0
        memory["hidden states times their scales"] = more_scaled * hold_scaled * (kept > 0)
        memory["kept probabilities"] = s.arena(arena, n, v) if arena else kept * s.saved_row(v)
    share = s.columns / s.hidden_size  # of a product
    if not s.grads:
        mode, gemms = "score", share
    elif not sweeps:
        mode, gemms = "frozen", 2.0
    else:
        mode = "recompute" if not kept else "keep" if kept == s.tokens else "mixed"
        mode = "sparse" if arena else "gather" if marks else mode
        again = 1 - kept / s.tokens if s.tokens else 0
        gemms = (1 + len(sweeps) * again) * share + s.grads.hidden + s.grads.weight
        gemms += 2 * (share - 1) * (s.grads.low_rank or s.grads.hidden)
        gemms = share if mode in ("sparse", "gather") else gemms
    return Plan(
        mode, s.tokens, s.hidden_size, s.vocab_size, s.dtype, n, v, kept, hold, s.capabilities.maxima_columns or v,
        s.capabilities.saved_by_vocab, s.one_pass(sweeps), sweeps, gemms, budget, tuple(memory.items()), s.rank,
        s.ranks, arena, s.capabilities.group if marks else 0,
        s.first_part(n, v) if marks and kept < s.tokens else 0, s.one_base and kept > 0 and not marks,
        hold_scaled and kept > 0, s.exchanges(),
    )  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
