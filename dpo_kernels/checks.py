"""Argument checks of the public functions: once, complete, both sides printed. Below them code trusts its arguments."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kernels import preference_losses
from dpo_kernels.call import Transform, flat_labels, ignored
from dpo_kernels.preference_losses import LossOptions
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
AGGREGATES = ("sum", "mean")


def transform(temperature: float, logit_scale: float, softcap: float | None) -> Transform:
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if not isinstance(value, (int, float)) and not (name == "softcap" and value is None):
            raise TypeError(f"{name} is {value!r}; expected a number")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}; expected None or a finite number > 0")
    return Transform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))


def outputs(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"outputs is the string {names!r}; expected a sequence of names, such as ({names!r},)")
    known = ("log_probs", *OPTIONAL_OUTPUTS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"outputs has {unknown}; expected names from {known}")
    return tuple(name for name in OPTIONAL_OUTPUTS if name in names)


def memory_budget(value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_budget is {value!r}; expected None or a whole number of bytes")
    if value <= 0:
        raise ValueError(f"memory_budget is {value}; expected None or a number of bytes > 0")
    return value


def logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    _tensor("logits", logits)
    _floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits are {_shape(logits)}; expected (..., V) with V >= 1")
    _labels("logits", logits, labels)


def head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """hidden (..., D), weight (V, D), labels (...), bias (V,) or None; one device, one dtype unless autocast is on."""
    for name, tensor in (("hidden", hidden), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        _tensor(name, tensor)
        _floating(name, tensor)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight is {_shape(weight)}; expected (V, D) with V >= 1")
    if hidden.ndim < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden is {_shape(hidden)}; expected (..., D) with D >= 1")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[-1]} features, weight {weight.shape[1]}: {_shape(hidden)} x {_shape(weight)}"
        )
    _labels("hidden", hidden, labels)
    _same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias is {_shape(bias)}, weight {_shape(weight)}; expected a bias of ({weight.shape[0]},)"
            )
        _same_device("bias", bias, "hidden", hidden)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == hidden.dtype:
            continue
        if not autocast or torch.float64 in (tensor.dtype, hidden.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype}, hidden {hidden.dtype}; cast one to the other, or run under torch.autocast"
            )


def labels_in_range(labels: Tensor, ignore_index: int | None, vocab_size: int) -> None:
    """On the CPU, and on any device under DPO_KERNELS_VALIDATE=1, a bad label raises; else its row becomes NaN.

    Raises:
        IndexError: a label that is neither ignore_index nor in [0, vocab_size); names the first and its position.
    """
    if labels.device.type != "cpu" and os.environ.get("DPO_KERNELS_VALIDATE") != "1":
        return
    values = flat_labels(labels)
    bad = ((values < 0) | (values >= vocab_size)) & ~ignored(values, ignore_index)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), labels.shape)]
        raise IndexError(
            f"labels{position or ''} is {int(values[first])}; expected a token in [0, {vocab_size}) "
            + ("" if ignore_index is None else f"or ignore_index {ignore_index}")
        )


def pairs(ref: Tensor | None, policy: Tensor, mask: Tensor, log_sum_sq_probs: Tensor | None) -> None:
    """ref, policy and log_sum_sq_probs (2B, S) floating, mask (2B, S) of any dtype; one device."""
    _tensor("policy_log_probs", policy)
    _floating("policy_log_probs", policy)
    _tensor("mask", mask)
    _same_device("mask", mask, "policy_log_probs", policy)
    for name, tensor in (("ref_log_probs", ref), ("log_sum_sq_probs", log_sum_sq_probs)):
        if tensor is None:
            continue
        _tensor(name, tensor)
        _floating(name, tensor)
        _same_device(name, tensor, "policy_log_probs", policy)
        if tensor.shape != policy.shape:
            raise ValueError(
                f"{name} are {_shape(tensor)}, policy_log_probs {_shape(policy)}; expected two equal shapes (2B, S)"
            )
    if policy.ndim != 2 or mask.shape != policy.shape:
        raise ValueError(f"log_probs are {_shape(policy)}, mask {_shape(mask)}; expected two equal shapes (R, S)")
    if len(policy) == 0 or len(policy) % 2:
        raise ValueError(
            f"the batch has {len(policy)} sequences: {_shape(policy)}; "
            "expected an even number, first the chosen, then as many rejected"
        )


def loss_options(options: LossOptions) -> LossOptions:
    """Holds a loss's options to their ranges, each by itself and together, and returns them."""
    names = _loss_names(options)
    _one_of("aggregate", options.aggregate, AGGREGATES)
    _one_of("f_divergence_type", options.f_divergence_type, tuple(preference_losses.DIVERGENCES))
    _number("beta", options.beta, "a finite number >= 0", low=0)
    _number("label_smoothing", options.label_smoothing, "a number in [0, 1)", low=0, below=1)
    _number("f_alpha_divergence_coef", options.f_alpha_divergence_coef, "a finite number")
    _number("discopop_tau", options.discopop_tau, "a finite number > 0", above=0)
    _number("simpo_gamma", options.simpo_gamma, "a finite number >= 0", low=0)
    _number("cpo_alpha", options.cpo_alpha, "a finite number >= 0", low=0)
    if options.ld_alpha is not None:
        _number("ld_alpha", options.ld_alpha, "None or a number in [0, 1]", low=0, high=1)
    _combination(options, names)
    return options


