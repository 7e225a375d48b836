"""Verify, then time: every peer of a case on the same inputs, in interleaved rounds. A wrong result is never timed.

The same for a CPU and a GPU. What differs is how `timed` reads the time, and where memory is measured: in a process of
its own on a CPU, in this one on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import busy
from benchmarks.cases import MIB, Case
from benchmarks.inputs import Step
from benchmarks.memory import Held, OfAllocator, Prepared, held, in_a_process
from benchmarks.peers import CONFIGURED, PEERS, Peer, default_impl, first_line, peers_of
from benchmarks.results import Row, is_ours
from benchmarks.training import TrainingProblem
from benchmarks.verify import Problem

TIME_IS_UP = "left out: time was up"


@dataclass(frozen=True)
class Effort:
    """How long a case may take.

    seconds: of timing, about, beyond the case's least number of rounds. patience: seconds after which a peer sits out.
    end: of `time.monotonic`, after which nothing is started.
    """

    seconds: float = 5.0
    patience: float = 25.0
    max_rounds: int = 15
    end: float = math.inf

    def left(self) -> float:
        return self.end - time.monotonic()


def problem_of(case: Case, device: torch.device) -> Problem:
    return TrainingProblem(case, device) if case.level == "train" else Problem(case, device)


def measure(
    case: Case, *, peers: Sequence[Peer] | None = None, device: torch.device | str = "cpu", effort: Effort = Effort()
) -> list[Row]:
    """The rows of a case: the floors, then each peer, verified against float64 and, where right, timed; its memory."""
    device = torch.device(device)
    problem = problem_of(case, device)
    peers = peers_of(case) if peers is None else peers
    makers = {name: partial(problem.floor, name) for name in case.floors}
    makers |= {peer.name: partial(problem.step, peer) for peer in peers}
    rows = [Row(case, name, "floor", gemms=case.needed_gemms) for name in case.floors]
    rows += [new_row(case, peer, device) for peer in peers]
    steps = {}
    for row in rows:
        if not row.reason and (case.timed or device.type == "cuda"):
            try:
                steps[row.peer] = makers[row.peer]()
            except Exception as error:
                row.fail("failed", first_line(error))
    if case.timed:
        compare(rows, steps, problem, effort)
        problem.forget()
    measure_memory(rows, steps, problem, effort)
    return rows


def new_row(case: Case, peer: Peer, device: torch.device) -> Row:
    """What is known before it runs, for ours with what it plans."""
    row = Row(case, peer.name, "unavailable", peer.unavailable(device) or "", peer.notes(case), gemms=case.needed_gemms)
    if row.reason:
        return row
    if not case.timed:
        row.status = "memory"
        row.marks.append("memory alone: not verified, not timed")
    if not is_ours(peer.name):
        return row
    row.marks.insert(0, f"impl {peer.impl or default_impl(device)}")
    try:
        planned = peer.plan(case, device)
    except Exception as error:
        row.fail("failed", first_line(error))
        return row
    if planned is not None:
        row.mode, row.gemms = planned.mode, planned.gemms + (case.level == "dpo")
        if case.level == "hidden":  # its bytes: the case is one call
            row.predicted_bytes, row.library_bytes = planned.bytes, planned.memory["libraries and threads"]
        if peer.configuration is not None:
            row.marks.append(f"tiles of {planned.tile_tokens:,} x {planned.tile_vocab:,}")
    return row


def compare(rows: Sequence[Row], steps: Mapping[str, Step], problem: Problem, effort: Effort) -> None:
    """Verifies the rows that have no reason yet, times those that are right, and verifies those again on other values.

    Rows of status "floor" are timed without being verified.
    """
    for row in rows:
        if row.reason:
            continue
        if effort.left() < 0:
            row.fail("unavailable", TIME_IS_UP)
        else:
            verify(row, steps[row.peer], problem)
    right = {row.peer: row for row in rows if row.status in ("timed", "floor")}
    if not right:
        return
    problem.forget()
    runs = {name: steps[name] for name in right}
    before = busy.read()
    rounds, failures = interleave(runs, effort, problem.device, problem.case.min_rounds)
    missing = busy.missing(before, busy.read(), torch.get_num_threads())
    for name, row in right.items():
        row.missing_cores = None if problem.device.type == "cuda" else missing
        if name in failures:
            row.fail("failed", f"while it was timed: {failures[name]}")
        elif not any(name in times for times in rounds):
            row.fail("unavailable", TIME_IS_UP)
    problem.change()
    for row in right.values():
        if row.status == "timed":
            verify(row, steps[row.peer], problem, "after it was timed, on other values: ")
    fill_times([row for row in right.values() if row.status in ("timed", "floor")], rounds)


def verify(row: Row, step: Step, problem: Problem, when: str = "") -> None:
    """Runs a step once and fills in errors and status, and the reason unless it is right."""
    ours, truth, start = is_ours(row.peer), problem.truth, time.monotonic()
    try:
        outcome = problem.run(step)
        if problem.device.type == "cuda" and not when and row.status != "floor":
            torch.cuda.synchronize(problem.device)
            row.marks.append(f"first call {time.monotonic() - start:.1f} s, compiling included")
        changed = problem.restore()
        errors, wrong = ({}, "") if changed or row.status == "floor" else truth.check(outcome, ours)
    except Exception as error:  # a peer may fail in any way; the row says how
        row.fail("failed", when + first_line(error))
        return
    finally:
        free(problem.device)
    if changed:
        row.fail("wrong", when + "it changes its inputs")
    elif row.status != "floor":
        row.errors = row.errors or errors
        row.allowed = truth.allowed_ours if ours else truth.allowed
        row.returned_bytes = sum(t.nbytes for t in outcome.values())
        row.status = "timed"
        if wrong:
            row.fail("wrong", when + wrong)


def interleave(
    runs: Mapping[str, Callable[[], object]], effort: Effort, device: torch.device, min_rounds: int = 5
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Times every function once a round, each round starting with another one.

    All play until the seconds are used up, and min_rounds rounds at least, unless they take too long alone or time is
    up. A function that raises plays no more.

    Returns:
        A dict of seconds a round, and why functions raised.
    """
    spent = dict.fromkeys(runs, 0.0)
    failures: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    while len(rounds) < effort.max_rounds and (len(rounds) < min_rounds or sum(spent.values()) < effort.seconds):
        part = [name for name in runs if (not rounds or spent[name] < effort.patience) and name not in failures]
        if not part or effort.left() < 0:
            break
        first = len(rounds) % len(part)
        times: dict[str, float] = {}
        for name in part[first:] + part[:first]:
            if effort.left() < 0:
                break
            start = time.perf_counter()
            try:
                times[name] = timed(runs[name], device)
            except Exception as error:
                failures[name] = first_line(error)
                free(device)
            spent[name] += time.perf_counter() - start
        rounds.append(times)
    return rounds, failures


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run. On a GPU by its events, after a run that is not timed: memory that others left in the
    allocator's cache is sorted out there."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    run()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def free(device: torch.device) -> None:
    """Of a GPU, for whoever runs next."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a kernel that broke the device: who runs next will meet it
            torch.cuda.empty_cache()


def ratio(rounds: Sequence[dict[str, float]], name: str, other: str) -> float | None:
    both = [times[name] / times[other] for times in rounds if name in times and other in times]
    return statistics.median(both) if both else None


def fill_times(rows: Sequence[Row], rounds: list[dict[str, float]]) -> None:
    floor = next((row.peer for row in rows if row.status == "floor"), "")
    ours = next((row.peer for row in rows if is_ours(row.peer)), "")
    for row in rows:
        row.samples = [times[row.peer] for times in rounds if row.peer in times]
        row.rounds = len(row.samples)
        row.seconds = statistics.median(row.samples)
        if row.rounds > 1:
            first, _, third = statistics.quantiles(row.samples, n=4, method="inclusive")
            row.quartiles = [first, third]
        row.to_floor, row.to_ours = ratio(rounds, row.peer, floor), ratio(rounds, row.peer, ours)


def prepare(case: Case, name: str, device: torch.device) -> Prepared:
    """A peer's step of a case, and what frees the gradients that it left."""
    peer = next((peer for peer in (*PEERS, *CONFIGURED) if peer.name == name), None)
    if peer is None:
        raise LookupError(f"{name} is none of PEERS, where a process of its own looks for it")
    problem = problem_of(replace(case, inputs="noise"), device)  # quicker to make, and the bytes are the same
    return problem.step(peer), problem.clear


