"""Pure: what a call is to the plan, and the sizes that follow from it, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpo_kernels.call import Grads, accumulate_dtype
from dpo_kernels.capabilities import DEFAULT_BUDGET, Capabilities
from dpo_kernels.layout import CAST

LABELS = 1024  # tokens whose labels' logits are made at once
MARKED = 2048  # columns of saved exponentials that a program marks
GROUP = 128  # tokens that share a list of columns that are kept (csrc/select.h)
LARGEST_SHARE = 3  # a tile with more than a third to keep is kept whole: gathering would cost what it saves
THIN_COLUMNS = 1024  # of which are multiplied at once
ALIGNMENT = 16  # numbers; rows that kernels write start on a multiple of it


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
    filter: how entries with a small share of the softmax are left out, as in `Capabilities.filters`.
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
    filter: str = ""

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
        return self.grads == Grads(hidden=True) and not self.entropy and not self.rank and not self.filter

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
        # Ranks have to make the same plan, on machines that may differ.
        usual = self.capabilities.default_budget if not self.ranks else DEFAULT_BUDGET
        return max(usual, 2 * self.dtype.itemsize * self.hidden_size * (self.tokens + self.vocab_size))

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
            own_sum = self.in_place or (single and not self.sparse and self.capabilities.rounds and self.tokens <= n)
            columns = 0 if own_sum else v if sweep.outer == "vocab" else self.vocab_size
            # Rows of the hidden states' gradient are cast before they are put in their places.
            cast = n * self.dtype.itemsize if sweep.hidden and self.gathers and not self.in_place else 0
            return self.hidden_size * (self.wide * (rows * sweep.hidden + columns * sweep.weight) + cast)

        return max((one(sweep) for sweep in sweeps), default=0)

    def marks(self, n: int) -> bool:
        """Whether forward marks columns that backward gathers: tiles of n tokens are whole groups."""
        whole = self.filter == "gather" and (n % self.capabilities.group == 0 or n >= self.tokens)
        return whole and self.tokens > 0 and not self.entropy

    def first_part(self, n: int, v: int) -> int:
        """Vocabulary entries that forward takes first where it marks columns: whole programs of any kernel that it may
        take, and few, where that leaves little of the device idle."""
        found, widest = [], 1
        for splits in self.capabilities.splits:
            width = splits.width(self.tokens, self.vocab_size, v)
            found.append(splits.first_part(min(n, self.tokens), self.vocab_size, width))
            widest = max(widest, width)
        return -(-max(found, default=self.vocab_size) // widest) * widest

    @property
    def sparse(self) -> bool:  # forward keeps columns, backward multiplies them
        return self.filter == "keep"

    def left_out(self, n: int, v: int) -> int:
        """Beside an arena: bounds and sums of what is left out; what a part of a tile's columns is multiplied with."""
        if self.filter == "gather":
            return self._gathered(n, v)
        if not self.sparse:
            return 0
        chosen = 3 * self.wide * GROUP * v + n * self.columns * (2 * self.wide + self.product)
        multiplied = THIN_COLUMNS * (
            self.columns * (self.wide + 2 * self.product) + GROUP * 3 * (self.wide + self.product)
        )
        return self.tokens * (16 + 2 * self.wide) + max(chosen, multiplied)

    def _gathered(self, n: int, v: int) -> int:
        """Flags of columns and what rows know; the padding of groups; labels' logits while they are made; how much rows
        leave out of parts of the vocabulary; lists of a tile's columns and groups, and what they are sorted by (keys,
        their sorted copy and its indices, twice); the weight's mean row."""
        group, whole = self.capabilities.group, aligned(self.tokens)
        of_tile, groups = -(-n // group), -(-self.tokens // group)
        marks = 2 * groups * aligned(self.vocab_size) + self.tokens * 48 + 5 * self.wide * whole
        beyond = self.product * (of_tile * group - n) * aligned(v)
        labels = min(self.tokens, LABELS) * (self.columns * (3 * self.wide + 2 * self.product) + 8)
        drops = self.wide * self.tokens * (-(-self.vocab_size // MARKED) + 1)
        lists = 4 * (2 * of_tile + 1) * (v + 1) + 64 * (v + 1) + 8 * groups * (-(-self.vocab_size // v) + 1)
        mean_row = self.wide * min(self.vocab_size, THIN_COLUMNS) * self.columns
        return marks + beyond + max(labels, drops, lists + mean_row)

    def arena(self, rows: int, n: int, v: int) -> int:
        """Of so many rows, with the numbers of columns that are kept: one a group of tokens, twice for a moment."""
        group = min(n, GROUP)
        listed = 16 * aligned(self.vocab_size) * rows // group
        short = 16 * (self.vocab_size // LARGEST_SHARE + 1)  # of the last group, which may be one token
        return rows * self.saved_row(v) + listed + short

    def arena_rows(self, left: int, n: int, v: int) -> int:
        """Rows of an arena within so many bytes; 0 where it would gain nothing: a frozen head's step is two products
        without one, and with one that holds all."""
        room = self.tokens + -(-n * v // (LARGEST_SHARE * max(1, self.vocab_size)))  # for the last tile's columns, too
        more = self.arena(1, n, v) - self.arena(0, n, v) + 1
        rows = min(room, max(0, left - self.arena(0, n, v)) // more)
        least = self.tokens if replace(self, filter="").frozen else -(-n * v // max(1, self.vocab_size))
        return rows if rows >= max(1, least) and self.tokens else 0

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
        splits = [(s.state, s.width(self.tokens, self.vocab_size, v)) for s in self.capabilities.splits]
        drops = self.wide * (self.filter == "gather")
        return n * max(((state + drops) * -(-columns // width) for state, width in splits), default=0)

    def scaled(self, n: int) -> int:
        """What backward of a frozen head makes of n rows: d log_prob / d hidden times their gradient, and its cast."""
        cast = self.dtype.itemsize if self.gathers and not self.in_place else 0
        return n * self.hidden_size * (self.wide + cast) if self.frozen else 0

    def saved_row(self, v: int) -> int:
        return (
            aligned(self.vocab_size) * self.compute_dtype.itemsize
            + -(-self.vocab_size // (self.capabilities.maxima_columns or v)) * self.wide
            + -(-self.vocab_size // v) * self.wide * self.sparse
            + 4 * self.wide * self.one_base
        )

    @property
    def one_base(self) -> bool:
        """Whether exponentials are saved relative to one number a row: float16 holds too few powers for it, float32
        would lose digits, what is summed beside the two gradients has no use for it, and forward with a cap too has no
        registers left for it."""
        more = self.grads.bias or self.rank or self.filter or self.softcap or self.compute_dtype != torch.bfloat16
        return self.capabilities.one_base and self.vocab_size > 0 and not more

    def scaled_rows(self, n: int) -> int:
        """Hidden states of n tokens times a number each, which stand in a product with such exponentials."""
        return self.product * n * self.hidden_size * (self.one_base and self.grads.weight)

    def unused_beside_saved(self, n: int, v: int) -> int:
        """What a tile needs no room for if all tokens are kept: products multiply what is saved as it lies."""
        of_vocab = self.grads.weight or self.grads.low_rank
        if self.one_base:
            return self.product * n * aligned(v) * (not self.converts) - self.scaled_rows(n)
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


def aligned(columns: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT
