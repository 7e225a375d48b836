"""What became of the lines of a dataset, in figures that fit on a screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from dpo_kernels.training.encoding import EQUAL_ANSWERS, TOO_LONG, WITHOUT_REPLY

PARTS = ("prompt", "chosen", "rejected")
PERCENTILES = (50, 90, 99, 100)
REASONS = {
    TOO_LONG: "longer than max_length", WITHOUT_REPLY: "with an answer of which truncation left no token",
    EQUAL_ANSWERS: "with equal answers",
}  # fmt: skip


@dataclass(frozen=True)
class DataReport:
    """What became of the lines.

    name: of the source. max_length: in tokens. pairs: that training uses. skipped: bad lines, left out on request.
    dropped: pairs that are not used, by their reason: "too_long", "without_reply", "equal_answers".
    cut_prompt, cut_answer: pairs of which truncation took something. prompts_differ: pairs whose messages before the
    last are not the same; duplicates: pairs that stand there more than once, counted from the second; empty_replies:
    pairs with an answer that says nothing; rewritten: pairs with an answer of which the template has changed the words
    (taken its thinking out, say); all four are used all the same.
    formats: pairs by the format that was read. unused: columns that nothing was read from.
    lengths: of prompt, chosen and rejected in tokens before truncation, at `PERCENTILES`.
    tokens, counted: of all pairs after truncation, and those that the loss counts.
    """

    name: str
    max_length: int
    pairs: int
    skipped: int
    dropped: Mapping[str, int]
    cut_prompt: int
    cut_answer: int
    prompts_differ: int
    duplicates: int
    empty_replies: int
    rewritten: int
    formats: Mapping[str, int]
    unused: tuple[str, ...]
    lengths: Mapping[str, tuple[int, ...]]
    tokens: int
    counted: int

    @classmethod
    def of(
        cls, rows: datasets.Dataset, name: str, max_length: int, skipped: int, dropped: Mapping[str, int]
    ) -> DataReport:
        """Counts over rows of `DPODataset.rows`."""
        columns: dict[str, Any] = {name: column(rows, name) for name in (
            "cut_prompt", "cut_answer", "prompts_differ", "empty_reply", "rewritten", "format", "unused", "digest",
            "tokens", "counted",
        )}  # fmt: skip
        return cls(
            name, max_length, len(rows), skipped, dropped, sum(columns["cut_prompt"]), sum(columns["cut_answer"]),
            sum(columns["prompts_differ"]), len(rows) - len(set(columns["digest"])), sum(columns["empty_reply"]),
            sum(columns["rewritten"]),
            dict(Counter(columns["format"]).most_common()),
            tuple(sorted({name for unused in columns["unused"] for name in unused})),
            percentiles(rows), sum(columns["tokens"]), sum(columns["counted"]),
        )  # fmt: skip

    def __str__(self) -> str:
        formats = ", ".join(
            f"{count:,} {name}" if len(self.formats) > 1 else name for name, count in self.formats.items()
        )
        lines = [f"{self.pairs:,} pairs of {self.name}" + (f", read as {formats}" if formats else "")]
        dropped = [f"{count:,} {REASONS[reason]}" for reason, count in self.dropped.items()]
        cut = [f"{count:,} {what}" for count, what in (
            (self.cut_prompt, "prompts at their start" if self.cut_prompt else ""), (self.cut_answer, "answers"),
        ) if count]  # fmt: skip
        told = [f"{count:,} {what}" for count, what in (
            (self.prompts_differ, "with prompts that differ"), (self.duplicates, "seen before"),
            (self.empty_replies, "with an empty answer"),
            (self.rewritten, "with an answer that the template writes otherwise (thinking taken out?)"),
        ) if count]  # fmt: skip
        for label, parts in (
            ("skipped", [f"{self.skipped:,} bad lines"] if self.skipped else []), ("dropped", dropped),
            (f"cut to {self.max_length:,}", cut), ("used, but", told),
            ("tokens", [self._lengths()] if self.pairs else []),
            ("counted", [f"{self.counted / self.tokens:.0%} of {self.tokens:,} tokens"] if self.tokens else []),
            ("not read", [f"columns {', '.join(self.unused)}"] if self.unused else []),
        ):  # fmt: skip
            if parts:
                lines.append(f"  {label:<13} {', '.join(parts)}")
        return "\n".join(lines)

    def _lengths(self) -> str:
        parts = ", ".join(f"{part} {' / '.join(f'{n:,}' for n in self.lengths[part])}" for part in PARTS)
        return f"{parts} (median / 90% / 99% / longest, before cutting)"


def column(rows: datasets.Dataset, name: str) -> list[Any]:
    """A column as a list, at Arrow's speed; row by row the library takes seconds for what this does at once."""
    values = rows.select_columns([name]).with_format("arrow")[:]
    return values.column(name).to_pylist()


def lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of prompt, chosen and rejected answer before truncation, (pairs, 3)."""
    return np.asarray(column(rows, "lengths"), dtype=np.int64).reshape(-1, len(PARTS))


def percentiles(rows: datasets.Dataset) -> dict[str, tuple[int, ...]]:
    if not len(rows):
        return {}
    found = np.percentile(lengths(rows), PERCENTILES, axis=0, method="higher").T
    return {part: tuple(int(n) for n in values) for part, values in zip(PARTS, found, strict=True)}
