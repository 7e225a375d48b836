"""Sequence sums and preference losses: ordinary PyTorch on per-token log-probs. A loss never sees a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_kernels import checks
from dpo_kernels.head import accumulate_dtype
from dpo_kernels.log_probs import hidden_to_log_probs

AGGREGATES = ("sum", "mean")


class DPOLoss(NamedTuple):
    """loss: scalar, differentiable. chosen_rewards, rejected_rewards: scalars, the batch means, detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class Pairs:
    """What a loss is made of: log pi(y|x) - log pi_ref(y|x) of each chosen and rejected answer, (B,) each, and beta."""

    chosen_logratios: Tensor
    rejected_logratios: Tensor
    beta: float


def _sigmoid(pairs: Pairs) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected)): DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7."""
    return -F.logsigmoid(pairs.beta * (pairs.chosen_logratios - pairs.rejected_logratios))


LOSSES: dict[str, Callable[[Pairs], Tensor]] = {"sigmoid": _sigmoid}


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


def dpo_loss(
    ref_log_probs: Tensor,  # (2B, S)
    policy_log_probs: Tensor,  # (2B, S)
    mask: Tensor,  # (2B, S)
    beta: float = 0.1,
    aggregate: str = "sum",
    *,
    loss_type: str = "sigmoid",
) -> DPOLoss:
    """A preference loss from per-token log-probs; the first half of the batch is chosen, the second rejected.

    With pc, pr the aggregated policy log-probs of the chosen and rejected answers and rc, rr the reference's:
    loss = mean of -log sigmoid(beta * ((pc - pr) - (rc - rr))) for "sigmoid" (Rafailov et al. 2023, arXiv:2305.18290);
    rewards are the means of beta * (pc - rc) and beta * (pr - rr). Policy and reference are subtracted token by token
    before they are summed, since the small difference of two long sums is what the loss lives on.

    Args:
        ref_log_probs: (2B, S); no gradient flows into it.
        policy_log_probs: (2B, S).
        mask: (2B, S), bool or numbers, 0 where a token does not count.
        beta: >= 0.
        aggregate: "sum", or "mean" over the tokens that count.
        loss_type: a key of `LOSSES`.

    Returns:
        DPOLoss(loss, chosen_rewards, rejected_rewards), scalars of float32 (float64 for float64).

    Raises:
        TypeError: something is no tensor, or log-probs are not floating.
        ValueError: shapes or devices differ, the batch is empty or odd, beta is negative, or an unknown aggregate or
            loss_type.
    """
    chosen, rejected = pair_logratios(ref_log_probs, policy_log_probs, mask, aggregate)
    check_loss(beta, aggregate, loss_type)
    loss = LOSSES[loss_type](Pairs(chosen, rejected, beta)).mean()
    return DPOLoss(loss, (beta * chosen.detach()).mean(), (beta * rejected.detach()).mean())


def pair_logratios(
    ref_log_probs: Tensor, policy_log_probs: Tensor, mask: Tensor, aggregate: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Aggregated log pi - log pi_ref of the chosen and of the rejected answers, (B,) each; beta times it is the reward.

    Raises:
        ValueError: as `dpo_loss`.
    """
    checks.log_probs_and_mask(ref_log_probs, policy_log_probs, mask)
    if len(policy_log_probs) == 0 or len(policy_log_probs) % 2:
        raise ValueError(
            f"the batch has {len(policy_log_probs)} sequences: {tuple(policy_log_probs.shape)}; "
            "expected an even number, first the chosen, then as many rejected"
        )
    wide = accumulate_dtype(torch.promote_types(policy_log_probs.dtype, ref_log_probs.dtype))
    logratios = aggregate_log_probs(policy_log_probs.to(wide) - ref_log_probs.detach().to(wide), mask, aggregate)
    chosen, rejected = logratios.chunk(2)
    return chosen, rejected


class FusedLinearDPOLoss(nn.Module):
    """DPO straight from hidden states and the head's weight: `hidden_to_log_probs`, then `dpo_loss`.

    The mask is labels != ignore_index. All options are those of the two functions.

    Raises:
        ValueError: beta is negative, or an unknown aggregate or loss_type.
    """

    def __init__(
        self,
        beta: float = 0.1,
        aggregate: str = "sum",
        loss_type: str = "sigmoid",
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        check_loss(beta, aggregate, loss_type)
        self.beta, self.aggregate, self.loss_type, self.ignore_index = beta, aggregate, loss_type, ignore_index
        self.head_options: dict[str, Any] = {
            "ignore_index": ignore_index, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
            "memory_budget": memory_budget, "impl": impl,
        }  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (2B, S, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (2B, S)
        *,
        bias: Tensor | None = None,  # (V,)
        ref_log_probs: Tensor | None = None,  # (2B, S)
        ref_hidden: Tensor | None = None,  # (2B, S, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
    ) -> DPOLoss:
        """The reference is given either as its log-probs, or as its hidden states and weight (and bias).

        Raises:
            ValueError: none or both of the two are given; and as `hidden_to_log_probs` and `dpo_loss`.
        """
        whole_head = ref_hidden is not None and ref_weight is not None
        any_head = not (ref_hidden is None and ref_weight is None and ref_bias is None)
        if (ref_log_probs is None) != whole_head or any_head != whole_head:
            raise ValueError("give the reference either as ref_log_probs, or as ref_hidden and ref_weight")
        if ref_hidden is not None and ref_weight is not None:
            with torch.no_grad():
                ref_log_probs = hidden_to_log_probs(ref_hidden, ref_weight, labels, ref_bias, **self.head_options)
        assert ref_log_probs is not None
        log_probs = hidden_to_log_probs(hidden, weight, labels, bias, **self.head_options)
        mask = labels != self.ignore_index
        return dpo_loss(ref_log_probs, log_probs, mask, self.beta, self.aggregate, loss_type=self.loss_type)


def check_loss(beta: float, aggregate: str, loss_type: str) -> None:
    """Raises ValueError for a beta below 0, or an unknown aggregate or loss_type."""
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}; expected one of {AGGREGATES}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta is {beta}; expected a finite number >= 0")
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {tuple(LOSSES)}")
