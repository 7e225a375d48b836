"""The picture of README.md: memory and time of a DPO step against tokens, ours beside what a user would pick instead.

python -m benchmarks.readme                                   docs/readme.json and docs/readme.png
python -m benchmarks.readme --seconds 900 --dtypes float32    with more time, one dtype
python -m benchmarks.readme --draw-only                       the picture anew, from the file

A step is the loss and its gradients of hidden states and weight, the reference's log-probs included: 4 products. No
label is masked, which suits those best that compute masked rows too. At the fewest tokens every peer is verified
against float64; at the others its loss is compared with ours. Times are medians of interleaved rounds in one process;
memory is that of a process of its own, of its second step at the fewest tokens and of its first at all others.

The order is: the first dtype, from few tokens to many, memory before time; then the next dtype. What would end after
--seconds is left out, and named.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import busy, results
from benchmarks.cases import MIB, Case
from benchmarks.inputs import Inputs, Outcome
from benchmarks.measure import TIME_IS_UP, Effort, fill_times, interleave, prepare, verify
from benchmarks.memory import in_a_process
from benchmarks.peers import PEERS, Peer
from benchmarks.results import Row, is_ours
from benchmarks.verify import Problem

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TOKENS = (256, 1024, 4096)
ROUNDS = {256: 3, 1024: 2}  # 1 of more tokens
LOSSES_AGREE = {"float32": 1e-3, "bfloat16": 2e-2}  # absolute; logits that are rounded to bfloat16 move a loss by 4e-3
BASE = Case("", "dpo", "full", 0, 512, 151_936, "", memory_of=())


@dataclass(frozen=True)
class Line:
    """One line of the picture. source: its peer in PEERS. memory_budget: bytes, ours alone; None is the default.
    label, color: in the picture; the colours are Okabe and Ito's, which the colour-blind tell apart."""

    source: str
    label: str
    color: str
    memory_budget: int | None = None

    @property
    def name(self) -> str:
        return self.source + (f", {self.memory_budget // MIB} MiB" if self.memory_budget else "")

    @property
    def peer(self) -> Peer:
        """The peer under this line's name and budget."""
        peer = next(p for p in PEERS if p.name == self.source)

        def dpo(inputs: Inputs) -> torch.Tensor:
            return peer.adapters["dpo"](replace(inputs, memory_budget=self.memory_budget))

        return replace(peer, name=self.name, adapters={"dpo": dpo})


