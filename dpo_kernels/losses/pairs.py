"""From log-probs per token to numbers per pair: masked sums and means, log ratios, lengths, weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.call import accumulate_dtype

AGGREGATES = ("sum", "mean")


@dataclass(frozen=True)
class Sides:
    """Values per answer, most often (B,) numbers: of the chosen and of the rejected, iterated in this order.

    No NamedTuple: torch.compile of PyTorch 2.9 does not see a property of one.
    """

    chosen: Tensor
    rejected: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.chosen, self.rejected))

    @staticmethod
    def of(values: Tensor) -> Sides:
        """Values of 2B answers, (2B, ...): first all chosen ones, then the rejected ones in the same order."""
        return Sides(*values.chunk(2))

    @property
    def answers(self) -> Tensor:
        """The way back, (2B, ...)."""
        return torch.cat((self.chosen, self.rejected))

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Pairs:
    """What the losses are made of, all float32 or float64.

    logps, ref_logps: aggregated log-probs of policy and reference.
    logratios: aggregated log pi - log pi_ref, subtracted token by token; beta times it is the reward.
    scores: f' of pi / pi_ref.
    tokens: how many tokens count.
    is_mean: whether logps, ref_logps and logratios are means over the tokens, and scores f' of such a mean.
    chosen_nll: the chosen answers' negative log-probs, (B,), scaled so that the mean over pairs is that over tokens.
    weights: None, or what each pair weighs, (B,).
    """

    logps: Sides
    ref_logps: Sides
    logratios: Sides
    scores: Sides
    tokens: Sides
    is_mean: bool
    chosen_nll: Tensor
    weights: Tensor | None

    def per_token(self, values: Sides) -> Sides:
        """Aggregated values over the number of tokens; those of a mean as they are; 0 for an answer without a token."""
        if self.is_mean:
            return values
        return Sides(*(value / count.clamp_min(1) for value, count in zip(values, self.tokens, strict=True)))


def aggregate_log_probs(
    log_probs: Tensor,  # (R, S)
    mask: Tensor,  # (R, S)
    aggregate: str = "sum",
) -> Tensor:
    """The sum or mean of each sequence's log-probs where the mask is not 0.

    Args:
        log_probs: (R, S), any floating dtype; masked values may be anything, NaN included.
        mask: (R, S), bool or numbers, 0 where a token does not count.
        aggregate: "sum" or "mean"; a sequence without any token is 0 either way.

    Returns:
        (R,), float32, or float64 for float64.

    Raises:
        ValueError: shapes differ, or an unknown aggregate.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}; expected one of {AGGREGATES}")
    if log_probs.ndim != 2 or mask.shape != log_probs.shape:
        raise ValueError(
            f"log_probs are {tuple(log_probs.shape)}, mask {tuple(mask.shape)}; expected two equal shapes (R, S)"
        )
    wide = log_probs.to(accumulate_dtype(log_probs.dtype))
    counts = mask != 0
    # where, not a product: NaN * 0 is NaN
    total = torch.where(counts, wide, 0).sum(1)
    return total if aggregate == "sum" else total / counts.sum(1).to(wide.dtype).clamp_min(1e-8)


def beyond_shared_length(counts: Tensor) -> Tensor:
    """Of the tokens that count, (2B, S) bool, those beyond the length of the pair's shorter answer."""
    shared = torch.minimum(*Sides.of(counts.sum(1)))
    return counts & (counts.cumsum(1) > Sides(shared, shared).answers[:, None])


@torch.no_grad()
def pair_weights(log_probs: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """(B,): exp of the mean of log p - log sum p^2 over an answer's tokens, of the chosen times of the rejected."""
    weights = Sides.of(aggregate_log_probs(log_probs - log_sum_sq_probs, mask, "mean").exp())
    return weights.chosen * weights.rejected
