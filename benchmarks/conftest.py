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

# Rows by the name of the case; where a case could not be measured at all, what it raised.
KNOWN = pytest.StashKey[dict[str, "list[Row] | Exception"]]()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=sorted(SIZES), default="small",
        help="benchmarks: shapes for two cores (small; cpu: larger, the head alone), for a server or a GPU (real; gpu: "
        "those of benchmarks/gpu.sh; tiny: the same for Triton's interpreter)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KNOWN] = {}


@pytest.fixture
def row(case: Case, peer: str, request: pytest.FixtureRequest) -> Row:
    """Of a peer in a case, which is measured for all of its peers that are part of this run."""
    known = request.config.stash[KNOWN]
    if case.name not in known:
        try:
            known[case.name] = _measured(case, request)
        except Exception as error:  # once is enough: every other benchmark of the case would meet it again
            known[case.name] = error
    rows = known[case.name]
    if isinstance(rows, Exception):
        raise rows
    return next(row for row in rows if row.peer == peer)


def _measured(case: Case, request: pytest.FixtureRequest) -> list[Row]:
    """Of the peers that are asked for, and ours, which every peer's ratio is to."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = {p["peer"] for p in parameters if p.get("case") is case}
    seconds = SECONDS[request.config.getoption("--size")] * (3 if case.level == "train" else 1)
    peers = [p for p in peers_of(case) if p.name in names or is_ours(p.name)]
    return measure(case, peers=peers, device=DEVICE, effort=Effort(seconds, 5 * seconds))


def _rows(config: pytest.Config) -> list[Row]:
    return [row for rows in config.stash[KNOWN].values() if not isinstance(rows, Exception) for row in rows]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    run = results.of_this_run(_rows(config), config.getoption("--size"), DEVICE)
    output_json[results.SECTION] = run.to_json()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := _rows(config):
        terminalreporter.section("peers, verified against float64 before and after they were timed")
        terminalreporter.write_line(report.outcomes(rows))
