"""Sizes in words."""

from __future__ import annotations

import re


def parse_bytes(text: str | int | None) -> int | None:
    """512MiB, 1.5 GiB, 64MB or a plain number of bytes; None stays None.

    Raises:
        ValueError: not a size.
    """
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory_budget is {text!r}; expected a size such as 512MiB, 2GiB or 500000000")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
