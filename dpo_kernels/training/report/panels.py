"""What is drawn of a log, as data: `pictures` draws it for a file, `svg` for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_kernels.training.report.metrics import CHANCE, Log, held_out, loss_without_learning, points, smoothed

# Blue, orange and grey are told apart by whoever sees colours otherwise, and each has a dash of its own for paper.
COLOURS = ("#2f6db3", "#d9731a", "#6b6b6b")
DASHES = ("solid", "dashed", "dotted")
MOST_POINTS = 600  # of a raw line: more than a screen shows


@dataclass(frozen=True)
class Curve:
    """raw: (step, value) as logged. smooth: over its neighbours; the same where there are few. look: into COLOURS and
    DASHES. held_out: of the held-out pairs, a mark an evaluation."""

    label: str
    raw: list[tuple[int, float]]
    smooth: list[tuple[int, float]]
    look: int
    held_out: bool = False


@dataclass(frozen=True)
class Panel:
    """levels: (value, label) of horizontal lines. limits: of the y axis, where they are known beforehand."""

    title: str
    unit: str
    curves: list[Curve]
    levels: list[tuple[float, str]]
    limits: tuple[float, float] | None = None


# Title, unit, (key, label) of each line, limits of the y axis.
PANELS = (
    ("Loss", "nats", (("loss", "loss"),), None),
    ("Chosen above rejected", "share of pairs", (
        ("rewards/accuracies", "reward accuracy"), ("logps/accuracies", "ranking accuracy"),
    ), (0.0, 1.05)),
    ("Rewards over the reference", "beta (log pi - log pi_ref)", (
        ("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margins", "margin"),
    ), None),
    ("Log-probs of the answers", "nats an answer", (("logps/chosen", "chosen"), ("logps/rejected", "rejected")), None),
)  # fmt: skip


def panels_of(log: Log, loss_type: Sequence[str] = ("sigmoid",)) -> list[Panel]:
    """The panels of a log; lines that it has no figures for are not there."""
    start = loss_without_learning(loss_type)
    levels = {
        "Loss": [(start, "log 2")] if start is not None else [],
        "Chosen above rejected": [(CHANCE, "chance")],
        "Rewards over the reference": [(0.0, "0")],
    }
    return [
        Panel(title, unit, [curve for i, line in enumerate(lines) for curve in _curves(log, *line, i)],
              levels.get(title, []), limits)
        for title, unit, lines, limits in PANELS
    ]  # fmt: skip


def _curves(log: Log, key: str, label: str, look: int) -> list[Curve]:
    found = []
    if trained := points(log, key):
        steps, values = zip(*trained, strict=True)
        smooth = list(zip(steps, smoothed(values), strict=True))
        found.append(Curve(label, thinned(trained), thinned(smooth), look))
    for name, own in held_out(log, key).items():
        if kept := points(log, own):
            found.append(Curve(f"{label}, held out{f' {name}' if name else ''}", kept, kept, look, held_out=True))
    return found


def thinned(line: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """No more points than a screen shows: of each stretch of steps its least and its largest value."""
    if len(line) <= most:
        return line
    size = -(-2 * len(line) // most)
    kept: list[tuple[int, float]] = []
    for i in range(0, len(line), size):
        stretch = line[i : i + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [line[0], *(p for p in kept if p not in (line[0], line[-1])), line[-1]]
