"""Time and memory against tokens, vocabulary and the memory budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import Case
from benchmarks.clock import CLOCK


def wanted(case: Case) -> bool:
    return case.curve is not None


@pytest.mark.benchmark(timer=CLOCK)
def test_curve(case: Case, peer: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, peer)
