"""Peak memory of one step: a process of its own on the CPU, the allocator's high-water mark on a GPU.

A fork server imports everything once and computes nothing; each measurement is a fresh child of it. The child runs the
step once, so that libraries are loaded and code is compiled, and weighs the second run.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
TIMEOUT = 120  # seconds that one child may take
M_MMAP_THRESHOLD = -3  # of glibc's mallopt

# prepare(device, *arguments) -> a step, and what frees the gradients that it left. It must be importable by name.
Prepare = Callable[..., tuple[Callable[[], Any], Callable[[], None]]]


def peak_bytes(device: torch.device, prepare: Prepare, *arguments: Any) -> tuple[int | None, str]:
    """Bytes that a step holds at its peak beyond its inputs, gradients included; None and the reason where unknown."""
    if device.type == "cuda":
        return _on_gpu(device, prepare, *arguments), ""
    if not CLEAR_REFS.exists():
        return None, "the high-water mark is read from Linux' /proc"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, prepare, device, *arguments), daemon=True)
    child.start()
    send.close()
    try:
        held = receive.recv() if receive.poll(TIMEOUT) else None
    except EOFError:
        held = None
    if held is None:
        child.kill()
    child.join()
    return held, "" if held is not None else f"the process ended with {child.exitcode}"


def _child(send: Connection, prepare: Prepare, device: torch.device, *arguments: Any) -> None:
    # Every block from 64 KiB on goes back to the system as soon as it is freed, so that the mark sees each run alone.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    step, clear = prepare(device, *arguments)
    step()
    clear()
    CLEAR_REFS.write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    step()
    send.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _on_gpu(device: torch.device, prepare: Prepare, *arguments: Any) -> int:
    step, clear = prepare(device, *arguments)
    step()
    clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
