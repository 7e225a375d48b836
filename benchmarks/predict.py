"""What the Triton kernels should need on GPUs, by machine code, traffic and schedule: predictions, not measurements.

    python -m benchmarks.predict        Markdown: tiles of each product's kernel, idle multiprocessors, times on an H200

A tile of a product costs the cycles that its tensor-core products take, then those of what is done once a tile, since
nothing of the next tile is under way meanwhile: instructions by unit (machine_code.py), barriers, and until the first
operands are there. Where warps are specialised (`ProductBlocks.specialized`), it is the longer of the two, at most; on
sm_90, where two groups of warps take turns, a simulation of their slices, buffers and tensor cores tells.
Programs take the first multiprocessor that is free. Products of the library run at what cuBLAS sustains, bytes at what
a copy does.

A run on a GPU compares: the time of score at 1,024, 2,048 and 4,096 features with `share` (FILL and BARRIER are
assumptions that those three decide), frozen, keep and recompute with the table of times, a filter's marks with their
row of the first table.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.cases import GPU, Case
from benchmarks.compiled import TARGETS, Launch, compile_for, disassembled, specialise, stand_in
from benchmarks.machine_code import Tile, tile_of
from benchmarks.peers import CONFIGURED
from benchmarks.results import markdown_table
from dpo_kernels import token_stats
from dpo_kernels.backends.triton_fused import HOPPER_STAGES
from dpo_kernels.kernels import configs
from dpo_kernels.overrides import override
from dpo_kernels.planner import Plan
from dpo_kernels.splits import PROGRAM, Splits

SAVED = ("score", "frozen", "keep")  # by how much forward saves: nothing, exponentials, those of one base a row
FEATURES = (1024, 2048, 4096)
HOPPER_KERNEL, LEAD = "hopper_forward_kernel", 2  # kernels/hopper.py
FILL = 700  # cycles from a tile's first request to its first product: an assumption
BARRIER = 30  # cycles of one for all warps of a program: an assumption


class Chip(NamedTuple):
    """flops: of tensor cores in half precision, dense, a cycle and multiprocessor. sustained: FLOP/s of cuBLAS; bytes:
    a second, of a copy; None where they are not known."""

    name: str
    multiprocessors: int
    flops: int
    sustained: float | None = None
    bytes: float | None = None


CHIPS = {"sm_90": Chip("H200", 132, 4096, 780e12, 4.3e12), "sm_100": Chip("B200", 148, 8192)}
# What others have published of the same work: GPU, tokens x features x vocabulary, what, milliseconds.
PUBLISHED = (
    ("H100", (8192, 4096, 131_072), "forward", "Liger, CuTe", 12.25),
    ("H100", (8192, 4096, 131_072), "forward and backward, logits again", "Liger, CuTe", 50.4),
    ("H200", (8192, 4096, 262_144), "forward", "Liger, CuTe", 22.3),
    ("H200", (8192, 4096, 128_256), "forward and backward", "Liger, CuTe", 34.4),
    ("H200", (8192, 4096, 128_256), "forward and backward", "QuACK", 35.5),
    ("H200", (8192, 4096, 128_256), "forward and backward", "Liger, Triton", 154.0),
    ("B200", (8192, 4096, 128_256), "forward and backward", "Liger, CuTe", 17.5),
)


def turns(slices: int, product: float, beside: float, stages: int = HOPPER_STAGES, lead: int = LEAD) -> float:
    """Cycles of a block, of many, where two groups share each slice's tensor cores (kernels/hopper.py).

    slices: of a block. product: cycles of a slice for both groups. beside: those that each group accumulates for, after
    a block. A slice comes FILL cycles after both are done with the one that was in its buffer.
    """
    blocks, now = 24, 0.0
    done, left, idle_until = [0, 0], [product / 2, product / 2], [0.0, 0.0]
    comes: defaultdict[int, float] = defaultdict(lambda: float("inf"), dict.fromkeys(range(stages), float(FILL)))
    ends = []
    while min(done) < blocks * slices:
        waits = [max(idle_until[g], comes[done[g]]) for g in (0, 1)]
        if done[0] < lead:
            waits[1] = float("inf")
        busy = [g for g in (0, 1) if waits[g] <= now and done[g] < blocks * slices]
        next_one = min((at for at in waits if at > now), default=float("inf"))
        step = min([left[g] * len(busy) for g in busy] + [next_one - now])
        now += step
        for g in busy:
            left[g] -= step / len(busy)
            if left[g] < 1e-6:
                left[g] = product / 2
                done[g] += 1
                if done[g] % slices == 0:
                    idle_until[g] = now + beside
                if min(done) == done[g]:  # the other was done with it before
                    comes[done[g] - 1 + stages] = now + FILL
                    if done[g] % slices == 0:
                        ends.append(now)
    return (ends[-2] - ends[3]) / (len(ends) - 5)


class Compiled(NamedTuple):
    """A product's kernel, what of its launches this is, its blocks, its tile's code and what it takes."""

    name: str
    purpose: str
    blocks: configs.ProductBlocks
    tile: Tile
    registers: int
    spills: int
    specialized: bool = False

    @property
    def accumulating(self) -> int:
        """Warps that do at once what is done once a tile."""
        return 4 if self.name == HOPPER_KERNEL else self.blocks.warps

    def cycles(self, chip: Chip, features: int) -> tuple[float, float]:
        """Of a multiprocessor and tile: all of them, and those of its tensor cores."""
        m, n, k = self.blocks[:3]
        slices = -(-features // k)
        product = 2 * m * n * k / chip.flops * slices
        beside = self.tile.cycles(self.accumulating) + BARRIER * self.tile.barriers
        if self.name == HOPPER_KERNEL:
            return turns(slices, product / slices, beside), product
        return (max(product, beside) if self.specialized else product + beside + FILL), product

    def share(self, chip: Chip, features: int) -> float:
        """Of the tensor cores' peak, while no multiprocessor is idle."""
        every, product = self.cycles(chip, features)
        return product / every


