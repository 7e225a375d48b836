"""`--size`, one interleaved measurement a case that all of its benchmarks share, and where the results go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import results
from benchmarks.cases import SIZES, Case
from benchmarks.clock import CLOCK
from benchmarks.measure import Effort, measure
from benchmarks.peers import peers_of
from benchmarks.results import Row, is_ours

SECONDS = {"small": 0.6, "cpu": 4.0, "real": 10.0, "gpu": 5.0, "tiny": 0.0}  # of timing a case
# Rows by the name of the case; where a case could not be measured at all, what it raised.
KNOWN = pytest.StashKey[dict[str, "list[Row] | Exception"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=sorted(SIZES), default="small",
        help="benchmarks: shapes for two cores (small; cpu: larger, the head alone), for a server or a GPU (real; gpu: "
        "those of benchmarks/gpu.sh; tiny: the same for Triton's interpreter)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KNOWN] = {}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compare(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """compare(case, peer): registers the peer's times in the case; skips it, or fails, where there are none."""
    config = request.config

    def of_case(case: Case, peer: str) -> None:
        known = config.stash[KNOWN]
        if case.name not in known:
            known[case.name] = _measured(case, _selected(request.session, case), config.getoption("--size"))
        rows = known[case.name]
        if isinstance(rows, Exception):
            raise rows
        _register(benchmark, next(row for row in rows if row.peer == peer))

    return of_case


def _selected(session: pytest.Session, case: Case) -> set[str]:
    """The peers of a case whose benchmarks are part of this run."""
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return {p["peer"] for p in parameters if p.get("case") is case}


def _measured(case: Case, names: Collection[str], size: str) -> list[Row] | Exception:
    """Those that are asked for, and ours, which every peer's ratio is to."""
    seconds = SECONDS[size] * (3 if case.level == "train" else 1)
    try:
        peers = [p for p in peers_of(case) if p.name in names or is_ours(p.name)]
        return measure(case, peers=peers, device=device(), effort=Effort(seconds, 5 * seconds))
    except Exception as error:  # once is enough: every other benchmark of the case would meet it again
        return error


def _register(benchmark: BenchmarkFixture, row: Row) -> None:
    """Hands the peer's rounds to pytest-benchmark."""
    message = f"{row.peer} is {row.status}: {row.reason}"
    if is_ours(row.peer) and row.status in ("wrong", "failed"):
        pytest.fail(message)
    if row.status == "wrong":
        pytest.xfail(message)
    if row.status in ("failed", "unavailable"):
        pytest.skip(message)
    if row.status == "memory":
        return
    benchmark.group = row.case.name
    benchmark.extra_info.update(
        to_floor=row.to_floor, to_ours=row.to_ours, bytes=row.bytes, predicted_bytes=row.predicted_bytes,
        errors=row.errors,
    )  # fmt: skip
    CLOCK.replay(row.samples)
    benchmark.pedantic(lambda: None, rounds=len(row.samples))


def _rows(config: pytest.Config) -> list[Row]:
    return [row for rows in config.stash[KNOWN].values() if not isinstance(rows, Exception) for row in rows]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    made = results.of_this_run(_rows(config), config.getoption("--size"), device())
    output_json[results.SECTION] = made.to_json(samples=True)


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
