"""A model's output head and its forward: found, and made into ones that can give log-probs instead of logits."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_kernels.call import LowRank, Transform
from dpo_kernels.dtensors import alike_on_all_ranks, whole_value
from dpo_kernels.statistics import TokenStats
from dpo_kernels.training import caches
from dpo_kernels.training.attention import Spans, masks, uses_branches, without_masks
from dpo_kernels.training.head_adapter import low_rank_of
from dpo_kernels.training.parallel_head import PARALLEL_FORWARD

# What a model without get_output_embeddings calls its head.
HEAD_NAMES = ("lm_head", "head", "output", "embed_out", "output_layer", "output_projection")
# What the trainer gives a model that takes it.
DISPENSABLE = ("attention_mask", "output_router_logits", "use_cache")


class HeadError(ValueError):
    """The model has no output head that log-probs can be computed from, or one that would be computed wrong."""


@dataclass
class Request:
    """What the head shall do in the forward that is running."""

    labels: Tensor | None = None  # (R, S): compute log-probs
    places: Tensor | None = None  # (N,): of the hidden states that predict labels (1, N), in R x S; None: all do
    defers: bool = False  # keep what reaches the head, (R, S, D), and compute nothing
    probe: Tensor | None = None  # (K,): return these instead of logits
    output: Tensor | None = None  # what the head's call gave, (R, S, 1) log-probs
    keeps_hidden: bool = False  # what reaches the head in a call without labels
    alone: bool = False  # what the head's class makes of the rows that this rank is given, no other rank asked
    hidden: Tensor | None = None
    stats: TokenStats | None = None  # of the same call; the fields besides log_probs have no gradient


class Fused(Protocol):
    """What an output head asks of the `FusedHead` that made it.

    transform: from the head's product to the logit. vocab_size: rows of the head's weight.
    request: what the head shall do in the forward that is running.
    """

    transform: Transform
    vocab_size: int

    @property
    def request(self) -> Request: ...

    def token_stats(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
    ) -> TokenStats:
        """Log-probs, and what else was asked for."""

    def asking(self, request: Request) -> AbstractContextManager[Request]:
        """The request holds within the block."""

    def unfuse(self, model: Any) -> None:
        """Gives the model back as it was."""


class FusedForward:
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
            return FusedForward(this, self.replaced)(*args, **kwargs)

        named = self.__signature__
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        marked: Any = forward
        marked.__signature__ = inspect.Signature([this, *named.parameters.values()])
        marked.fused = self
        return forward

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        spans: Spans | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's forward; with labels {"log_probs", ...} instead of its output. What a layout asks for: places of
        the hidden states that the labels are predicted from; spans that attention keeps to; groups of inputs, which are
        run one after the other, each with places of its own, and whose hidden states go to the head together."""
        model = self.model
        if labels is None:
            return own_forward(model, self.replaced)(*args, **kwargs)
        head = find_head(model)
        if not isinstance(head, OutputHead):
            raise HeadError(f"{type(model).__name__} got another output head since; make a FusedHead of it again")
        if groups is not None:  # a load-balancing loss is over all rows, or it is none
            rows = [hidden for group in groups for hidden in self._hidden_of(head, **kwargs | group)]
            with head.fused.asking(Request(labels=labels)) as request:
                head(torch.cat(rows)[None])
            return self._result(request, None)
        told: AbstractContextManager[None] = nullcontext()
        if spans is not None and uses_branches(model):
            kwargs["spans"], told = spans, without_masks()
        elif spans is not None:
            kwargs["attention_mask"] = masks(model, spans, kwargs["position_ids"])
        with told:
            request, output = self._run(head, Request(labels=labels, places=places), *args, **kwargs)
        return self._result(request, output)

    def _hidden_of(
        self, head: OutputHead, places: Tensor, continued: Sequence[dict[str, Any]] = (), **kwargs: Any
    ) -> Iterator[Tensor]:
        """The hidden states of a group's places, (N, D), then of what goes on from its cache."""
        kwargs |= {"use_cache": True} if continued else {}
        request, output = self._run(head, Request(defers=True), **kwargs)
        hidden, name = request.hidden, type(below_adapters(self.model)).__name__
        if hidden is None or hidden.numel() // hidden.shape[-1] != kwargs["input_ids"].numel():
            seen = None if hidden is None else tuple(hidden.shape)
            raise HeadError(
                f"the head of {name} got {seen} of {tuple(kwargs['input_ids'].shape)} tokens; give --layout padded"
            )
        yield hidden.flatten(0, -2)[places]
        for call in continued:
            given = {caches.name_in(parameters_of(self.model)): caches.of_output(output, name)}
            yield from self._hidden_of(head, **kwargs | call | given)

    def _run(self, head: OutputHead, request: Request, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model = self.model
        with head.fused.asking(request):
            output = own_forward(model, self.replaced)(*args, **accepted(model, kwargs))
        if request.output is None and request.hidden is None:
            raise HeadError(f"{type(model).__name__} did not call its output head {type(head).__name__} in forward")
        return request, output

    def _result(self, request: Request, output: Any) -> dict[str, Tensor]:
        assert request.output is not None
        result = {"log_probs": request.output.squeeze(-1).clone()}  # FSDP hangs hooks on it, which wants no view
        for name in ("log_sum_sq_probs", "dropped_mass"):
            if (value := getattr(request.stats, name, None)) is not None:
                result[name] = value.squeeze(-1)
        if getattr(output, "aux_loss", None) is not None:
            result["aux_loss"] = output.aux_loss
        return result


class OutputHead(nn.Module):
    """What the model's output head becomes: a subclass of its own class, so that it stays what others take it for."""

    plain: type[nn.Module]
    fused: Fused
    weight: Tensor

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self.fused.request
        if request.defers:
            request.hidden = whole_value(hidden)
            return hidden.new_zeros(*hidden.shape[:-1], 1)
        if request.labels is None and request.probe is None and not request.alone:
            if request.keeps_hidden:
                request.hidden = whole_value(hidden)
            return own_head_forward(self)(hidden, *args, **kwargs)
        made = self._asked(request, whole_value(hidden), *args, **kwargs)
        return alike_on_all_ranks(made, hidden)

    def _asked(self, request: Request, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if request.probe is not None:
            return request.probe.to(hidden.device).expand(*hidden.shape[:-1], -1)
        if request.labels is None:
            return type(self).plain.forward(self, hidden, *args, **kwargs)
        if request.places is not None:
            hidden = hidden.flatten(0, -2)[None, request.places]
        bias = getattr(self, "bias", None)
        request.stats = self.fused.token_stats(
            hidden.unsqueeze(-2), self.weight, request.labels.unsqueeze(-1), bias, low_rank_of(self)
        )
        return request.stats.log_probs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the output as the hooks of FSDP and DeepSpeed leave it: their backward hooks hang on it."""
        output = super().__call__(*args, **kwargs)
        if self.fused.request.labels is None:
            return output
        self.fused.request.output = output
        return output.detach().clone()  # what the model makes of it, in place perhaps, is not used

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_head, (type(self).plain,), vars(self)


def own_head_forward(head: OutputHead) -> Any:
    """The forward that a head had before it was fused: its class's, or what tensor parallelism has put around that."""
    return vars(head).get(PARALLEL_FORWARD) or types.MethodType(type(head).plain.forward, head)


def fused_class(plain: Any) -> Any:
    if plain not in _FUSED:
        _FUSED[plain] = type(f"Fused{plain.__name__}", (OutputHead, plain), {"plain": plain})
    return _FUSED[plain]


_FUSED: dict[Any, Any] = {}


def _new_head(plain: type[nn.Module]) -> Any:
    """An empty head of a class that pickle cannot find by its name."""
    fused = fused_class(plain)
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
        return copies_of(head)[0]
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


def copies_of(head: Any) -> list[Any]:
    """A head, or what PEFT's modules_to_save makes of it: the copy that is used now, then the others."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None or not hasattr(head, "original_module"):
        return [head]
    now = next((copies[name] for name in head.active_adapters if name in copies), head.original_module)
    now = head.original_module if head.disable_adapters else now
    return [now, *(copy for copy in (head.original_module, *copies.values()) if copy is not now)]


def below_adapters(model: Any) -> Any:
    """The model that an adapter of PEFT is around, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_forward(model: Any, replaced: Any = None) -> Any:
    """The forward that a model had before it was fused."""
    if replaced is not None:
        return replaced
    return types.MethodType(type(model).forward, model)


def plain_forward(model: Any) -> Any:
    """The forward of a model as if it had not been fused."""
    fused = fused_forward_of(model)
    return own_forward(model, vars(model).get("forward") if fused is None else fused.replaced)


def fused_forward_of(model: Any) -> FusedForward | None:
    """What fused a model, also where accelerate has wrapped it since, and keeps it beside or inside its wrapper."""
    for name in ("_original_forward", "forward"):
        found = vars(model).get(name)
        found = getattr(getattr(found, "__func__", None), "fused", found)
        if isinstance(found, FusedForward):
            return found
    return None


def parameters_of(model: Any) -> Mapping[str, inspect.Parameter]:
    """Of a model's own forward, below an adapter, fused or not."""
    return inspect.signature(plain_forward(below_adapters(model))).parameters


def accepted(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the model's own forward takes, of those that it may do without."""
    parameters = parameters_of(model)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters or name not in DISPENSABLE}
