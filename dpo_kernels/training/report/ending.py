"""The end of a run on the screen: its accuracies, what happened, answers before and after, and what was saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_kernels.training.report.metrics import LOG_NAME, MEANINGS, NAMES, Log, held_out, points
from dpo_kernels.training.report.pictures import CURVES_NAME, LENGTHS_NAME
from dpo_kernels.training.report.run import RunReport
from dpo_kernels.training.trainer import DPOTrainer

ACCURACIES = ("logps/accuracies", "rewards/accuracies")
STYLES = {"good": "green", "bad": "yellow", "note": ""}


def evaluate_last(trainer: DPOTrainer) -> None:
    """The held-out pairs once more, unless the last step was followed by an evaluation already."""
    sets: Any = trainer.eval_dataset
    last, state = trainer.state.global_step, trainer.state
    key = f"eval_{list(sets)[-1]}_{ACCURACIES[0]}" if isinstance(sets, dict) else f"eval_{ACCURACIES[0]}"
    if not any(entry["step"] == last and key in entry for entry in state.log_history):
        trainer.evaluate()


def show_end(report: RunReport, saved: str, output_dir: Path, console: Console | None = None) -> None:
    """Writes report and card, and says what happened.

    Args:
        saved: what else was saved, as a list in words.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True, file=sys.stdout)
    found, written = report.write()
    for line in accuracies(report.trainer.state.log_history):
        console.print(line)
    for finding in found:
        console.print(Text(str(finding), style=STYLES[finding.kind]))
    if answers := report.answers():
        which = "held-out prompts" if report.held_out else "prompts that were trained on"
        console.print(Text(f"{len(answers)} {which}, with the answer before and after:", style="bold"))
        for answer in answers:
            console.print(f"  {one_line(answer.question)}")
            console.print(Text(f"    before  {one_line(answer.before)}", style="dim"))
            console.print(f"    after   {one_line(answer.after)}")
    names = ", ".join([saved, LOG_NAME, CURVES_NAME, LENGTHS_NAME, *written[:-1]])
    names += f" and {written[-1]}" if written else ""
    console.print(f"saved: {names} in {output_dir}")


def accuracies(log: Log) -> list[str]:
    """Of each set of held-out pairs both accuracies, under their own names, and what they are."""
    lines = []
    for key in ACCURACIES:
        for name, own in held_out(log, key).items():
            line = points(log, own)
            if not line:
                continue
            before = f"{line[0][1]:.3f} before, " if line[0][0] == 0 and key == ACCURACIES[0] else ""
            of = f" of {name}" if name else ""
            lines.append(f"held-out {NAMES[key]}{of}: {before}{line[-1][1]:.3f} after ({MEANINGS[key]})")
    return lines


def one_line(text: str, most: int = 200) -> str:
    """A text without line breaks and control characters, cut where it is long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
