"""The training step of train.py's trainer beside TRL's."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

from benchmarks.cases import TRAINING
from benchmarks.clock import CLOCK
from benchmarks.conftest import SECONDS, device, register
from benchmarks.training import TRAINERS, measure_training


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("trainer", list(TRAINERS))
def test_training_step(trainer: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    size = request.config.getoption("--size")
    case = TRAINING[size]
    register(benchmark, request.config, case.name, trainer, lambda: measure_training(case, device(), 3 * SECONDS[size]))
