"""Log-probs of the labels from any Hugging Face causal language model, without its logits.

The model runs its own forward; only its output head is replaced while labels are given: it returns nothing of size V,
and keeps the log-probs that `hidden_to_log_probs` made of what reached it. So the hooks of DDP, FSDP and DeepSpeed
fire as always, and whatever the model does before its head (scaling, slicing) is already done. What it does behind the
head (a scale, a softcap) is measured on a probe, not guessed from names in a config.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpo_kernels import token_stats
from dpo_kernels.call import Transform
from dpo_kernels.statistics import TokenStats

# What a model without get_output_embeddings calls its head.
HEAD_NAMES = ("lm_head", "head", "output", "embed_out", "output_layer", "output_projection")
# What the trainer gives a model that takes it.
DISPENSABLE = ("attention_mask", "output_router_logits", "use_cache")


class HeadError(ValueError):
    """The model has no output head that log-probs can be computed from, or one that would be computed wrong."""


@dataclass
class _Request:
    """What the head shall do in the forward that is running."""

    labels: Tensor | None = None  # (R, S): compute log-probs
    probe: Tensor | None = None  # (K,): return these instead of logits
    output: Tensor | None = None  # what the head's call gave, (R, S, 1) log-probs
    keeps_hidden: bool = False  # what reaches the head in a call without labels
    hidden: Tensor | None = None
    stats: TokenStats | None = None  # of the same call; the fields besides log_probs have no gradient


class FusedHead:
    """Makes `model(input_ids=..., labels=...)` return log-probs of the labels instead of logits.

    After `FusedHead(model)`, a call with labels returns {"log_probs": (R, S) float32, "log_sum_sq_probs" alike where
    asked for, and "aux_loss" where the model has one and router logits are asked for}; labels are already shifted, -100
    where a token does not count. A call without labels is the model's own, and so are `generate`, `save_pretrained`,
    pickling and copying. The model may be wrapped (DDP, FSDP, accelerate) afterwards.

    `unfuse` gives the model back as it was, and so does the end of `with FusedHead(model):`. A second FusedHead takes
    the place of the first.

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
        head: Any = find_head(model)
        if isinstance(head, _OutputHead):
            head.fused.unfuse(model)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise HeadError(
                f"{type(model).__name__} has no output head with a floating-point weight (V, D); found "
                f"{type(head).__name__} with weight {_describe(weight)}; load a model for causal language modelling, "
                "its head not quantized"
            )
        if others := sorted({name for name, _ in head.named_parameters()} - {"weight", "bias"}):
            raise HeadError(
                f"the output head {type(head).__name__} has parameters besides weight and bias, which would not be "
                f"trained: {others}; if they are an adapter's, leave the head out of the adapter"
            )
        if "forward" in vars(head) and "_old_forward" not in vars(head):
            raise HeadError(
                f"something has put a forward of its own on the output head {type(head).__name__} of this model: make "
                "the FusedHead before it is wrapped"
            )
        self.memory_budget, self.impl = memory_budget, impl
        self.outputs = ("log_sum_sq_probs",) if with_log_sum_sq_probs else ()
        self.transform = Transform()
        self._request = _Request()
        self._vocab_size = weight.shape[0]
        head.fused = self
        head.__class__ = _fused_class(type(head))
        if "_old_forward" in vars(head):  # accelerate's hooks call the forward that they found
            head._old_forward = types.MethodType(_OutputHead.forward, head)
        self._model = weakref.ref(model)
        # An attribute of the instance, not of the class: other models stay what they are.
        model.forward = _FusedForward(model, vars(model).get("forward"))

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        model = self._model()
        if model is not None:
            self.unfuse(model)

    def __getstate__(self) -> dict[str, Any]:
        """A copy's model is another one; it is found when the copy is fused again."""
        return {**vars(self), "_model": _no_model, "_request": _Request()}

    def unfuse(self, model: Any) -> None:
        """Makes the model what it was; what is no model of this head is left alone."""
        head: Any = find_head(model)
        if not isinstance(head, _OutputHead):
            return
        head.__class__ = type(head).plain  # type: ignore[assignment]
        del head.fused
        if "_old_forward" in vars(head):
            vars(head)["_old_forward"] = types.MethodType(type(head).forward, head)
        for holder in {id(m): m for m in (model, *model.modules())}.values():
            found, fused = vars(holder), _fused_forward_of(holder)
            if fused is not None:
                for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                    found.pop(name, None)
                if fused.replaced is not None:
                    holder.forward = fused.replaced

    def check(self, model: nn.Module, deterministic: bool = True) -> None:
        """Refuses a model that would be trained wrong; see `head_check.check_head`.

        Args:
            model: the model given at the start, or what now wraps it.
            deterministic: whether training has to compute what evaluation does (dropout is off).

        Raises:
            HeadError: says what is not as it has to be.
        """
        from dpo_kernels.training.head_check import check_head

        check_head(self, model, deterministic)

    def token_stats(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> TokenStats:
        t = self.transform
        return token_stats(
            hidden, weight, labels, bias, outputs=self.outputs, temperature=t.temperature, logit_scale=t.logit_scale,
            softcap=t.softcap, memory_budget=self.memory_budget, impl=self.impl,
        )  # fmt: skip

    @contextmanager
    def asking(self, request: _Request) -> Iterator[_Request]:
        before, self._request = self._request, request
        try:
            yield request
        finally:
            self._request = before


class _FusedForward:
    """A model's forward that takes labels, and looks like the model's own to whoever asks for its signature."""

    def __init__(self, model: Any, replaced: Any) -> None:
        self.model, self.replaced = model, replaced  # replaced: by another wrapper, before us

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(own_forward(self.model, self.replaced))

    @property
    def __func__(self) -> Any:
        """As of a method: accelerate wraps the function, and binds it to the model again."""

        def forward(this: Any, *args: Any, **kwargs: Any) -> Any:
            return _FusedForward(this, self.replaced)(*args, **kwargs)

        named = self.__signature__
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        marked: Any = forward
        marked.__signature__ = inspect.Signature([this, *named.parameters.values()])
        marked.fused = self
        return forward

    def __call__(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        model = self.model
        forward = own_forward(model, self.replaced)
        if labels is None:
            return forward(*args, **kwargs)
        head = find_head(model)
        if not isinstance(head, _OutputHead):
            raise HeadError(f"{type(model).__name__} got another output head since; make a FusedHead of it again")
        with head.fused.asking(_Request(labels=labels)) as request:
            output = forward(*args, **accepted(model, kwargs))
        if request.output is None:
            raise HeadError(f"{type(model).__name__} did not call its output head {type(head).__name__} in forward")
        result = {"log_probs": request.output.squeeze(-1).clone()}  # FSDP hangs hooks on it, which wants no view
        if request.stats is not None and request.stats.log_sum_sq_probs is not None:
            result["log_sum_sq_probs"] = request.stats.log_sum_sq_probs.squeeze(-1)
        if getattr(output, "aux_loss", None) is not None:
            result["aux_loss"] = output.aux_loss
        return result


class _OutputHead(nn.Module):
    """What the model's output head becomes: a subclass of its own class, so that it stays what others take it for."""

    plain: type[nn.Module]
    fused: FusedHead
    weight: Tensor

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self.fused._request
        if request.probe is not None:
            return request.probe.to(hidden.device).expand(*hidden.shape[:-1], -1)
        if request.labels is None:
            if request.keeps_hidden:
                request.hidden = hidden
            return type(self).plain.forward(self, hidden, *args, **kwargs)
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_head, (type(self).plain,), vars(self)


def _fused_class(plain: Any) -> Any:
    if plain not in _FUSED:
        _FUSED[plain] = type(f"Fused{plain.__name__}", (_OutputHead, plain), {"plain": plain})
    return _FUSED[plain]


_FUSED: dict[Any, Any] = {}


def _no_model() -> None:
    """Where a weak reference to a model was, in a copy."""


def _new_head(plain: type[nn.Module]) -> Any:
    """An empty head of a class that pickle cannot find by its name."""
    fused = _fused_class(plain)
    return fused.__new__(fused)


def find_head(model: Any) -> nn.Module:
    """The output head of a model: what the model says it is, or the one layer that makes logits.

    Raises:
        HeadError: there is none, or more than one.
    """
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if isinstance(head, nn.Module):
        return head
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    found = [
        module for name, module in (model.named_modules() if isinstance(model, nn.Module) else ())
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in HEAD_NAMES and module.out_features == size
    ]  # fmt: skip
    if len(found) != 1:
        raise HeadError(
            f"{type(model).__name__} has no output head that it names itself, and {len(found)} of its linear layers "
            f"are called {', '.join(HEAD_NAMES)} and make {size} logits; load a model for causal language modelling"
        )
    return found[0]


def own_forward(model: Any, replaced: Any = None) -> Any:
    """The forward that a model had before it was fused."""
    if replaced is not None:
        return replaced
    return types.MethodType(type(model).forward, model)


def plain_forward(model: Any) -> Any:
    """The forward of a model as if it had not been fused."""
    fused = _fused_forward_of(model)
    return own_forward(model, vars(model).get("forward") if fused is None else fused.replaced)


def _fused_forward_of(model: Any) -> _FusedForward | None:
    """What fused a model, also where accelerate has wrapped it since, and keeps it beside or inside its wrapper."""
    for name in ("_original_forward", "forward"):
        found = vars(model).get(name)
        found = getattr(getattr(found, "__func__", None), "fused", found)
        if isinstance(found, _FusedForward):
            return found
    return None


def accepted(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the model's own forward takes, of those that it may do without."""
    parameters = inspect.signature(plain_forward(model)).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters or name not in DISPENSABLE}


def _describe(weight: Any) -> str:
    return f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else "none"
