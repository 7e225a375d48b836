"""How the C++ kernels' time grows with tokens, vocabulary and threads, beside the bare products.

python -m benchmarks.growth --out docs/growth

Writes growth.json, growth.md and growth.png. The bare products are `torch.mm` into tensors that exist: 1 for a forward,
3 for a full step. A round times each once, and the number shown is the median; small sizes get many rounds, and those
of many seconds 2 or 1, so that all takes about four minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from dpo_kernels import hidden_to_log_probs

FEATURES, DTYPE = 1024, torch.bfloat16
THREADS = (1, 2)
TOKENS, VOCAB = 512, 32_000  # what stays while the other grows
GROWING = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096, 16_384),
    "vocabulary": (1000, 4000, 16_000, 32_000, 64_000, 128_000, 260_000),
}
SECONDS, MOST = 0.4, 31  # as many rounds as fit in the seconds of a point, at most 31 and at least 3
PRODUCTS = {"forward": 1, "full step": 3}


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
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": results.machine(torch.device("cpu")),
        "threads": results.threads(),
        "versions": results.versions(),
        "commit": results.commit(),
        "impl": options.impl,
    }
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
            problem = Problem(tokens, vocab, impl)
            for threads in THREADS:
                torch.set_num_threads(threads)
                for what in PRODUCTS:
                    rounds, ours, bare = medians(*problem.runs(what))
                    yield Point(curve, what, threads, tokens, vocab, rounds, ours, bare)


class Problem:
    """One size's tensors; what ours computes is checked once."""

    def __init__(self, tokens: int, vocab: int, impl: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.impl = impl
        self.hidden = torch.randn(tokens, FEATURES, generator=generator).to(DTYPE)
        self.weight = (torch.randn(vocab, FEATURES, generator=generator) / FEATURES**0.5).to(DTYPE)
        self.labels = torch.randint(vocab, (tokens,), generator=generator)
        self.leaves = [t.detach().clone().requires_grad_() for t in (self.hidden, self.weight)]
        # Written once, so that no page is new when it is timed.
        self.logits = torch.zeros(tokens, vocab, dtype=DTYPE).fill_(0)
        self.grads = [torch.zeros_like(t).fill_(0) for t in (self.hidden, self.weight)]
        self.check()

    def check(self) -> None:
        """Some rows against float64: no timing without agreement."""
        rows = slice(0, 8)
        with torch.no_grad():
            got = self.log_probs(self.hidden, self.weight)[rows]
        part = self.hidden[rows].double()
        logits = torch.cat([part @ weight.double().T for weight in self.weight.split(16_384)], 1)
        exact = logits.log_softmax(-1).gather(1, self.labels[rows, None])[:, 0]
        if not (got - exact).abs().max() <= 1e-4:
            raise AssertionError(f"log-probs are wrong by {(got - exact).abs().max():.1e}")

    def log_probs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden_to_log_probs(hidden, weight, self.labels, impl=self.impl)

    def runs(self, what: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return (self.forward, self.bare_forward) if what == "forward" else (self.step, self.bare_step)

    def forward(self) -> None:
        with torch.no_grad():
            self.log_probs(self.hidden, self.weight)

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.log_probs(*self.leaves).sum().backward()

    def bare_forward(self) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.logits)

    def bare_step(self) -> None:
        self.bare_forward()
        torch.mm(self.logits, self.weight, out=self.grads[0])
        torch.mm(self.logits.T, self.hidden, out=self.grads[1])


def medians(ours: Callable[[], Any], bare: Callable[[], Any]) -> tuple[int, float, float]:
    """Rounds, and median seconds of both, which take turns to be first. A short run's first round does not count."""
    runs = (ours, bare)
    times = ([clocked(ours)], [clocked(bare)])
    once = times[0][0] + times[1][0]
    least = 3 if once < 5 else 2 if once < 20 else 1
    if once < 1:
        times = ([], [])
    rounds = min(max(int(SECONDS / once), least), MOST)
    for i in range(len(times[0]), rounds):
        for which in (i % 2, 1 - i % 2):
            times[which].append(clocked(runs[which]))
    return rounds, statistics.median(times[0]), statistics.median(times[1])


def clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
