"""A rank's part of the vocabulary: which rows of the head's weight it holds, and with whom it holds them all."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_DIM = -1


@dataclass(frozen=True)
class VocabShard:
    """Rows first_row, first_row + 1, ... of the weight (V, D) are here, the others on the other ranks of a group.

    The ranks' parts lie one behind the other in any order of ranks, may differ in size, and may be empty. Every rank
    calls with the same labels, which are tokens of the whole vocabulary, and the same hidden states; gets the same
    log-probs, to the last bit, and has to give them the same gradient. It gets the whole gradient of the hidden states,
    and that of its own rows of weight, bias and low_rank.b.

    Args:
        process_group: the ranks; None: all of them.
        first_row: of the rows that are here, in the whole vocabulary.
        vocab_size: V, of the whole vocabulary.
        hidden_dim: the dimension of the hidden states, but the last, that is split over the ranks too, in the pieces of
            `torch.chunk`: each rank gives its own piece, and gets the gradient of it. Labels and log-probs are whole.
            None: every rank gives all hidden states.

    Raises:
        TypeError, ValueError: a number is not whole, or is out of range.
    """

    process_group: ProcessGroup | None
    first_row: int
    vocab_size: int
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("first_row", 0), ("vocab_size", 1), ("hidden_dim", 0)):
            value = getattr(self, name)
            if name == "hidden_dim" and value is None:
                continue
            if isinstance(value, bool) or not hasattr(type(value), "__index__"):
                raise TypeError(f"{name} of a VocabShard is {value!r}; expected a whole number")
            if operator.index(value) < least:
                raise ValueError(f"{name} of a VocabShard is {value}; expected a number >= {least}")

    @staticmethod
    def of(rows: int, process_group: ProcessGroup | None = None, hidden_dim: int | None = None) -> VocabShard:
        """From how many rows each rank holds, in the order of ranks. All ranks of the group have to call it.

        Raises:
            ValueError: torch.distributed is not initialized; no rank holds a row.
        """
        _initialized()
        counts = [0] * dist.get_world_size(process_group)
        dist.all_gather_object(counts, rows, group=process_group)
        first = sum(counts[: dist.get_rank(process_group)])
        return VocabShard(process_group, first, sum(counts), hidden_dim)

    @property
    def group(self) -> ProcessGroup:
        """The ranks, as an object.

        Raises:
            ValueError: torch.distributed is not initialized.
        """
        if self.process_group is not None:
            return self.process_group
        _initialized()
        group = dist.group.WORLD
        assert group is not None
        return group

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    def encode(self) -> tuple[list[int], str]:
        """As whole numbers and the name that torch.distributed knows the group by."""
        return [self.first_row, self.vocab_size, NO_DIM if self.hidden_dim is None else self.hidden_dim], (
            self.group.group_name
        )

    @staticmethod
    def decode(numbers: list[int], group_name: str) -> VocabShard:
        first_row, vocab_size, hidden_dim = numbers
        group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
        return VocabShard(group, first_row, vocab_size, None if hidden_dim == NO_DIM else hidden_dim)


def chunk(size: int, ranks: int, rank: int) -> slice:
    """What `torch.chunk` gives a rank of `size` rows; DTensor shards so too. The last ones may be short or empty."""
    step = -(-size // ranks)
    return slice(min(rank * step, size), min((rank + 1) * step, size))


def _initialized() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("a VocabShard needs ranks: call torch.distributed.init_process_group first")
