"""A benchmark for each case of the size asked for, and each of its peers."""

from __future__ import annotations

from collections import deque

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import SIZES, Case
from benchmarks.peers import peers_of
from benchmarks.results import Row, is_ours

READINGS: deque[float] = deque()


def replayed() -> float:
    """pytest-benchmark's clock, read before and after each round: it times one function after another, and is given
    here what was measured in interleaved rounds."""
    return READINGS.popleft()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("case", "peer"), [
        pytest.param(case, name, id=f"{case.name}/{name}")
        for case in SIZES[metafunc.config.getoption("--size")]
        for name in (*case.floors, *(peer.name for peer in peers_of(case)))
    ])  # fmt: skip


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # where memory alone is measured
def test_case(case: Case, peer: str, row: Row, benchmark: BenchmarkFixture) -> None:
    message = f"{peer} is {row.status}: {row.reason}"
    if is_ours(peer) and row.status in ("wrong", "failed"):
        pytest.fail(message)
    if row.status == "wrong":
        pytest.xfail(message)
    if row.status in ("failed", "unavailable"):
        pytest.skip(message)
    if row.status == "memory":
        return
    benchmark.group = case.name
    told = ("to_floor", "to_ours", "bytes", "predicted_bytes", "errors")
    benchmark.extra_info.update({name: getattr(row, name) for name in told})
    READINGS.extend(reading for seconds in row.samples for reading in (0.0, seconds))
    benchmark.pedantic(lambda: None, rounds=row.rounds)
