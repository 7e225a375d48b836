"""How the C++ kernels' time grows with tokens, vocabulary and threads, beside the bare products.

python -m benchmarks.growth --out docs/growth

Writes growth.json, growth.md and growth.png. The bare products are `torch.mm` into tensors that exist: 1 for a forward,
3 for a full step. Verified and timed as `pytest benchmarks/` does it; small sizes get many rounds, and those of many
seconds 2 or 1, so that all takes some minutes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.measure import Effort, measure
from benchmarks.peers import default_impl, ours

FEATURES = 1024
THREADS = (1, 2)
TOKENS, VOCAB = 512, 32_000  # what stays while the other grows
GROWING = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096, 16_384),
    "vocabulary": (1000, 4000, 16_000, 32_000, 64_000, 128_000, 260_000),
}
FIXED = {"tokens": f"{VOCAB:,} vocabulary entries", "vocabulary": f"{TOKENS:,} tokens"}  # by what grows
MODES = {"forward": "score", "full step": "full"}
PRODUCTS = {"forward": 1, "full step": 3}
VERIFIED = 8  # tokens
EFFORT = Effort(seconds=0.8, patience=10.0, max_rounds=32)


@dataclass(frozen=True)
class Point:
    """Medians of one size at one number of threads: seconds of ours and of the bare products."""

    curve: str
    what: str
    threads: int
    tokens: int
    vocab_size: int
    rounds: int
    ours: float
    bare: float

    def rate(self, seconds: float) -> float:
        return 2e-9 * self.tokens * FEATURES * self.vocab_size * PRODUCTS[self.what] / seconds

    @property
    def size(self) -> int:
        return self.tokens if self.curve == "tokens" else self.vocab_size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path of the files, without .json, .md and .png")
    options = parser.parse_args(argv)
    facts = results.of_this_run([], "", torch.device("cpu")).to_json() | {"impl": default_impl(torch.device("cpu"))}
    del facts["rows"], facts["size"]
    threads = torch.get_num_threads()
    try:
        points = list(measured())
    finally:
        torch.set_num_threads(threads)
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(results.one_a_line("points", map(asdict, points), facts) + "\n")
    report = markdown(points, facts, f"{out.name}.png")
    out.with_suffix(".md").write_text(report)
    draw(points, facts, out.with_suffix(".png"))
    print(report)


def measured() -> Iterable[Point]:
    for curve, sizes in GROWING.items():
        for size, what, threads in itertools.product(sizes, MODES, THREADS):
            tokens, vocab = (size, VOCAB) if curve == "tokens" else (TOKENS, size)
            case = Case(curve, "hidden", MODES[what], tokens, FEATURES, vocab, "bfloat16", inputs="noise", sequences=1,
                        verified=VERIFIED, min_rounds=4, memory_of=())  # fmt: skip
            torch.set_num_threads(threads)
            bare, mine = measure(case, peers=[ours("dpo_kernels")], effort=EFFORT)
            if not (mine.seconds and bare.seconds):
                raise RuntimeError(f"{mine.status}: {mine.reason}{bare.reason}")
            yield Point(curve, what, threads, tokens, vocab, mine.rounds, mine.seconds, bare.seconds)


def markdown(points: list[Point], facts: dict[str, Any], picture: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"# How time grows: {facts['machine']}, {facts['date']}",
        f"`python -m benchmarks.growth`, impl {facts['impl']}, bfloat16, {FEATURES:,} features, "
        f"commit {facts['commit']}. {versions}. Bare: `torch.mm` into tensors that exist, 1 for a forward and 3 for a "
        "full step; GFLOP/s are of those products, so that what ours computes twice counts once. Medians of "
        "interleaved rounds.",
    ]
    for curve, fixed in FIXED.items():
        names = (f"{curve}:", "what", "threads:", "ours, ms:", "bare, ms:", "ratio:", "ours, GFLOP/s:",
                 "bare, GFLOP/s:", "rounds:")  # fmt: skip
        lines = [
            (f"{p.size:,}", p.what, f"{p.threads}", f"{1e3 * p.ours:,.4g}", f"{1e3 * p.bare:,.4g}",
             f"{p.ours / p.bare:.2f}", f"{p.rate(p.ours):,.0f}", f"{p.rate(p.bare):,.0f}", f"{p.rounds}")
            for p in points if p.curve == curve
        ]  # fmt: skip
        parts += [f"## {curve.capitalize()}, at {fixed}", results.markdown_table(names, lines)]
    return "\n\n".join([*parts, f"![Time and rate by tokens and by vocabulary]({picture})"]) + "\n"


def draw(points: list[Point], facts: dict[str, Any], path: Path) -> None:
    """Time above, rate below; ours filled and solid, bare products white and dashed; a marker a number of threads."""
    from benchmarks import pictures  # needs matplotlib

    columns = list(itertools.product(GROWING, MODES))
    figure, grid = pictures.plt.subplots(2, len(columns), figsize=(16, 7.5), sharex="col", sharey="row", squeeze=False)
    white = {"linestyle": "--", "color": "0.45", "markerfacecolor": "white"}
    black = {"linestyle": "-", "color": "black"}
    for (times, rates), (curve, what) in zip(grid.T, columns, strict=True):
        for threads, marker in zip(THREADS, "os", strict=True):
            mine = [p for p in points if (p.curve, p.what, p.threads) == (curve, what, threads)]
            sizes = [p.size for p in mine]
            for name, field, look in (("dpo_kernels", "ours", black), (f"torch.mm x {PRODUCTS[what]}", "bare", white)):
                look = {**look, "marker": marker, "label": f"{name}, {threads} thread{'s'[: threads - 1]}"}
                times.plot(sizes, [1e3 * getattr(p, field) for p in mine], **look)
                rates.plot(sizes, [p.rate(getattr(p, field)) for p in mine], **look)
        pictures.finish(times, "", "", GROWING[curve])
        pictures.finish(rates, curve, "", GROWING[curve])
        times.set_title(f"{what}, {FIXED[curve]}", fontsize=9, loc="left")
        times.legend(fontsize=7, frameon=False, loc="lower right")
    times, rates = grid[:, 0]
    times.set_ylabel("time, ms")
    times.set_yscale("log")
    pictures.plain_ticks(times, of_a_decade=(1,))
    rates.set_ylabel("GFLOP/s of the products")
    rates.set_ylim(bottom=0)
    versions = facts["versions"]
    title = f"{facts['machine']}, {facts['date']}, torch {versions['torch']}, Python {versions['python']}, "
    pictures.save(figure, f"{title}bfloat16, {FEATURES:,} features", path)


if __name__ == "__main__":
    main()
