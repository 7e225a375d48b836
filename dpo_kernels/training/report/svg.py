"""Panels and histograms as inline SVG: no script, no font, and colours that the page's style gives by class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from dpo_kernels.training.report.panels import Curve, Panel

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # around the axes
DASHES = ("", "7 4", "2 3")  # as `panels.DASHES`


class Axes:
    """From values to places in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = _wide(x), _wide(y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x, self.y
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def panel_svg(panel: Panel) -> Markup:
    """A panel as a picture; its legend stands below it, in the page's own text (`Curve.label`)."""
    points = [point for curve in panel.curves for point in (*curve.raw, *curve.smooth)]
    if not points:
        return Markup("")
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    levels = [value for value, _ in panel.levels]
    low, high = min([low, *levels]), max([high, *levels])
    margin = 0.06 * (high - low)
    axes = Axes((min(steps), max(steps)), panel.limits or (low - margin, high + margin))
    parts = [*_grid(axes, panel.unit)]
    for value, label in panel.levels:
        (x0, y), (x1, _) = axes.place(axes.x[0], value), axes.place(axes.x[1], value)
        parts.append(f'<line class="level" x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="level-name" x="{x1 - 3:.1f}" y="{y - 4:.1f}">{escape(label)}</text>')
    for curve in panel.curves:
        parts += _curve(axes, curve)
    return _picture(parts, panel.title)


def histogram_svg(lengths: np.ndarray, max_length: int) -> Markup:
    """How many pairs have a prompt, chosen and rejected answer of how many tokens, (pairs, 3); a logarithmic axis."""
    edges = np.geomspace(1, max(2, lengths.max() + 1), 33)
    counts = [np.histogram(values, edges)[0] for values in lengths.T]
    top = max(1, max(int(count.max()) for count in counts))
    axes = Axes((0, math.log10(edges[-1])), (0, top * 1.05))
    parts = [*_grid(axes, "pairs", logarithmic=True)]
    for look, count in enumerate(counts):
        places = []
        for left, right, value in zip(edges[:-1], edges[1:], count, strict=True):
            places += [axes.place(math.log10(left), value), axes.place(math.log10(right), value)]
        parts.append(_line(places, f"curve c{look}", DASHES[look]))
    if max_length <= edges[-1]:
        (x, y0), (_, y1) = axes.place(math.log10(max_length), 0), axes.place(0, top)
        parts.append(f'<line class="level" x1="{x:.1f}" y1="{y0:.1f}" x2="{x:.1f}" y2="{y1:.1f}"/>')
        parts.append(f'<text class="level-name" x="{x - 4:.1f}" y="{y1 + 10:.1f}">max_length {max_length:,}</text>')
    return _picture(parts, "Lengths of the pairs that were trained on")


def _curve(axes: Axes, curve: Curve) -> list[str]:
    look, dash = f"c{curve.look}", DASHES[curve.look]
    smooth = [axes.place(*point) for point in curve.smooth]
    if not curve.held_out:
        raw = [] if curve.raw == curve.smooth else [_line([axes.place(*p) for p in curve.raw], f"raw {look}", "")]
        return [*raw, _line(smooth, f"curve {look}", dash)]
    marks = [
        f'<circle class="mark {look}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>'
        f"{escape(curve.label)}, step {step:,}: {value:.4g}</title></circle>"
        for (x, y), (step, value) in zip(smooth, curve.raw, strict=True)
    ]
    return [_line(smooth, f"kept {look}", dash), *marks]


def _grid(axes: Axes, unit: str, logarithmic: bool = False) -> list[str]:
    parts = []
    for value in ticks(*axes.y):
        (x0, y), (x1, _) = axes.place(axes.x[0], value), axes.place(axes.x[1], value)
        parts.append(f'<line class="grid" x1="{x0:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 6}" y="{y + 4:.1f}">{value:,.6g}</text>')
    across = range(math.ceil(axes.x[1] - 1e-9) + 1) if logarithmic else ticks(*axes.x)
    for value in across:
        if axes.x[0] <= value <= axes.x[1]:
            x, y = axes.place(value, axes.y[0])
            label = 10**value if logarithmic else value
            parts.append(f'<text class="tick x" x="{x:.1f}" y="{y + 15:.1f}">{label:,.6g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="unit" transform="translate(11 {middle:.0f}) rotate(-90)">{escape(unit)}</text>')
    name = "tokens" if logarithmic else "step"
    parts.append(f'<text class="unit" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}">{name}</text>')
    return parts


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, no more than `most` + 1."""
    step = (high - low) / most
    power = 10.0 ** math.floor(math.log10(step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _line(places: Sequence[tuple[float, float]], classes: str, dash: str) -> str:
    given = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="{classes}"{given} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _picture(parts: Sequence[str], title: str) -> Markup:
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{inside}</svg>')


def _wide(limits: tuple[float, float]) -> tuple[float, float]:
    """A range that has a width."""
    low, high = float(limits[0]), float(limits[1])
    return (low, high) if high - low > 1e-12 * max(1.0, abs(low)) else (low - 0.5, high + 0.5)
