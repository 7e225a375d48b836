"""Hands times that were measured in interleaved rounds to pytest-benchmark, which times one function after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class ReplayClock:
    """A timer that pytest-benchmark reads before and after each round; the differences are the given seconds."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def replay(self, seconds: Sequence[float]) -> None:
        self._readings = iter([reading for s in seconds for reading in (0.0, s)])

    def __call__(self) -> float:
        return next(self._readings)


CLOCK = ReplayClock()
