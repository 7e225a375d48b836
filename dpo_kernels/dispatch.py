"""Decides once, in forward, what a call becomes: which back end, with what configuration and plan, on which tokens.

The decision is an `Execution`. Backward gets the same one: the two directions never choose apart.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import collectives, driver, overrides
from dpo_kernels.backends.base import Backend, Execution, Saved, State
from dpo_kernels.backends.cpp import CppBackend
from dpo_kernels.backends.pytorch import PyTorchBackend
from dpo_kernels.backends.triton import TritonBackend
from dpo_kernels.call import Call, Grads, Options, TokenGrads, Tokens
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.layout import spread_rows
from dpo_kernels.planner import plan
from dpo_kernels.statistics import Finished
from dpo_kernels.warn import warn
from dpo_kernels.workload import Workload

FALLBACK = "torch"
# Fastest first. A new back end is a file in backends/ and a name here.
BACKENDS: dict[str, Backend] = {
    TritonBackend.name: TritonBackend(),
    CppBackend.name: CppBackend(),
    PyTorchBackend.name: PyTorchBackend(),
}
NAMES = tuple(BACKENDS)


class AvailableImpls(dict[str, str | None]):
    """Name of each implementation -> None if it can run, else the reason why not; printed, it says so in words."""

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {'can run' if why is None else 'cannot run: ' + why}" for name, why in self.items())


def available_impls(device: torch.device | str = "cpu") -> AvailableImpls:
    """Name of each implementation -> None if it can run on `device`, else the reason why not. Print it.

    Nothing is built: "cpp" can run where it is built already, or where a compiler and ninja are there to build it.
    """
    device = torch.device(device)
    return AvailableImpls((name, backend.unavailable(device)) for name, backend in BACKENDS.items())


def empty_cache() -> int:
    """Gives the memory that waits for its next use back to the system, and returns its bytes.

    On CPUs the "cpp" implementation lets large buffers (what forward keeps for backward, those of a tile, and gradients
    that nobody holds any more) wait for the next call, one of each kind: fresh memory costs page faults. The system
    may take what waits whenever it needs memory, so no budget counts it. On GPUs PyTorch's allocator does the like; see
    `torch.cuda.empty_cache`.
    """
    return sum(backend.empty_cache() for backend in BACKENDS.values())


def choose(name: str | None, device: torch.device, dtype: torch.dtype, vocab_size: int = 1) -> Backend:
    """The back end asked for, or the fastest that can run; "torch" for float64, which no other computes, and for
    vocabularies that the other does not hold.

    Where the fastest made for this kind of device cannot run, another takes over, and a warning says once what would
    make it fast.

    Raises:
        ValueError: no back end has that name.
        RuntimeError: it cannot run on this device; says why.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"impl is {name!r}; expected None or one of {NAMES}")
    if dtype == torch.float64:
        return BACKENDS[FALLBACK]
    if name is not None:
        reason = BACKENDS[name].cannot_run(device)
        if reason is not None:
            raise RuntimeError(f"impl {name!r} cannot run on {device}: {reason}")
        return BACKENDS[name if vocab_size <= BACKENDS[name].largest_vocabulary else FALLBACK]
    asked = overrides.current().backends
    if unknown := set(asked or ()) - set(NAMES):
        raise ValueError(f"override has the back ends {sorted(unknown)}; expected names from {NAMES}")
    made_for_it = [name for name, backend in BACKENDS.items() if device.type in backend.devices]
    for candidate in made_for_it if asked is None else asked:
        reason = BACKENDS[candidate].cannot_run(device)
        if reason is None:
            return BACKENDS[candidate if vocab_size <= BACKENDS[candidate].largest_vocabulary else FALLBACK]
        _warn(reason)
    return BACKENDS[FALLBACK]


def capabilities(backend: Backend, device: torch.device, configuration: object) -> Capabilities:
    known, changes = backend.capabilities(device, configuration), overrides.current().capabilities
    if changes and "tiles" in changes:
        known = replace(known, wide_tiles=())  # whoever names the tiles gets no other
    return replace(known, **changes) if changes else known


def forward(call: Call) -> tuple[Execution, Saved]:
    """Resolves a call and runs it."""
    if call.shard is not None:
        return _forward_over_ranks(call)
    chosen = _chosen(call)
    execution, saved = _run(chosen, call)
    if chosen.out_of_reach(saved.maximum):
        del saved
        chosen.empty_cache()
        execution, saved = _run(BACKENDS[FALLBACK], call)
    return execution, saved


def _chosen(call: Call) -> Backend:
    chosen = choose(call.options.impl, call.hidden.device, call.hidden.dtype, call.vocab_size)
    return BACKENDS[FALLBACK] if chosen.declines_head(call.hidden, call.weight) else chosen


def _forward_over_ranks(call: Call) -> tuple[Execution, Saved]:
    """Each rank has its own back end and plan. What all have to do alike, the exchange tells them."""
    try:
        return _exchange(_chosen, call)
    except collectives.RunAgainError:
        pass  # out of this block nothing holds what was computed
    _chosen(call).empty_cache()
    return _exchange(lambda _: BACKENDS[FALLBACK], call)


def _exchange(choice: Callable[[Call], Backend], call: Call) -> tuple[Execution, Saved]:
    assert call.shard is not None
    exchange = collectives.Exchange(
        call.shard, call.vocab_size, call.tokens.labels, call.outputs, call.accumulate_dtype
    )  # fmt: skip
    try:
        backend = choice(call)
        return _run(backend, call, lambda state: exchange.finish(state, backend.out_of_reach))
    except Exception:
        exchange.fail()
        raise


