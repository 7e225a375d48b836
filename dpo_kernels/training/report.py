"""Pictures of a run: its curves, from its log, and the lengths of its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTHS_NAME = "lengths.png"
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
    figure, axes = _figure(2, 2, (11, 7))
    for axis, (title, unit, lines) in zip(axes.flat, PANELS, strict=True):
        for key, label, style in lines:
            for name, found in _named(log_history, key).items():
                points = [(entry["step"], entry[found]) for entry in log_history if found in entry]
                axis.plot(*zip(*points, strict=True), style, label=label + name, linewidth=1.5, markersize=4)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    return _save(figure, output_dir / CURVES_NAME)


def save_lengths(lengths: np.ndarray, max_length: int, output_dir: Path) -> Path:
    """Draws how long the pairs are to output_dir/lengths.png.

    Args:
        lengths: of prompt, chosen and rejected answer in tokens before truncation, (pairs, 3).
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (parts, fits) = _figure(1, 2, (11, 4))
    edges = np.geomspace(1, max(2, lengths.max() + 1), 41)
    for values, label, style in zip(lengths.T, ("prompt", "chosen", "rejected"), ("-", "--", ":"), strict=True):
        parts.stairs(np.histogram(values, edges)[0], edges, label=label, linestyle=style, linewidth=1.8)
    parts.set(title="Parts of a pair", xlabel="tokens", ylabel="pairs", xscale="log")
    longest = np.sort(lengths[:, 0] + lengths[:, 1:].max(1))
    fits.step(longest, np.arange(1, len(longest) + 1) / len(longest), where="post", linewidth=1.8, label="longer side")
    fits.axvline(max_length, color="black", linestyle="--", linewidth=1.2, label=f"max_length {max_length:,}")
    share = np.searchsorted(longest, max_length, side="right") / len(longest)
    fits.set(title=f"{share:.0%} of the pairs fit whole", xlabel="tokens of prompt and answer", ylabel="share of pairs",
             xscale="log", ylim=(0, 1.02))  # fmt: skip
    for axis, ticks in ((parts, (1,)), (fits, (1, 2, 5))):
        axis.xaxis.set_major_locator(LogLocator(subs=ticks))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend()
    return _save(figure, output_dir / LENGTHS_NAME)


def _named(log_history: Sequence[dict[str, Any]], key: str) -> dict[str, str]:
    """The keys of the log that a line is drawn from: the key itself, or one for each of several evaluation sets."""
    keys = dict.fromkeys(name for entry in log_history for name in entry)
    if key in keys or not key.startswith("eval_"):
        return {"": key} if key in keys else {}
    rest = key.removeprefix("eval")
    return {f" {name[5 : -len(rest)]}": name for name in keys if name.startswith("eval_") and name.endswith(rest)}


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def _save(figure: Any, target: Path) -> Path:
    """Writes the picture so that it appears whole or not at all."""
    from matplotlib import pyplot as plt

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}")
    try:
        figure.savefig(part, dpi=110, format="png")
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        plt.close(figure)
    part.replace(target)
    return target


def peak_memory_mib() -> float:
    """On a GPU the most that PyTorch had allocated, on a CPU the most that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
