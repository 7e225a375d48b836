"""What a process holds on its device, the most that it held, and what it may hold: measured, or asked of the system."""

from __future__ import annotations

import ctypes
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_kernels.host_memory import CGROUPS

# Bytes that libraries hold beside tensors: on a CPU beyond what a process holds before it has a model (kernels that are
# built as they are needed, threads; measured); on a GPU its context and cuBLAS's workspaces, an estimate.
CPU_LIBRARIES, GPU_LIBRARIES = 96 * 2**20, 640 * 2**20
# Bytes from which on glibc's malloc asks the system for memory of a block's own: at most, and after `keep_compact`.
USUAL, COMPACT = 32 * 2**20, 2 * 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h
NO_LIMIT = 2**60  # what limits of no meaning exceed
EVERY = 0.002  # seconds between two looks, where the system does not remember the most


@dataclass(frozen=True)
class Limit:
    """bytes: that a process may hold in all. why: what limits it, in a few words."""

    bytes: int
    why: str


def held(device: torch.device) -> int:
    """Bytes that this process holds: on a GPU what PyTorch has allocated there, on a CPU what is resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def keep_compact() -> bool:
    """Makes malloc return what is freed to the system for all but small blocks, for the rest of the process.

    As it is, glibc keeps blocks of up to 32 MiB in heaps, whose gaps have cost a quarter of a step's memory, and grow
    from step to step. Fresh pages for each such block cost from an eighth to a half of a step's time. Returns whether
    it worked: other C libraries have no such thing.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, COMPACT))
    except (AttributeError, OSError, TypeError):
        return False


@contextmanager
def peak_within(device: torch.device) -> Iterator[list[int]]:
    """The most bytes that the process holds within the block: one number in the list, at its end."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
    elif _forgets_its_peak():
        yield found
        found.append(_status("VmHWM"))
    else:
        with _watched() as most:
            yield found
        found.append(most[0])


def limit_of(device: torch.device) -> Limit:
    """What a process can hold here: the least of all that limits it, counted as `held` counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Limit(free + torch.cuda.memory_reserved(device), f"free of {torch.cuda.get_device_name(device)}")
    own = _status("VmRSS")
    limits = [Limit(own + available, "memory available on this machine") for available in _available()]
    limits += [Limit(bytes_, "the limit of this container") for bytes_ in _of_cgroup(own)]
    # Addresses and data that are reserved and not resident count in these limits too.
    for kind, name, field in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "VmSize"), (resource.RLIMIT_DATA, "RLIMIT_DATA", "VmData")
    ):  # fmt: skip
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(Limit(max(0, soft - _status(field)) + own, f"the limit {name} of this process"))
    return min(limits, key=lambda limit: limit.bytes)


def _available() -> Iterator[int]:
    """Bytes that the system can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        pages, size = (_sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
        yield pages * size


def _sysconf(name: str) -> int:
    import os

    return os.sysconf(name)


def _of_cgroup(own: int) -> Iterator[int]:
    for maximum, current, statistics in CGROUPS:
        try:
            limit, used = (int(Path(path).read_text()) for path in (maximum, current))
            lines = dict(line.split() for line in Path(statistics).read_text().splitlines())
        except (OSError, ValueError):  # not this version of them, or no limit
            continue
        if limit < NO_LIMIT:  # files in the page cache go when their memory is wanted
            files = int(lines.get("inactive_file", lines.get("total_inactive_file", 0)))
            yield max(0, limit - (used - files)) + own


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; elsewhere the most that was ever resident."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forgets_its_peak() -> bool:
    """Begins the system's own record of the most that is resident anew, where it allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") <= _status("VmRSS") + 2**20


@contextmanager
def _watched() -> Iterator[list[int]]:
    most, ended = [_status("VmRSS")], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], _status("VmRSS"))
            time.sleep(EVERY)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
