"""The one way to make calls resolve to something else than the tables say: for tests, benchmarks and compilers.

    with override(capabilities={"tiles": ((64, 64),)}, kernels={"strategy": "tiles"}):
        log_probs = hidden_to_log_probs(...)
    log_probs.sum().backward()      # runs as forward decided

Overrides are read where a call is resolved, in forward, and travel from there to backward. They hold in the thread that
entered the block. What runs in another thread, or after the block, does not see them: a forward that checkpointing runs
again; and `launch`, which is read at every launch, in a GPU's backward, which autograd runs in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Overrides:
    """backends: names of those that a call without `impl` may take, on any device, fastest first; None: as ever.
    capabilities: fields of `Capabilities`. `tiles`, `scratch` and `widens` may be anything, `one_base` may be turned
        off; the others say what the kernels do.
    kernels: fields of `kernels.configs.KernelConfig`; of `product` and `rows` some fields, as a mapping.
    arch: what every device is taken for (`kernels.configs.Arch`); then Triton's kernels need not run here.
    launch: takes the place of every Triton launch: launch(module, kernel, programs, warps, stages, arguments).
    """

    backends: tuple[str, ...] | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Any] = field(default_factory=dict)
    arch: Any = None
    launch: Callable[..., None] | None = None


_current: ContextVar[Overrides] = ContextVar("dpo_kernels_overrides", default=Overrides())  # noqa: B039  (frozen)


def current() -> Overrides:
    return _current.get()


@contextmanager
def override(**changes: Any) -> Iterator[None]:
    """Changes fields of `Overrides` within the block; mappings are merged with those of an outer block.

    Raises:
        TypeError: there is no such field, or a tile is no pair of numbers.
    """
    outer = _current.get()
    if unknown := set(changes) - {f.name for f in fields(Overrides)}:
        raise TypeError(f"override has no {sorted(unknown)}; it has {[f.name for f in fields(Overrides)]}")
    for name in ("capabilities", "kernels"):
        if name in changes:
            changes[name] = _merged(getattr(outer, name), changes[name])
    if tiles := changes.get("capabilities", {}).get("tiles"):
        changes["capabilities"]["tiles"] = tuple((int(n), int(v)) for n, v in tiles)
    token = _current.set(replace(outer, **changes))
    try:
        yield
    finally:
        _current.reset(token)


def _merged(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    both = {**outer, **inner}
    for name in set(outer) & set(inner):
        if isinstance(outer[name], Mapping) and isinstance(inner[name], Mapping):
            both[name] = _merged(outer[name], inner[name])
    return both
