"""Counts the bytes of tensors that live, by what they are for, and remembers the moment with the most."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ATTENTION = "attention"
GRADIENTS = "gradients"
HOST = "on the host"  # counted, and no part of the peak


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made while it is entered, from an operator's result to the end of their life.

    What was there before counts nothing. An operator's own scratch is not seen: `after` says what is known of it. On
    fake tensors nothing is computed or held, and the counts are the same.

    Args:
        from_system: bytes from which on a storage is memory of its own, and not of malloc's heaps.

    Attributes:
        live: bytes by kind.
        at_peak: `live` at the moment with the most, scratch included.
        peak: their sum.
        small_at_peak: bytes of it in storages that malloc takes from its heaps, not from the system.
    """

    def __init__(self, from_system: int = 0) -> None:
        super().__init__()
        self.from_system = from_system
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = self.small_at_peak = 0
        self._small = 0
        self.kind = "other"
        self._storages: dict[int, tuple[str, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._meet(value, None)
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        kind = ATTENTION if "attention" in str(func) else self.kind
        counted, scratch = self.after(func, args, kwargs, results)
        for value in tree_iter(counted):
            if isinstance(value, Tensor):
                self._meet(value, kind)
        self.look(scratch)
        return results

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Any, results: Any) -> tuple[Any, dict[str, int]]:
        """Of an operator that has run: the results that count, and bytes by kind that it held besides."""
        return results, {}

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """What is made within the block is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def set_kind(self, tensor: Tensor, kind: str) -> None:
        """The bytes of a tensor that was made while this was entered go over to another kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            before, size, reference = self._storages[key]
            self.live[before] -= size
            self.live[kind] += size
            self._storages[key] = (kind, size, reference)

    def watch_gradients(self, model: nn.Module) -> list[Any]:
        """Handles of hooks that call a gradient by its name as soon as a parameter has it."""

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.set_kind(parameter.grad, GRADIENTS)

        return [
            p.register_post_accumulate_grad_hook(accumulated) for p in model.parameters() if p.requires_grad
        ]  # fmt: skip

    def look(self, scratch: dict[str, int] | None = None) -> None:
        """Remembers the moment if it is the one with the most bytes."""
        now = self.live + Counter(scratch or {})
        total = sum(size for kind, size in now.items() if kind != HOST)
        if total > self.peak:
            self.peak, self.at_peak, self.small_at_peak = total, now, self._small

    def _meet(self, tensor: Tensor, kind: str | None) -> None:
        """Counts a storage that is new; kind None: it was there before, and counts nothing."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or without storage
            return
        key = storage._cdata
        if key in self._storages:
            return
        size = 0 if kind is None else storage.nbytes()
        kind = kind or "before"
        self._storages[key] = (kind, size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live[kind] += size
        self._small += size if size < self.from_system else 0

    def _forget(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key, ("before", 0, None))
        self.live[kind] -= size
        self._small -= size if size < self.from_system else 0
