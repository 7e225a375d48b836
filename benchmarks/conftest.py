"""`--size`, one interleaved measurement a case that all of its benchmarks share, and what is shown and kept of it."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results, screen
from benchmarks.busy import Machine
from benchmarks.cases import SECONDS, SIZES, Case
from benchmarks.measure import Effort, measure
from benchmarks.peers import peers_of
from benchmarks.results import Row, is_ours

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Progress:
    """Of this run: what is known of its cases, a file that is whole after each of them, lines on the screen.

    rows: by the name of the case; where a case could not be measured at all, what it raised.
    """

    def __init__(self, path: Path, size: str) -> None:
        self.path, self.size, self.start = path, size, time.monotonic()
        self.rows: dict[str, list[Row] | Exception] = {}
        self.machine = Machine()

    def results(self) -> results.Results:
        rows = [row for rows in self.rows.values() if not isinstance(rows, Exception) for row in rows]
        return results.of_this_run(rows, self.size, DEVICE)

    def measure(self, case: Case, request: pytest.FixtureRequest) -> None:
        """Of the peers that are asked for, and ours, which every peer's ratio is to."""
        parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        names = {p["peer"] for p in parameters if p.get("case") is case}
        cases = len({p["case"].name for p in parameters if "case" in p})
        peers = [p for p in peers_of(case) if p.name in names or is_ours(p.name)]
        seconds = SECONDS[self.size] * (3 if case.level == "train" else 1)
        show = partial(_show, request.config.pluginmanager)
        left = screen.left(time.monotonic() - self.start, len(self.rows), cases)
        show(f"\n[{len(self.rows) + 1}/{cases}] {case.name}: {case.shape}{left}", bold=True)
        if DEVICE.type == "cpu":
            show(self.machine.warning(), red=True)
        try:
            rows = measure(case, peers=peers, device=DEVICE, effort=Effort(seconds, 5 * seconds))
        except Exception as error:  # once is enough: every other benchmark of the case would meet it again
            self.rows[case.name] = error
            show(f"could not be measured: {error}", red=True)
            return
        self.rows[case.name] = rows
        results.save(self.results(), self.path, samples=True)
        show(screen.case_table(rows))
        show(screen.verdict(rows), bold=True)
        show(screen.busy_warning(rows), red=True)


def _show(plugins: pytest.PytestPluginManager, text: str, **style: bool) -> None:
    """At once, though what a test prints is captured."""
    terminal, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")
    if text:
        with capture.global_and_fixture_disabled():
            terminal.write_line(text, **style)
            terminal.flush()


PROGRESS = pytest.StashKey[Progress]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=sorted(SIZES), default="small",
        help="benchmarks: shapes for two cores (small; cpu: larger, the head alone), for a server or a GPU (real; gpu: "
        "those of benchmarks/gpu.sh; tiny: the same for Triton's interpreter)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark's, which comes last: its table is 241 columns wide, and ours is shown instead."""
    size = config.getoption("--size")
    given = config.getoption("--benchmark-json", default=None)
    path = Path(given or f".benchmarks/{size}-{time.strftime('%Y-%m-%dT%H-%M-%S')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.stash[PROGRESS] = Progress(path, size)
    config.option.benchmark_quiet = config.getoption("verbose") <= 0


@pytest.fixture
def row(case: Case, peer: str, request: pytest.FixtureRequest) -> Row:
    """Of a peer in a case, which is measured for all of its peers that are part of this run."""
    progress = request.config.stash[PROGRESS]
    if case.name not in progress.rows:
        progress.measure(case, request)
    rows = progress.rows[case.name]
    if isinstance(rows, Exception):
        raise rows
    return next(row for row in rows if row.peer == peer)


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No dots between the tables."""
    if report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
        return "passed", "", "PASSED"
    return None


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json[results.SECTION] = config.stash[PROGRESS].results().to_json(samples=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    progress = config.stash[PROGRESS]
    if rows := progress.results().rows:
        terminalreporter.section("verified against float64 before and after the timing")
        terminalreporter.write_line(screen.summary(rows))
        terminalreporter.write_line(f"results: {progress.path}")
