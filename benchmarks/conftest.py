"""`--size`, one interleaved measurement a case that all of its benchmarks share, and where the results go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import report, results
from benchmarks.cases import SECONDS, SIZES, Case
from benchmarks.measure import Effort, measure
from benchmarks.peers import peers_of
from benchmarks.results import Row, is_ours

ROWS = pytest.StashKey[list[Row]]()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=sorted(SIZES), default="small",
        help="benchmarks: shapes for two cores (small; cpu: larger, the head alone), for a server or a GPU (real; gpu: "
        "those of benchmarks/gpu.sh; tiny: the same for Triton's interpreter)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def rows(case: Case, request: pytest.FixtureRequest) -> list[Row]:
    """Of a case: of its peers that are part of this run, and of ours, which every peer's ratio is to."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = {p["peer"] for p in parameters if p.get("case") is case}
    seconds = SECONDS[request.config.getoption("--size")] * (3 if case.level == "train" else 1)
    peers = [p for p in peers_of(case) if p.name in names or is_ours(p.name)]
    made = measure(case, peers=peers, device=DEVICE, effort=Effort(seconds, 5 * seconds))
    request.config.stash[ROWS].extend(made)
    return made


@pytest.fixture
def row(rows: list[Row], peer: str) -> Row:
    return next(row for row in rows if row.peer == peer)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    run = results.of_this_run(config.stash[ROWS], config.getoption("--size"), DEVICE)
    output_json[results.SECTION] = run.to_json()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.section("peers, verified against float64 before and after they were timed")
        terminalreporter.write_line(report.outcomes(rows))
