"""The losses under the name of the module that they were in before; `dpo_kernels.losses` has them now.

A new loss does not have to be added here.
"""

from typing import Any

from dpo_kernels.losses import DIVERGENCES, LOSSES, LossOptions, Pairs, Sides, formulas, pair_losses
from dpo_kernels.losses.registry import names_of

__all__ = ["DIVERGENCES", "LOSSES", "LossOptions", "Pairs", "Sides", "pair_losses"]

# Of the losses that come with the package.
SMOOTHED = names_of(lambda loss: loss.smoothing is not None)
DIVERGING = names_of(lambda loss: len(loss.divergences) > 1)
SORTED = names_of(lambda loss: not loss.paired)
REFERENCE_FREE = names_of(lambda loss: not loss.needs_reference)
POSITIVE_BETA = names_of(lambda loss: loss.positive_beta)


def __getattr__(name: str) -> Any:
    """Each loss by the name of its function."""
    return getattr(formulas, name)
