"""`dpo-kernels sample MODEL`: what a model answers."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from dpo_kernels.commands.inputs import quiet
from dpo_kernels.commands.prompts import add_options, answers, prompts_of, text_of
from dpo_kernels.commands.simple import Parser


def main(argv: list[str], program: str) -> int:
    """Prints prompts and answers."""
    quiet()
    parser = Parser(program, "Prints what a model answers.")
    parser.add_argument("model", help="a model folder or hub name, an adapter's too")
    add_options(parser)
    options = parser.parse_args(argv)
    prompts = prompts_of(options)
    console = Console(highlight=False, soft_wrap=True)
    for prompt, said in zip(prompts, answers(options.model, prompts, options), strict=True):
        console.print(Text(text_of(prompt), style="bold cyan"))
        console.print(Text(f"{said.strip() or '(an empty answer)'}\n"))
    return 0
