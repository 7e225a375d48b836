"""What the screen shows: a table a case within 100 columns, what it means in a sentence, and what did not run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks import busy
from benchmarks.results import Row, is_ours, mib, milliseconds

WIDTH = 100
CUT = 34  # characters of a name, at most


def text_table(names: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH) -> str:
    """Columns as wide as they must be; the last takes what is left of the width, and is folded. A column whose name
    ends with a colon is aligned to the right."""
    lines = [[cell if len(cell) <= CUT else cell[: CUT - 1] + "…" for cell in row[:-1]] for row in rows]
    last = [row[-1] for row in rows]
    heads = [name.rstrip(":") for name in names]
    widths = [max(map(len, column)) for column in zip(heads[:-1], *lines, strict=True)]
    left = width - sum(widths) - 2 * len(widths)
    made = []
    for cells, end in zip([heads[:-1], *lines], [heads[-1], *last], strict=True):
        start = "  ".join(
            cell.rjust(size) if name.endswith(":") else cell.ljust(size)
            for cell, size, name in zip(cells, widths, names, strict=False)
        )
        folded = fold(end, max(left, 12))
        made += [f"{start}  {folded[0]}".rstrip(), *(" " * (len(start) + 2) + line for line in folded[1:])]
    return "\n".join(made)


def fold(text: str, width: int) -> list[str]:
    """Lines of so many characters at most, at spaces where there are any."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def case_table(rows: Sequence[Row]) -> str:
    """The rows of a case that ran: the floor first, then by time."""
    shown = [row for row in rows if row.status != "unavailable"]
    shown.sort(key=lambda row: (row.status != "floor", row.seconds or float("inf")))
    names = ("what", "time:", "x ours:", "x bare:", "error:", "memory:", "")
    return text_table(names, [_cells(row) for row in shown])


def _cells(row: Row) -> list[str]:
    error = next((row.errors[name] for name in ("log_probs", "loss") if name in row.errors), None)
    said = f"{row.status.upper()}: {row.reason}" if row.reason else row.mode
    return [
        row.peer, milliseconds(row.seconds), number(row.to_ours), number(row.to_floor),
        "" if error is None else f"{error:.0e}", mib(row.bytes or row.first_bytes), said,
    ]  # fmt: skip


def verdict(rows: Sequence[Row]) -> str:
    """How ours does in a case, beside the fastest of the others; nothing where that was not timed."""
    ours = next((row for row in rows if is_ours(row.peer) and row.seconds), None)
    bare = "" if ours is None or ours.to_floor is None else f", {ours.to_floor:.2f} x the bare work"
    if broken := [row for row in rows if is_ours(row.peer) and row.status in ("wrong", "failed")]:
        return "; ".join(f"{row.peer} is {row.status.upper()}" for row in broken)
    others = [row for row in rows if row.status == "timed" and not is_ours(row.peer) and row.to_ours]
    if ours is None or not others:
        return "" if ours is None else f"ours{bare[1:]}"
    best = min(others, key=lambda row: row.to_ours or 0.0)
    ratio = best.to_ours or 1.0
    low, high = quartiles_over_ours(best, ours)
    if low <= 1 <= high:
        return f"ours and {best.peer} are equally fast, within the rounds' quartiles{bare}"
    if ratio > 1:
        return f"ours is the fastest{bare}; the next, {best.peer}, takes {ratio:.2f} x"
    return f"ours is BEHIND{bare}: {best.peer} takes {ratio:.2f} x"


def quartiles_over_ours(row: Row, ours: Row) -> tuple[float, float]:
    """Of the ratios of each round."""
    ratios = sorted(a / b for a, b in zip(row.samples, ours.samples, strict=False)) or [row.to_ours or 1.0]
    return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def busy_warning(rows: Sequence[Row]) -> str:
    taken = max((row.missing_cores for row in rows if row.missing_cores is not None), default=None)
    return busy.said(taken)


def left(seconds: float, done: int, cases: int) -> str:
    """How long what is left may take, by what the first cases took."""
    if not done or done == cases:
        return ""
    rest = seconds / done * (cases - done)
    return f", about {rest / 60:.0f} min left" if rest >= 90 else f", about {rest:.0f} s left"


def summary(rows: Sequence[Row]) -> str:
    """Where ours is behind or wrong, which cases a busy machine spoilt, and in a line a reason what did not run."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case.name].append(row)
    told = {name: verdict(of_case) for name, of_case in cases.items()}
    lines = [f"{sum('fastest' in said for said in told.values())} of {len(told)} cases: ours is the fastest"]
    lines += [f"{name}: {said}" for name, said in told.items() if any(w in said for w in ("BEHIND", "WRONG", "FAILED"))]
    if spoilt := [name for name, of_case in cases.items() if busy_warning(of_case)]:
        lines.append(f"BUSY MACHINE in {len(spoilt)} of {len(cases)} cases: {', '.join(spoilt)}")
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if row.reason and not (is_ours(row.peer) and row.status != "unavailable"):
            reasons[f"{row.status}: {row.reason}"][row.peer] = None
    lines += [f"{reason}: {', '.join(peers)}" for reason, peers in reasons.items()]
    return "\n".join("\n  ".join(fold(line, WIDTH - 2)) for line in lines)
