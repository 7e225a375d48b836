"""The memory that this machine has for a process: all of it, a container's part, or what the process may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dpo_kernels.capabilities import DEFAULT_BUDGET

# Files of a control group, version 2 and 1: its limit, what it uses, and its statistics.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)  # fmt: skip
SHARE, STEP = 8, 2**29


def default_budget() -> int:
    """Bytes of the default memory budget on a CPU: an eighth of the memory, in halves of a GiB, 1 GiB at the least.

    Of the memory that there is, not of what is free just now: the same from run to run on one machine. Processes that
    a launcher started together (LOCAL_WORLD_SIZE) share it.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    each = min(_limits(), default=0) // SHARE // max(1, int(processes) if processes.isdecimal() else 1)
    return max(DEFAULT_BUDGET, each // STEP * STEP)


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
