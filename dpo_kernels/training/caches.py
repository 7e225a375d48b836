"""Answers that go on from the cache of their prompt, so that the prompt goes through a model once.

Keys and values of a cache are the prompt's own, with their graph, so what the answers send back through them reaches
the prompt. Each answer gets a cache of its own, which holds the same tensors. A model that extends them into new ones,
as transformers' caches and tuples of keys and values are, leaves the others as they were. One that writes into them, as
into recurrent states, does not; the check at start finds it.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

from torch import Tensor

NAMES = ("cache", "past_key_values")  # what a forward calls it, and its output


class CacheError(ValueError):
    """A model gave no cache that several answers can go on from."""


def name_in(parameters: Container[str]) -> str:
    """What a forward with these parameters calls the cache that it goes on from; "": it takes none."""
    return next((name for name in NAMES if name in parameters), "")


def of_output(output: Any, model: str) -> Any:
    """The cache that a forward gave, for one that goes on from it; each time anew.

    Args:
        model: the name of its class, for an error.

    Raises:
        CacheError: there is none, or one of an unknown kind.
    """
    found = next((value for name in NAMES if (value := getattr(output, name, None)) is not None), None)
    if found is None:
        raise CacheError(
            f"{model} was asked for a cache and its output, a {type(output).__name__}, has none; give --layout bucketed"
        )
    return _own(found)


def _own(cache: Any) -> Any:
    """Containers anew, tensors the same."""
    if isinstance(cache, Tensor) or cache is None:
        return cache
    if isinstance(cache, (list, tuple)):
        own = [_own(one) for one in cache]
        return type(cache)(*own) if hasattr(cache, "_fields") else type(cache)(own)
    if isinstance(getattr(cache, "layers", None), list):  # transformers.Cache
        made = copy.copy(cache)
        made.layers = [copy.copy(layer) for layer in cache.layers]
        return made
    raise CacheError(
        f"a cache is of keys and values, in tuples or in a transformers.Cache, and this is a {type(cache).__name__}; "
        "give --layout bucketed"
    )