def _loss_names(options: LossOptions) -> tuple[str, ...]:
    if not isinstance(options.loss_type, (str, list, tuple)):
        raise TypeError(f"loss_type is {options.loss_type!r}; expected a name or a list of names")
    names, weights = options.names, options.loss_weights
    if not names:
        raise ValueError(f"loss_type is {options.loss_type!r}; expected at least one name")
    for name in names:
        _one_of("loss_type", name, tuple(preference_losses.LOSSES))
    if weights is not None:
        if not isinstance(weights, (list, tuple)):
            raise TypeError(f"loss_weights are {weights!r}; expected None or a list of numbers")
        if len(weights) != len(names):
            raise ValueError(f"loss_weights are {weights!r}, loss_type {options.loss_type!r}; expected one weight each")
        for weight in weights:
            _number("a weight in loss_weights", weight, "a finite number")
    return names


def _combination(options: LossOptions, names: tuple[str, ...]) -> None:
    """What one option needs of another."""
    if options.beta == 0 and (strict := [name for name in names if name in preference_losses.POSITIVE_BETA]):
        raise ValueError(f"beta is {options.beta}; expected a finite number > 0 for loss_type {strict[0]!r}")
    smoothing = options.label_smoothing
    if smoothing >= 0.5 and "robust" in names:
        raise ValueError(f"label_smoothing is {smoothing}; expected a number in [0, 0.5) for loss_type 'robust'")
    if smoothing == 0 and "exo_pair" in names:
        raise ValueError(
            f"label_smoothing is {smoothing}; expected a number in (0, 1) for loss_type 'exo_pair', such as 1e-3"
        )
    if smoothing != 0 and not any(name in preference_losses.SMOOTHED for name in names):
        raise ValueError(
            f"label_smoothing is {smoothing}, which loss_type {options.loss_type!r} does not have; "
            f"these do: {preference_losses.SMOOTHED}"
        )
    if options.f_divergence_type != "reverse_kl":
        for name in names:
            if name not in preference_losses.DIVERGING:
                raise ValueError(
                    f"f_divergence_type is {options.f_divergence_type!r}, which loss_type {name!r} is not defined for; "
                    f"expected 'reverse_kl', or a loss_type from {preference_losses.DIVERGING}"
                )
    if options.use_weighting and (unpaired := [name for name in names if name in preference_losses.SORTED]):
        raise ValueError(f"use_weighting is True, but loss_type {unpaired[0]!r} sorts the batch and has no pairs left")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {choices}")


def _number(
    name: str,
    value: float,
    expected: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> None:
    """A finite number in [low, high], and between above and below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    if not (math.isfinite(value) and low <= value <= high and above < value < below):
        raise ValueError(f"{name} is {value}; expected {expected}")


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor")


def _floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")


def _labels(name: str, rows: Tensor, labels: Tensor) -> None:
    _tensor("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels are {labels.dtype}; expected an integer dtype, such as torch.int64")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels are {_shape(labels)}, {name} {_shape(rows)}; expected labels of {tuple(rows.shape[:-1])}"
        )
    _same_device("labels", labels, name, rows)


def _same_device(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, {other} on {like.device}; move both to one device")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
