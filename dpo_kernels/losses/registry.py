"""What each loss has and needs, one row a loss. `formulas.py` fills the table in, below the functions themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_kernels.losses.pairs import Pairs


@dataclass(frozen=True)
class Smoothing:
    """A loss's range of label_smoothing: [0, below), or (0, below) where it has to be positive."""

    below: float = 1.0
    positive: bool = False
    example: str = ""  # a value that works, for the error message

    def __contains__(self, value: float) -> bool:
        return (value > 0 if self.positive else value >= 0) and value < self.below

    def __str__(self) -> str:
        return f"{'(' if self.positive else '['}0, {self.below:g})"


@dataclass(frozen=True)
class Loss:
    """One row: a loss, and which options it has.

    name: what loss_type calls it.
    function: takes `Pairs` and `LossOptions`, gives one number per pair, (B,).
    smoothing: the range of label_smoothing; None: the loss has none.
    needs_reference: whether the loss looks at the reference.
    positive_beta: whether a beta of 0 is an error.
    paired: False for a loss that sorts the batch: it has no pairs left that could be weighted.
    divergences: the names in `DIVERGENCES` that it is defined for.
    """

    name: str
    function: Callable[..., Tensor]
    smoothing: Smoothing | None = None
    needs_reference: bool = True
    positive_beta: bool = False
    paired: bool = True
    divergences: tuple[str, ...] = ("reverse_kl",)

    def __call__(self, pairs: Pairs, options: Any) -> Tensor:
        return self.function(pairs, options)


LOSSES: dict[str, Loss] = {}
# f'(t) of t = exp(h) = pi / pi_ref, from h and the options.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {}


def register(*losses: Loss) -> None:
    """Puts rows into the table.

    Raises:
        ValueError: there is a loss of that name.
    """
    for loss in losses:
        if loss.name in LOSSES:
            raise ValueError(f"there is a loss {loss.name!r} already; expected another name")
        LOSSES[loss.name] = loss


def names_of(has: Callable[[Loss], bool]) -> tuple[str, ...]:
    """The names of the losses for which it is so."""
    return tuple(name for name, loss in LOSSES.items() if has(loss))
