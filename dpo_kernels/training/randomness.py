"""What is random in a model's training: dropout and jitter, off for the run, and in its config as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dpo_kernels.training.head_check import JITTER, logits_of, numbers_named, probe_ids
from dpo_kernels.training.output_head import accepted, find_head
from dpo_kernels.training.partitioned import by_module, shape_of

DROPOUT = re.compile(r"dropout|_pdrop$|layerdrop")


@dataclass
class Silenced:
    """What was set to 0: (holder, name, value, whether the holder is a config, which is saved with the model)."""

    changed: list[tuple[Any, str, float, bool]] = field(default_factory=list)

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        """While a model is saved: its config says what it said before."""
        configs = [(holder, name, value) for holder, name, value, is_config in self.changed if is_config]
        for holder, name, value in configs:
            setattr(holder, name, value)
        try:
            yield
        finally:
            for holder, name, _ in configs:
                setattr(holder, name, 0.0)

    def undo(self) -> None:
        for holder, name, value, _ in self.changed:
            setattr(holder, name, value)


def disable_dropout(model: Any) -> Silenced:
    """Sets every probability of dropout, and every jitter of a router, to 0, in modules and in configs that they read,
    so that policy and reference start equal.

    A number that a model computes with in evaluation too is no noise, whatever it is called, and stays. What an earlier
    call has set to 0 on the same model is remembered.
    """
    silenced = _silenced(model)
    silenced.changed = [*_EARLIER.get(model, ()), *silenced.changed]
    _EARLIER[model] = [entry for entry in silenced.changed if entry[3]]  # configs alone: they do not hold the model
    return silenced


_EARLIER: WeakKeyDictionary[Any, list[tuple[Any, str, float, bool]]] = WeakKeyDictionary()


def _silenced(model: Any) -> Silenced:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    silenced = _set(model, DROPOUT, 0.0)
    if not any(numbers_named(model, JITTER)):
        return silenced
    with by_module(model):
        before = _evaluated(model)
    noise = _set(model, JITTER, 10.0)  # so much that an evaluation which reads it moves
    with by_module(model):
        is_noise = torch.equal(before, _evaluated(model))
    noise.undo()
    return Silenced(silenced.changed + _set(model, JITTER, 0.0).changed) if is_noise else silenced


def _set(model: nn.Module, names: re.Pattern[str], to: float) -> Silenced:
    silenced = Silenced()
    for holder, name, value, is_config in numbers_named(model, names):
        with suppress(AttributeError, TypeError, ValueError):  # a property, or a config that checks itself
            setattr(holder, name, to)
            silenced.changed.append((holder, name, value, is_config))
    return silenced


@torch.no_grad()
def _evaluated(model: Any) -> torch.Tensor:
    modes = {module: module.training for module in model.modules()}
    weight: Any = find_head(model).weight
    try:
        ids = probe_ids(shape_of(weight)[0], weight.device)
        return logits_of(model.eval()(input_ids=ids, **accepted(model, {"use_cache": False}))).clone()
    finally:
        for module, mode in modes.items():
            module.training = mode
