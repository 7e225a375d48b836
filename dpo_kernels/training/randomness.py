"""What is random in a model's training: dropout and jitter, off for the run, and in its config as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

NAMES = re.compile(r"dropout|_pdrop$|layerdrop|jitter")


@dataclass
class Silenced:
    """What was set to 0. configs: (holder, name, value) of configs, which are saved with the model."""

    configs: list[tuple[Any, str, float]] = field(default_factory=list)

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        """While a model is saved: its config says what it said before."""
        for holder, name, value in self.configs:
            setattr(holder, name, value)
        try:
            yield
        finally:
            for holder, name, _ in self.configs:
                setattr(holder, name, 0.0)


def disable_dropout(model: nn.Module) -> Silenced:
    """Sets every probability of dropout, and every jitter of a router, to 0, in modules and in configs that they read,
    so that policy and reference start equal."""
    silenced = Silenced()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for holder in (*model.modules(), *configs.values()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and value != 0.0 and NAMES.search(name):
                with suppress(AttributeError, TypeError, ValueError):  # a property, or a config that checks itself
                    setattr(holder, name, 0.0)
                    if id(holder) in configs:
                        silenced.configs.append((holder, name, value))
    return silenced