def nothing(*_: object) -> None:
    """A mock would remember what it is given."""


def compiled(target_name: str, specialized: bool = False) -> list[Compiled]:
    """Kernels of a plain call in bfloat16, as each mode launches them; or those that have specialised warps."""
    target = TARGETS[target_name]
    found: dict[Launch, None] = {}

    def record(module: str, name: str, _: int, warps: int, stages: int | None, arguments: dict[str, Any]) -> None:
        if name in ("forward_kernel", HOPPER_KERNEL, "recompute_kernel", "gather_kernel"):
            found[specialise(module, name, warps, stages, arguments)] = None
        stand_in(name, arguments, share=0.0)

    multiply = "dpo_kernels.backends.triton_tiles.library_multiply"
    changes = {"product": {"specialized": specialized}}
    with (
        override(arch=target.arch, launch=record, kernels=changes, capabilities={"scratch": 0}),
        mock.patch(multiply, nothing),
    ):
        for grads, budget, share in itertools.product((False, True), (None, 2**24), (None, 2**-8)):
            hidden, weight = (torch.ones(n, 256, dtype=torch.bfloat16) for n in (256, 65_536))
            hidden.requires_grad_(grads)
            weight.requires_grad_(grads)
            labels = torch.zeros(256, dtype=torch.int64)
            made = token_stats(
                hidden, weight, labels, outputs=(), memory_budget=budget, gradient_filter=share, impl="triton"
            )
            if grads:
                made.log_probs.sum().backward()
    blocks = configs.product_blocks(target.arch, torch.bfloat16, options=False)
    every = [_compiled(target_name, launch, blocks) for launch in found]
    return [kernel for kernel in every if kernel.specialized == specialized]


def _compiled(target_name: str, launch: Launch, blocks: configs.ProductBlocks) -> Compiled:
    usage, code = disassembled(compile_for(TARGETS[target_name], launch))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    known = dict(launch.constants)
    purpose = {
        "recompute_kernel": "logits again, masked" if known.get("MASK") else "logits again",
        "gather_kernel": "columns that stay, logits again",
    }.get(launch.kernel) or SAVED[bool(known["SAVE"]) + bool(known["ONE_BASE"])] + ", marked" * bool(known.get("MARK"))
    taking_turns = launch.kernel == HOPPER_KERNEL
    specialized = taking_turns or bool(known.get("SPECIALIZED"))
    tile = tile_of(code, specialized and not taking_turns)
    return Compiled(launch.kernel, purpose, blocks, tile, int(registers[1]), spills, specialized)


