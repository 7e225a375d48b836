"""What the contracts are held by: each implementation, on each device that is here, in each configuration.

A test that takes `target` runs once on each of them. One that takes `dtype` too runs in each dtype that the target
computes in, unless it names dtypes of its own; one that takes `shape`, at each of the target's ragged shapes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Head, head_on
from torch import Tensor

from dpo_kernels.dispatch import BACKENDS

SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """changes: of `override`. size: (tokens, features, vocabulary) in which every mode has a budget; deep: with so many
    features that they count; long: more tokens than vocabulary entries. wide: a vocabulary of several tiles. largest: a
    vocabulary beyond 16 bits. shapes: ragged ones."""

    name: str
    impl: str
    device: torch.device
    size: tuple[int, int, int]
    deep: tuple[int, int, int]
    long: tuple[int, int, int]
    wide: int
    largest: int
    shapes: Mapping[str, tuple[int | tuple[int, ...], int, int]]
    dtypes: tuple[torch.dtype, ...] = SINGLE
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widest(self) -> torch.dtype:
        return self.dtypes[0]

    def head(self, *shape: Any, **options: Any) -> Head:
        return head_on(self.device, *shape, **options)

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape).to(self.device).requires_grad_(grad)

    def labels(self, vocab: int, shape: tuple[int, ...], ignored: float = 0.0) -> Tensor:
        labels = torch.randint(vocab, shape)
        labels[torch.rand(shape) < ignored] = -100
        return labels.to(self.device)

    def tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.device)


ON_CPU: dict[str, Any] = {
    "size": (910, 64, 3000), "deep": (1050, 512, 1900), "long": (2100, 32, 700), "wide": 4200, "largest": 70_000,
    "shapes": {
        "one-token-tiny-vocabulary": (1, 8, 5), "ragged": (33, 96, 130),
        "one-past-the-last-vocabulary-tile": ((3, 7), 40, 2049), "one-past-the-last-token-tile": (513, 24, 700),
        "whole-tiles-odd-features": ((2, 2, 5), 65, 4096),
    },
}  # fmt: skip
# The interpreter is slow, so its tiles are small.
INTERPRETED: dict[str, Any] = {
    "size": (200, 32, 400), "deep": (200, 128, 260), "long": (300, 32, 130), "wide": 320, "largest": 33_000,
    "shapes": {
        "one-token-tiny-vocabulary": (1, 16, 5), "one-past-the-last-block": ((5, 13), 32, 129),
        "one-block": (33, 80, 64), "features-that-fused-kernels-cannot-read": (70, 7, 600),
    },
}  # fmt: skip
ON_GPU: dict[str, Any] = {
    "size": (1300, 512, 5000), "deep": (1050, 2048, 3000), "long": (4200, 256, 1000), "wide": 9000, "largest": 70_000,
    "shapes": {
        "one-token-tiny-vocabulary": (1, 16, 5), "ragged": (33, 96, 130),
        "features-that-are-not-aligned": ((3, 7), 40, 2049), "one-past-the-last-block": (129, 272, 8193),
    },
}  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITH_DOUBLES = (torch.float64, *SINGLE)
# So small that a target's tokens fill several: where saved tokens are whole tiles, the mode "mixed" needs that.
SMALL_TILES = {"tiles": ((64, 128),), "scratch": 0}
SMALL_TILES_ON_GPU = {"tiles": ((256, 1024),)}


def targets() -> list[Any]:
    """cpp and torch on the CPU; Triton's two strategies, and torch, on a GPU; else Triton's in its interpreter."""
    found = [
        Target("cpp", "cpp", CPU, **ON_CPU),
        Target("torch", "torch", CPU, dtypes=WITH_DOUBLES, **ON_CPU),
    ]
    on_gpu = torch.cuda.is_available() and os.environ.get("DPO_KERNELS_GPU_TESTS", "cuda") == "cuda"
    for strategy in ("fused", "tiles"):
        changes: dict[str, Any] = {"kernels": {"strategy": strategy}}
        if on_gpu:
            if strategy == "tiles":
                changes["capabilities"] = SMALL_TILES_ON_GPU
            found.append(Target(f"triton-{strategy}-cuda", "triton", CUDA, changes=changes, **ON_GPU))
        else:
            changes["capabilities"] = SMALL_TILES
            found.append(Target(f"triton-{strategy}", "triton", CPU, changes=changes, **INTERPRETED))
    if on_gpu:
        on_cuda: dict[str, Any] = {"capabilities": SMALL_TILES_ON_GPU}
        found.append(Target("torch-cuda", "torch", CUDA, dtypes=WITH_DOUBLES, changes=on_cuda, **ON_GPU))
    return [pytest.param(t, id=t.name, marks=[pytest.mark.gpu] if t.device.type == "cuda" else []) for t in found]


TARGETS = targets()


def is_of(label: str, parts: set[str]) -> bool:
    """Whether a case's label has one of these parts, such as a target's name or a dtype."""
    return any(f"-{part}-" in f"-{label}-" for part in parts)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    given = [m.args[0] for m in metafunc.definition.iter_markers("parametrize")]
    named = {name.strip() for names in given for name in (names.split(",") if isinstance(names, str) else names)}
    of_target: dict[str, Callable[[Target], dict[str, Any]]] = {
        "shape": lambda target: dict(target.shapes),
        "dtype": lambda target: {str(dtype).removeprefix("torch."): dtype for dtype in target.dtypes},
    }
    names = [name for name in of_target if name in metafunc.fixturenames and name not in named]
    rows = [([target.values[0]], target.id, target.marks) for target in TARGETS]
    for name in names:
        rows = [
            ([*values, value], f"{label}-{key}", marks)
            for values, label, marks in rows for key, value in of_target[name](values[0]).items()
        ]  # fmt: skip
    slow = {part for marker in metafunc.definition.iter_markers("slow_on") for part in marker.args}
    made = [
        pytest.param(*values, id=label, marks=[*marks, pytest.mark.slow] if is_of(label, slow) else marks)
        for values, label, marks in rows
    ]
    metafunc.parametrize(["target", *names], made, indirect=["target"])


@pytest.fixture
def target(request: pytest.FixtureRequest, override: Callable[..., None]) -> Target:
    """Every call of the test that names no implementation is this one's."""
    made: Target = request.param
    assert BACKENDS[made.impl].cannot_run(made.device) is None
    override(backends=(made.impl,), **made.changes)
    return made


@pytest.fixture
def unchecked_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where asking whether labels are in range would stall it."""
    monkeypatch.setattr("dpo_kernels.checks.labels_in_range", lambda *_: None)