LINES = (
    Line("plain PyTorch", "plain PyTorch", "#7f7f7f"),
    Line("dpo_kernels", "ours", "#0072B2"),
    Line("dpo_kernels", "ours, 256 MiB", "#D55E00", 256 * MIB),
    Line("TRL selective_log_softmax", "TRL", "#009E73"),
    Line("Liger FusedLinearDPOLoss", "Liger", "#CC79A7"),
    Line("CCE torch_compile", "CCE", "#A6761D"),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/readme.json", help="the picture is beside it")
    parser.add_argument("--seconds", type=float, default=350, help="after which nothing is started (350)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="multiples of 8 (256 1024 4096)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(LOSSES_AGREE))
    parser.add_argument("--hidden-size", type=int, default=BASE.hidden_size, help="to try it: smaller ones")
    parser.add_argument("--vocab-size", type=int, default=BASE.vocab_size, help="to try it: smaller ones")
    parser.add_argument("--draw-only", action="store_true", help="draw what the file has, measure nothing")
    options = parser.parse_args(argv)
    if not options.draw_only:
        base = replace(BASE, hidden_size=options.hidden_size, vocab_size=options.vocab_size)
        cases = [case_of(base, dtype, tokens) for dtype in options.dtypes for tokens in sorted(options.tokens)]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        found: list[Row] = []
        for rows in measured(cases, time.monotonic() + options.seconds):
            found += rows
            results.save(results.of_this_run(found, "readme", CPU), options.output)
    run = results.load(options.output)
    dtype = next(row.case.dtype for row in run.rows)
    draw(run, dtype, options.output.with_suffix(".png"))
    print(table(run.rows))


def case_of(base: Case, dtype: str, tokens: int) -> Case:
    return replace(base, name=f"readme-{dtype}-{tokens}", dtype=dtype, tokens=tokens, inputs="noise")


def measured(cases: Sequence[Case], end: float) -> Iterator[list[Row]]:
    """The rows of each case, as soon as they are there. end: of `time.monotonic`, after which nothing is started."""
    machine, rate = busy.Machine(), {case.dtype: 1e9 * product_rate(case) for case in cases}
    for case in cases:
        first = case.tokens == min(other.tokens for other in cases)
        rows = [Row(case, line.name, "unavailable", line.peer.unavailable(CPU) or "") for line in LINES]
        step = case.needed_gemms * case.gemm_flop / rate[case.dtype]  # of bare products
        print(f"{case.name}: {case.shape}, a step of bare products {step:.1f} s. {machine.warning()}", flush=True)
        for line, row in zip(LINES, rows, strict=True):
            if not row.reason:
                measure_memory(row, line, 2 if first else 1, time.monotonic() + step < end)
        rounds = ROUNDS.get(case.tokens, 1) if not first else max(ROUNDS.values())
        if time.monotonic() + 1.5 * step * len(LINES) * (rounds + first) < end:
            measure_time(rows, case, rounds, first, end)
        for row in rows:
            if row.status == "unavailable" and not row.reason:
                row.reason = TIME_IS_UP
                row.status = "memory" if row.first_bytes else row.status
        yield rows


def product_rate(case: Case) -> float:
    """GFLOP/s of a small product in the case's dtype."""
    hidden = torch.randn(64, 512).to(case.torch_dtype)
    weight = torch.randn(16_000, 512).to(case.torch_dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        hidden @ weight.T
        times.append(time.perf_counter() - start)
    return 2e-9 * 64 * 512 * 16_000 / min(times)


def measure_memory(row: Row, line: Line, steps: int, starts: bool) -> None:
    if not starts:
        row.bytes_reason = TIME_IS_UP
        return
    case = replace(row.case, memory_budget=line.memory_budget)
    found, row.bytes_reason = in_a_process(steps, prepare, case, line.source, CPU)
    if found:
        row.first_bytes, row.returned_bytes = found[0].peak, found[-1].returned
        row.bytes = found[-1].peak if steps > 1 else None


def measure_time(rows: Sequence[Row], case: Case, rounds: int, verified: bool, end: float) -> None:
    """Verifies where that is wanted, times in interleaved rounds, compares the losses."""
    problem = Problem(replace(case, inputs="peaked") if verified else case, CPU)
    losses: dict[str, float] = {}

    def kept(name: str, step: Callable[[], Outcome]) -> Callable[[], None]:
        def run() -> None:
            losses[name] = float(step()["loss"])

        return run

    steps = {line.name: problem.step(line.peer) for line in LINES}
    tried = [row for row in rows if not row.reason]
    for row in tried:
        row.status = "timed"
        if verified:
            verify(row, steps[row.peer], problem)
    tried = [row for row in tried if row.status == "timed"]
    problem.forget()
    before = busy.read()
    runs = {row.peer: kept(row.peer, steps[row.peer]) for row in tried}
    times, failures = interleave(runs, Effort(0, math.inf, rounds, end), CPU, rounds)
    missing = busy.missing(before, busy.read(), torch.get_num_threads())
    ours = losses.get("dpo_kernels", float("nan"))
    for row in tried:
        row.missing_cores = missing
        if row.peer in failures:
            row.fail("failed", failures[row.peer])
        elif row.peer not in losses:
            row.fail("memory" if row.first_bytes else "unavailable", TIME_IS_UP)
        elif not abs(losses[row.peer] - ours) <= LOSSES_AGREE[case.dtype]:
            row.fail("wrong", f"its loss is {losses[row.peer]:.6f}, ours {ours:.6f}")
    fill_times([row for row in tried if row.status == "timed"], times)


def held(row: Row) -> int | None:
    """Bytes beyond inputs, loss and gradients."""
    return row.beyond(row.bytes or row.first_bytes)


def table(rows: Sequence[Row]) -> str:
    lines = [
        (r.case.dtype, f"{r.case.tokens:,}", r.peer, results.mib(held(r)), f"{r.seconds:.2f} s" if r.seconds else "",
         f"{r.to_ours:.2f}" if r.to_ours else "", r.reason or r.bytes_reason)
        for r in rows
    ]  # fmt: skip
    return results.markdown_table(("dtype", "tokens:", "what", "held:", "time:", "x ours:", "notes"), lines)


def draw(run: results.Results, dtype: str, path: Path) -> None:
    """Memory left, time right, both axes logarithmic; a name at the end of each line; ours thick."""
    from benchmarks import pictures  # needs matplotlib

    rows = [row for row in run.rows if row.case.dtype == dtype]
    case = rows[0].case
    with pictures.plt.rc_context({"font.size": 11}):
        figure, (memory, times) = pictures.plt.subplots(1, 2, figsize=(10, 4.6), dpi=160, facecolor="white")
        for axes, value, title in (
            (memory, lambda r: (held(r) or 0) / MIB, "Memory beyond inputs and gradients, MiB"),
            (times, lambda r: r.seconds or 0, "Time of a step, s"),
        ):
            ends: list[tuple[tuple[int, float], Line, bool]] = []
            for line in LINES:
                points = [(r.case.tokens, value(r)) for r in rows if r.peer == line.name and value(r) > 0]
                if not points:
                    continue
                mine = is_ours(line.name)
                look = {"linewidth": 3.2, "markersize": 7, "zorder": 3} if mine else {"linewidth": 1.5, "markersize": 5}
                axes.plot(*zip(*points, strict=True), color=line.color, marker="o" if mine else "s", **look)
                ends.append((points[-1], line, mine))
            sizes = sorted({r.case.tokens for r in rows})
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            pictures.plain_ticks(axes)
            axes.minorticks_off()
            axes.grid(True, color="0.92")
            axes.set_xlabel("tokens")
            axes.set_title(title, fontsize=10.5, loc="left")
            if ends:
                label_ends(axes, ends)
        shape = f"{case.vocab_size:,} vocabulary x {case.hidden_size:,} features, {case.dtype}"
        title = f"A DPO step, loss and gradients: {shape}; {run.machine}, {run.date}"
        pictures.save(figure, title, path)


def label_ends(axes: Any, ends: list[tuple[tuple[int, float], Line, bool]]) -> None:
    """Names right of the lines' ends, moved apart where they would overlap."""
    axes.figure.canvas.draw()
    scale = axes.figure.dpi / 72  # pixels of a point
    ends = sorted(ends, key=lambda end: end[0][1])
    wanted = [float(axes.transData.transform(point)[1]) for point, *_ in ends]
    for (point, line, mine), at, to in zip(ends, wanted, apart(wanted, 15 * scale), strict=True):
        axes.annotate(
            line.label, point, xytext=(9, (to - at) / scale), textcoords="offset points", va="center",
            color=line.color, fontweight="bold" if mine else "normal", annotation_clip=False,
        )  # fmt: skip


def apart(wanted: Sequence[float], least: float) -> list[float]:
    """Ascending places, least apart and as near to the wanted ones, ascending too, as that leaves: those that are too
    close share a middle."""
    groups: list[list[float]] = []  # of what is wanted, less the places below
    for i, at in enumerate(wanted):
        groups.append([at - i * least])
        while len(groups) > 1 and statistics.fmean(groups[-2]) > statistics.fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    middles = [statistics.fmean(group) for group in groups for _ in group]
    return [middle + i * least for i, middle in enumerate(middles)]


if __name__ == "__main__":
    main()