def kernels_table(target_name: str, kernels: list[Compiled]) -> str:
    chip = CHIPS[target_name]
    names = (
        "kernel", "once a tile:", "ALU:", "FMA:", "MUFU:", "memory:", "others:", "in few tiles:", "a step:",
        "barriers:", "registers:", "spills:", "cycles:", *(f"{features:,}:" for features in FEATURES),
    )  # fmt: skip
    lines = []
    for kernel in kernels:
        tile = kernel.tile
        units = [tile.once[unit] for unit in ("alu", "fma", "mufu", "memory")]
        lines.append((
            f"`{kernel.name}`, {kernel.purpose}", f"{tile.once.total():,}", *(f"{n:,}" for n in units),
            f"{tile.once.total() - sum(units):,}", f"{tile.rare.total():,}", f"{tile.step.total():,}",
            str(tile.barriers), str(kernel.registers), str(kernel.spills),
            f"{tile.cycles(kernel.accumulating):,.0f}", *(f"{kernel.share(chip, d):.1%}" for d in FEATURES),
        ))  # fmt: skip
    return markdown_table(names, lines)


def scheduled(splits: Splits, tokens: int, vocab: int, width: int, group: int = 16) -> float:
    """Until the last program is done, in blocks of columns: each takes the first multiprocessor that is free, in the
    order of the grid."""
    blocks = -(-tokens // splits.rows)
    free = [0.0] * splits.at_once
    for first in range(0, blocks, group):
        for start in range(0, vocab, width):
            columns = -(-min(width, vocab - start) // splits.columns)
            for _ in range(min(group, blocks - first)):
                heapq.heapreplace(free, free[0] + columns + PROGRAM)
    return max(free)


def idle(splits: Splits, tokens: int, vocab: int, width: int) -> float:
    """The share of the multiprocessors' time that no program uses."""
    used = -(-tokens // splits.rows) * -(-vocab // splits.columns) / splits.at_once
    return 1 - used / scheduled(splits, tokens, vocab, width)


def idle_table() -> str:
    shapes = sorted({(c.counted_tokens, c.vocab_size) for c in GPU if c.level == "hidden"} | {(1024, 151_936)})
    lines = []
    for target_name, chip in CHIPS.items():
        config = configs.resolve(TARGETS[target_name].arch, 4096, torch.bfloat16, options=False)
        splits = config.splits(config.product)
        for tokens, vocab in shapes:
            chosen = splits.width(tokens, vocab, 8192)
            lines.append((
                chip.name, f"{tokens:,} x {vocab:,}", f"{chosen:,}", f"{idle(splits, tokens, vocab, chosen):.1%}",
                f"{idle(splits, tokens, vocab, 8192):.1%}",
            ))  # fmt: skip
    return markdown_table(("GPU", "tokens x vocabulary", "columns:", "idle:", "idle, 8,192 columns:"), lines)


def traffic(case: Case, fused: bool, made: Plan) -> tuple[float, float]:
    """Bytes: of reading and writing float32 sums of gradients, which fit no cache; of logits, kept probabilities and
    gradients of logits, where nothing stays in a cache."""
    features, vocab, logits = case.hidden_size, case.vocab_size, case.tokens * case.vocab_size
    tile = 0 if fused else 8 * logits  # float32, written and read
    sums, tiles = 0.0, float(tile)
    if case.wanted:
        sums += 8 * case.tokens * features * made.vocab_tiles
    if case.mode == "frozen":  # the operand: written, read; again where forward kept it relative to other bases
        tiles += (4 + 4 * fused) * logits
    if made.one_base:  # hidden states read for bases, and scaled: once, or for each tile of the vocabulary
        times = 1 if made.hold_scaled or len(made.token_spans) == 1 else made.vocab_tiles
        sums += (4 + 4 * times) * case.tokens * features
    if case.mode == "full":
        token_tiles = len(made.token_spans)
        # dz: written, and read by two products, or kept exponentials in its place; where they are no product's operand,
        # written and read first
        tiles += 6 * logits + (0 if made.one_base else 4 * logits if made.mode == "keep" else tile)
        sums += 6 * case.tokens * features
        if token_tiles > 1:
            sums += (8 * token_tiles + 6) * vocab * features
    return sums, tiles


def logits_time(kernel: Compiled, chip: Chip, tokens: int, features: int, vocab: int) -> float:
    """Seconds of all logits by a kernel of ours, with multiprocessors that wait for the last program."""
    assert chip.sustained is not None
    config = configs.resolve(TARGETS["sm_90"].arch, features, torch.bfloat16, options=False)
    splits = config.splits(config.product)
    clock = chip.sustained / chip.flops / chip.multiprocessors
    every, _ = kernel.cycles(chip, features)
    return scheduled(splits, tokens, vocab, splits.width(tokens, vocab, 8192)) * every / clock


def times_table(kernels: dict[str, Compiled]) -> str:
    """On an H200: by the library's products alone, and by the model."""
    chip = CHIPS["sm_90"]
    assert chip.sustained is not None
    assert chip.bytes is not None
    names = (
        "tokens x features x vocabulary", "mode", "strategy", "GEMMs:", "bare GEMMs, ms:", "our products lose, ms:",
        "sums, ms:", "tiles, ms:", "ms", "ratio",
    )  # fmt: skip
    lines = []
    compared = [case for case in GPU if case.level == "hidden" and case.peers is None]  # strategies, not other tiles
    for case, peer in itertools.product(compared, CONFIGURED):
        if peer.name not in case.configurations or peer.configuration is None:
            continue
        strategy = str(peer.configuration.strategy)
        with override(arch=TARGETS["sm_90"].arch):
            plan = peer.plan(case, torch.device("cuda"))
        assert plan is not None
        mode = plan.mode if case.mode == "full" else case.mode
        bare = plan.gemms * case.gemm_flop / chip.sustained
        sums, tiles = (size / chip.bytes for size in traffic(case, strategy == "fused", plan))
        ours = [] if strategy == "tiles" else ["score"] if mode in ("score", "recompute") else [mode]
        ours += ["logits again"] * (mode == "recompute" and strategy == "fused")
        sizes = case.counted_tokens, case.hidden_size, case.vocab_size
        lost = sum(logits_time(kernels[name], chip, *sizes) - case.gemm_flop / chip.sustained for name in ours)
        least, most = bare + lost + sums, bare + lost + sums + tiles
        chosen = configs.resolve(TARGETS["sm_90"].arch, case.hidden_size, torch.bfloat16, options=False).strategy
        lines.append((
            f"{case.tokens:,} x {case.hidden_size:,} x {case.vocab_size:,}", mode,
            f"**{strategy}**" if strategy == chosen else strategy, f"{plan.gemms:.3g}", f"{1e3 * bare:.1f}",
            f"{1e3 * lost:.1f}", f"{1e3 * sums:.1f}", f"{1e3 * tiles:.1f}", f"{1e3 * least:.1f} to {1e3 * most:.1f}",
            f"{least / bare:.2f} to {most / bare:.2f}",
        ))  # fmt: skip
    return markdown_table(names, lines)


def published_table(kernels: dict[str, Compiled]) -> str:
    """Beside ours on an H200, keep: where nothing of a tile goes through memory but sums."""
    chip = CHIPS["sm_90"]
    assert chip.sustained is not None
    lines = []
    for gpu, (tokens, features, vocab), what, who, time in PUBLISHED:
        flop = 2.0 * tokens * features * vocab * (3 if "backward" in what else 1)
        ours = logits_time(kernels["keep" if "backward" in what else "score"], chip, tokens, features, vocab)
        ours += flop * 2 / 3 / chip.sustained if "backward" in what else 0
        predicted = f"{1e3 * ours:.1f}" if gpu == chip.name else ""
        lines.append((
            gpu, f"{tokens:,} x {features:,} x {vocab:,}", what, who, f"{time:.1f}", f"{flop / time / 1e9:,.0f}",
            predicted, f"{flop / ours / 1e12:,.0f}" if predicted else "",
        ))  # fmt: skip
    names = (
        "GPU", "tokens x features x vocabulary", "what", "whose", "published, ms:", "TFLOP/s:", "ours, predicted, ms:",
        "TFLOP/s:",
    )  # fmt: skip
    return markdown_table(names, lines)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "0"
    of_chips = {name: compiled(name) for name in CHIPS}
    for name, kernels in of_chips.items():
        print(f"{name} ({CHIPS[name].name}); shares of the tensor cores' peak at so many features:\n")
        print(kernels_table(name, kernels) + "\n")
    for name in CHIPS:
        print(f"{name}, warps specialised:\n")
        print(kernels_table(name, compiled(name, specialized=True)) + "\n")
    print(idle_table() + "\n")
    named = {kernel.purpose: kernel for kernel in of_chips["sm_90"]}
    print(times_table(named) + "\n")
    print(published_table(named))


if __name__ == "__main__":
    main()
