"""`train.py` in a process of its own, with a small model on the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import EXAMPLE, ROOT

import train

PAIR = {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}  # fmt: skip


def command(*arguments, launcher=()):
    return [*(launcher or [sys.executable]), str(ROOT / "train.py"), *map(str, arguments)]


def run(environment, *arguments, cwd=None, launcher=()):
    return subprocess.run(
        command(*arguments, launcher=launcher), env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def refusal(*arguments):
    """The error that `train.py` ends with and prints; in this process, since one takes seconds to start."""
    with pytest.raises((ValueError, OSError)) as caught:
        train.main([str(argument) for argument in arguments])
    return str(caught.value)


def small_run(model_dir, output_dir, **options):
    options = {"data_path": EXAMPLE, "ref_weight": model_dir, "output_dir": output_dir, "max_length": 160,
               "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True, "max_steps": 6,
               "save_steps": 2, "disable_tqdm": True, "report": False} | options  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def losses(output_dir):
    entries = map(json.loads, (Path(output_dir) / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def check_probe(name, processes):
    """A script of tests/ that compares processes with one of them alone, and says so on each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / name)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as one process") == processes
