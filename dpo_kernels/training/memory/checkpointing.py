"""Gradient checkpointing of a model, under whatever name its version of transformers has for it."""

from __future__ import annotations

from typing import Any

NAMES = ("activation_checkpointing", "gradient_checkpointing")  # the second one until transformers 5
OPTIONS = {"use_reentrant": False}


def is_on(model: Any) -> bool:
    name = next((name for name in NAMES if hasattr(model, f"is_{name}")), None)
    return name is not None and bool(getattr(model, f"is_{name}"))


def is_possible(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def switch(model: Any, on: bool) -> None:
    name = next(name for name in NAMES if hasattr(model, f"{name}_enable"))
    if on:
        getattr(model, f"{name}_enable")(OPTIONS)
    else:
        getattr(model, f"{name}_disable")()
