"""Two runs, a verdict a row: python -m benchmarks.compare BEFORE.json AFTER.json

A time counts over the floor's in the same round, where there is a floor: a machine that is slower altogether changes
nothing. The bound is what the samples' own spread leaves open: Student's t at one false alarm in 100 rows, times the
standard error of both medians, and what two runs of one commit differ by besides.

Exit status: 0 nothing of dpo_kernels is worse; 1 something is: slower, more memory, less exact, wrong or failed now;
2 nothing could be compared.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import busy, results
from benchmarks.results import Results, Row, case_names, is_ours, mib, milliseconds
from benchmarks.screen import WIDTH, number, text_table

FALSE_ALARMS = 1e-2  # of a row that did not change, before SAME_COMMIT is added, which leaves about 1e-3
SAME_COMMIT = 0.05  # log ratio: two runs of one commit, beyond the spread within each (README.md has the figures)
RULED_OUT = 0.2  # a slowdown that "same" rules out; where noise could hide it, the verdict says so
MORE_MEMORY = 1.1, 4 * 2**20  # a ratio, and bytes: what peaks of one commit differ by
LESS_EXACT = 2.0  # times the error; inputs are the same, so that an error changes with the arithmetic alone
GONE = ("wrong", "failed")
NOISY = "too noisy to tell"


@dataclass(frozen=True)
class Spread:
    """Of log times, over the floor's where there is one: median, standard error of it, and how many rounds."""

    median: float
    error: float
    rounds: int


@dataclass(frozen=True)
class Verdict:
    """worse: the row counts against the change. change, bound: as ratios, less 1; None where times do not tell."""

    said: str
    worse: bool = False
    change: float | None = None
    bound: float | None = None


def spread(row: Row, floor: Row | None) -> Spread:
    """From the rounds' samples, or from the quartiles of a file that has no samples."""
    assert row.seconds
    middle = math.log(row.to_floor or row.seconds)
    if row.samples:
        beside = floor.samples if floor is not None and row.to_floor else [1.0] * len(row.samples)
        logs = [math.log(sample / other) for sample, other in zip(row.samples, beside, strict=False)]
        middle = statistics.median(logs)
        low, high = quartiles(logs)
    else:
        low, high = map(math.log, row.quartiles or [row.seconds] * 2)
    n = max(row.rounds, 2)
    # Of a normal law: quartiles lie 1.349 sigma apart, in n samples less by about 1.4 / n; a median's error is 1.25
    # times a mean's.
    sigma = (high - low) / 1.349 / (1 - 1.4 / max(n, 3))
    return Spread(middle, 1.25 * sigma / math.sqrt(n), n)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def students_t(probability: float, freedom: int) -> float:
    """The quantile of Student's t, by the first terms of its expansion (Abramowitz and Stegun 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def change(was: Spread, now: Spread) -> tuple[float, float]:
    """The difference of two medians, and the bound that noise alone stays within; both of logarithms."""
    quantile = students_t(1 - FALSE_ALARMS / 2, was.rounds + now.rounds - 2)
    return now.median - was.median, quantile * math.hypot(was.error, now.error) + SAME_COMMIT


def verdict(was: Row | None, now: Row | None, floors: tuple[Row | None, Row | None] = (None, None)) -> Verdict:
    """Of a row of two runs; floors: the rows of the first floor of its case in each."""
    if was is None or now is None:
        return Verdict("only after" if was is None else "only before")
    if was.case != now.case:
        return Verdict("the case changed")
    if now.status in GONE and was.status not in GONE:
        return Verdict(f"{now.status.upper()} now: {now.reason}", worse=True)
    found = []
    if was.bytes and now.bytes and now.bytes > MORE_MEMORY[0] * was.bytes + MORE_MEMORY[1]:
        found.append(f"MORE MEMORY: {mib(was.bytes)}, now {mib(now.bytes)}")
    for name, error in now.errors.items():
        if name in was.errors and error > LESS_EXACT * was.errors[name] and error > now.allowed.get(name, 0) / 100:
            found.append(f"LESS EXACT, {name}: {was.errors[name]:.1e}, now {error:.1e}")
    worse = bool(found)
    if not (was.seconds and now.seconds):
        return Verdict("; ".join(found) or f"not timed: {was.status}, now {now.status}", worse)
    of_machine = was.status == "floor"
    if of_machine:
        floors = (None, None)
    difference, bound = change(spread(was, floors[0]), spread(now, floors[1]))
    slower = difference > bound
    if slower:
        found.insert(0, "slower machine" if of_machine else "SLOWER")
    elif difference < -bound:
        found.insert(0, "faster machine" if of_machine else "faster")
    else:
        found.insert(0, "same" if difference + bound < math.log1p(RULED_OUT) else NOISY)
    return Verdict("; ".join(found), worse or (slower and not of_machine), math.expm1(difference), math.expm1(bound))


def compare(before: Results, after: Results) -> list[tuple[str, str, Row | None, Row | None, Verdict]]:
    """Case, peer, both rows and the verdict, of every row that ran in either."""
    old, new = ({(row.case.name, row.peer): row for row in run.rows} for run in (before, after))
    floors = [{row.case.name: row for row in reversed(run.rows) if row.status == "floor"} for run in (before, after)]
    found = []
    for case in case_names([*before.rows, *after.rows]):
        for name, peer in old | new:
            was, now = old.get((name, peer)), new.get((name, peer))
            ran = [row for row in (was, now) if row is not None and row.status != "unavailable"]
            if name == case and ran:
                both = floors[0].get(case), floors[1].get(case)
                found.append((case, peer, was, now, verdict(was, now, both)))
    return found


def _cells(case: str, peer: str, was: Row | None, now: Row | None, told: Verdict) -> list[str]:
    times = [milliseconds(row.seconds) if row else "" for row in (was, now)]
    over = [number(row.to_floor) if row else "" for row in (was, now)]
    busy_when = [when for when, row in (("before", was), ("after", now)) if row and busy.is_busy(row.missing_cores)]
    said = told.said + (f" (busy {' and '.join(busy_when)})" if busy_when else "")
    shown = "" if told.change is None else f"{told.change:+.0%} (±{told.bound:.0%})"
    return [case, peer, *times, *over, shown, said]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="of `pytest benchmarks/ --benchmark-json`, or a committed run")
    parser.add_argument("after", type=Path)
    options = parser.parse_args(argv)
    try:
        before, after = results.load(options.before), results.load(options.after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for when, run in (("before", before), ("after", after)):
        print(f"{when}: {run.machine}, {run.date}, commit {run.commit}, {run.threads}"[:WIDTH])
    rows = compare(before, after)
    if not any(was and now for _, _, was, now, _ in rows):
        print("no row is in both files: run the same --size and -k twice", file=sys.stderr)
        return 2
    names = ("case", "what", "before:", "after:", "x bare:", "after:", "change:", "verdict")
    print(text_table(names, [_cells(*row) for row in rows]))
    worse = [f"{case}, {peer}: {told.said}" for case, peer, _, _, told in rows if told.worse and is_ours(peer)]
    if before.machine != after.machine:
        print("The machines differ: only times over the floor's mean something, and memory and errors.")
    if noisy := sum(NOISY in told.said for _, peer, _, _, told in rows if is_ours(peer)):
        print(f"{noisy} rows of dpo_kernels are {NOISY}: run both again on a quiet machine.")
    print("\n".join(["WORSE:", *(f"- {line}" for line in worse)]) if worse else "Nothing of dpo_kernels is worse.")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
