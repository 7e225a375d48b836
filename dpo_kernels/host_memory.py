"""The memory that this machine has for a process: all of it, a container's part, or what the process may take."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dpo_kernels.capabilities import DEFAULT_BUDGET, Capabilities

# Files of a control group, version 2 and 1: its limit, what it uses, and its statistics.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)  # fmt: skip
SHARE, STEP = 8, 2**29
# Variables in which launchers say how many processes they start on a machine: torchrun and accelerate, then MPIs.
ON_THIS_MACHINE = (
    "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


def with_memory(known: Capabilities) -> Capabilities:
    """Of a back end on a CPU, with the budget that this machine has for a call."""
    return _with_budget(known, default_budget())


@functools.cache
def _with_budget(known: Capabilities, budget: int) -> Capabilities:
    return replace(known, default_budget=budget)


def default_budget() -> int:
    """Bytes of the default memory budget on a CPU: an eighth of the memory, in halves of a GiB, 1 GiB at the least.

    Of the memory that there is, not of what is free just now: the same from run to run on one machine. Processes that
    a launcher started together share it.
    """
    given = (os.environ.get(name, "") for name in ON_THIS_MACHINE)
    processes = next((int(value) for value in given if value.isdecimal() and int(value)), 1)
    return max(DEFAULT_BUDGET, _memory() // SHARE // processes // STEP * STEP)


@functools.cache
def _memory() -> int:
    return min(_limits(), default=0)


def _limits() -> Iterator[int]:
    with suppress(AttributeError, OSError, ValueError):  # not everywhere
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path, _, _ in CGROUPS:
        with suppress(OSError, ValueError):  # not this version of them, or no limit
            yield int(Path(path).read_text())
    with suppress(ImportError):
        import resource

        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            soft, _ = resource.getrlimit(kind)
            if soft != resource.RLIM_INFINITY:
                yield soft
