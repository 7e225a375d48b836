"""Preference losses on log-probs per token, in ordinary PyTorch: no loss ever sees a vocabulary.

pairs.py has the sums that losses are made of, formulas.py the losses and their table, registry.py what a row of the
table says, options.py what a loss can be told and the checks of it, api.py the public functions.
"""

from dpo_kernels.losses import formulas  # fills the table
from dpo_kernels.losses.api import DPOLoss, FusedLinearDPOLoss, dpo_loss, make_pairs, pair_losses
from dpo_kernels.losses.options import LossOptions, check_options
from dpo_kernels.losses.pairs import AGGREGATES, Pairs, Sides, aggregate_log_probs, beyond_shared_length, pair_weights
from dpo_kernels.losses.registry import DIVERGENCES, LOSSES, Loss, Smoothing, register

__all__ = [
    "AGGREGATES",
    "DIVERGENCES",
    "LOSSES",
    "DPOLoss",
    "FusedLinearDPOLoss",
    "Loss",
    "LossOptions",
    "Pairs",
    "Sides",
    "Smoothing",
    "aggregate_log_probs",
    "beyond_shared_length",
    "check_options",
    "dpo_loss",
    "formulas",
    "make_pairs",
    "pair_losses",
    "pair_weights",
    "register",
]
