"""The curves of a run as one picture, from its log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"
CURVES_NAME = "curves.png"

# One panel each: title, unit of the y axis, and the lines in it as (key of the log, label, line style).
PANELS = (
    ("Loss", "nats", (("loss", "train", "-"), ("eval_loss", "held out", "o--"))),
    ("Chosen ranked above rejected, by log-prob a token", "share of pairs", (
        ("logps/accuracies", "train", "-"), ("eval_logps/accuracies", "held out", "o--"),
    )),
    ("Rewards", "beta * log ratio", (
        ("rewards/chosen", "chosen", "-"), ("rewards/rejected", "rejected", "--"), ("rewards/margins", "margin", ":"),
    )),
    ("Log-probs of the answers", "nats", (("logps/chosen", "chosen", "-"), ("logps/rejected", "rejected", "--"))),
)  # fmt: skip


def save_curves(log_history: Sequence[dict[str, Any]], output_dir: Path) -> Path | None:
    """Draws the log's curves to output_dir/curves.png, readable in black and white; None if there is nothing yet."""
    if not any("loss" in entry for entry in log_history):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, unit, lines) in zip(axes.flat, PANELS, strict=True):
        for key, label, style in lines:
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.5, markersize=4)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    target = output_dir / CURVES_NAME
    part = output_dir / f".{CURVES_NAME}"
    figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    part.replace(target)
    return target
