"""The training step of train.py's trainer beside TRL's."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from collections.abc import Callable

from benchmarks.cases import TRAINING, Case
from benchmarks.clock import CLOCK
from benchmarks.training import TRAINERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    case = TRAINING[metafunc.config.getoption("--size")]
    metafunc.parametrize(("case", "peer"), [pytest.param(case, name, id=name) for name in TRAINERS])


@pytest.mark.benchmark(timer=CLOCK)
def test_training_step(case: Case, peer: str, compare: Callable[[Case, str], None]) -> None:
    compare(case, peer)
