"""What a step should cost on an H200 by its products and its traffic: predictions, not measurements.

    python -m benchmarks.predict        a Markdown table of every mode and strategy at the sizes of benchmarks/gpu.sh

Products run at 780 TFLOP/s and bytes at 4.3 TB/s, what cuBLAS and a copy sustain there. Two bounds: tiles of logits and
of their gradients stay in the L2 cache and cost nothing, or all of them go through memory.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.cases import GPU, Case
from benchmarks.peers import CONFIGURED
from benchmarks.results import markdown_table
from dpo_kernels.kernels.configs import Arch, resolve
from dpo_kernels.overrides import override
from dpo_kernels.planner import Plan

HOPPER = Arch("cuda", 9)
FLOPS, BYTES = 780e12, 4.3e12


def predict(case: Case, fused: bool, made: Plan) -> tuple[float, float, float]:
    """Milliseconds: of all GEMMs of the mode; of reading and writing float32 sums of gradients, which fit no cache; of
    logits, kept probabilities and gradients of logits, where nothing stays in a cache."""
    features, vocab, logits = case.hidden_size, case.vocab_size, case.tokens * case.vocab_size
    tile = 0 if fused else 8 * logits  # float32, written and read
    sums, tiles = 0.0, float(tile)
    if case.wanted:
        sums += 8 * case.tokens * features * made.vocab_tiles
    if case.mode == "frozen":  # the operand: written, read; again where forward kept it relative to other bases
        tiles += (4 + 4 * fused) * logits
    if case.mode == "full":
        token_tiles = len(made.token_spans)
        # dz: written, and read by two products; kept probabilities: written, read
        tiles += 6 * logits + (4 * logits if made.mode == "keep" else tile)
        sums += 6 * case.tokens * features
        if token_tiles > 1:
            sums += (8 * token_tiles + 6) * vocab * features
    return 1e3 * made.gemms * case.gemm_flop / FLOPS, 1e3 * sums / BYTES, 1e3 * tiles / BYTES


def table() -> str:
    names = (
        "tokens x features x vocabulary", "mode", "strategy", "GEMMs:", "bare GEMMs, ms:", "sums, ms:", "tiles, ms:",
        "ratio",
    )  # fmt: skip
    lines = []
    compared = [case for case in GPU if case.level == "hidden" and case.peers is None]  # strategies, not other tiles
    for case, peer in itertools.product(compared, CONFIGURED):
        if peer.name in case.configurations and peer.configuration is not None:
            strategy = str(peer.configuration.strategy)
            plan = peer.plan(case, torch.device("cuda"))
            assert plan is not None
            bare, sums, tiles = predict(case, strategy == "fused", plan)
            chosen = resolve(HOPPER, case.hidden_size, torch.bfloat16, options=False).strategy
            lines.append((
                f"{case.tokens:,} x {case.hidden_size:,} x {case.vocab_size:,}",
                plan.mode if case.mode == "full" else case.mode,
                f"**{strategy}**" if strategy == chosen else strategy, f"{plan.gemms:.3g}",
                f"{bare:.1f}", f"{sums:.1f}", f"{tiles:.1f}",
                f"{1 + sums / bare:.2f} to {1 + (sums + tiles) / bare:.2f}",
            ))  # fmt: skip
    return markdown_table(names, lines)


if __name__ == "__main__":
    with override(arch=HOPPER):
        print(table())
