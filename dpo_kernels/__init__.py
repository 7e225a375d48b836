"""Fused log-softmax-gather over the vocabulary, and DPO on top of it. Importing needs torch alone."""

from dpo_kernels import reference
from dpo_kernels.call import LowRank
from dpo_kernels.dispatch import available_impls, empty_cache
from dpo_kernels.functional import hidden_to_log_probs, logits_to_log_probs, plan, token_stats
from dpo_kernels.losses import DPOLoss, FusedLinearDPOLoss, dpo_loss
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import TokenStats

__version__ = "0.1.0"

__all__ = [
    "DPOLoss",
    "FusedLinearDPOLoss",
    "LowRank",
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
