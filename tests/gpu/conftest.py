"""The device of these tests: a GPU; with DPO_KERNELS_GPU_TESTS=cpu a CPU, on which Triton interprets small shapes."""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    asked = os.environ.get("DPO_KERNELS_GPU_TESTS", "cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False; DPO_KERNELS_GPU_TESTS=cpu interprets what makes sense")
    return torch.device(asked)


@pytest.fixture(autouse=True)
def on_a_device(device: torch.device) -> None:
    """Skips each test here where there is no device."""


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("means nothing in the interpreter")
    return device


@pytest.fixture
def room(cuda: torch.device) -> Iterator[torch.device]:
    """The device, for a test of many GiB: one at a time, whatever other processes of pytest-xdist run, and all given
    back."""
    with (Path(tempfile.gettempdir()) / "dpo_kernels_gpu_tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cuda
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(params=["fused", "tiles"])
def strategy(request: pytest.FixtureRequest, override: Callable[..., None]) -> str:
    """Which of the two strategies every shape takes."""
    override(kernels={"strategy": request.param})
    return request.param
