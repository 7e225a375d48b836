"""Real sizes on one GPU in a few minutes: both paths of ours in every mode, and every installed peer beside them.

python -m benchmarks.gpu --json FILE [--seconds 280] [--only NAME ...] [--tests JUNIT.xml STATUS] [--try]

Of each contest (`gpu_cases.py`), in this order: the exact answer in float64 for a slice of rows spread over all tokens;
every contestant once, against that answer, and once more for its peak memory; interleaved rounds, timed by CUDA events,
of those that were right; each once more on changed inputs and another slice. A gradient of the weight is judged with a
cotangent that is 0 outside the slice. FILE is written after every contest: it has the section that
`python -m benchmarks.report` reads, and one named "gpu" with a summary, the tests' outcomes and what time left out.
--try runs all of it at tiny sizes on a CPU, in Triton's interpreter, to prove the code.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

import dpo_kernels
from benchmarks import results
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.gpu_cases import Contest, Way, contests, tiny_contests
from benchmarks.judge import Judge, Outcome
from benchmarks.measure import MAX_ROUNDS, InputsRing, Row, clear, fill_times, step, verify
from benchmarks.peak_memory import peak_bytes
from benchmarks.peers import PEERS, Peer, first_line, floor_name, make_floor, ours

VERIFIED_ROWS = 512
COPY = "a large copy"
COPY_BYTES = {"cuda": 2**30, "cpu": 2**20}


class Clock:
    """How much of a budget of seconds is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass
class Contestant:
    """A peer, or ours in one way, with what the way's plan takes as budget."""

    row: Row
    peer: Peer
    way: Way | None = None
    memory_budget: int | None = None

    def run(self, case: Case, inputs: Inputs, cotangent: Tensor | None = None) -> Outcome:
        """One forward, and a backward where the case wants gradients; cotangent: another than the inputs'."""
        mine = replace(inputs, memory_budget=self.memory_budget)
        mine.cotangent = inputs.cotangent if cotangent is None else cotangent
        planted = (
            contextlib.nullcontext() if self.way is None else self.way.planted(inputs.labels.device, case.torch_dtype)
        )
        with planted:
            return step(self.peer.adapters[case.level], case, mine)


def contestants(contest: Contest, device: torch.device) -> list[Contestant]:
    """Ours in every way, then the peers; whoever cannot be tried has a reason."""
    case = contest.case
    return [*(_way(way, case, device) for way in contest.ways), *(_peer(name, case, device) for name in contest.peers)]


def _way(way: Way, case: Case, device: torch.device) -> Contestant:
    row = Row(asdict(case), way.peer, "unavailable", dpo_kernels.available_impls(device)["triton"] or "")
    made = Contestant(row, ours(way.peer, "triton"), way)
    row.gemms = case.needed_gemms
    if row.reason:
        return made
    try:
        with way.planted(device, case.torch_dtype):
            planned = way.plan(case, device)
    except Exception as error:
        row.fail("failed", first_line(error))
        return made
    if planned is not None:
        row.mode, row.gemms = planned.mode, planned.gemms
        row.predicted_bytes, row.library_bytes = planned.bytes, planned.memory["libraries and threads"]
        row.marks.append(f"tiles of {planned.tile_tokens:,} x {planned.tile_vocab:,}")
        made.memory_budget = planned.memory_budget
    return made


def _peer(name: str, case: Case, device: torch.device) -> Contestant:
    peer = next(p for p in PEERS if p.name == name)
    row = Row(asdict(case), name, "unavailable", peer.unavailable(device) or "", peer.notes(case))
    row.gemms = case.needed_gemms
    return Contestant(row, peer)


