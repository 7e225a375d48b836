"""compute-sanitizer over every kernel. It takes longest, so its file comes first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SECONDS = 180


def test_the_sanitizer_finds_nothing(device):
    """compute-sanitizer's memcheck over every mode, path and option; on a CPU the probe runs without it."""
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"] if device.type == "cuda" else []
    if tool and shutil.which(tool[0]) is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    command = [*tool, sys.executable, str(Path(__file__).with_name("sanitizer_probe.py")), device.type]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor its own allocation, whose ends are known
    }
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"not done after {SECONDS} s; until then it said: {(error.stdout or b'')[-2000:].decode()!r}")
    if "Device not supported" in ran.stdout + ran.stderr:
        pytest.skip("compute-sanitizer: Device not supported")
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert "done: 48 calls" in ran.stdout
    assert not tool or "ERROR SUMMARY: 0 errors" in ran.stdout
