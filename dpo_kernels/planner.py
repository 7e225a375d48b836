"""Pure: shapes, dtypes, wanted gradients, capabilities and a memory budget in; mode, tiles, GEMMs and bytes out.

Nothing here touches a device or a tensor. The driver (`driver.py`) does what the plan says and no more, so the plan's
bytes are a promise: they bound what a call, forward and backward together, holds beyond its inputs, its outputs and
the gradients that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch

from dpo_kernels.call import Grads, accumulate_dtype
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.layout import CAST

MIB = 2**20
ALIGNMENT = 16  # numbers; rows that kernels write start on a multiple of it
DEFAULT_BUDGET = 1024 * MIB


@dataclass(frozen=True)
class Sweep:
    """One backward pass over all tiles. outer: the axis of the outer loop, whose gradient is finished tile by tile;
    the other axis' gradient, where wanted too, needs an accumulator of its full size. low_rank: what its gradients are
    made of is summed too, in accumulators of its full size: it is narrow."""

    outer: str
    hidden: bool
    weight: bool
    low_rank: bool = False


@dataclass(frozen=True)
class Plan:
    """What a call will do. Print it.

    mode: "score" (no gradient), "frozen" (only the hidden states want one), "keep", "mixed" or "recompute".
    kept_tokens: how many tokens keep their probabilities from forward to backward; the others compute logits again.
    gemms: products of 2 * tokens * hidden_size * vocab_size flop that forward and backward take together.
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
    exchanges: tuple[tuple[str, int], ...] = ()

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
        return [slice(0, self.vocab_size)] if whole else self.vocab_spans

    @property
    def blocks(self) -> int:
        """How many block maxima a row of saved exponentials has; 0 where nothing is saved."""
        return -(-self.vocab_size // self.maxima_columns) if self.kept_tokens else 0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        n, d, v = self.tokens, self.hidden_size, self.vocab_size
        lines = [
            f"{self.mode}: {n:,} tokens x {d:,} features x {v:,} vocabulary, {name}"
            + (f", low rank {self.rank}" if self.rank else "")
            + (f", one of {self.ranks} ranks" if self.ranks else ""),
            f"  GEMMs   {self.gemms:.3g} (of {2e-9 * n * d * v:,.0f} GFLOP each)",
            f"  tiles   {self.tile_tokens:,} tokens x {self.tile_vocab:,} vocabulary",
        ]
        if self.mode in ("keep", "mixed", "recompute"):
            lines.append(f"  kept    {self.kept_tokens:,} of {self.tokens:,} tokens")
        for sweep in self.sweeps:
            parts = (("hidden", sweep.hidden), ("weight", sweep.weight), ("low rank", sweep.low_rank))
            wanted = " and ".join(n for n, on in parts if on) or "bias"
            lines.append(f"  sweep   {sweep.outer} outside, gradient of {wanted}")
        lines.append(f"  memory  {_mib(self.bytes)} of a budget of {_mib(self.memory_budget)}")
        lines += [f"          {_mib(size):>11}  {what}" for what, size in self.memory.items() if size]
        lines += [f"  ranks   {_mib(size):>11}  {what}" for what, size in self.exchanges]
        return "\n".join(lines)


@dataclass(frozen=True)
class Workload:
    """What a call is to the plan, checked by the caller; the rest are the sizes that follow from it, in bytes.

    tokens, hidden_size, vocab_size: N (those whose label counts), D and V.
    dtype, compute_dtype: of hidden states and weight; autocast's, or `dtype`.
    entropy: whether it is asked for: a gradient through it rules out the modes frozen and keep.
    softcap: whether logits are capped.
    labels: all of them, with those that are ignored, of which a few bytes are held too.
    rank: of the weight's low-rank adapter; 0 without one.
    statistics: how many are asked for.
    ranks: over which the vocabulary is split, vocab_size being what is here, which may be 0; 0 where it is not split.
    hidden_split: whether the hidden states are too.
    """

    tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    grads: Grads
    entropy: bool
    softcap: bool
    labels: int
    capabilities: Capabilities
    rank: int = 0
    statistics: int = 0
    ranks: int = 0
    hidden_split: bool = False

    @property
    def columns(self) -> int:
        """Of an operand: features, and what a low-rank adapter puts beside them."""
        return self.hidden_size + self.rank

    @property
    def wide(self) -> int:  # bytes of a number in the accumulation dtype
        return accumulate_dtype(self.dtype).itemsize

    @property
    def in_place(self) -> bool:  # a returned gradient can serve as its own accumulator
        return self.dtype == accumulate_dtype(self.dtype)

    @property
    def gathers(self) -> bool:  # some labels are ignored: rows of the hidden states are gathered, and scattered
        return self.labels > self.tokens

    @property
    def operand(self) -> int:  # bytes of a converted operand, 0 where the input itself is one
        if self.converts:
            return self.wide if self.dtype == self.compute_dtype else self.wide + self.compute_dtype.itemsize
        # An adapter's columns lie beside the features, so that an operand is a copy.
        return 0 if self.dtype == self.compute_dtype and not self.rank else self.compute_dtype.itemsize

    @property
    def weight_slice(self) -> int:  # bytes of a number of the weight's slice, 0 where the weight itself is read
        if not self.capabilities.packs or self.rank:
            return self.operand
        return 0 if self.dtype == self.compute_dtype else self.compute_dtype.itemsize

    @property
    def converts(self) -> bool:  # operands are widened first
        return self.compute_dtype in self.capabilities.widens

    @property
    def product(self) -> int:  # bytes of a number of a product's operand
        return self.wide if self.converts else self.compute_dtype.itemsize

    @property
    def frozen(self) -> bool:
        return self.grads == Grads(hidden=True) and not self.entropy and not self.rank

    def tile_sizes(self) -> list[tuple[int, int]]:
        """The device's tiles that this shape fills at least half, cut to it; best first."""
        useful = [
            (n, v) for n, v in self.capabilities.tiles if n // 2 < max(self.tokens, 1) or v // 2 < self.vocab_size
        ]
        useful = self.wide_tile() + useful
        return [
            (min(n, max(self.tokens, 1)), min(v, max(self.vocab_size, 1)))
            for n, v in useful or [self.capabilities.tiles[-1]]
        ]

    def wide_tile(self) -> list[tuple[int, int]]:
        """The wide tile that this shape fills at least half, if any. Where W is converted a narrow one is better.

        A vocabulary that is no multiple of 16 is cut as narrow tiles cut it, at multiples of their width: kernels are
        compiled by whether a tile's is one of 16, and no number of tokens may compile them.
        """
        if self.weight_slice:
            return []
        narrow = self.capabilities.tiles[0][1]
        copied = self.capabilities.packs * self.columns * self.product  # bytes of a column
        found = [
            (n, v)
            for n, v in self.capabilities.wide_tiles
            if self.tokens <= n and v // 2 < self.vocab_size and v * copied <= self.capabilities.widest_copy
        ][:1]
        if self.vocab_size % ALIGNMENT == 0 or self.capabilities.packs:
            return found
        return [(n, min(v, self.vocab_size // narrow * narrow)) for n, v in found if self.vocab_size >= narrow]

    def default_budget(self) -> int:
        return max(DEFAULT_BUDGET, 2 * self.dtype.itemsize * self.hidden_size * (self.tokens + self.vocab_size))

    def vectors(self) -> int:  # vectors of one number a token: index, label, maximum, sums, gradients
        found = 4 * self.labels  # which labels count
        return (
            found
            + self.tokens * (3 * 8 + (20 if self.capabilities.packs else 12) * self.wide)
            + (2 * self.wide * self.vocab_size if self.grads.bias else 0)
        )

    def low_rank(self, n: int, v: int) -> int:
        """Sums of a low-rank adapter's gradients and of the hidden states' through it, and what becomes of them."""
        if not self.rank:
            return 0
        scratch = self.product * self.rank * self.hidden_size + self.wide * self.rank * (n + v)
        if not self.grads.low_rank and not self.grads.hidden:
            return scratch
        sums = self.rank * (self.tokens + self.vocab_size + 3 * self.hidden_size)
        return scratch + self.wide * (sums + 2 * n * self.hidden_size)

    def tile(self, n: int, v: int) -> int:
        """The logits tile, what stands beside it while it is accumulated, and both operands."""
        g, columns = self.grads, self.columns
        gathered = n * (self.hidden_size * self.dtype.itemsize + columns * self.operand)
        operands = v * columns * self.weight_slice + gathered
        if self.capabilities.packs:
            left = n * (columns + 1)  # the hidden states, for logits
            # The right operands of a tile's products: slices of the weight and of the hidden states.
            right = ((v + 1) * (g.hidden or g.low_rank) + (n + 1) * (g.weight or g.low_rank)) * columns
            packed = self.product * (left + right)
            sides = (g.hidden or g.low_rank) + (g.weight or g.bias or g.low_rank)
            maxima = self.wide * n * -(-v // 64) * (g.hidden or g.low_rank)
            return operands + packed + self.product * n * v * sides + maxima
        # dz, or the frozen head's operand, where it is not the tile of logits itself
        beside = self.product * (bool(self.grads) and (self.capabilities.one_pass or self.product != self.wide))
        logits = self.wide * (not self.capabilities.one_pass)
        if not self.capabilities.no_temporaries:
            beside += self.wide * (self.softcap + self.entropy)
        shared = self.capabilities.maxima_columns
        maxima = self.wide * n * aligned(-(-v // shared)) if shared else 0
        columns = aligned(v) if self.capabilities.no_temporaries else v
        return n * columns * (logits + beside) + maxima + operands

    def accumulators(self, n: int, v: int, sweeps: tuple[Sweep, ...], single: bool = True) -> int:
        """The largest that the sweeps need: a tile's worth on the outer axis, a whole gradient on the inner one.
        single: a tile of all tokens is one product, which is its own sum."""

        def one(sweep: Sweep) -> int:
            here = self.ranks > 0 or (self.in_place and not self.gathers)  # `between_ranks` counts what is summed there
            rows = 0 if here else n if sweep.outer == "tokens" else self.tokens
            own_sum = self.in_place or (single and self.capabilities.rounds and self.tokens <= n)
            columns = 0 if own_sum else v if sweep.outer == "vocab" else self.vocab_size
            # Rows of the hidden states' gradient are cast before they are put in their places.
            cast = n * self.dtype.itemsize if sweep.hidden and self.gathers and not self.in_place else 0
            return self.hidden_size * (self.wide * (rows * sweep.hidden + columns * sweep.weight) + cast)

        return max((one(sweep) for sweep in sweeps), default=0)

    def between_ranks(self) -> int:
        """What is sent and what it is made of: a few numbers a token, then a sum for each that counts."""
        if not self.ranks:
            return 0
        vectors = self.wide * self.tokens * (2 * (5 + self.statistics) + 20)
        row = self.hidden_size * self.dtype.itemsize
        whole = self.labels + self.ranks  # with what fills up the last piece
        pieces = 2 * -(-whole // self.ranks)
        hidden = row * (whole + pieces) if self.hidden_split else 0
        if not self.grads.hidden:
            return vectors + hidden + self.wide * self.rank * self.hidden_size
        sums = 0 if self.in_place and not self.gathers and not self.hidden_split else self.wide * self.tokens
        sums += self.wide * (whole + pieces) if self.hidden_split else 0
        cast = (
            0 if self.in_place or not self.gathers else self.dtype.itemsize * min(self.tokens * self.hidden_size, CAST)
        )
        return vectors + hidden + sums * self.hidden_size + cast + self.wide * self.rank * self.hidden_size

    def exchanges(self) -> tuple[tuple[str, int], ...]:
        """See `Plan`."""
        if not self.ranks:
            return ()
        hidden = -(-self.labels // self.ranks) * self.ranks * self.hidden_size  # the last piece is filled up
        made = [
            ("all-reduce, maxima", self.wide * (self.tokens + 3)),
            ("all-reduce, sums", self.wide * ((2 + self.statistics) * self.tokens + 2)),
        ]
        if self.hidden_split:
            made.insert(0, ("all-gather, hidden states", self.dtype.itemsize * hidden))
            if self.grads:
                made.append(("all-gather, hidden states again", self.dtype.itemsize * hidden))
        if self.grads.hidden and self.hidden_split:
            made.append(("reduce-scatter, gradient of hidden states", self.wide * hidden))
        elif self.grads.hidden:
            made.append(("all-reduce, gradient of hidden states", self.wide * self.tokens * self.hidden_size))
        if self.grads.low_rank:
            made.append(("all-reduce, gradient of low_rank.a", self.wide * self.rank * self.hidden_size))
        return tuple(made)

    def one_pass(self, sweeps: tuple[Sweep, ...]) -> bool:
        """Whether forward takes the vocabulary in one piece."""
        return self.capabilities.one_pass and not self.operand and (not self.frozen or bool(sweeps))

    def states(self, n: int, v: int, sweeps: tuple[Sweep, ...]) -> int:
        """What the programs of a forward kernel leave to be merged."""
        columns = self.vocab_size if self.one_pass(sweeps) else v
        return n * max(
            (s.state * -(-columns // s.width(self.tokens, self.vocab_size, v)) for s in self.capabilities.splits),
            default=0,
        )

    def scaled(self, n: int) -> int:
        """What backward of a frozen head makes of n rows: d log_prob / d hidden times their gradient, and its cast."""
        cast = self.dtype.itemsize if self.gathers and not self.in_place else 0
        return n * self.hidden_size * (self.wide + cast) if self.frozen else 0

    def saved_row(self, v: int) -> int:
        return (
            aligned(self.vocab_size) * self.compute_dtype.itemsize
            + -(-self.vocab_size // (self.capabilities.maxima_columns or v)) * self.wide
        )

    def unused_beside_saved(self, n: int, v: int) -> int:
        """What a tile needs no room for if all tokens are kept: products multiply what is saved as it lies."""
        of_vocab = self.grads.weight or self.grads.low_rank
        return self.product * n * v * (self.capabilities.packs and of_vocab)

    def sweep_choices(self) -> list[tuple[Sweep, ...]]:
        """The ways to order the backward loops, fewest GEMMs first."""
        g = self.grads
        if not g or self.frozen:
            return [()]
        if not (g.hidden and g.weight):
            usual = Sweep("tokens" if g.hidden else "vocab", g.hidden, g.weight, g.low_rank)
            # Slices of the weight are copied for an adapter: once, where they are walked outside.
            return [(replace(usual, outer="vocab"),), (usual,)] if self.rank else [(usual,)]
        smaller = "vocab" if self.tokens <= self.vocab_size else "tokens"
        two = (Sweep("tokens", True, False, g.low_rank), Sweep("vocab", False, True))
        return [(Sweep(smaller, True, True, g.low_rank),), two]


@lru_cache(maxsize=4096)
def plan(s: Workload, budget: int | None = None, held: int = 0) -> Plan:
    """What a call will do under a memory budget in bytes, of which `held` are taken.

    The default budget is 1 GiB, or twice the bytes of hidden states and weight where that is more.

    Raises:
        ValueError: the budget is too small to run at all; names the least that works.
    """
    given = s.default_budget() if budget is None else budget
    budget = given - held
    of_full_step = _tile_of_a_full_step(s, budget)
    wide = s.tile_sizes()[0] if s.wide_tile() and of_full_step is None else None
    for tile, sweeps in _candidates(s, of_full_step):
        memory = _memory(s, tile, sweeps)
        if sum(memory.values()) <= budget:
            made = _spend(s, budget, tile, sweeps, memory)
            # A wide tile gains less than a product that is not done again.
            if tile != wide or made.kept_tokens == s.tokens or not sweeps or s.entropy:
                return made
    least = least_budget(s) + held
    raise ValueError(
        f"memory_budget is {given:,} bytes ({_mib(given)}), but {s.tokens:,} tokens x {s.hidden_size:,} features x "
        f"{s.vocab_size:,} vocabulary in {s.dtype} need at least {least:,} ({_mib(least)})"
    )


def least_budget(s: Workload) -> int:
    """The smallest budget in bytes that a call has a plan for."""
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
    kept = 0
    if sweeps and not s.entropy:
        kept = s.tokens
        unused = s.unused_beside_saved(n, v)
        if s.saved_row(v) * s.tokens <= left + unused:
            memory["tile and operands"] -= unused
        else:
            # A gradient that one product makes is made of two where some tokens are kept.
            more = s.accumulators(n, v, sweeps, single=False) - memory["gradient accumulators"]
            step = s.capabilities.saved_multiple or n
            kept = max(left - more, 0) // s.saved_row(v) // step * step
            memory["gradient accumulators"] += more if kept else 0
        memory["kept probabilities"] = kept * s.saved_row(v)
    share = s.columns / s.hidden_size  # of a product
    if not s.grads:
        mode, gemms = "score", share
    elif not sweeps:
        mode, gemms = "frozen", 2.0
    else:
        mode = "recompute" if not kept else "keep" if kept == s.tokens else "mixed"
        again = 1 - kept / s.tokens if s.tokens else 0
        gemms = (1 + len(sweeps) * again) * share + s.grads.hidden + s.grads.weight
        gemms += 2 * (share - 1) * (s.grads.low_rank or s.grads.hidden)
    return Plan(
        mode, s.tokens, s.hidden_size, s.vocab_size, s.dtype, n, v, kept, hold, s.capabilities.maxima_columns or v,
        s.capabilities.saved_by_vocab, s.one_pass(sweeps), sweeps, gemms, budget, tuple(memory.items()), s.rank,
        s.ranks, s.exchanges(),
    )  # fmt: skip


def aligned(columns: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
