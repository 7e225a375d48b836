"""A LoRA on the output head, as PEFT puts it there: read as the two matrices that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.call import LowRank
from dpo_kernels.training.parallel_head import is_parallel


def is_lora(head: Any) -> bool:
    """Whether a head is one of PEFT's linear layers with LoRA around the model's own."""
    # One on a bare parameter (target_parameters) has them too, but puts its sum into the model's own layer.
    names = ("base_layer", "lora_A", "lora_B", "scaling", "lora_dropout")
    return all(hasattr(head, name) for name in names) and not hasattr(head, "parameter_name")


def own_names(head: Any) -> tuple[str, str]:
    """What weight and bias of the model's own head are called in it."""
    return ("base_layer.weight", "base_layer.bias") if is_lora(head) else ("weight", "bias")


def parameters_of(head: Any) -> dict[str, Tensor]:
    """The parameters that log-probs are computed from, by their names in the head."""
    found = {*own_names(head), *(f"lora_{side}.{name}.weight" for name in _active(head) for side in "AB")}
    return {name: p for name, p in head.named_parameters() if name in found}


def refusal(head: Any) -> str | None:
    """Why log-probs cannot be computed from a head with these parameters; None if they can."""
    if is_lora(head):
        for name, variant in getattr(head, "lora_variant", {}).items():
            if "Dora" in type(variant).__name__ or "Dora" in getattr(variant, "__name__", ""):
                return (
                    f"the adapter {name!r} is a DoRA, whose weight is divided by the norms of its rows: all of W + B A "
                    "would have to be made and held; use LoRA without use_dora, or leave the head out of the targets"
                )
            return (
                f"the adapter {name!r} is a {_name(variant)}, which is no plain LoRA; leave the head out of the targets"
            )
        if biased := [name for name, layer in head.lora_B.items() if layer.bias is not None]:
            return (
                f"the adapter {biased[0]!r} has a bias of its own (lora_bias), which would not be trained; leave it out"
            )
        if is_parallel(head.base_layer):
            return (
                "tensor parallelism has split the weight below the adapter, whose own matrices are whole; leave the "
                "head out of the targets"
            )
        if hasattr(head.base_layer.weight, "ds_id"):
            return "DeepSpeed ZeRO-3 has partitioned the weight below the adapter; leave the head out of the targets"
    known = {"weight", "bias"} | {name for name, _ in head.named_parameters() if is_lora(head)}
    if others := sorted({name for name, _ in head.named_parameters()} - known):
        return (
            f"it has parameters besides weight and bias, which would not be trained: {others}; if they are an "
            "adapter's, leave the head out of the adapter"
        )
    return None


def low_rank_of(head: Any, parameters: Mapping[str, Tensor] | None = None) -> LowRank | None:
    """What the active adapters add to the head's weight; None without one.

    The scale of adapters that are switched off is 0: a policy and itself without its adapter are computed alike.

    Args:
        parameters: in place of the head's own, by their names in it.

    Raises:
        ValueError: dropout is on within the adapter.
    """
    names = _active(head)
    if not names:
        return None
    given = dict(head.named_parameters()) if parameters is None else parameters
    for name in names if parameters is None and head.training else []:
        dropout = head.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0:
            raise ValueError(
                f"the adapter {name!r} on the output head drops {dropout.p:g} of its inputs, which the fused head "
                "cannot; leave dropout off (--disable_dropout), set lora_dropout to 0, or leave the head out of the "
                "targets"
            )
    on = 0.0 if head.disable_adapters else 1.0
    scales = [on * float(head.scaling[name]) for name in names]
    a, b = ([given[f"lora_{side}.{name}.weight"] for name in names] for side in "AB")
    if len(names) == 1:
        return LowRank(a[0], b[0], scales[0])
    return LowRank(torch.cat([matrix * scale for matrix, scale in zip(a, scales, strict=True)]), torch.cat(b, 1))


def rank_of(head: Any) -> int:
    """Of what the adapters add together, on or off; 0 without one."""
    return sum(len(head.lora_A[name].weight) for name in _active(head))


def _active(head: Any) -> list[str]:
    """Adapters that are used, and not merged into the weight."""
    if not is_lora(head) or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _name(variant: Any) -> str:
    return getattr(variant, "__name__", type(variant).__name__)
