"""`dpo-kernels show DATA --model M`: pairs as the model sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_kernels.commands import on_pairs
from dpo_kernels.commands.inputs import (
    check_sources,
    choose_max_length,
    find_models,
    prepare_tokenizer,
    quiet,
    read_pairs,
)
from dpo_kernels.training.show import show_pairs

TEXT = "Prints pairs as a model sees them, special tokens and all, and what became of the lines; loads no weights."


@dataclass
class ShowOptions:
    """What to show."""

    count: int = field(default=3, metadata={"help": "So many pairs of each DATA."})


def main(argv: list[str], program: str) -> int:
    """Prints the first pairs of each source, and its report."""
    quiet()
    if (parsed := on_pairs.parse(argv, program, TEXT, ShowOptions)) is None:
        return 0
    script, options = parsed
    check_sources(script)
    find_models(script)
    tokenizer = prepare_tokenizer(script, None, with_reference=False)
    max_length = choose_max_length(script, None)
    for path in script.data_path or ():
        dataset = read_pairs(script, path, tokenizer, max_length)
        show_pairs(dataset, tokenizer, options.count)
        print(dataset.report)
    return 0
