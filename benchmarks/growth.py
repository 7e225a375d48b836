"""How the C++ kernels' time grows with tokens, vocabulary and threads, beside the bare products.

python -m benchmarks.growth --out docs/growth

Writes growth.json, growth.md and growth.png. The bare products are `torch.mm` into tensors that exist: 1 for a forward,
3 for a full step. A round times each once, and the number shown is the median; small sizes get many rounds, and those
of many seconds 2 or 1, so that all takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.measure import Effort, HeadProblem, interleave
from benchmarks.peers import ours

FEATURES = 1024
THREADS = (1, 2)
TOKENS, VOCAB = 512, 32_000  # what stays while the other grows
GROWING = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096, 16_384),
    "vocabulary": (1000, 4000, 16_000, 32_000, 64_000, 128_000, 260_000),
}
PRODUCTS = {"forward": 1, "full step": 3}
MODES = {"forward": "score", "full step": "full"}
VERIFIED = 8  # tokens
SHORT = 1.0  # seconds of a round up to which the first one is not counted
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

    @property
    def flop(self) -> int:
        return 2 * self.tokens * FEATURES * self.vocab_size * PRODUCTS[self.what]

    @property
    def size(self) -> int:
        return self.tokens if self.curve == "tokens" else self.vocab_size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path of the files, without .json, .md and .png")
    parser.add_argument("--largest", type=int, default=0, help="leave out sizes beyond this many logits; 0: none")
    parser.add_argument("--impl", default="cpp")
    options = parser.parse_args(argv)
    before = torch.get_num_threads()
    facts = results.of_this_run([], "", torch.device("cpu")).to_json() | {"impl": options.impl}
    del facts["rows"], facts["size"]
    try:
        points = list(measured(options.largest, options.impl))
    finally:
        torch.set_num_threads(before)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = markdown(points, facts, f"{options.out.name}.png")
    rows = ",\n".join("  " + json.dumps(asdict(point)) for point in points)
    options.out.with_suffix(".json").write_text(f'{json.dumps(facts)[:-1]}, "points": [\n{rows}\n]}}\n')
    options.out.with_suffix(".md").write_text(report)
    draw(points, facts, options.out.with_suffix(".png"))
    print(report)


def measured(largest: int, impl: str) -> Iterable[Point]:
    for curve, sizes in GROWING.items():
        for size in sizes:
            tokens, vocab = (size, VOCAB) if curve == "tokens" else (TOKENS, size)
            if largest and tokens * vocab > largest:
                continue
            for what, mode in MODES.items():
                case = Case(curve, "hidden", mode, tokens, FEATURES, vocab, "bfloat16", inputs="noise", sequences=1,
                            verified=VERIFIED)  # fmt: skip
                for threads, rounds in rounds_of(case, impl):
                    medians = [statistics.median(times[name] for times in rounds) for name in ("ours", "bare")]
                    yield Point(curve, what, threads, tokens, vocab, len(rounds), *medians)


def rounds_of(case: Case, impl: str) -> Iterable[tuple[int, list[dict[str, float]]]]:
    """By the number of threads. Some tokens are verified first: no timing without agreement."""
    cpu = torch.device("cpu")
    problem = HeadProblem(case, cpu)
    runs = {"ours": problem.step(ours("dpo_kernels", impl)), "bare": problem.floor("bare GEMMs")}
    _, wrong = problem.truth.check(problem.run(runs["ours"]), ours=True)
    if wrong:
        raise AssertionError(wrong)
    problem.forget()
    for threads in THREADS:
        torch.set_num_threads(threads)
        rounds, failures = interleave(runs, EFFORT, cpu, min_rounds=4)
        if failures:
            raise RuntimeError(f"{failures}")
        if len(rounds) > 1 and sum(rounds[0].values()) < SHORT:
            del rounds[0]
        yield threads, rounds


def markdown(points: list[Point], facts: dict[str, Any], picture: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"# How time grows: {facts['machine']}, {facts['date']}",
        f"`python -m benchmarks.growth`, impl {facts['impl']}, bfloat16, {FEATURES:,} features, "
        f"commit {facts['commit']}. {versions}. Bare: `torch.mm` into tensors that exist, 1 for a forward and 3 for a "
        "full step; GFLOP/s are of those products, so that what ours computes twice counts once. Medians of "
        "interleaved rounds.",
    ]
    for curve, fixed in (("tokens", f"{VOCAB:,} vocabulary entries"), ("vocabulary", f"{TOKENS:,} tokens")):
        lines = [
            f"| {curve} | what | threads | ours, ms | bare, ms | ratio | ours, GFLOP/s | bare, GFLOP/s | rounds |",
            "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {p.size:,} | {p.what} | {p.threads} | {1e3 * p.ours:,.4g} | {1e3 * p.bare:,.4g} | "
            f"{p.ours / p.bare:.2f} | {1e-9 * p.flop / p.ours:,.0f} | {1e-9 * p.flop / p.bare:,.0f} | {p.rounds} |"
            for p in points
            if p.curve == curve
        ]
        parts += [f"## {curve.capitalize()}, at {fixed}", "\n".join(lines)]
    return "\n\n".join([*parts, f"![Time and rate by tokens and by vocabulary]({picture})"]) + "\n"


def draw(points: list[Point], facts: dict[str, Any], path: Path) -> None:
    """Time above, rate below; ours filled and solid, bare products white and dashed; a marker a number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    columns = [(curve, what) for curve in GROWING for what in PRODUCTS]
    figure, grid = plt.subplots(2, len(columns), figsize=(16, 7.5), sharex="col", sharey="row", squeeze=False)
    for (times, rates), (curve, what) in zip(grid.T, columns, strict=True):
        for threads, marker in zip(THREADS, "os", strict=True):
            mine = [p for p in points if (p.curve, p.what, p.threads) == (curve, what, threads)]
            sizes = [p.size for p in mine]
            bare = f"torch.mm x {PRODUCTS[what]}"
            for name, seconds in (("dpo_kernels", [p.ours for p in mine]), (bare, [p.bare for p in mine])):
                look: dict[str, Any] = {"linestyle": "-", "color": "black"}
                if name == bare:
                    look = {"linestyle": "--", "color": "0.45", "markerfacecolor": "white"}
                label = f"{name}, {threads} thread{'s'[: threads - 1]}"
                times.plot(sizes, [1e3 * s for s in seconds], marker=marker, label=label, **look)
                rates.plot(
                    sizes, [1e-9 * p.flop / s for p, s in zip(mine, seconds, strict=True)], marker=marker, **look
                )
        fixed = f"{VOCAB:,} vocabulary entries" if curve == "tokens" else f"{TOKENS:,} tokens"
        times.set_title(f"{what}, {fixed}", fontsize=9, loc="left")
        times.set_yscale("log")
        times.legend(fontsize=7, frameon=False, loc="lower right")
        rates.set_xscale("log", base=2)
        rates.set_xticks(GROWING[curve], [f"{size:,}" for size in GROWING[curve]], rotation=40, ha="right")
        rates.set_xlabel("tokens" if curve == "tokens" else "vocabulary, entries")
        for axes in (times, rates):
            axes.minorticks_off()
            axes.grid(True, color="0.9")
    grid[0, 0].set_ylabel("time, ms")
    low, high = grid[0, 0].get_ylim()
    ticks = [10.0**e for e in range(-3, 7) if low <= 10.0**e <= high]
    grid[0, 0].set_yticks(ticks, [f"{t:,.10g}" for t in ticks])
    grid[1, 0].set_ylabel("GFLOP/s of the products")
    grid[1, 0].set_ylim(bottom=0)
    versions = facts["versions"]
    figure.suptitle(
        f"{facts['machine']}, {facts['date']}, torch {versions['torch']}, Python {versions['python']}, "
        f"bfloat16, {FEATURES:,} features",
        fontsize=9, color="0.3", y=0.995,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
