"""A fused head on models whose weights are split over processes."""

from __future__ import annotations

import pytest
from helpers import slow
from script_helpers import check_probe


@pytest.mark.parametrize("processes", [2, slow(4)])
def test_fused_heads_on_split_models(processes):
    """Four: tensor parallelism and FSDP at once."""
    check_probe("tensor_parallel_probe.py", processes)
