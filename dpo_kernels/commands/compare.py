"""`dpo-kernels compare --before REF --after OUT`: what two models answer, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_kernels.commands.inputs import quiet
from dpo_kernels.commands.prompts import Prompt, add_options, answers, prompts_of, text_of
from dpo_kernels.commands.simple import Parser
from dpo_kernels.training.adapters import base_of
from dpo_kernels.training.loading import load_config


def main(argv: list[str], program: str) -> int:
    """Prints a prompt and both answers at a time, and in how many they differ."""
    quiet()
    parser = Parser(program, "Prints what two models answer, side by side, as before and after training.")
    parser.add_argument("--before", required=True, help="a model folder or hub name")
    parser.add_argument("--after", required=True, help="another, such as the output of train; an adapter's too")
    add_options(parser)
    options = parser.parse_args(argv)
    prompts = prompts_of(options)
    for name in (options.before, options.after):  # before either is loaded
        load_config(base_of(name) or name, options.trust_remote_code)
    before, after = (answers(name, prompts, options) for name in (options.before, options.after))
    console = Console(highlight=False)
    console.print(side_by_side(prompts, before, after))
    differ = sum(one != other for one, other in zip(before, after, strict=True))
    console.print(f"{differ} of {len(prompts)} answers differ")
    return 0


def side_by_side(prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]) -> Table:
    """A row a prompt: what was asked, and both answers."""
    table = Table("prompt", "before", "after", show_lines=True, expand=True)
    for column, ratio in zip(table.columns, (2, 3, 3), strict=True):
        column.ratio, column.overflow = ratio, "fold"
    for prompt, *said in zip(prompts, before, after, strict=True):
        table.add_row(Text(text_of(prompt), style="bold cyan"), *map(_shown, said))
    return table


def _shown(answer: str) -> Text:
    return Text(answer.strip()) if answer.strip() else Text("(an empty answer)", style="dim")
