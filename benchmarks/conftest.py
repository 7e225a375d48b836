"""`--size`, one interleaved measurement a case that all of its benchmarks share, and where the results go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import results
from benchmarks.cases import SIZES, Case
from benchmarks.clock import CLOCK
from benchmarks.measure import Row, is_ours, measure
from benchmarks.peers import floor_name, peers_of

SECONDS = {"small": 1.0, "real": 10.0}  # of timing a case
ROWS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", choices=sorted(SIZES), default="small",
        help="benchmarks: shapes for two cores (small) or for a GPU or a server (real)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each case of the test's levels or curves, and each of its peers."""
    if "peer" not in metafunc.fixturenames:
        return
    wanted: Callable[[Case], bool] = metafunc.module.wanted
    metafunc.parametrize(("case", "peer"), [
        pytest.param(case, name, id=f"{case.name}/{name}")
        for case in SIZES[metafunc.config.getoption("--size")]
        if wanted(case)
        for name in (floor_name(case), *(peer.name for peer in peers_of(case)))
    ])  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compare(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """compare(case, peer): registers the peer's times in the case; skips it, or fails, where there are none."""

    def of_case(case: Case, peer: str) -> None:
        seconds = SECONDS[request.config.getoption("--size")]
        register(benchmark, request.config, case.name, peer, lambda: measure(case, device=device(), seconds=seconds))

    return of_case


def register(
    benchmark: BenchmarkFixture, config: pytest.Config, case: str, peer: str, measured: Callable[[], list[Row]]
) -> None:
    """Measures the case the first time that it is asked for, then hands the peer's rounds to pytest-benchmark."""
    known = config.stash[ROWS]
    if case not in known:
        known[case] = measured()
    row = next(row for row in known[case] if row.peer == peer)
    if row.status == "unavailable":
        pytest.skip(f"{peer} cannot run here: {row.reason}")
    if row.status == "wrong":
        message = f"{peer} is WRONG and was not timed: {row.reason}"
        pytest.fail(message) if is_ours(peer) else pytest.xfail(message)
    benchmark.group = case
    benchmark.extra_info.update(
        to_floor=row.to_floor, to_ours=row.to_ours, bytes=row.bytes, predicted_bytes=row.predicted_bytes,
        errors=row.errors,
    )  # fmt: skip
    CLOCK.replay(row.samples)
    benchmark.pedantic(lambda: None, rounds=len(row.samples))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    rows = [row for case in config.stash[ROWS].values() for row in case]
    made = results.of_this_run(rows, config.getoption("--size"), device())
    output_json[results.SECTION] = made.to_json(samples=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Each peer once: in how many cases it was right, and what went wrong or why it did not run."""
    by_peer: dict[str, list[Row]] = defaultdict(list)
    for rows in config.stash[ROWS].values():
        for row in rows:
            if row.status != "floor":
                by_peer[row.peer].append(row)
    if by_peer:
        terminalreporter.section("peers, verified against float64 before they were timed")
    for peer, rows in by_peer.items():
        right = [row for row in rows if row.status == "timed"]
        said = [f"right and timed in {len(right)} of {len(rows)} cases"] if right else []
        said += sorted({f"{row.status}: {row.reason}" for row in rows if row.reason})
        terminalreporter.write_line(f"{peer}: {'; '.join(said)}")
