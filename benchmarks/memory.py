"""Peak memory of a step: a process of its own on the CPU, the allocator's high-water mark on a GPU.

A fork server imports everything once and computes nothing; each measurement is a fresh child of it. The child runs the
step once, in which libraries are loaded and code is compiled, and once more: both are measured.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import PEERS, first_line
from dpo_kernels import empty_cache

CLEAR_REFS = Path("/proc/self/clear_refs")
TIMEOUT = 300  # seconds that one child may take
M_MMAP_THRESHOLD = -3  # of glibc's mallopt

# A step that returns its outputs and gradients, and what frees the gradients that it left.
Prepared = tuple[Callable[[], dict[str, Tensor]], Callable[[], None]]


class Held(NamedTuple):
    """Bytes of one step: at its peak beyond its inputs, gradients included, and of outputs and gradients alone."""

    peak: int
    returned: int


def in_a_process(steps: int, prepare: Callable[..., Prepared], *arguments: Any) -> tuple[list[Held], str]:
    """What each of a number of steps holds; none and the reason where that is not known."""
    if not CLEAR_REFS.exists():
        return [], "the high-water mark is read from Linux' /proc"
    context = multiprocessing.get_context("forkserver")
    # All that a child could need, so that no import is measured; in this order, which leaves least to a first step.
    modules = [m for peer in PEERS if peer.unavailable(torch.device("cpu")) is None for m in peer.modules]
    context.set_forkserver_preload(["torch._inductor.compile_fx", "benchmarks.peers", *modules])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, steps, prepare, *arguments), daemon=True)
    child.start()
    send.close()
    try:
        found, reason = receive.recv() if receive.poll(TIMEOUT) else ([], f"took more than {TIMEOUT} s")
    except EOFError:
        found, reason = [], ""
    if not found:
        child.kill()
    child.join()
    return found, reason or ("" if found else f"the process ended with {child.exitcode}")


def _child(send: Connection, steps: int, prepare: Callable[..., Prepared], *arguments: Any) -> None:
    # Every block from 64 KiB on goes back to the system as soon as it is freed, so that the mark sees each run alone.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    send.send(held(OfProcess(), steps, prepare, *arguments))


def held(
    mark: OfProcess | OfAllocator, steps: int, prepare: Callable[..., Prepared], *arguments: Any
) -> tuple[list[Held], str]:
    found = []
    try:
        step, clear = prepare(*arguments)
        for _ in range(steps):
            clear()
            before = mark.start()
            returned = sum(t.nbytes for t in step().values())
            found.append(Held(mark.peak() - before, returned))
        clear()
    except Exception as error:  # a peer may fail in any way
        return [], first_line(error)
    return found, ""


class OfProcess:
    def start(self) -> int:
        """Bytes in use; the mark starts again from here."""
        empty_cache()  # what waits for this step is held by it
        CLEAR_REFS.write_text("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(name)[2].split()[1]) * 1024


class OfAllocator:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)
