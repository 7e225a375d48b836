"""Liger's fused linear DPO loss by its own constructor, call and return value (Liger 0.8.5), without Liger.

    from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss

The same numbers, and numbers where Liger has none: loss_type "ipo" and every other loss of this package works,
label_smoothing counts with "sigmoid", a sequence or a chosen half without labels gives 0 instead of NaN, and an odd
batch raises instead of broadcasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dpo_kernels.call import accumulate_dtype
from dpo_kernels.functional import hidden_to_log_probs
from dpo_kernels.losses import LOSSES, LossOptions, Sides, check_options, make_pairs, pair_losses
from dpo_kernels.warn import warn

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class LigerFusedLinearDPOLoss(nn.Module):
    """A preference loss from hidden states and the head's weight, as Liger has it.

    Args:
        ignore_index: of labels that do not count.
        beta: >= 0.
        alpha: weight of the chosen answers' negative log-likelihood, where compute_nll_loss is True.
        compute_nll_loss: whether there is one.
        compiled: without effect; nothing has to be compiled.
        use_ref_model: whether a reference is given in the call.
        average_log_prob: log-probs are means over tokens instead of sums.
        chunk_size: without effect; memory_budget bounds what is held.
        loss_type: a key of `dpo_kernels.losses.LOSSES`, or several: their sum.
        label_smoothing: as in `dpo_loss`; ignored, with a warning, where no loss asked for has it.
        discopop_tau: temperature of discopop, > 0.
        memory_budget: as in `hidden_to_log_probs`.
        impl: as in `hidden_to_log_probs`.

    All of them are attributes, read at each call.

    Raises:
        TypeError, ValueError: an option is out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        memory_budget: int | None = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.use_ref_model, self.average_log_prob = compiled, use_ref_model, average_log_prob
        self.chunk_size, self.loss_type, self.label_smoothing = chunk_size, loss_type, label_smoothing
        self.discopop_tau, self.memory_budget, self.impl = discopop_tau, memory_budget, impl
        if self.options.label_smoothing != label_smoothing:
            warn(f"label_smoothing is {label_smoothing}, which loss_type {loss_type!r} does not have: it is ignored")

    @property
    def options(self) -> LossOptions:
        """What the attributes make of the loss."""
        options = LossOptions(
            beta=self.beta, aggregate="mean" if self.average_log_prob else "sum", loss_type=self.loss_type,
            label_smoothing=self.label_smoothing, discopop_tau=self.discopop_tau,
        )  # fmt: skip
        if not any(name in LOSSES and LOSSES[name].smoothing is not None for name in options.names):
            options = replace(options, label_smoothing=0.0)
        return check_options(options)

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2B, T, D)
        target: Tensor,  # (2B, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2B, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, Outputs]:
        """The loss, and chosen_logps (B,), rejected_logps (B,), chosen_logits_mean (), rejected_logits_mean (),
        nll_loss (), chosen_rewards (B,) and rejected_rewards (B,). Only the loss has a gradient.

        Raises:
            ValueError: use_ref_model, and no reference is given; or shapes that do not fit, an odd batch among them.
        """
        if len(target) % 2:
            raise ValueError(
                f"the batch has {len(target)} sequences: {tuple(target.shape)}; "
                "expected an even number, first the chosen, then as many rejected"
            )
        options, mask, ref = self.options, target != self.ignore_index, None
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model is True; expected ref_input and ref_weight, or use_ref_model=False")
            with torch.no_grad():
                ref = self._log_probs(ref_input, ref_weight, target, ref_bias)
        pairs = make_pairs(ref, self._log_probs(_input, lin_weight, target, bias), mask, options)
        loss = pair_losses(pairs, options).mean()
        nll = pairs.chosen_nll.mean() if self.compute_nll_loss else torch.zeros_like(loss)
        if self.compute_nll_loss:
            loss = loss + self.alpha * nll
        rewards = (options.beta * h for h in pairs.logratios)
        outputs = (*pairs.logps, *mean_logits(_input, lin_weight, bias), nll, *rewards)
        return loss, tuple(t.detach() for t in outputs)  # type: ignore[return-value]

    def _log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        return hidden_to_log_probs(
            hidden, weight, labels, bias, ignore_index=self.ignore_index, memory_budget=self.memory_budget,
            impl=self.impl,
        )  # fmt: skip


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of h W^T + b over the vocabulary and all tokens, masked ones too, of the chosen and the rejected half.

    The logits are linear in h and in W, so that their mean is the product of the means.
    """
    wide = accumulate_dtype(hidden.dtype)
    row = weight.mean(0, dtype=wide)
    offset = 0 if bias is None else bias.mean(dtype=wide)
    chosen, rejected = ((half.mean((0, 1), dtype=wide) * row).sum() + offset for half in Sides.of(hidden))
    return chosen, rejected
