"""Log-probs of the labels from any Hugging Face causal language model, without its logits.

The model runs its own forward; only its output head is replaced while labels are given: it returns nothing of size V,
and keeps the log-probs that `hidden_to_log_probs` made of what reached it. So the hooks of DDP, FSDP and DeepSpeed
fire as always, and whatever the model does before its head (scaling, slicing) is already done. What it does behind the
head (a scale, a softcap) is measured on a probe, not guessed from names in a config.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dpo_kernels import token_stats
from dpo_kernels.call import LowRank, Transform
from dpo_kernels.statistics import TokenStats
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.head_adapter import refusal
from dpo_kernels.training.head_check import check_head
from dpo_kernels.training.output_head import (
    FusedForward,
    HeadError,
    OutputHead,
    Request,
    copies_of,
    find_head,
    fused_class,
    fused_forward_of,
)
from dpo_kernels.training.parallel_head import PARALLEL_FORWARD, is_parallel
from dpo_kernels.training.partitioned import shape_of


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
        gradient_filter: as in `hidden_to_log_probs`; with one, calls return "dropped_mass" too, of the labels' shape.

    Raises:
        HeadError: the model has no output head with a floating-point weight of its own.
    """

    def __init__(
        self,
        model: Any,
        memory_budget: int | None = None,
        impl: str | None = None,
        with_log_sum_sq_probs: bool = False,
        gradient_filter: float | None = None,
    ) -> None:
        head: Any = find_head(model)
        if isinstance(head, OutputHead):
            head.fused.unfuse(model)
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or len(shape_of(weight)) != 2 or not weight.is_floating_point():
            raise HeadError(
                f"{type(model).__name__} has no output head with a floating-point weight (V, D); found "
                f"{type(head).__name__} with weight {_describe(weight)}; load a model for causal language modelling, "
                "its head not quantized"
            )
        if why := refusal(head):
            raise HeadError(f"the output head {type(head).__name__} of {type(model).__name__} cannot be fused: {why}")
        if "forward" in vars(head) and "_old_forward" not in vars(head) and not is_parallel(head):
            raise HeadError(
                f"something has put a forward of its own on the output head {type(head).__name__} of this model: make "
                "the FusedHead before it is wrapped"
            )
        self.memory_budget, self.impl = memory_budget, impl
        self.outputs = ("log_sum_sq_probs",) if with_log_sum_sq_probs else ()
        self.gradient_filter = gradient_filter
        self.transform = Transform()
        self._requests = threading.local()  # a model may be called from several threads at once
        self.vocab_size = shape_of(weight)[0]
        for copy in _copies(model, head):
            copy.fused = self
            copy.__class__ = fused_class(type(copy))
            if is_parallel(copy):
                vars(copy)[PARALLEL_FORWARD] = vars(copy).pop("forward")
            if "_old_forward" in vars(copy):  # accelerate's hooks call the forward that they found
                copy._old_forward = types.MethodType(OutputHead.forward, copy)
        self._model = weakref.ref(model)
        # An attribute of the instance, not of the class: other models stay what they are.
        model.forward = FusedForward(model, vars(model).get("forward"))

    def __enter__(self) -> FusedHead:
        return self

    def __exit__(self, *_: object) -> None:
        model = self._model()
        if model is not None:
            self.unfuse(model)

    def __getstate__(self) -> dict[str, Any]:
        """A copy's model is another one; it is found when the copy is fused again."""
        return {**vars(self), "_model": _no_model, "_requests": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _requests=threading.local())

    @property
    def request(self) -> Request:
        """Of the forward that runs in this thread."""
        return getattr(self._requests, "now", None) or Request()

    def unfuse(self, model: Any) -> None:
        """Makes the model what it was; what is no model of this head is left alone."""
        if isinstance(model, nn.Module):
            use_branches(model, False)
        head: Any = find_head(model)
        if not isinstance(head, OutputHead):
            return
        for copy in _copies(model, head):
            copy.__class__ = type(copy).plain
            del copy.fused
            if PARALLEL_FORWARD in vars(copy):
                vars(copy)["forward"] = vars(copy).pop(PARALLEL_FORWARD)
            if "_old_forward" in vars(copy):
                vars(copy)["_old_forward"] = types.MethodType(type(copy).forward, copy)
        for holder in {id(m): m for m in (model, *model.modules())}.values():
            found, fused = vars(holder), fused_forward_of(holder)
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
        with self.exact():
            check_head(self, model, deterministic)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Nothing is left out of gradients within the block, as of those that are compared."""
        before, self.gradient_filter = self.gradient_filter, None
        try:
            yield
        finally:
            self.gradient_filter = before

    def token_stats(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
    ) -> TokenStats:
        t, share = self.transform, self.gradient_filter
        return token_stats(
            hidden, weight, labels, bias, outputs=(*self.outputs, *(["dropped_mass"] if share else [])),
            temperature=t.temperature, logit_scale=t.logit_scale, softcap=t.softcap, low_rank=low_rank,
            gradient_filter=share, memory_budget=self.memory_budget, impl=self.impl,
        )  # fmt: skip

    @contextmanager
    def asking(self, request: Request) -> Iterator[Request]:
        before = self.request
        self._requests.now = request
        try:
            yield request
        finally:
            self._requests.now = before


def _copies(model: Any, head: Any) -> list[Any]:
    """The head, and the copies that an adapter has of it."""
    outer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else head
    found = copies_of(outer)
    return found if any(copy is head for copy in found) else [head]


def _no_model() -> None:
    """Where a weak reference to a model was, in a copy."""


def _describe(weight: Any) -> str:
    return f"{shape_of(weight)} {weight.dtype}" if isinstance(weight, Tensor) else "none"
