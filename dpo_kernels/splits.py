"""How a kernel splits the vocabulary among its programs: so that all of them are done first, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

IDLE = 1.15  # how much longer parts may take than one piece: a step without room for exponentials has four products
PROGRAM = 0.05  # what a program of a kernel costs beside its blocks, in blocks


@dataclass(frozen=True)
class Splits:
    """How a forward kernel splits the vocabulary among programs, each of which leaves a state of its rows to be merged.

    rows, columns: of a block. at_once: programs that the device runs at a time. widest: columns that one program walks
    at most. state: bytes of a row's state.
    """

    rows: int
    columns: int
    at_once: int
    widest: int
    state: int = 0

    def width(self, tokens: int, vocab_size: int, tile_vocab: int) -> int:
        """Vocabulary entries that one program walks, `columns` times a power of two: those with which all programs are
        done first. Of the whole call and its tiles: then modes do not move the places where sums are cut."""
        widths = [self.columns]
        while 2 * widths[-1] <= min(tile_vocab, self.widest):
            widths.append(2 * widths[-1])
        blocks = -(-max(tokens, 1) // self.rows)
        return min(reversed(widths), key=lambda width: self._time(blocks, vocab_size, width))

    def first_part(self, tokens: int, vocab_size: int, width: int) -> int:
        """Vocabulary entries of the first of the `parts` of a call that is cut into them, in programs of `width`: as
        few as leave little of the device idle, of so many tokens at once."""
        blocks = -(-max(tokens, 1) // self.rows)
        whole = self._time(blocks, vocab_size, width)
        for first in range(width, vocab_size, width):
            if sum(self._time(blocks, end - start, width) for start, end in parts(vocab_size, first)) <= IDLE * whole:
                return first
        return vocab_size

    def _time(self, blocks: int, vocab_size: int, width: int) -> float:
        """Until the last program is done, in blocks of columns: whole waves of programs, then those that are left, with
        the narrower ones of the vocabulary's end beside them where there is room."""
        splits, rest = divmod(vocab_size, width)
        whole, last = width / self.columns + PROGRAM, -(-rest // self.columns) + PROGRAM
        waves, left = divmod(blocks * splits, self.at_once)
        narrow, time = blocks if rest else 0, waves * whole
        if left:
            time += whole
            narrow -= min(narrow, (self.at_once - left) * int(whole // last))
        return time + -(-narrow // self.at_once) * last


def parts(vocab_size: int, first: int, widest: int | None = None) -> list[tuple[int, int]]:
    """(start, end) of the parts of a vocabulary, each as long as all before it, but no longer than the widest."""
    starts = [0]
    while starts[-1] < vocab_size:
        step = max(starts[-1], first)
        starts.append(min(starts[-1] + (step if widest is None else min(step, widest)), vocab_size))
    return list(pairwise(starts))
