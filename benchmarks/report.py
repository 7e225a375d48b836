"""From a results file to a Markdown report with pictures: python -m benchmarks.report results.json --out DIR"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks import results
from benchmarks.results import Results, Row, case_names, is_ours, markdown_table, mib, milliseconds
from benchmarks.screen import number

HOW_TO_READ = "How to read it: [benchmarks/README.md](../README.md#how-to-read)."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what `pytest benchmarks/ --benchmark-json` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for Markdown, pictures and the stripped JSON")
    options = parser.parse_args(argv)
    run, out = results.load(options.results), options.out
    out.mkdir(parents=True, exist_ok=True)
    from benchmarks import pictures  # needs matplotlib

    results.save(run, out / f"{run.name}.json")
    path = out / f"{run.name}.md"
    path.write_text(markdown(run, pictures.draw(run, out)))
    print(path)


def markdown(run: Results, picture_names: Iterable[str] = ()) -> str:
    parts = [
        f"# Benchmarks: {run.machine}, {run.date}",
        facts(run),
        HOW_TO_READ,
        table(run.rows),
        "## Every peer: timed, wrong, or why it did not run",
        outcomes(run.rows),
    ]
    if budget := [row for row in run.rows if row.case.memory_budget and row.first_bytes]:
        parts += ["## The memory budget: planned and measured", budget_table(budget)]
    parts += [f"![{name}]({name})" for name in picture_names]
    return "\n\n".join(parts) + "\n"


def facts(run: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"Size `{run.size}`, {run.threads}, commit {run.commit}. {versions}."


def table(rows: Iterable[Row]) -> str:
    """Every case that is no point of a curve, the floor first, then by time."""
    names = (
        "case", "what", "time", "quartiles", "rounds", "x floor", "x ours", "rate", "peak memory", "error",
        "error of gradients", "notes",
    )  # fmt: skip
    shown = [row for row in rows if row.case.curve is None and row.status != "unavailable"]
    lines = []
    for case in case_names(shown):
        of_case = [row for row in shown if row.case.name == case]
        of_case.sort(key=lambda row: (row.status != "floor", row.seconds or float("inf")))
        heads = [f"**{case}**<br>{of_case[0].case.shape}", *[""] * len(of_case)]
        lines += [[head, *_cells(row)] for head, row in zip(heads, of_case, strict=False)]
    return markdown_table(names, lines)


def _cells(row: Row) -> list[str]:
    status = {"wrong": "**WRONG, not timed**", "failed": "**failed, not timed**"}.get(row.status)
    notes = [f"{status}: {row.reason}"] if status else list(row.marks)
    if row.mode:
        own = f" ({row.to_own_gemms:.2f} x those bare)" if row.to_own_gemms else ""
        notes.insert(0, f"{row.mode}, {row.gemms:.3g} GEMMs{own}")
    if row.bytes_reason:
        notes.append(f"memory: {row.bytes_reason}")
    return [
        _label(row.peer), milliseconds(row.seconds), " to ".join(map(milliseconds, row.quartiles)),
        str(row.rounds or ""), number(row.to_floor), number(row.to_ours), _rate(row), mib(row.bytes),
        *_error_cells(row), "; ".join(notes),
    ]  # fmt: skip


def _rate(row: Row) -> str:
    """Of the case's products, of ours the plan's; without products, of the bytes that must be moved."""
    if not row.seconds or row.case.level == "train":
        return ""
    if moved := row.moved:
        return f"{1e-9 * moved / row.seconds:,.0f} GB/s"
    return f"{1e-9 * (row.gemms or 0) * row.case.gemm_flop / row.seconds:,.0f} GFLOP/s"


def _error_cells(row: Row) -> tuple[str, str]:
    """Of log-probs or loss, and the largest of gradients."""
    gradients = [error for name, error in row.errors.items() if name not in ("log_probs", "loss")]
    value = next((row.errors[name] for name in ("log_probs", "loss") if name in row.errors), None)
    return "" if value is None else f"{value:.1e}", f"{max(gradients):.1e}" if gradients else ""


def outcomes(rows: Iterable[Row]) -> str:
    """Each peer once: in how many cases it was right, and what went wrong or why it did not run."""
    by_peer: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.status != "floor":
            by_peer[row.peer][f"{row.status}: {row.reason}" if row.reason else row.status] += 1
    return "\n".join(
        f"- {peer}: " + "; ".join(f"{said} ({count} cases)" for said, count in cases.items())
        for peer, cases in by_peer.items()
    )


def budget_table(rows: list[Row]) -> str:
    """Planned bytes beside measured ones: what is held beyond inputs, outputs and gradients."""
    names = ("case", "budget", "mode", "GEMMs", "time, x floor")
    beside = ("planned", "first step", "difference", "planned for the driver", "second step", "difference")
    lines = []
    for row in rows:
        cells = [row.case.name, mib(row.case.memory_budget), row.mode, number(row.gemms), number(row.to_floor)]
        driver = (row.predicted_bytes or 0) - (row.library_bytes or 0)
        for planned, peak in ((row.predicted_bytes, row.first_bytes), (driver, row.bytes)):
            held = row.beyond(peak)
            change = f"{held / planned - 1:+.0%}" if held is not None and planned else ""
            cells += [mib(planned, 1), mib(held, 1), change]
        lines.append(cells)
    return markdown_table((*names, *beside), lines)


def _label(peer: str) -> str:
    return f"**{peer}**" if is_ours(peer) else peer


if __name__ == "__main__":
    main()
