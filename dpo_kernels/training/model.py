"""Log-probs of the labels from any Hugging Face causal language model, without its logits.

The model runs its own forward; only its output head is replaced while labels are given: it returns nothing of size V,
and keeps the log-probs that `hidden_to_log_probs` made of what reached it. So the hooks of DDP, FSDP and DeepSpeed
fire as always, and whatever the model does before its head (scaling, slicing) is already done. What it does behind the
head (a scale, a softcap) is measured on a probe, not guessed from names in a config.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels import reference, token_stats
from dpo_kernels.head import TokenStats, Transform

# Where the probe looks at what stands behind the head: small enough for a slope, large enough for a cap.
PROBE = (1e-4, -1e-4, 0.5, -0.5, 3.0, -3.0, 20.0, -20.0, 200.0, -200.0, 1e9, -1e9)
# A model rounds its logits to its dtype, we do not: what the check at start allows, in roundings of the largest logit.
ROUNDINGS = 3.0


class HeadError(ValueError):
    """The model has no output head that log-probs can be computed from, or one that would be computed wrong."""


@dataclass
class _Request:
    """What the head shall do in the forward that is running."""

    labels: Tensor | None = None  # (R, S): compute log-probs
    probe: Tensor | None = None  # (K,): return these instead of logits
    output: Tensor | None = None  # what the head's call gave, (R, S, 1) log-probs
    stats: TokenStats | None = None  # of the same call; the fields besides log_probs have no gradient


class FusedHead:
    """Makes `model(input_ids=..., attention_mask=..., labels=...)` return log-probs of the labels instead of logits.

    After `FusedHead(model)`, a call with labels returns {"log_probs": (R, S) float32, "log_sum_sq_probs" alike where
    asked for, and "aux_loss" where the model has one and router logits are asked for}; labels are already shifted, -100
    where a token does not count. A call without labels is the model's own. The model may be wrapped (DDP, FSDP,
    accelerate) afterwards.

    Args:
        model: an `AutoModelForCausalLM`; tied or untied head, with or without bias.
        memory_budget: as in `hidden_to_log_probs`.
        impl: as in `hidden_to_log_probs`.
        with_log_sum_sq_probs: whether calls return that too (WPO's weights are made of it); it has no gradient.

    Raises:
        HeadError: the model has no output head with a floating-point weight of its own.
    """

    def __init__(
        self,
        model: Any,
        memory_budget: int | None = None,
        impl: str | None = None,
        with_log_sum_sq_probs: bool = False,
    ) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        weight = getattr(head, "weight", None)
        if head is None or weight is None or weight.ndim != 2 or not weight.is_floating_point():
            found = "none" if head is None else f"{type(head).__name__} with weight {_describe(weight)}"
            raise HeadError(
                f"{type(model).__name__} has no output head with a floating-point weight (V, D); found {found}; "
                "load a model for causal language modelling, its head not quantized"
            )
        if others := sorted({name for name, _ in head.named_parameters()} - {"weight", "bias"}):
            raise HeadError(
                f"the output head {type(head).__name__} has parameters besides weight and bias, which would not be "
                f"trained: {others}; leave the head out of the adapter"
            )
        self.memory_budget, self.impl = memory_budget, impl
        self.outputs = ("log_sum_sq_probs",) if with_log_sum_sq_probs else ()
        self.transform = Transform()
        self._request = _Request()
        self._vocab_size = weight.shape[0]
        replaced = model.__dict__.get("forward")  # by another wrapper, before us

        def forward(this: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            # Through `this` alone: a copy of the model is a model of its own.
            own_forward = replaced or types.MethodType(type(this).forward, this)
            if labels is None:
                return own_forward(*args, **kwargs)
            own_head = this.get_output_embeddings()
            if not hasattr(own_head, "fused"):
                raise HeadError(f"{type(this).__name__} got another output head since; make a FusedHead of it again")
            with own_head.fused._asking(_Request(labels=labels)) as request:
                output = own_forward(*args, **kwargs)
            if request.output is None:
                raise HeadError(
                    f"{type(this).__name__} did not call its output head {type(own_head).__name__} in forward"
                )
            result = {"log_probs": request.output.squeeze(-1).clone()}  # FSDP hangs hooks on it, which wants no view
            if request.stats is not None and request.stats.log_sum_sq_probs is not None:
                result["log_sum_sq_probs"] = request.stats.log_sum_sq_probs.squeeze(-1)
            if getattr(output, "aux_loss", None) is not None:
                result["aux_loss"] = output.aux_loss
            return result

        # A method of the instance, not of the class: other models stay what they are, and wrappers find a method.
        model.forward = types.MethodType(forward, model)
        head.fused = self
        head.__class__ = type(f"Fused{type(head).__name__}", (_OutputHead, type(head)), {})

    def token_stats(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> TokenStats:
        t = self.transform
        return token_stats(
            hidden, weight, labels, bias, outputs=self.outputs, temperature=t.temperature, logit_scale=t.logit_scale,
            softcap=t.softcap, memory_budget=self.memory_budget, impl=self.impl,
        )  # fmt: skip

    @torch.no_grad()
    def check(self, model: nn.Module, tokens: int = 16) -> None:
        """Measures what stands behind the head, then compares log-probs with those of the model's own logits.

        Runs three forwards of one sequence of `tokens` tokens; on every process alike, where there are several.

        Args:
            model: the model given at the start, or what now wraps it.

        Raises:
            HeadError: the two differ by more than the rounding of the logits explains, or behind the head stands
                something that is no scale and no softcap.
        """
        device = next(model.parameters()).device
        ids = torch.arange(tokens, device=device).remainder(self._vocab_size).unsqueeze(0)
        labels = ids.roll(-1, 1)
        training = model.training
        model.eval()
        try:
            self.transform = Transform()
            self.transform = self._measure_transform(model, ids)
            log_probs = model(input_ids=ids, labels=labels)["log_probs"]
            logits = model(input_ids=ids).logits
        finally:
            model.train(training)
        if logits.shape[-1] != self._vocab_size:
            raise HeadError(
                f"the model's logits are {tuple(logits.shape)}, its head's weight has {self._vocab_size} rows"
            )
        own = reference.logits_to_log_probs(logits.float(), labels)
        error = (own - log_probs).abs().max().item()
        allowed = ROUNDINGS * torch.finfo(_logits_dtype(model, logits)).eps * max(1.0, logits.abs().max().item())
        if not error <= max(allowed, 1e-3):
            raise HeadError(
                f"the fused head would train {type(model).__name__} wrong: on {tokens} tokens its log-probs differ "
                f"from those of the model's own logits by {error:.2e}, where rounding explains {allowed:.2e} (measured "
                f"behind the head: {self.transform}); please report the model's class"
            )

    def _measure_transform(self, model: nn.Module, ids: Tensor) -> Transform:
        """logit_scale and softcap from what the model's forward makes of known numbers in place of its logits."""
        probe = torch.tensor(PROBE, dtype=torch.float64 if ids.device.type in ("cpu", "cuda") else torch.float32)
        with self._asking(_Request(probe=probe)), torch.enable_grad():
            seen = model(input_ids=ids[:, :1]).logits
        if seen.requires_grad:
            raise HeadError(f"{type(model).__name__} has parameters behind its output head, which would not be trained")
        seen = seen.detach()
        if seen.shape[-1] != len(probe):
            raise HeadError(f"the model turns {len(probe)} numbers from its head into logits of {tuple(seen.shape)}")
        made = seen.double().reshape(-1, len(probe))[0].cpu()
        probe = probe.double()
        scale = _rounded((made[0] / probe[0]).item())
        largest = made[-2].item()
        capped = abs(largest) < 0.5 * abs(scale) * probe[-2].item()
        found = Transform(logit_scale=scale, softcap=_rounded(abs(largest)) if capped else None)
        expected = reference.logits(
            probe[:, None], torch.ones(1, 1, dtype=torch.float64), logit_scale=scale, softcap=found.softcap
        ).squeeze(1)
        if not torch.allclose(made, expected, rtol=1e-3, atol=1e-9):
            raise HeadError(
                f"{type(model).__name__} does something to its logits that is neither a scale nor a softcap: it makes "
                f"{[f'{x:.4g}' for x in made.tolist()]} of {list(PROBE)}"
            )
        return found

    @contextmanager
    def _asking(self, request: _Request) -> Iterator[_Request]:
        before, self._request = self._request, request
        try:
            yield request
        finally:
            self._request = before


class _OutputHead(nn.Module):
    """What the model's output head becomes: a subclass of its own class, so that it stays what others take it for."""

    fused: FusedHead
    weight: Tensor

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self.fused._request
        if request.probe is not None:
            return request.probe.to(hidden.device).expand(*hidden.shape[:-1], -1)
        if request.labels is None:
            return super().forward(hidden, *args, **kwargs)
        bias = getattr(self, "bias", None)
        request.stats = self.fused.token_stats(hidden.unsqueeze(-2), self.weight, request.labels.unsqueeze(-1), bias)
        return request.stats.log_probs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the output as the hooks of FSDP and DeepSpeed leave it: their backward hooks hang on it."""
        output = super().__call__(*args, **kwargs)
        if self.fused._request.labels is None:
            return output
        self.fused._request.output = output
        return output.detach().clone()  # what the model makes of it, in place perhaps, is not used


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, in modules and in configs that they read, so that policy and reference start
    equal."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    holders = [*model.modules(), *(m.config for m in model.modules() if hasattr(m, "config"))]
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and re.search(r"dropout|_pdrop$|layerdrop", name):
                setattr(holder, name, 0.0)


def router_aux_loss_coef(model: Any) -> float | None:
    """The weight of the model's load-balancing loss, None where it is no mixture of experts."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "router_aux_loss_coef", None)


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens, scaled rotary embeddings included; None: no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaled in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        factor, original = (scaled.get(name) for name in ("factor", "original_max_position_embeddings"))
        if factor and original:
            limits.append(int(factor * original))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return max(known, default=None)


def check_positions(config: Any, max_length: int) -> None:
    """
    Raises:
        ValueError: sequences of max_length tokens have more positions than the model.
    """
    limit = max_positions(config)
    if limit is not None and max_length - 1 > limit:  # the last token is predicted, never read
        raise ValueError(
            f"max_length is {max_length:,}, and the model has {limit:,} positions (max_position_embeddings, with what "
            f"its rope parameters extend them by); give --max_length {limit:,} or less, or a model for longer sequences"
        )


def _rounded(value: float) -> float:
    """To seven digits: what a model that computes in float32 can tell, and 1 is exactly 1."""
    return float(f"{value:.7g}")


def _logits_dtype(model: nn.Module, logits: Tensor) -> torch.dtype:
    """What the logits were rounded to; a wrapper may have cast them up since."""
    if torch.is_autocast_enabled(logits.device.type):
        return torch.get_autocast_dtype(logits.device.type)
    narrow = [p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    return max([logits.dtype, *narrow], key=lambda dtype: torch.finfo(dtype).eps)


def _describe(weight: Any) -> str:
    return f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else "none"
