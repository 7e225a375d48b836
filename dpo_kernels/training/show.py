"""Pairs on the screen as the model sees them, with the tokens that count in colour."""

from __future__ import annotations

import itertools
import re

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.formats import SIDES

COLOURS = {"chosen": "bold green", "rejected": "bold magenta"}
# Characters of what does not count that are shown at the start and at the end of a stretch.
SHOWN_BEFORE, SHOWN_AFTER = 160, 240
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what would move the cursor or ring the bell


def show_pairs(
    dataset: DPODataset, tokenizer: PreTrainedTokenizerBase, count: int, console: Console | None = None
) -> None:
    """Prints the first `count` pairs, special tokens and all.

    Tokens that count are green (chosen) or magenta (rejected) and bold; without colours they stand between ⟦ and ⟧.
    What both sides have in common is printed once, and shortened in its middle.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    for i, row in enumerate(dataset.rows.select(range(min(count, len(dataset))))):
        ids, masks = ([row[f"{side}_{what}"] for side in SIDES] for what in ("ids", "mask"))
        tokens = [list(zip(x, mask, strict=True)) for x, mask in zip(ids, masks, strict=True)]
        shared = 0 if row["prompts_differ"] else _common(tokens)
        lengths = ", ".join(f"{side} {len(x) - shared:,}" for side, x in zip(SIDES, tokens, strict=True))
        console.print(
            Text(f"pair {i + 1} of {len(dataset):,} ({row['where']}): both {shared:,} tokens, {lengths}", style="bold")
        )
        parts = [("both", tokens[0][:shared]), *((side, x[shared:]) for side, x in zip(SIDES, tokens, strict=True))]
        for name, part in parts:
            console.print(Text(f"  {name}", style="bold cyan"))
            console.print(_coloured(part, tokenizer, COLOURS.get(name, "bold"), console.color_system is not None))
    if count:
        mark = "in colour" if console.color_system is not None else "between ⟦ and ⟧"
        console.print(Text(f"Tokens {mark} count in the loss; the others are only read.", style="italic"))


def _common(sides: list[list[tuple[int, int]]]) -> int:
    """Tokens that both sides begin with and that lie before both answers."""
    same = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    while same and sides[0][same - 1][1]:  # equal beginnings of the answers belong to the answers
        same -= 1
    return same


def _coloured(part: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, style: str, has_colour: bool) -> Text:
    text = Text()
    for counts, run in itertools.groupby(part, key=lambda token: token[1]):
        piece = _clean(str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False)))
        if counts:
            text.append(piece if has_colour else f"⟦{piece}⟧", style=style)
        else:
            text.append(_shortened(piece), style="dim")
    return text


def _shortened(text: str) -> str:
    left_out = len(text) - SHOWN_BEFORE - SHOWN_AFTER
    if left_out < 40:
        return text
    return f"{text[:SHOWN_BEFORE]} [... {left_out:,} characters ...] {text[-SHOWN_AFTER:]}"


def _clean(text: str) -> str:
    return CONTROL.sub("�", text)
