"""Fused log-softmax-gather over the vocabulary, and DPO on top of it. Importing needs torch alone."""

from dpo_kernels import reference
from dpo_kernels.head import TokenStats
from dpo_kernels.impls import available_impls, empty_cache
from dpo_kernels.log_probs import hidden_to_log_probs, logits_to_log_probs, plan, token_stats
from dpo_kernels.losses import DPOLoss, FusedLinearDPOLoss, dpo_loss
from dpo_kernels.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "DPOLoss",
    "FusedLinearDPOLoss",
    "Plan",
    "TokenStats",
    "available_impls",
    "dpo_loss",
    "empty_cache",
    "hidden_to_log_probs",
    "logits_to_log_probs",
    "plan",
    "reference",
    "token_stats",
]
