"""Sizes in words."""

from __future__ import annotations

import re


def parse_bytes(text: str | int | None, name: str = "memory_budget") -> int | None:
    """512MiB, 1.5 GiB, 64MB or a plain number of bytes; None stays None.

    Raises:
        ValueError: not a size.
    """
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{name} is {text!r}; expected a size such as 512MiB, 2GiB or 500000000")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def in_words(size: int) -> str:
    """1536 -> "1.50 KiB": in the largest unit that it has one of, with the digits that count."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= unit:
            value = size / unit
            return f"{value:,.2f} {name}" if value < 10 else f"{value:,.1f} {name}"
    return f"{size} B"
