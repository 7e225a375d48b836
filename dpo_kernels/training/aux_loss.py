"""The load-balancing loss of a mixture of experts: whether a model gives one, and what it is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dpo_kernels.training.head_check import has_experts, logits_of, probe_ids
from dpo_kernels.training.loading import is_of_its_own_kind
from dpo_kernels.training.output_head import accepted, find_head, plain_forward
from dpo_kernels.training.partitioned import shape_of

# Where configs keep the coefficient.
NAMES = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight", "aux_loss_alpha")


@dataclass(frozen=True)
class AuxLoss:
    """weight: of the model's aux_loss in the loss of a step; 0: it is left out. told: what that is, in a sentence."""

    weight: float
    told: str


def coefficient(model: Any) -> float | None:
    """What the model's config multiplies its load-balancing loss by; None where it says nothing of one."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in NAMES:
            if isinstance(value := getattr(holder, name, None), int | float):
                return float(value)
    return None


def decide(model: Any, wanted: float | None) -> AuxLoss:
    """What is added to the loss of a step.

    transformers' own classes give their load-balancing loss as it is, and multiply it where they add it. Code that
    models bring often gives it multiplied already, and leaves adding to the training loop: what such a class adds to
    its own loss is measured; if it is nothing, its aux_loss is taken as it comes.

    Args:
        wanted: the weight asked for; None: the model's.

    Raises:
        ValueError: a weight is asked for, and the model gives no load-balancing loss.
    """
    name, coef = type(model).__name__, coefficient(model)
    if coef is None and not is_of_its_own_kind(model):
        if wanted:
            raise ValueError(f"router_aux_loss_coef is {wanted}, but {name} has no experts")
        return AuxLoss(0.0, "")
    found, added = _measure(model)
    if found is None:
        if wanted:
            raise ValueError(f"router_aux_loss_coef is {wanted}, but {name} gives no aux_loss")
        told = (
            f"{name} has a coefficient of {coef:g} for load balancing and gives no such loss: none is added"
            if coef and has_experts(model)
            else ""
        )
        return AuxLoss(0.0, told)
    if wanted is not None:
        return AuxLoss(wanted, f"added to the loss: {wanted:g} times the aux_loss of {name}, as asked for")
    if not is_of_its_own_kind(model):
        return AuxLoss(coef or 0.0, f"added to the loss: {coef or 0.0:g} (the config's) times the aux_loss of {name}")
    if added is not None:
        return AuxLoss(added, f"added to the loss: {added:g} times the aux_loss of {name}, as in its own loss")
    told = f"added to the loss: the aux_loss of {name} as it comes; for another weight give --router_aux_loss_coef"
    return AuxLoss(1.0, told if found else "")


def _measure(model: Any) -> tuple[float | None, float | None]:
    """The model's aux_loss on a few tokens, and what its own loss multiplies it by; None where there is none, or where
    it is a 0 that nothing was computed for, as dense models of such code give."""
    device = next(model.parameters()).device
    head: Any = find_head(model)
    ids = probe_ids(shape_of(head.weight)[0], device)
    forward = plain_forward(model)
    options = accepted(model, {"output_router_logits": True, "use_cache": False})
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]):
        try:
            model.train()
            output = forward(input_ids=ids, **options)
            aux = getattr(output, "aux_loss", None)
            if not isinstance(aux, torch.Tensor) or aux.numel() != 1:
                return None, None
            if not aux.item() and not aux.requires_grad:
                return None, None
            if not is_of_its_own_kind(model) or not aux.item():
                return aux.item(), None
            with torch.no_grad():
                output = forward(input_ids=ids, labels=ids, **options)
        finally:
            for module, mode in modes.items():
                module.training = mode
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        return aux.item(), None
    logits = logits_of(output).float()
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    added = ((loss - plain) / output.aux_loss).item()
    return aux.item(), float(f"{added:.3g}") if abs(added) > 1e-3 else None
