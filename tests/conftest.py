"""Every test runs on poisoned memory (fresh tensors are NaN) and from a fixed seed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall where a core is busy

# Tests run with deterministic algorithms, which cuBLAS has with a workspace of this kind alone.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: without a GPU its interpreter runs the kernels


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def override() -> Iterator[Callable[..., None]]:
    """Changes what calls resolve to, until the test ends; see `dpo_kernels.overrides`."""
    from dpo_kernels import overrides

    with contextlib.ExitStack() as stack:
        yield lambda **changes: stack.enter_context(overrides.override(**changes))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from helpers import WORST

    for (impl, dtype), worst in sorted(WORST.items()):
        numbers = ", ".join(f"{name} {worst[name]:.1e}" for name in ("log_probs", "gradients") if name in worst)
        terminalreporter.write_line(f"largest errors of {impl} in {dtype}, {worst['cases']} cases: {numbers}")
