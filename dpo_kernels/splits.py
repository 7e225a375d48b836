"""How a kernel splits the vocabulary among its programs: so that all of them are done first, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

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
