"""Warnings that point at the line which called this package, whatever lies between."""

from __future__ import annotations

import sys
import warnings

BETWEEN = {"dpo_kernels", "torch", "transformers", "accelerate", "functools", "contextlib"}


def warn(message: str) -> None:
    """A `UserWarning` at the nearest caller outside of this package and the libraries that call it."""
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, stacklevel=level)
