"""A fused head on models whose weights are split over processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import ROOT, slow


@pytest.mark.parametrize("processes", [2, slow(4)])
def test_fused_heads_on_split_models(processes):
    """Four: tensor parallelism and FSDP at once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "tensor_parallel_probe.py")], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as one process") == processes
