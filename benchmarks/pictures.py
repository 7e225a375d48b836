"""Pictures of a run, readable in black and white: markers, line styles, hatches; units on every axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    figures = {
        "cases": _cases(run), "tokens": _curve("tokens", run), "vocabulary": _curve("vocabulary", run),
        "budget": _budget(run),
    }  # fmt: skip
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
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4.2))
    for peer in dict.fromkeys(r.peer for r in rows):
        mine = [r for r in rows if r.peer == peer]
        sizes, look = [getattr(r.case, CURVES[name]) for r in mine], {"label": peer, **LOOKS.get(peer, {})}
        times.plot(sizes, [1e3 * (r.seconds or 0) for r in mine], **look)
        if any(r.bytes for r in mine):
            bytes_.plot(sizes, _mib(r.bytes for r in mine), **look)
    points = sorted({getattr(r.case, CURVES[name]) for r in rows})
    for axes, unit in ((times, "time of a full step, ms"), (bytes_, "peak beyond inputs, MiB")):
        finish(axes, name, unit, points)
        axes.set_yscale("log")
        plain_ticks(axes)
        axes.legend(fontsize=8, frameon=False)
    fixed = [f"{getattr(rows[0].case, size):,} {axis}" for axis, size in _AXES.items() if axis != name]
    times.set_title(", ".join([*fixed, rows[0].case.dtype]), fontsize=9, loc="left")
    return figure


def _mib(sizes: Iterable[int | None]) -> list[float]:
    return [math.nan if size is None else size / MIB for size in sizes]


def finish(axes: Axes, x: str, y: str, points: Sequence[int] = ()) -> None:
    """points: where a logarithmic axis of sizes is marked."""
    axes.set_xlabel("vocabulary, entries" if x == "vocabulary" else x)
    axes.set_ylabel(y)
    axes.grid(True, color="0.9")
    if points:
        axes.set_xscale("log", base=2)
        axes.set_xticks(points, [f"{size:,}" for size in points], rotation=40, ha="right")
        axes.minorticks_off()


def plain_ticks(axes: Axes, of_a_decade: tuple[float, ...] = (1, 2, 5)) -> None:
    low, high = axes.get_ylim()
    ticks = [m * 10**e for e in range(-3, 7) for m in of_a_decade if low <= m * 10**e <= high]
    axes.set_yticks(ticks, [f"{t:,.10g}" for t in ticks])
    axes.minorticks_off()


def _budget(run: Results) -> plt.Figure | None:
    """The dial: time against the budget beside the GEMMs that the plan counts, and planned beside measured bytes."""
    rows = [r for r in run.rows if r.case.curve == "budget" and r.predicted_bytes and r.seconds]
    if not rows:
        return None
    figure, (times, bytes_) = plt.subplots(1, 2, figsize=(11, 4.2))
    look, last = LOOKS["dpo_kernels"], rows[-1]
    budgets, planned = _mib(r.case.memory_budget for r in rows), _mib(r.predicted_bytes for r in rows)
    floors, gemms = [r.to_floor or 0 for r in rows], [(r.gemms or 0) / (last.gemms or 1) for r in rows]
    label = f"measured: {floors[-1]:.2f} x bare GEMMs at the largest"
    times.plot(budgets, [f / floors[-1] for f in floors], label=label, **look)
    times.plot(budgets, gemms, "k--", marker="x", label=f"GEMMs planned: {last.gemms:.3g} at the largest")
    for row, budget in zip(rows, budgets, strict=True):
        times.text(budget, 0.02, row.mode, transform=times.get_xaxis_transform(), ha="center", fontsize=7)
    first, second = (_mib(r.beyond(getattr(r, field)) for r in rows) for field in ("first_bytes", "bytes"))
    driver = [p - library for p, library in zip(planned, _mib(r.library_bytes or 0 for r in rows), strict=True)]
    bytes_.plot(budgets, first, label="measured, first step", **look)
    bytes_.plot(budgets, second, label="measured, second step", **look, markerfacecolor="white")
    bytes_.plot(budgets, planned, "k--", marker="x", label="planned")
    bytes_.plot(budgets, driver, "k-.", marker="+", label="planned for the driver, without libraries and threads")
    bytes_.plot(budgets, budgets, color="0.6", linestyle=":", label="the budget")
    times.margins(x=0.1)
    times.set_ylim(0.8 * min(gemms), None)
    bytes_.set_ylim(bottom=0)
    times.set_title(last.case.shape, fontsize=9, loc="left")
    finish(times, "memory budget, MiB", "time of a step, relative to the largest budget")
    finish(bytes_, "memory budget, MiB", "held beyond inputs, outputs, gradients, MiB")
    for axes in (times, bytes_):
        axes.legend(fontsize=8, frameon=False)
    return figure
