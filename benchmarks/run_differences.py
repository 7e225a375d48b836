"""Two runs of train.py side by side: what an option changed, step by step.

python -m benchmarks.run_differences EXACT FILTERED [--picture curves.png]

Each is an output folder whose log has the same steps (--logging_steps 1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

KEYS = ("loss", "rewards/margins", "rewards/accuracies", "grad_norm")
LINES = 10  # of the table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(argv)
    for folder in options.runs:
        if not (folder / "log.jsonl").is_file():
            parser.error(f"{folder} has no log.jsonl; expected an output folder of train.py")
    logs = [steps_of(folder) for folder in options.runs]
    steps = sorted(logs[0].keys() & logs[1].keys())
    if not steps:
        parser.error(f"{options.runs[0]} and {options.runs[1]} have no step in common")
    print("| steps | " + " | ".join(f"{key} | " for key in KEYS) + "|")
    print("|---|" + "---:|" * 2 * len(KEYS))
    size = -(-len(steps) // LINES)
    for first in range(0, len(steps), size):
        some = steps[first : first + size]
        means = [f"{sum(log[s][key] for s in some) / len(some):.4f}" for key in KEYS for log in logs]
        print(f"| {some[0]} to {some[-1]} | " + " | ".join(means) + " |")
    for key in KEYS[:2]:
        most, at = max((abs(logs[0][s][key] - logs[1][s][key]), s) for s in steps)
        print(f"\nlargest difference of {key}: {most:.4f}, at step {at}")
    dropped = [log["dropped_mass"] for log in logs[1].values() if "dropped_mass" in log]
    if dropped:
        print(f"\ndropped mass: {sum(dropped) / len(dropped):.4f} in the mean, at most {max(dropped):.4f} of a step")
    if options.picture is not None:
        draw(options.picture, logs, steps, [folder.name for folder in options.runs])


def steps_of(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")
    return {line["step"]: line for line in map(json.loads, filter(None, lines)) if "loss" in line}


def draw(picture: Path, logs: list[dict[int, dict[str, float]]], steps: list[int], names: list[str]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, key in zip(axes, KEYS[:2], strict=True):
        for log, name, width in zip(logs, names, (3.0, 1.0), strict=True):
            axis.plot(steps, [log[step][key] for step in steps], linewidth=width, label=name)
        axis.set(xlabel="step", title=key)
        axis.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
