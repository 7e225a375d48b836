"""What a step should cost on an H200 by its products and its traffic: predictions, not measurements.

    python -m benchmarks.predict        a Markdown table of every mode and strategy at the sizes of benchmarks/gpu.sh

Products run at 780 TFLOP/s and bytes at 4.3 TB/s, what cuBLAS and a copy sustain there. Two bounds: tiles of logits and
of their gradients stay in the L2 cache and cost nothing, or all of them go through memory.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.cases import GPU
from benchmarks.peers import UNLIMITED
from benchmarks.results import markdown_table
from dpo_kernels import plan
from dpo_kernels.kernels.configs import Arch, resolve
from dpo_kernels.overrides import override

HOPPER = Arch("cuda", 9)
FLOPS, BYTES = 780e12, 4.3e12
# Of the cases that compare strategies, and not other tiles.
SHAPES = tuple(
    dict.fromkeys((c.tokens, c.hidden_size, c.vocab_size) for c in GPU if c.level == "hidden" and c.peers is None)
)
MODES = {"score": (), "frozen": ("hidden",), "keep": ("hidden", "weight"), "recompute": ("hidden", "weight")}


class Prediction(NamedTuple):
    """Milliseconds. products: all GEMMs of the mode alone; sums: reading and writing float32 sums of gradients, which
    fit no cache; tiles: logits, kept probabilities and gradients of logits, where nothing stays in a cache."""

    gemms: float
    products: float
    sums: float
    tiles: float

    def ratio(self, tiles: float) -> float:
        return 1 + (self.sums + tiles) / self.products


def predict(tokens: int, features: int, vocab: int, mode: str, strategy: str) -> Prediction:
    call = partial(plan, tokens, features, vocab, torch.bfloat16, grads=MODES[mode], impl="triton")
    with override(arch=HOPPER, kernels={"strategy": strategy}):
        made = call(memory_budget=UNLIMITED)
        if mode == "recompute":  # all that the same tiles need, and nothing for what could be kept
            made = call(memory_budget=made.bytes - made.memory["kept probabilities"])
    logits = tokens * vocab
    tile = 0 if strategy == "fused" else 8 * logits  # float32, written and read
    sums, tiles = 0.0, float(tile)
    if mode == "frozen":  # the operand: written, read; again where forward kept it relative to other bases
        tiles += (4 + 4 * (strategy == "fused")) * logits
        sums += 8 * tokens * features * made.vocab_tiles
    if mode in ("keep", "recompute"):
        token_tiles = len(made.token_spans)
        # dz: written, and read by two products; kept probabilities: written, read
        tiles += 6 * logits + (4 * logits if mode == "keep" else tile)
        sums += 8 * tokens * features * made.vocab_tiles + 6 * tokens * features
        if token_tiles > 1:
            sums += (8 * token_tiles + 6) * vocab * features
    products = made.gemms * 2 * tokens * features * vocab / FLOPS
    return Prediction(made.gemms, 1e3 * products, 1e3 * sums / BYTES, 1e3 * tiles / BYTES)


def table() -> str:
    names = (
        "tokens x features x vocabulary", "mode", "strategy", "GEMMs:", "bare GEMMs, ms:", "sums, ms:", "tiles, ms:",
        "ratio",
    )  # fmt: skip
    chosen = {shape: resolve(HOPPER, shape[1], torch.bfloat16, options=False).strategy for shape in SHAPES}
    lines = []
    for shape, mode, strategy in itertools.product(SHAPES, MODES, ("tiles", "fused")):
        made = predict(*shape, mode, strategy)
        lines.append((
            " x ".join(f"{size:,}" for size in shape), mode,
            f"**{strategy}**" if strategy == chosen[shape] else strategy, f"{made.gemms:.3g}",
            f"{made.products:.1f}", f"{made.sums:.1f}", f"{made.tiles:.1f}",
            f"{made.ratio(tiles=0):.2f} to {made.ratio(made.tiles):.2f}",
        ))  # fmt: skip
    return markdown_table(names, lines)


if __name__ == "__main__":
    print(table())
