"""Runs of two processes to their end: `make endings`. Each has to end with status 0 and a saved model.

Usage: python tests/endings.py [--runs 50]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import scale_runs

RECIPES = ("ddp.sh", "fsdp2.sh")  # in turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    runs = parser.parse_args().runs
    bad, begin = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        model = scale_runs.save_model(Path(scratch, "model"), "Llama")
        for i in range(runs):
            output = Path(scratch, f"run{i}")
            recipe = RECIPES[i % len(RECIPES)]
            done = scale_runs.recipe(recipe, 2, scale_runs.options(model, output, 2, 2, save_strategy="no"))
            saved = any(output.glob("*.safetensors")) and "saved: " in done.stdout
            if done.returncode or not saved or "terminate called" in done.stderr:
                bad += 1
                print(f"run {i} ({recipe}): status {done.returncode}, saved {saved}\n{done.stderr[-3000:]}", flush=True)
            elif i % 10 == 9:
                print(f"{i + 1} runs, {bad} of them ended badly", flush=True)
    print(f"{runs} runs in {time.monotonic() - begin:,.0f} s: {bad} ended badly", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
