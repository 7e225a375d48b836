"""`--size`, one interleaved measurement a case that all of its benchmarks share, and where the results go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.cases import SIZES, Case
from benchmarks.measure import Effort, measure
from benchmarks.peers import peers_of
from benchmarks.results import Row, is_ours

SECONDS = {"small": 0.6, "cpu": 4.0, "real": 10.0, "gpu": 5.0, "tiny": 0.0}  # of timing a case
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
    output_json[results.SECTION] = results.of_this_run(_rows(config), config.getoption("--size"), DEVICE).to_json()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each peer once: in how many cases it was right, and what went wrong or why it did not run."""
    by_peer: dict[str, list[Row]] = defaultdict(list)
    for row in _rows(config):
        if row.status != "floor":
            by_peer[row.peer].append(row)
    if by_peer:
        terminalreporter.section("peers, verified against float64 before and after they were timed")
    for peer, rows in by_peer.items():
        right = [row for row in rows if row.status == "timed"]
        said = [f"right and timed in {len(right)} of {len(rows)} cases"] if right else []
        said += sorted({f"{row.status}: {row.reason}" for row in rows if row.reason})
        terminalreporter.write_line(f"{peer}: {'; '.join(said)}")