def _run(backend: Backend, call: Call, join: Callable[[State], Finished] | None = None) -> tuple[Execution, Saved]:
    hidden, options = call.hidden, call.options
    plain = not (call.bias is not None or options.transform.softcap is not None or call.outputs)
    configuration = backend.configure(hidden.device, hidden.shape[-1], options.compute_dtype, not plain)
    capable = capabilities(backend, hidden.device, configuration)
    workload = Workload(
        call.tokens.count, hidden.shape[-1], call.vocab_size, hidden.dtype, options.compute_dtype, options.grads,
        entropy="entropy" in options.outputs, softcap=options.transform.softcap is not None, labels=call.label_count,
        capabilities=capable, rank=call.rank, statistics=len(call.outputs),
        filter="" if _is_captured(call)
        else filter_of(options.gradient_filter, options.grads, capable, backend, hidden.shape[-1]),
        **_split(call),
    )  # fmt: skip
    copied = hidden.numel() * hidden.element_size() if call.tokens.masked else 0  # without what is ignored (ops.py)
    made = plan(workload, options.memory_budget, copied)
    execution = Execution(backend.name, capable, configuration, made, call.tokens.index is None, call.tokens.masked)
    with _as_decided(hidden):
        return execution, driver.forward(call, made, backend.tile_ops(call, made, execution), join)


def _is_captured(call: Call) -> bool:
    """By a CUDA graph: the host cannot ask what a filter keeps."""
    return call.tokens.masked or (call.hidden.is_cuda and torch.cuda.is_current_stream_capturing())


def filter_of(share: float, grads: Grads, capable: Capabilities, backend: Backend, features: int) -> str:
    """How a call with a gradient_filter leaves entries out of its gradients, as in `Capabilities`; "" if it does not.

    Raises:
        ValueError: it is asked to, and the back end cannot.
    """
    if not share or not grads:
        return ""
    if not capable.filters:
        raise ValueError(
            f"gradient_filter is {share}, but {backend.name!r} has the library multiply this call ({features} features "
            "are no multiple of 16, or it was asked to), which leaves nothing out; leave it out, or give impl='torch'"
        )
    return capable.filters


def _split(call: Call) -> dict[str, Any]:
    """What a plan has to know of the ranks."""
    shard = call.shard
    return {} if shard is None else {"ranks": shard.ranks, "hidden_split": shard.hidden_dim is not None}


def backward(call: Call, wanted: Grads, execution: Execution, grads: TokenGrads, saved: Saved) -> driver.InputGrads:
    """wanted: the gradients wanted now, some of those that forward planned for."""
    assert execution.plan is not None
    ops = BACKENDS[execution.backend].tile_ops(call, execution.plan, execution)
    with _as_decided(call.hidden):
        made = driver.backward(call, wanted, execution.plan, ops, grads, saved)
        return made if call.shard is None else _summed(call, made)


def _summed(call: Call, parts: driver.InputGrads) -> driver.InputGrads:
    """Of parts of sums over ranks the gradients."""
    shard, hidden, a = call.shard, parts.hidden, parts.low_rank_a
    assert shard is not None
    if hidden is not None and shard.hidden_dim is not None:
        hidden = collectives.scatter_hidden(hidden, call.tokens.index, call.hidden.shape, shard).to(call.hidden.dtype)
        hidden = hidden.contiguous()
    elif hidden is not None:
        hidden = spread_rows(collectives.sum_over_ranks(hidden, shard), call.tokens.index, call.hidden)
    if a is not None and call.low_rank is not None:
        a = collectives.sum_over_ranks(a, shard).to(call.low_rank.a.dtype)
    return parts._replace(hidden=hidden, low_rank_a=a)


def logits_forward(
    logits: Tensor, tokens: Tokens, options: Options
) -> tuple[Execution, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """As `forward`, from logits: log-probs, max z, log sum exp(z - max z), labels' logits."""
    chosen = choose(options.impl, logits.device, logits.dtype, logits.shape[-1])
    if chosen.declines_logits(logits):
        chosen = BACKENDS[FALLBACK]
    execution, made = _run_logits(chosen, logits, tokens, options)
    if chosen.out_of_reach(made[1]):
        execution, made = _run_logits(BACKENDS[FALLBACK], logits, tokens, options)
    return execution, made


def _run_logits(
    backend: Backend, logits: Tensor, tokens: Tokens, options: Options
) -> tuple[Execution, tuple[Tensor, Tensor, Tensor, Tensor]]:
    configuration = backend.configure(logits.device, logits.shape[-1], logits.dtype, False)
    capable = capabilities(backend, logits.device, configuration)
    execution = Execution(backend.name, capable, configuration, None, tokens.index is None, tokens.masked)
    with _as_decided(logits):
        return execution, backend.logits_forward(logits, tokens, options.transform, configuration)


def logits_backward(
    logits: Tensor, tokens: Tokens, options: Options, execution: Execution, grads: TokenGrads, out: Tensor
) -> None:
    """Writes d loss / d logits of the tokens that count to out, which may be logits itself."""
    backend, configuration = BACKENDS[execution.backend], execution.configuration
    if backend.declines_logits(logits) or backend.declines_logits(out):
        # A hook on saved tensors laid the logits out anew: their gradient is the same function of the same numbers.
        backend, configuration = BACKENDS[FALLBACK], None
    with _as_decided(logits):
        backend.logits_backward(logits, tokens, options.transform, grads, out, configuration)


@contextlib.contextmanager
def _as_decided(tensor: Tensor) -> Iterator[None]:
    """Where operands are rounded is the driver's decision: autocast would round statistics too. Kernels are launched on
    the current device."""
    on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with torch.autocast(tensor.device.type, enabled=False), on_device:
        yield


@functools.cache  # once a reason
def _warn(reason: str) -> None:
    warn(f"dpo_kernels falls back to PyTorch operations, which are slower: {reason}")
