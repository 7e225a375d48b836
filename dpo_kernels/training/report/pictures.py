"""Pictures of a run: its curves, from its log, and the lengths of its pairs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_kernels.training.report.metrics import Log
from dpo_kernels.training.report.panels import COLOURS, DASHES, Panel, panels_of

LENGTHS_NAME = "lengths.png"
CURVES_NAME = "curves.png"


def save_curves(log: Log, output_dir: Path, title: str = "", loss_type: Sequence[str] = ("sigmoid",)) -> Path | None:
    """Draws the log's curves to output_dir/curves.png, readable in black and white; None if there is nothing yet.

    Args:
        title: of the run, above all panels.
        loss_type: its losses; of some the line that learning starts at is drawn.
    """
    if not any("loss" in entry for entry in log):
        return None
    figure, axes = _figure(2, 2, (12, 8.5))
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left", parse_math=False)
    for axis, panel in zip(axes.flat, panels_of(log, loss_type), strict=True):
        _draw(axis, panel)
    return _save(figure, output_dir / CURVES_NAME)


def _draw(axis: Any, panel: Panel) -> None:
    for curve in panel.curves:
        colour, dash = COLOURS[curve.look], DASHES[curve.look]
        if curve.held_out:
            axis.plot(*zip(*curve.raw, strict=True), color=colour, linestyle=dash, marker="o", markersize=5.5,
                      markerfacecolor="white", linewidth=1.2, label=_plain(curve.label), zorder=4)  # fmt: skip
            continue
        if curve.raw != curve.smooth:
            axis.plot(*zip(*curve.raw, strict=True), color=colour, alpha=0.22, linewidth=0.9)
        axis.plot(*zip(*curve.smooth, strict=True), color=colour, linestyle=dash, linewidth=2.2,
                  label=_plain(curve.label), zorder=3)  # fmt: skip
    for value, label in panel.levels:
        axis.axhline(value, color="#444444", linestyle=(0, (1, 2)), linewidth=1.1, zorder=2)
        axis.annotate(label, (1, value), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=9, color="#444444")  # fmt: skip
    axis.set_title(panel.title, fontsize=11, fontweight="bold", loc="left")
    axis.set(xlabel="step", ylabel=panel.unit)
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.curves:  # below the axes: never over the data
        columns = max(1, sum(not curve.held_out for curve in panel.curves))
        columns = len(panel.curves) if len(panel.curves) <= 3 else columns
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, frameon=False,
                    fontsize=9)  # fmt: skip


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


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def _plain(text: str) -> str:
    """A name in which dollar signs begin no formula."""
    return text.replace("$", r"\$")


def _save(figure: Any, target: Path) -> Path:
    """Writes the picture so that it appears whole or not at all."""
    from matplotlib import pyplot as plt

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
            figure.savefig(part, dpi=110, format="png")
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        plt.close(figure)
    part.replace(target)
    return target
