"""From per-token log-probs to a preference loss, in ordinary PyTorch: no loss ever sees a vocabulary.

`make_pairs` sums what the losses are made of, `pair_losses` makes the loss of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels import checks, dtensors
from dpo_kernels.call import accumulate_dtype
from dpo_kernels.functional import hidden_to_log_probs, token_stats
from dpo_kernels.losses.options import LossOptions, check_options
from dpo_kernels.losses.pairs import Pairs, Sides, aggregate_log_probs, beyond_shared_length, pair_weights
from dpo_kernels.losses.registry import DIVERGENCES
from dpo_kernels.vocab_shard import VocabShard


class DPOLoss(NamedTuple):
    """loss: scalar, differentiable. chosen_rewards, rejected_rewards: scalars, the batch means, detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    ref_log_probs: Tensor | None,  # (2B, S)
    policy_log_probs: Tensor,  # (2B, S)
    mask: Tensor,  # (2B, S)
    beta: float = 0.1,
    aggregate: str = "sum",
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    log_sum_sq_probs: Tensor | None = None,  # (2B, S)
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
) -> DPOLoss:
    """A preference loss from per-token log-probs; the first half of the batch is chosen, the second rejected.

    With pc, pr the aggregated policy log-probs of the chosen and rejected answers and rc, rr the reference's:
    loss = mean of -log sigmoid(beta * ((pc - pr) - (rc - rr))) for "sigmoid" (Rafailov et al. 2023, arXiv:2305.18290);
    rewards are the means of beta * (pc - rc) and beta * (pr - rr), whatever the loss. Policy and reference are
    subtracted token by token before they are summed, since the small difference of two long sums is what the loss lives
    on. The other losses, their equations, papers and ranges are in `dpo_kernels.losses.formulas`, a small function
    each.

    Args:
        ref_log_probs: (2B, S); no gradient flows into it. None: no reference, every rc and rr is 0.
        policy_log_probs: (2B, S).
        mask: (2B, S), bool or numbers, 0 where a token does not count.
        beta: at least 0; greater than 0 for ipo, ipo_unnormalized and sppo_hard.
        aggregate: "sum", or "mean" over the tokens that count.
        loss_type: a key of `dpo_kernels.losses.LOSSES`, or several: the loss is their weighted sum.
        loss_weights: one number for each of several; None: 1 each.
        label_smoothing: in [0, 1), the share of preferences that may be flipped: conservative DPO with sigmoid; for
            robust < 0.5, for exo_pair > 0. An error where no loss asked for has it; in a sum it counts in each loss
            that has it.
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence" (f-DPO, Wang et al. 2023,
            arXiv:2309.16240); for losses of a difference of scores.
        f_alpha_divergence_coef: alpha of the last, in f' = (t^(alpha - 1) - 1) / (alpha - 1) (one minus the paper's); 1
            is the reverse KL divergence.
        ld_alpha: None, or in [0, 1]: weight of the tokens beyond the shorter answer's length (LD-DPO, Liu et al. 2024,
            arXiv:2409.06411), in policy and reference. A mean still divides by all tokens, and a negative
            log-likelihood (sft, and those within cpo and orpo) counts every token in full.
        use_weighting: each pair's loss is multiplied by w_c * w_r, w = exp(mean of log p - log sum p^2 over the
            answer's tokens), without gradient (WPO, Zhou et al. 2024, arXiv:2406.11827).
        log_sum_sq_probs: (2B, S), `token_stats(..., outputs=("log_sum_sq_probs",))` of the policy, for use_weighting.
        discopop_tau: temperature of discopop, > 0.
        simpo_gamma: target margin of simpo, >= 0.
        cpo_alpha: weight of cpo's negative log-likelihood, >= 0.

    Returns:
        DPOLoss(loss, chosen_rewards, rejected_rewards), scalars of float32 (float64 for float64).

    Raises:
        TypeError: something is no tensor or no number, or log-probs are not floating.
        ValueError: shapes or devices differ, the batch is empty or odd, an option is out of range or means nothing for
            the loss asked for.
    """
    options = LossOptions(
        beta=beta, aggregate=aggregate, loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type, f_alpha_divergence_coef=f_alpha_divergence_coef, ld_alpha=ld_alpha,
        use_weighting=use_weighting, discopop_tau=discopop_tau, simpo_gamma=simpo_gamma, cpo_alpha=cpo_alpha,
    )  # fmt: skip
    check_options(options)
    return _dpo_loss(make_pairs(ref_log_probs, policy_log_probs, mask, options, log_sum_sq_probs), options)


