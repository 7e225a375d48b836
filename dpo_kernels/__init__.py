"""Fused log-softmax-gather over the vocabulary, and DPO on top of it. Importing needs torch alone.

torch is imported, and the operators `torch.ops.dpo_kernels` are registered, when the first public name is used: the
command `dpo-kernels` answers, and hears signals, before that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_kernels import reference
    from dpo_kernels.call import LowRank
    from dpo_kernels.dispatch import available_impls, empty_cache
    from dpo_kernels.functional import hidden_to_log_probs, logits_to_log_probs, plan, token_stats
    from dpo_kernels.losses import DPOLoss, FusedLinearDPOLoss, dpo_loss
    from dpo_kernels.planner import Plan
    from dpo_kernels.statistics import TokenStats
    from dpo_kernels.vocab_shard import VocabShard

__version__ = "0.1.0"

_MODULES = {
    "call": ("LowRank",),
    "dispatch": ("available_impls", "empty_cache"),
    "functional": ("hidden_to_log_probs", "logits_to_log_probs", "plan", "token_stats"),
    "losses": ("DPOLoss", "FusedLinearDPOLoss", "dpo_loss"),
    "planner": ("Plan",),
    "statistics": ("TokenStats",),
    "vocab_shard": ("VocabShard",),
}

__all__ = [
    "DPOLoss",
    "FusedLinearDPOLoss",
    "LowRank",
    "Plan",
    "TokenStats",
    "VocabShard",
    "available_impls",
    "dpo_loss",
    "empty_cache",
    "hidden_to_log_probs",
    "logits_to_log_probs",
    "plan",
    "reference",
    "token_stats",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in _MODULES.items():
        found = importlib.import_module(f"{__name__}.{module}")
        globals().update({public: getattr(found, public) for public in names})
    globals()["reference"] = importlib.import_module(f"{__name__}.reference")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
