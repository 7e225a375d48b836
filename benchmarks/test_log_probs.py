"""Log-probs of the labels, from logits and from hidden states: forward, full step, frozen head."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.cases import Case
from benchmarks.clock import CLOCK


def wanted(case: Case) -> bool:
    return case.level in ("logits", "hidden") and case.curve is None


@pytest.mark.benchmark(timer=CLOCK)
def test_log_probs(case: Case, peer: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, peer)
