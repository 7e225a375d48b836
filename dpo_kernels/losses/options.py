"""What a preference loss can be told, and the ranges of all of it, by itself and together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_kernels.losses.pairs import AGGREGATES
from dpo_kernels.losses.registry import DIVERGENCES, LOSSES, Loss, names_of


@dataclass(frozen=True)
class LossOptions:
    """What a preference loss can be told; `check_options` holds it to the ranges given here.

    beta: >= 0, for ipo, ipo_unnormalized and sppo_hard > 0. How strongly the policy is held to the reference.
    aggregate: "sum", or "mean" over the tokens that count.
    loss_type: a key of `LOSSES`, or several: their weighted sum.
    loss_weights: one finite number per loss_type; None: 1 each.
    label_smoothing: in [0, 1), the share of pairs whose preference may be flipped; for robust < 0.5, for exo_pair > 0.
        Not every loss has it (`Loss.smoothing`); in a sum it counts in each that has it, and the others are as without.
    f_divergence_type: a key of `DIVERGENCES`; another than "reverse_kl" only with losses that have it
        (`Loss.divergences`).
    f_alpha_divergence_coef: finite, alpha of "alpha_divergence"; 1 is the reverse KL divergence.
    ld_alpha: None or in [0, 1]: weight of the tokens that the longer answer of a pair has beyond the shorter one's
        length, in policy and reference (LD-DPO, Liu et al. 2024, arXiv:2409.06411). Negative log-likelihoods (sft, and
        those within cpo and orpo) count every token in full all the same.
    use_weighting: each pair weighs as much as it is likely under the policy (WPO, Zhou et al. 2024, arXiv:2406.11827);
        not for losses that sort the batch and have no pairs left (`Loss.paired`).
    discopop_tau: temperature of discopop, > 0.
    simpo_gamma: target margin of simpo, >= 0.
    cpo_alpha: weight of cpo's negative log-likelihood, >= 0.
    """

    beta: float = 0.1
    aggregate: str = "sum"
    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The rows of the losses asked for; the options are checked before."""
        return tuple(LOSSES[name] for name in self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses looks at the reference; the rewards always do where there is one."""
        return any(loss.needs_reference for loss in self.losses)


def check_options(options: LossOptions) -> LossOptions:
    """Holds a loss's options to their ranges, each by itself and together, and returns them."""
    _check_names(options)
    _one_of("aggregate", options.aggregate, AGGREGATES)
    _one_of("f_divergence_type", options.f_divergence_type, tuple(DIVERGENCES))
    _number("beta", options.beta, "a finite number >= 0", low=0)
    _number("label_smoothing", options.label_smoothing, "a number in [0, 1)", low=0, below=1)
    _number("f_alpha_divergence_coef", options.f_alpha_divergence_coef, "a finite number")
    _number("discopop_tau", options.discopop_tau, "a finite number > 0", above=0)
    _number("simpo_gamma", options.simpo_gamma, "a finite number >= 0", low=0)
    _number("cpo_alpha", options.cpo_alpha, "a finite number >= 0", low=0)
    if options.ld_alpha is not None:
        _number("ld_alpha", options.ld_alpha, "None or a number in [0, 1]", low=0, high=1)
    _check_together(options)
    return options


def _check_names(options: LossOptions) -> None:
    if not isinstance(options.loss_type, (str, list, tuple)):
        raise TypeError(f"loss_type is {options.loss_type!r}; expected a name or a list of names")
    names, weights = options.names, options.loss_weights
    if not names:
        raise ValueError(f"loss_type is {options.loss_type!r}; expected at least one name")
    for name in names:
        _one_of("loss_type", name, tuple(LOSSES))
    if weights is not None:
        if not isinstance(weights, (list, tuple)):
            raise TypeError(f"loss_weights are {weights!r}; expected None or a list of numbers")
        if len(weights) != len(names):
            raise ValueError(f"loss_weights are {weights!r}, loss_type {options.loss_type!r}; expected one weight each")
        for weight in weights:
            _number("a weight in loss_weights", weight, "a finite number")


def _check_together(options: LossOptions) -> None:
    """What each loss wants of the options, and what one option needs of another."""
    losses, smoothing, divergence = options.losses, options.label_smoothing, options.f_divergence_type
    for loss in losses:
        if loss.positive_beta and options.beta == 0:
            raise ValueError(f"beta is {options.beta}; expected a finite number > 0 for loss_type {loss.name!r}")
    for loss in losses:
        if loss.smoothing is not None and smoothing not in loss.smoothing:
            example = f", such as {loss.smoothing.example}" if loss.smoothing.example else ""
            raise ValueError(
                f"label_smoothing is {smoothing}; expected a number in {loss.smoothing} for loss_type "
                f"{loss.name!r}{example}"
            )
    if smoothing != 0 and all(loss.smoothing is None for loss in losses):
        raise ValueError(
            f"label_smoothing is {smoothing}, which loss_type {options.loss_type!r} does not have; "
            f"these do: {names_of(lambda loss: loss.smoothing is not None)}"
        )
    for loss in losses:
        if divergence not in loss.divergences:
            raise ValueError(
                f"f_divergence_type is {divergence!r}, which loss_type {loss.name!r} is not defined for; "
                f"expected 'reverse_kl', or a loss_type from {names_of(lambda loss: divergence in loss.divergences)}"
            )
    for loss in losses:
        if options.use_weighting and not loss.paired:
            raise ValueError(
                f"use_weighting is True, but loss_type {loss.name!r} sorts the batch and has no pairs left"
            )


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {choices}")


def _number(
    name: str,
    value: float,
    expected: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> None:
    """A finite number in [low, high], and between above and below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if not (-math.inf < value < math.inf and low <= value <= high and above < value < below):
        raise ValueError(f"{name} is {value}; expected {expected}")
