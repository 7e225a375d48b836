"""Pictures of a run, readable in black and white: markers, line styles, hatches; units on every axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from benchmarks.cases import CURVES, MIB
from benchmarks.results import Results, Row, case_names, is_ours, mib, milliseconds

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
# One look a name, the same in every picture.
LOOKS: dict[str, dict[str, Any]] = {
    "bare GEMMs": {"marker": "", "linestyle": ":", "color": "0.3"},
    "dpo_kernels": {"marker": "o", "linestyle": "-", "color": "black"},
    "plain PyTorch": {"marker": "s", "linestyle": "--", "color": "0.35", "markerfacecolor": "white"},
    "CCE torch_compile": {"marker": "^", "linestyle": "-.", "color": "0.35"},
}


def draw(run: Results, out: Path) -> list[str]:
    """Writes the pictures of a run and returns their file names; those without data are left out."""
    figures = {"cases": _cases(run)} | {curve: _curve(curve, run) for curve in CURVES}
    drawn = {f"{run.name}-{kind}.png": figure for kind, figure in figures.items() if figure}
    for name, figure in drawn.items():
        save(figure, f"{run.machine}, {run.date}", out / name)
    return list(drawn)


def save(figure: plt.Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9, color="0.3", y=0.995)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _cases(run: Results) -> plt.Figure | None:
    """A panel a case: bars of time, the floor as a line, and the peak memory beside each bar."""
    timed = [r for r in run.rows if r.case.curve is None and r.status == "timed" and r.seconds]
    names = case_names(timed)
    if not names:
        return None
    lines = -(-len(names) // 3)
    figure, grid = plt.subplots(lines, 3, figsize=(15, 2.7 * lines), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        rows = sorted((r for r in timed if r.case.name == name), key=lambda r: r.seconds or 0, reverse=True)
        floor = next((r for r in run.rows if r.case.name == name and r.status == "floor"), None)
        _bars(axes, rows, floor)
        axes.set_title(f"{name}\n{rows[0].case.shape}", fontsize=9, loc="left")
    notes = dict.fromkeys(f"* {r.peer}: {'; '.join(r.marks)}" for r in timed if _starred(r))
    figure.text(0.01, -0.01, "\n".join(notes), fontsize=7, va="top")
    return figure


def _starred(row: Row) -> bool:
    return bool(row.marks) and not is_ours(row.peer)


def _bars(axes: Axes, rows: list[Row], floor: Row | None) -> None:
    times = [1e3 * (r.seconds or 0) for r in rows]
    # A peer many times slower than ours would squeeze all others: its bar is cut, and says so.
    mine = min((t for t, r in zip(times, rows, strict=True) if is_ours(r.peer)), default=max(times))
    limit = min(max(times), 4 * mine)
    bars = axes.barh(
        range(len(rows)), [min(t, limit) for t in times], height=0.7, edgecolor="black",
        color=["0.25" if is_ours(r.peer) else "0.88" for r in rows],
        hatch=["" if is_ours(r.peer) else "//" for r in rows],
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), [r.peer + " *" * _starred(r) for r in rows], fontsize=8)
    labels = [
        ", ".join(filter(None, [f"{time:,.0f} ms", mib(row.bytes)])) + (" (cut)" if time > limit else "")
        for time, row in zip(times, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=2, fontsize=7)
    if floor is not None and floor.seconds:
        line = axes.axvline(1e3 * floor.seconds, color="black", linestyle=":", linewidth=1.5)
        line.set_path_effects([withStroke(linewidth=3.5, foreground="white")])  # seen on dark bars too
    dotted = f" (dotted: {floor.peer}, {milliseconds(floor.seconds)})" if floor is not None else ""
    axes.set_xlim(0, limit * 1.5)
    axes.set_xlabel(f"time, ms{dotted}")


_AXES = {"tokens": "tokens", "features": "hidden_size", "vocabulary": "vocab_size"}


def _curve(name: str, run: Results) -> plt.Figure | None:
    rows = [r for r in run.rows if r.case.curve == name and r.seconds]
    if not rows:
        return None
    unit = MIB if name == "budget" else 1
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4.2))
    for peer in dict.fromkeys(r.peer for r in rows):
        mine = [r for r in rows if r.peer == peer]
        sizes = [getattr(r.case, CURVES[name]) // unit for r in mine]
        look = {"label": peer, **LOOKS.get(peer, {})}
        times.plot(sizes, [1e3 * (r.seconds or 0) for r in mine], **look)
        if any(r.bytes for r in mine):
            bytes_.plot(sizes, [math.nan if r.bytes is None else r.bytes / MIB for r in mine], **look)
    points = sorted({getattr(r.case, CURVES[name]) // unit for r in rows})
    for axes, what in ((times, "time of a full step, ms"), (bytes_, "peak beyond inputs, MiB")):
        finish(axes, name, what, points)
        if name == "budget":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            plain_ticks(axes)
        axes.legend(fontsize=8, frameon=False)
    fixed = [f"{getattr(rows[0].case, size):,} {axis}" for axis, size in _AXES.items() if axis != name]
    times.set_title(", ".join([*fixed, rows[0].case.dtype]), fontsize=9, loc="left")
    return figure


def finish(axes: Axes, curve: str, y: str, points: Sequence[int]) -> None:
    """points: the sizes that are marked on the curve's axis."""
    axes.set_xlabel({"vocabulary": "vocabulary, entries", "budget": "memory budget, MiB"}.get(curve, curve))
    axes.set_ylabel(y)
    axes.grid(True, color="0.9")
    axes.set_xscale("log", base=2)
    axes.set_xticks(points, [f"{size:,}" for size in points], rotation=40, ha="right")
    axes.minorticks_off()


def plain_ticks(axes: Axes, of_a_decade: tuple[float, ...] = (1, 2, 5)) -> None:
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-3, 7) for m in of_a_decade if low <= m * 10**e <= high]
    axes.set_yticks(ticks, [f"{t:,.10g}" for t in ticks])
    axes.minorticks_off()
