"""From a results file to a Markdown report with pictures; with two files, a comparison.

python -m benchmarks.report results.json [other.json] --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks import results
from benchmarks.cases import MIB, Case
from benchmarks.measure import Row, is_ours
from benchmarks.results import Results

HOW_TO_READ = (
    "Times are medians of interleaved rounds; ratios are medians of the ratios within a round. Bare GEMMs: 1 product "
    "for a forward, 2 for a frozen head, 3 for all gradients, 1 more for DPO's reference, of the rows that count "
    "alone; bare copy: the logits copied once for a forward, twice with the gradient. Memory: the peak beyond the "
    "inputs, gradients included. Errors against float64: of log-probs or loss the largest, absolute; of gradients the "
    "larger one of hidden's and weight's, relative."
)

LEVELS = ("logits", "hidden", "dpo", "train")
BUDGET_NOTE = (
    "The plan is the driver's own tensors and an allowance for the GEMM library (12 MiB on a CPU, 32 on a GPU). The "
    "step that is weighed is a process's second, and the library keeps what it took in the first: the measured bytes "
    "belong beside what is planned for the driver."
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what `pytest benchmarks/ --benchmark-json` wrote")
    parser.add_argument("other", type=Path, nargs="?", help="a later run, to compare")
    parser.add_argument("--out", type=Path, required=True, help="folder for Markdown, pictures and the stripped JSON")
    options = parser.parse_args(argv)
    first = results.load(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.other is not None:
        second = results.load(options.other)
        path = options.out / f"{second.name}-compared.md"
        path.write_text(comparison(first, second))
    else:
        path = write(first, options.out)
    print(path)


def write(run: Results, out: Path) -> Path:
    """NAME.json (without single times), NAME-*.png and NAME.md, which it returns."""
    from benchmarks import pictures  # needs matplotlib

    results.save(run, out / f"{run.name}.json")
    path = out / f"{run.name}.md"
    path.write_text(markdown(run, pictures.draw(run, out)))
    return path


def markdown(run: Results, picture_names: Iterable[str] = ()) -> str:
    parts = [
        f"# Benchmarks: {run.machine}, {run.date}",
        facts(run),
        HOW_TO_READ,
        table(run),
        "## Peers that did not run, and wrong results",
        absent(run),
    ]
    if budget := [row for row in run.rows if row.case["curve"] == "budget" and row.mode and row.seconds]:
        parts += ["## The memory budget: planned and measured", budget_table(budget)]
    parts += [f"![{name}]({name})" for name in picture_names]
    return "\n\n".join(parts) + "\n"


def facts(run: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"Size `{run.size}`, {run.threads}, commit {run.commit}. {versions}."


def table(run: Results) -> str:
    """Every case that is no point of a curve, the floor first, then by time."""
    lines = _header("case", "what", "time", "x floor", "x ours", "peak memory", "error", "error of gradients", "notes")
    shown = [row for row in run.rows if row.case["curve"] is None and row.status != "unavailable"]
    last = ""
    for case in case_names(shown):
        rows = [row for row in shown if row.case["name"] == case]
        for row in sorted(rows, key=lambda row: (row.status != "floor", row.seconds or float("inf"))):
            name = f"**{case}**<br>{shape(row.case)}" if case != last else ""
            lines.append(_line(name, *_cells(row)))
            last = case
    return "\n".join(lines)


def case_names(rows: Iterable[Row]) -> list[str]:
    """Each case once, from logits to training."""
    levels = {row.case["name"]: LEVELS.index(row.case["level"]) for row in rows}
    return sorted(levels, key=levels.__getitem__)


def _cells(row: Row) -> list[str]:
    gradients = [error for name, error in row.errors.items() if name not in ("log_probs", "loss")]
    value = next((row.errors[name] for name in ("log_probs", "loss") if name in row.errors), None)
    notes = [f"**WRONG, not timed**: {row.reason}"] if row.status == "wrong" else list(row.marks)
    if row.mode:
        notes.insert(0, f"{row.mode}, {row.gemms:.3g} GEMMs")
    if row.rounds == 1:
        notes.append("1 round")
    if row.bytes_reason:
        notes.append(f"memory: {row.bytes_reason}")
    label = f"**{row.peer}**" if is_ours(row.peer) else row.peer
    return [
        label, milliseconds(row.seconds), _number(row.to_floor), _number(row.to_ours), mib(row.bytes),
        "" if value is None else f"{value:.1e}", f"{max(gradients):.1e}" if gradients else "", "; ".join(notes),
    ]  # fmt: skip


def absent(run: Results) -> str:
    """One line a peer and reason, with the cases that it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        if row.reason:
            cases.setdefault((row.peer, f"{row.status}: {row.reason}"), []).append(row.case["name"])
    lines = [f"- {peer}: {reason} ({len(names)} cases)" for (peer, reason), names in cases.items()]
    return "\n".join(lines) or "None: every peer ran and was right."