class Slice:
    """Every so many tokens from `first` on: their exact answer, and the same part of a contestant's outcome."""

    def __init__(self, case: Case, inputs: Inputs, first: int) -> None:
        tokens = inputs.labels.numel()
        self.rows = torch.arange(first, tokens, max(1, tokens // VERIFIED_ROWS), device=inputs.labels.device)
        self.case = case
        self.cotangent = torch.zeros_like(inputs.cotangent)
        self.cotangent.view(-1)[self.rows] = inputs.cotangent.flatten()[self.rows]
        logits = None if inputs.logits is None else self._of(inputs.logits.detach())
        part = Inputs(
            self._of(inputs.labels, 0), self._of(inputs.cotangent, 0), self._of(inputs.hidden.detach()),
            inputs.weight.detach(), logits=logits,
        )  # fmt: skip
        self.judge = Judge.of(case, part)

    def _of(self, t: Tensor, vectors: int = 1) -> Tensor:
        """(R, S, ...) -> (1, rows, ...); vectors: how many trailing dimensions belong to a token."""
        return t.flatten(0, t.dim() - 1 - vectors)[self.rows].unsqueeze(0)

    def outcome(self, contestant: Contestant, inputs: Inputs) -> Outcome:
        whole = contestant.run(self.case, inputs, self.cotangent)
        vectors = {"log_probs": 0, "hidden": 1, "logits": 1}
        return {name: self._of(t, vectors[name]) if name in vectors else t for name, t in whole.items()}


def measure_contest(
    contest: Contest,
    device: torch.device,
    clock: Clock,
    seconds: float = 5.0,
    field: Sequence[Contestant] | None = None,
) -> list[Row]:
    """All rows of a contest: the floor, a copy beside it, then each contestant.

    Args:
        seconds: about how long the timing takes, beyond the contest's least number of rounds.
        field: the contestants, if not the contest's own.
    """
    case = contest.case
    field = contestants(contest, device) if field is None else field
    inputs = _inputs(case, device)
    floors = [
        Row(asdict(case), floor_name(case), "floor", gemms=case.needed_gemms),
        Row(asdict(case), COPY, "floor", returned_bytes=COPY_BYTES[device.type]),
    ]
    first = Slice(case, inputs, 0)
    ring = InputsRing(case, inputs, first.judge)
    for one in field:
        _judge_first(one, case, inputs, first, ring, clock, device)
    del first, ring
    right = [one for one in field if one.row.status == "timed"]
    runs: dict[str, Callable[[], object]] = {floor_name(case): make_floor(case, inputs), COPY: _make_copy(device)}
    if case.level == "logits":
        del runs[COPY], floors[1]
    runs |= {one.row.peer: partial(one.run, case, inputs) for one in right}
    rounds, failures = interleave(runs, contest.min_rounds, seconds, clock, device)
    runs.clear()
    for one in right:
        if one.row.peer in failures:
            one.row.fail("failed", f"while it was timed: {failures[one.row.peer]}")
    floors = [row for row in floors if any(row.peer in times for times in rounds)]
    inputs.change()
    last = Slice(case, inputs, 1 if case.tokens > VERIFIED_ROWS else 0)
    ring = InputsRing(case, inputs, last.judge)
    for row, one in [(one.row, one) for one in right if one.row.status == "timed"]:
        held = row.returned_bytes
        verify(row, partial(last.outcome, one, inputs), last.judge, ring, "after it was timed, on other values: ")
        row.returned_bytes = held
        free(device)
    rows = [*floors, *(one.row for one in field)]
    for row in [row for row in rows if row.status == "timed" and not any(row.peer in times for times in rounds)]:
        row.fail("failed", "right, but time was up before it could be timed")
    fill_times(rows, rounds)
    return rows


def _inputs(case: Case, device: torch.device) -> Inputs:
    """In TF32: labels are drawn from logits, and those need no more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return make_inputs(case, device)
    finally:
        torch.set_float32_matmul_precision(before)


def _judge_first(
    one: Contestant, case: Case, inputs: Inputs, exact: Slice, ring: InputsRing, clock: Clock, device: torch.device
) -> None:
    """Verifies a contestant and weighs it."""
    row = one.row
    if row.reason:
        return
    if clock.left() < 0:
        row.fail("unavailable", "left out: time was up")
        return
    start = time.monotonic()
    verify(row, partial(exact.outcome, one, inputs), exact.judge, ring)
    row.marks.append(f"first call {time.monotonic() - start:.1f} s, compiling included")
    free(device)
    if row.status == "timed":
        _weigh(one, case, inputs, device)
        free(device)


def _weigh(one: Contestant, case: Case, inputs: Inputs, device: torch.device) -> None:
    row = one.row
    if device.type != "cuda":
        row.bytes_reason = "weighed on a GPU alone"
        return

    def prepare(_: torch.device) -> tuple[Callable[[], Outcome], Callable[[], None]]:
        return partial(one.run, case, inputs), lambda: clear(inputs.leaves().values())

    clear(inputs.leaves().values())
    held, row.bytes_reason = peak_bytes(device, 1, prepare)
    if not held:
        return
    row.bytes, row.returned_bytes = held[0].peak, held[0].returned
    beyond = row.bytes - row.returned_bytes
    if row.predicted_bytes is not None and beyond > row.predicted_bytes:
        row.marks.append(f"HOLDS MORE THAN PLANNED: {beyond:,} of {row.predicted_bytes:,} bytes")


def interleave(
    runs: dict[str, Callable[[], object]], min_rounds: int, seconds: float, clock: Clock, device: torch.device
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Times every function once a round, each round starting with another one, each after a run that is not timed:
    memory that others left in the allocator's cache is sorted out there.

    Whoever has spent `seconds` alone sits out; nobody starts when time is up. A function that raises plays no more.

    Returns:
        A dict of seconds a round, and why functions raised.
    """
    spent = dict.fromkeys(runs, 0.0)
    failures: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    while len(rounds) < MAX_ROUNDS and (len(rounds) < min_rounds or sum(spent.values()) < seconds):
        part = [name for name in runs if (not rounds or spent[name] < seconds) and name not in failures]
        if not part or clock.left() < 0:
            break
        first = len(rounds) % len(part)
        times: dict[str, float] = {}
        for name in part[first:] + part[:first]:
            if clock.left() < 0:
                break
            start = time.monotonic()
            try:
                if device.type == "cuda":
                    runs[name]()
                times[name] = timed(runs[name], device)
            except Exception as error:
                failures[name] = first_line(error)
                free(device)
            spent[name] += time.monotonic() - start
        rounds.append(times)
    return rounds, failures


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the device, by its events; on a CPU by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a kernel that broke the device: who runs next will meet it
            torch.cuda.empty_cache()


def _make_copy(device: torch.device) -> Callable[[], object]:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# The file ------------------------------------------------------------------------------------------------------------


def summary(row: Row) -> dict[str, Any]:
    """What is read first of a row.

    to_own_gemms: the time over that of as many bare products as this mode makes (recompute: 4), where to_floor counts
    those that the task needs (3). tflops: of the needed products. terabytes_per_second: of what must be moved.
    """
    case = Case(**row.case)
    said: dict[str, Any] = {"case": case.name, "peer": row.peer, "status": row.status}
    if row.reason:
        said["reason"] = row.reason
    if row.seconds is not None:
        said |= {"ms": 1000 * row.seconds, "rounds": row.rounds, "to_floor": row.to_floor}
        if row.peer == COPY:
            said["terabytes_per_second"] = 2 * (row.returned_bytes or 0) / row.seconds / 1e12
        elif case.level == "logits":
            passes = {"score": 1, "full": 3}[case.mode] if row.status != "floor" else {"score": 2, "full": 4}[case.mode]
            size = case.tokens * case.vocab_size * case.torch_dtype.itemsize
            said["terabytes_per_second"] = passes * size / row.seconds / 1e12
        else:
            said["tflops"] = case.needed_gemms * case.gemm_flop / row.seconds / 1e12
            if row.gemms and row.to_floor:
                said["to_own_gemms"] = row.to_floor * case.needed_gemms / row.gemms
    if row.bytes is not None and row.returned_bytes is not None:
        said["holds_mib"] = (row.bytes - row.returned_bytes) / 2**20
    if row.predicted_bytes is not None:
        said["planned_mib"] = row.predicted_bytes / 2**20
    return said | {"errors": row.errors, "marks": row.marks}


def line(said: dict[str, Any]) -> str:
    """A summary as one line of a table."""
    numbers = [
        f"{said[name]:{form}} {unit}"
        for name, form, unit in (
            ("ms", "9.3f", "ms"), ("to_floor", "6.3f", "x floor"), ("to_own_gemms", "6.3f", "x own GEMMs"),
            ("tflops", "5.0f", "TFLOP/s"), ("terabytes_per_second", "5.2f", "TB/s"), ("holds_mib", "8.0f", "MiB"),
            ("planned_mib", "8.0f", "MiB planned"),
        )
        if said.get(name) is not None
    ]  # fmt: skip
    errors = " ".join(f"{name} {error:.1e}" for name, error in said["errors"].items())
    status = "" if said["status"] in ("timed", "floor") else f"{said['status'].upper()} {said.get('reason', '')}"
    return "  ".join(filter(None, [f"{said['case']:16} {said['peer']:44}", status, *numbers, errors]))


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": results.machine(device), "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{known.major}.{known.minor}", "multiprocessors": known.multi_processor_count,
            "memory": known.total_memory, "l2": known.L2_cache_size, "devices": torch.cuda.device_count(),
        }  # fmt: skip
    return facts


def test_outcomes(junit: Path, status: int) -> dict[str, Any]:
    """How many tests passed, and which failed or were skipped and why, of a file of pytest's --junitxml.

    status: pytest's; 2 (or 124, of timeout) says that it was interrupted, and that the test it was in counts as passed.
    """
    try:
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return {"exit_status": status, "error": f"no outcomes: {first_line(error)}"}
    told: dict[str, Any] = {"exit_status": status, "passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if bad is None:
            told["passed"] += 1
        elif bad.tag == "skipped":
            told["skipped"].setdefault(bad.get("message", ""), []).append(name)
        else:
            told["failed"][name] = bad.get("message", "")[:500]
    return told


class Report:
    """The file, written anew whenever something is known: a run that is killed keeps what it has."""

    def __init__(self, path: Path, size: str, device: torch.device, tests: dict[str, Any] | None) -> None:
        self.path, self.size, self.device = path, size, device
        self.rows: list[Row] = []
        self.told: dict[str, Any] = {
            "device": device_facts(device), "tests": tests, "finished": False, "failed": {}, "left_out": {},
        }  # fmt: skip

    def write(self) -> None:
        run = results.of_this_run(self.rows, self.size, self.device)
        told = self.told | {"summary": [summary(row) for row in self.rows]}
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps({results.SECTION: run.to_json(samples=True), "gpu": told}, indent=1))
        beside.replace(self.path)


def measure_all(todo: Sequence[Contest], report: Report, clock: Clock, seconds: float) -> None:
    report.write()
    for contest in todo:
        name = contest.case.name
        if clock.left() < contest.needs:
            report.told["left_out"][name] = f"{max(clock.left(), 0):.0f} s left, {contest.needs:.0f} needed to start"
            print(f"{name}: left out, time is up", flush=True)
            continue
        before = clock.left()
        try:
            rows = measure_contest(contest, report.device, clock, seconds)
        except Exception as error:  # the others may still go
            report.told["failed"][name] = f"{first_line(error)}\n{traceback.format_exc()[-2000:]}"
            print(f"{name}: {first_line(error)}", flush=True)
        else:
            report.rows += rows
            print(*(line(summary(row)) for row in rows), f"  {before - clock.left():.1f} s", sep="\n", flush=True)
        free(report.device)
        report.write()
    report.told["finished"] = True
    report.write()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--seconds", type=float, default=280.0, help="no contest is started after these")
    parser.add_argument("--each", type=float, default=5.0, help="seconds of timing a contest")
    parser.add_argument("--only", nargs="+", default=[], help="contests whose name holds one of these")
    parser.add_argument(
        "--tests",
        nargs=2,
        metavar=("JUNIT", "STATUS"),
        help="pytest's --junitxml and exit status, to be told in the file",
    )
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny sizes on a CPU, interpreted")
    options = parser.parse_args(argv)
    clock = Clock(options.seconds)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --try proves the code without one")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    tests = None if options.tests is None else test_outcomes(Path(options.tests[0]), int(options.tests[1]))
    todo = [
        contest for contest in (tiny_contests() if options.tiny else contests())
        if not options.only or any(part in contest.case.name for part in options.only)
    ]  # fmt: skip
    if options.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    report = Report(options.json, "tiny" if options.tiny else "real", device, tests)
    measure_all(todo, report, clock, 0.0 if options.tiny else options.each)


if __name__ == "__main__":
    main()
