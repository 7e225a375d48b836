"""The DPO loss end to end, reference included, with prompts masked at realistic shares."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import Case
from benchmarks.clock import CLOCK


def wanted(case: Case) -> bool:
    return case.level == "dpo" and case.curve is None


@pytest.mark.benchmark(timer=CLOCK)
def test_dpo_loss(case: Case, peer: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, peer)