def measure_memory(rows: Sequence[Row], made: Mapping[str, Step], problem: Problem, effort: Effort) -> None:
    """Peak memory of what was timed, and of what is not timed at all.

    Ours fails if its first step, which has the library's share in it, holds more than its budget.
    """
    case, device = problem.case, problem.device
    rows = [row for row in rows if row.status in ("timed", "memory")]
    wanted = [row for row in rows if case.memory_of is None or row.peer in case.memory_of]
    for row in rows:
        row.bytes_reason = "not measured in this case"
    steps = 2 if case.timed else 1

    def measured(row: Row) -> tuple[list[Held], str]:
        if device.type != "cuda":
            return in_a_process(steps, prepare, case, row.peer, device)
        if effort.left() < 0:
            return [], TIME_IS_UP
        free(device)
        return held(OfAllocator(device), steps, lambda: (made[row.peer], problem.clear))

    # Processes of their own hold what they hold whatever runs beside them; on a GPU there is only this one.
    with ThreadPoolExecutor(1 if device.type == "cuda" else 2) as pool:
        for row, (found, row.bytes_reason) in zip(wanted, list(pool.map(measured, wanted)), strict=True):
            if not found:
                continue
            row.returned_bytes, row.first_bytes = found[0].returned, found[0].peak
            row.bytes = found[1].peak if steps > 1 else None
            budget, beyond = case.memory_budget, row.beyond(row.first_bytes) or 0
            if row.predicted_bytes is not None and beyond > row.predicted_bytes:
                row.marks.append(f"HOLDS MORE THAN PLANNED: {beyond:,} of {row.predicted_bytes:,} bytes")
            if is_ours(row.peer) and budget is not None and beyond > budget:
                row.fail("wrong", f"its first step holds {beyond / MIB:.1f} MiB, its budget is {budget / MIB:.1f} MiB")
