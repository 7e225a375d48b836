"""A benchmark for each case of the size asked for, and each of its peers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import SIZES, Case
from benchmarks.clock import CLOCK
from benchmarks.peers import peers_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize(("case", "peer"), [
        pytest.param(case, name, id=f"{case.name}/{name}")
        for case in SIZES[metafunc.config.getoption("--size")]
        for name in (*case.floors, *(peer.name for peer in peers_of(case)))
    ])  # fmt: skip


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # where memory alone is measured
def test_case(case: Case, peer: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, peer)
