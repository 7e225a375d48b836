"""The cases of one GPU within a budget of seconds, and a file that is complete after each of them.

python -m benchmarks.gpu --json FILE [--seconds 280] [--only NAME ...] [--tests JUNIT.xml STATUS] [--try]

Measured as `pytest benchmarks/` measures, without a plugin: the cases "gpu" of `cases.py`. FILE is written after every
case. It has the section that `python -m benchmarks.report` reads, and one named "gpu": the device, the tests' outcomes
and what time left out. --try runs the cases "tiny" on a CPU, in Triton's interpreter, to prove the code.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks import results
from benchmarks.cases import SECONDS, SIZES, Case
from benchmarks.measure import Effort, free, measure
from benchmarks.peers import first_line
from benchmarks.results import Row
from benchmarks.screen import case_table, verdict


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
        facts = {"name": results.machine(device), "cuda": torch.version.cuda, "hip": torch.version.hip}
        if device.type == "cuda":
            known = torch.cuda.get_device_properties(device)
            names = ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
            facts |= {name: getattr(known, name) for name in names} | {"devices": torch.cuda.device_count()}
        self.told: dict[str, Any] = {"device": facts, "tests": tests, "finished": False, "failed": {}, "left_out": {}}

    def write(self) -> None:
        run = results.of_this_run(self.rows, self.size, self.device)
        told = {results.SECTION: run.to_json(samples=True), "gpu": self.told}
        results.write_whole(self.path, json.dumps(told, indent=1))


def measure_all(cases: Sequence[Case], report: Report, effort: Effort) -> None:
    for case in cases:
        report.write()
        before = effort.left()
        if before < case.needs:
            report.told["left_out"][case.name] = f"{max(before, 0):.0f} s left, {case.needs:.0f} needed to start"
            print(f"{case.name}: left out, time is up", flush=True)
            continue
        try:
            rows = measure(case, device=report.device, effort=effort)
        except Exception as error:  # the others may still go
            report.told["failed"][case.name] = f"{first_line(error)}\n{traceback.format_exc()[-2000:]}"
            print(f"{case.name}: {first_line(error)}", flush=True)
        else:
            report.rows += rows
            print(
                case.name, case_table(rows), f"{verdict(rows)} ({before - effort.left():.1f} s)", sep="\n", flush=True
            )
        free(report.device)
    report.told["finished"] = True
    report.write()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--seconds", type=float, default=280.0, help="no case is started after these")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these")
    parser.add_argument("--tests", nargs=2, metavar=("JUNIT", "STATUS"),
                        help="pytest's --junitxml and exit status, to be told in the file")  # fmt: skip
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny sizes on a CPU, interpreted")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --try proves the code without one")
    size, device = ("tiny", torch.device("cpu")) if options.tiny else ("gpu", torch.device("cuda", 0))
    if options.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    effort = Effort(SECONDS[size], SECONDS[size], end=time.monotonic() + options.seconds)
    tests = None if options.tests is None else test_outcomes(Path(options.tests[0]), int(options.tests[1]))
    cases = [case for case in SIZES[size] if any(part in case.name for part in options.only)]
    measure_all(cases, Report(options.json, size, device, tests), effort)


if __name__ == "__main__":
    main()