def make_pairs(
    ref_log_probs: Tensor | None,
    policy_log_probs: Tensor,
    mask: Tensor,
    options: LossOptions,
    log_sum_sq_probs: Tensor | None = None,
    tokens_per_chosen: Tensor | None = None,
) -> Pairs:
    """What the losses are made of; the tensors as in `dpo_loss`, the options checked before.

    Args:
        tokens_per_chosen: the mean number of tokens of the chosen answers, over which a negative log-likelihood is
            averaged. None: of this batch; where the batch is a part of a larger one, that of the whole.

    Raises:
        TypeError, ValueError: as `dpo_loss`.
    """
    checks.pairs(ref_log_probs, policy_log_probs, mask, log_sum_sq_probs)
    if options.use_weighting != (log_sum_sq_probs is not None):
        found = "None" if log_sum_sq_probs is None else "given"
        raise ValueError(
            f"use_weighting is {options.use_weighting}, log_sum_sq_probs {found}; expected both or neither: "
            'token_stats(..., outputs=("log_sum_sq_probs",)) computes them'
        )
    ref = torch.zeros_like(policy_log_probs) if ref_log_probs is None else ref_log_probs.detach()
    wide = accumulate_dtype(torch.promote_types(policy_log_probs.dtype, ref.dtype))
    policy, ref, counts = policy_log_probs.to(wide), ref.to(wide), mask != 0
    ld_alpha = options.ld_alpha
    beyond = None if ld_alpha is None else beyond_shared_length(counts)

    def aggregated(values: Tensor) -> Sides:
        if ld_alpha is not None and beyond is not None:
            values = torch.where(beyond, ld_alpha * values, values)
        return Sides.of(aggregate_log_probs(values, mask, options.aggregate))

    tokens = Sides.of(counts.sum(1).to(wide))
    logratios = aggregated(policy - ref)
    divergence = DIVERGENCES[options.f_divergence_type]
    chosen_nll = -Sides.of(aggregate_log_probs(policy, mask)).chosen
    mean_length = tokens.chosen.mean() if tokens_per_chosen is None else tokens_per_chosen
    return Pairs(
        logps=aggregated(policy),
        ref_logps=aggregated(ref),
        logratios=logratios,
        scores=Sides(*(divergence(h, options) for h in logratios)),
        tokens=tokens,
        is_mean=options.aggregate == "mean",
        chosen_nll=chosen_nll / mean_length.clamp_min(1e-8),
        weights=None if log_sum_sq_probs is None else pair_weights(policy, log_sum_sq_probs, mask),
    )


def pair_losses(pairs: Pairs, options: LossOptions) -> Tensor:
    """The weighted sum of the losses that the options name, one number per pair, (B,)."""
    losses = options.losses
    factors = options.loss_weights or (1.0,) * len(losses)
    terms = [factor * loss.function(pairs, options) for loss, factor in zip(losses, factors, strict=True)]
    total = torch.stack(terms).sum(0)
    return total if pairs.weights is None else total * pairs.weights


class FusedLinearDPOLoss(nn.Module):
    """A preference loss straight from hidden states and the head's weight: `hidden_to_log_probs`, then `dpo_loss`.

    The mask is labels != ignore_index. The options are those of the two functions; log_sum_sq_probs is computed where
    use_weighting asks for it.

    Args:
        reference_free: no reference is given in the call, every reference log-prob is 0. sft, simpo, cpo and orpo need
            none in any case.
        loss_options: the other keyword options of `dpo_loss`.

    Raises:
        TypeError, ValueError: an option is out of range, as in `dpo_loss`.
    """

    def __init__(
        self,
        beta: float = 0.1,
        aggregate: str = "sum",
        loss_type: str | Sequence[str] = "sigmoid",
        *,
        reference_free: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        gradient_filter: float | None = None,
        memory_budget: int | None = None,
        impl: str | None = None,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        self.options = check_options(LossOptions(beta, aggregate, loss_type, **loss_options))
        self.reference_free, self.ignore_index = reference_free, ignore_index
        self.head_options: dict[str, Any] = {
            "ignore_index": ignore_index, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap,
            "gradient_filter": gradient_filter, "memory_budget": memory_budget, "impl": impl,
        }  # fmt: skip

    def extra_repr(self) -> str:
        """Every option that is not at its default."""
        loss, head = LossOptions(), {"ignore_index": -100, "temperature": 1.0, "logit_scale": 1.0}
        shown = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        changed = {name: value for name, value in shown.items() if name == "beta" or value != getattr(loss, name)}
        changed |= {name: value for name, value in self.head_options.items() if value != head.get(name)}
        changed |= {"reference_free": True} if self.reference_free else {}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())

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
        tokens: int | None = None,
        shard: VocabShard | None = None,
    ) -> DPOLoss:
        """The reference is given either as its log-probs, or as its hidden states and weight (and bias).

        tokens: how many of all labels count, as in `hidden_to_log_probs`.
        shard: as there; of the reference's weight too. Without it either may be a DTensor. The loss is the same on
        every rank.

        Raises:
            ValueError: none of the two, both, or one where there is to be none; and as `hidden_to_log_probs` and
                `dpo_loss`.
        """
        whole_head = ref_hidden is not None and ref_weight is not None
        any_head = not (ref_hidden is None and ref_weight is None and ref_bias is None)
        given = (ref_log_probs is not None) + any_head
        if self.reference_free and given:
            raise ValueError("reference_free is True, but a reference is given; leave one of them out")
        optional = self.reference_free or not self.options.needs_reference
        if any_head != whole_head or given > 1 or (given == 0 and not optional):
            raise ValueError("give the reference either as ref_log_probs, or as ref_hidden and ref_weight")
        if ref_hidden is not None and ref_weight is not None:
            with torch.no_grad():
                ref_log_probs = hidden_to_log_probs(
                    ref_hidden, ref_weight, labels, ref_bias, tokens=tokens, shard=shard, **self.head_options
                )
        labels = dtensors.whole_value(labels)
        outputs = ("log_sum_sq_probs",) if self.options.use_weighting else ()
        stats = token_stats(
            hidden, weight, labels, bias, outputs=outputs, tokens=tokens, shard=shard, **self.head_options
        )
        mask = labels != self.ignore_index
        pairs = make_pairs(ref_log_probs, stats.log_probs, mask, self.options, stats.log_sum_sq_probs)
        return _dpo_loss(pairs, self.options)


def _dpo_loss(pairs: Pairs, options: LossOptions) -> DPOLoss:
    chosen, rejected = (options.beta * h.detach().mean() for h in pairs.logratios)
    return DPOLoss(pair_losses(pairs, options).mean(), chosen, rejected)