def budget_table(rows: list[Row]) -> str:
    """Planned bytes beside measured ones: what is held beyond inputs, outputs and gradients."""
    lines = _header(
        "budget", "what", "mode", "GEMMs", "time, x floor", "planned", "measured", "difference",
        "planned for the driver", "difference",
    )  # fmt: skip
    for row in rows:
        held, driver = held_bytes(row), (row.predicted_bytes or 0) - (row.library_bytes or 0)
        lines.append(_line(
            mib(row.case["memory_budget"]), row.peer, row.mode, _number(row.gemms), _number(row.to_floor),
            mib(row.predicted_bytes, 1), mib(held, 1), _difference(held, row.predicted_bytes), mib(driver, 1),
            _difference(held, driver),
        ))  # fmt: skip
    return "\n".join([*lines, "", BUDGET_NOTE])


def held_bytes(row: Row) -> int | None:
    """Measured, beyond inputs, outputs and gradients: what the budget is about."""
    return None if row.bytes is None else row.bytes - (row.returned_bytes or 0)


def _difference(measured: int | None, planned: int | None) -> str:
    return f"{measured / planned - 1:+.0%}" if measured is not None and planned else ""


def comparison(before: Results, after: Results) -> str:
    """What a change did: each benchmark of both files, by time over the floor, which a faster machine leaves alone."""
    lines = _header(
        "case", "what", "time before", "after", "x floor before", "after", "change", "memory before", "after", "notes"
    )
    old = {(row.case["name"], row.peer): row for row in before.rows}
    for row in after.rows:
        was = old.get((row.case["name"], row.peer))
        if was is None or {was.status, row.status} <= {"unavailable"}:
            continue
        scaled = (was.to_floor, row.to_floor) if was.to_floor and row.to_floor else (was.seconds, row.seconds)
        change = f"{scaled[1] / scaled[0] - 1:+.0%}" if scaled[0] and scaled[1] else ""
        notes = "; ".join(f"{when}: {r.status}" for when, r in (("before", was), ("after", row)) if r.seconds is None)
        if was.case != row.case:
            notes = f"the case changed; {notes}".rstrip("; ")
        lines.append(_line(
            row.case["name"], f"**{row.peer}**" if is_ours(row.peer) else row.peer, milliseconds(was.seconds),
            milliseconds(row.seconds), _number(was.to_floor), _number(row.to_floor),
            "" if row.status == "floor" else change, mib(was.bytes), mib(row.bytes), notes,
        ))  # fmt: skip
    heads = [f"- {when}: {r.machine}, {r.date}. {facts(r)}" for when, r in (("before", before), ("after", after))]
    note = "Change: of the time over the floor's in the same rounds, negative is faster; of the time without a floor."
    return "\n\n".join(["# Benchmarks compared", "\n".join(heads), note, "\n".join(lines)]) + "\n"


def shape(case: dict) -> str:
    """(N, D, V) of a case, in words where they matter."""
    c = Case(**{**case, "peers": (), "without": ()})
    size = f"{c.tokens:,} x {c.vocab_size:,}" if c.level == "logits" else (
        f"{c.tokens:,} x {c.hidden_size:,} x {c.vocab_size:,}"
    )  # fmt: skip
    masked = f", {c.counted_tokens:,} count" if c.masked else ""
    return f"{size}, {c.dtype}{masked}"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def mib(size: int | None, digits: int = 0) -> str:
    return "" if size is None else f"{size / MIB:,.{digits}f} MiB"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _header(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
