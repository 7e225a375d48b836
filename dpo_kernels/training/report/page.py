"""report.html: one page that a browser opens from a disk, with nothing from elsewhere in it and no script at all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dpo_kernels.training.data import write_whole
from dpo_kernels.training.report.metrics import Log, figure, held_out, points
from dpo_kernels.training.report.panels import Panel, panels_of
from dpo_kernels.training.report.sentences import Finding
from dpo_kernels.training.report.svg import panel_svg
from dpo_kernels.training.report.tokens import ShownPair

REPORT_NAME = "report.html"
TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Answer:
    """What the policy says to a question, before and after training."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Page:
    """Everything on the page. Texts are plain; what in them looks like HTML is shown as it is.

    tiles: (name, figure, what it is) at the top. full: the reward at which a token's colour is full.
    reward_told: how an answer's reward comes from those of its tokens.
    """

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]]
    findings: Sequence[Finding]
    answers: Sequence[Answer]
    where_from: str
    pairs: Sequence[ShownPair]
    pairs_from: str
    full: str
    reward_told: str
    panels: Sequence[tuple[Panel, Markup]]
    lengths: Markup
    settings: Sequence[tuple[str, str]]
    versions: str


def render(page: Page) -> str:
    return environment().get_template("page.html.j2").render(page=page)


def write_page(page: Page, output_dir: Path) -> Path:
    """Writes output_dir/report.html, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = output_dir / REPORT_NAME
    write_whole(path, render(page))
    return path


def drawn(log: Log, loss_type: Sequence[str]) -> list[tuple[Panel, Markup]]:
    """The panels that have a curve, with their pictures."""
    return [(panel, panel_svg(panel)) for panel in panels_of(log, loss_type) if panel.curves]


def tiles_of(log: Log) -> list[tuple[str, str, str]]:
    """The figures that a person looks for first, of a log: held-out ones where there are any."""
    found = []
    for key, name in (("logps/accuracies", "ranking accuracy"), ("rewards/accuracies", "reward accuracy"),
                      ("rewards/margins", "reward margin"), ("loss", "loss")):  # fmt: skip
        sets = {f"held out {set_name}".strip(): own for set_name, own in held_out(log, key).items()}
        for where, own in (sets or {"training": key}).items():
            if not (line := points(log, own)):
                continue
            first, last = (f"{value:.3f}" if key == "loss" else figure(key, value) for _, value in (line[0], line[-1]))
            changes = len(line) > 1 and key in ("logps/accuracies", "loss")
            found.append((f"{name}, {where}", f"{first} → {last}" if changes else last, _meaning(key, changes)))
    return found


@functools.cache
def environment() -> Any:
    """Every text that is put into the page is escaped; of Markdown, which is no page, none."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=False,
        autoescape=lambda name: name is not None and ".html" in name,
    )  # fmt: skip


def _meaning(key: str, changes: bool) -> str:
    return "before → after" if changes else {
        "rewards/margins": "chosen less rejected", "rewards/accuracies": "chosen gained more than rejected",
    }.get(key, "at the end")  # fmt: skip
