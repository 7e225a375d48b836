"""Whether the machine does something else meanwhile: by the kernel's counters, and by a product that is timed.

Cores that are missing: what all processes but this one kept busy, and what a hypervisor gave to others, beyond what
this one leaves idle. A product that is slower than the fastest of the run shows what no counter does: memory or clock
shared.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

STAT = Path("/proc/stat")
IDLE, IOWAIT, STEAL = 3, 4, 7  # columns of a CPU's line
SECONDS = 0.25  # of products, before and between cases
MISSING = 0.15  # cores; the counters tick every 10 ms, which is 0.04 of a core in SECONDS
SLOWER = 1.25  # a product's time over the fastest's


@dataclass(frozen=True)
class Reading:
    """Seconds so far: of the clock, of this process on all cores, of all that kept the cores busy, stolen ones too."""

    wall: float
    own: float
    busy: float
    cpus: int


def read() -> Reading | None:
    """Of the cores that this process may use; None where the system does not tell (other than Linux)."""
    if not STAT.exists():
        return None
    cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in STAT.read_text().splitlines()]
    ticks = [[int(count) for count in line[1 : 2 + STEAL]] for line in lines if line and line[0] in cpus]
    busy = sum(sum(of_cpu) - of_cpu[IDLE] - of_cpu[IOWAIT] for of_cpu in ticks)
    return Reading(time.monotonic(), time.process_time(), busy / os.sysconf("SC_CLK_TCK"), len(ticks))


def missing(before: Reading | None, after: Reading | None, threads: int) -> float | None:
    """Cores that so many threads did not have between two readings; None where it is not known."""
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.busy - before.busy - (after.own - before.own)) / (after.wall - before.wall)
    return max(0.0, others + min(threads, after.cpus) - after.cpus)


class Machine:
    """Tries the machine between cases."""

    def __init__(self) -> None:
        self.a = torch.ones(512, 512)
        self.product = torch.empty_like(self.a)
        self.fastest = float("inf")  # seconds of a product, of the run so far

    def warning(self) -> str:
        """Multiplies for SECONDS; what is wrong, in a sentence, or nothing."""
        before, end, times = read(), time.monotonic() + SECONDS, []
        while time.monotonic() < end:
            start = time.perf_counter()
            torch.mm(self.a, self.a, out=self.product)
            times.append(time.perf_counter() - start)
        taken = missing(before, read(), torch.get_num_threads())
        median = sorted(times)[len(times) // 2]
        self.fastest = min(self.fastest, median)
        return said(taken, median / self.fastest)


def said(taken: float | None, slower: float = 1.0) -> str:
    """taken: cores missing; slower: a product's time over the fastest's."""
    found = []
    if is_busy(taken):
        found.append(f"other processes take {taken:.1f} of {len(os.sched_getaffinity(0))} cores")
    if slower > SLOWER:
        found.append(f"a product takes {slower:.1f} x what it took before")
    return f"BUSY MACHINE: {' and '.join(found)}; times now are not to be quoted" if found else ""


def is_busy(taken: float | None) -> bool:
    return taken is not None and taken > MISSING
