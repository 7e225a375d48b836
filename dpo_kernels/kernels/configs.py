"""Pure: what runs where, and with what blocks. Everything that a class of devices decides is a row in here.

A call resolves to one `KernelConfig`, a value that forward uses and hands to backward. No row was measured on its
device yet: rows come from the traffic models beside the kernels and from what the compiler makes of each block
(`pytest -m aot`: registers, spills, shared memory), and `benchmarks/gpu.sh` measures both strategies of every shape.
Nothing here looks at the number of tokens but the width of a split, which is no compile-time constant: no shape
compiles a kernel anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


class Arch(NamedTuple):
    """A class of devices. kind: "cuda", "hip" or "interpreted"; major: of the compute capability (gfx942 is 9)."""

    kind: str
    major: int


class ProductBlocks(NamedTuple):
    """How a kernel of fused.py multiplies: a block is (BLOCK_M, BLOCK_K) x (BLOCK_N, BLOCK_K)."""

    block_m: int
    block_n: int
    block_k: int
    group: int  # blocks of tokens that run together
    warps: int
    stages: int
    descriptors: bool = False
    precision: str = "ieee"  # of float32 operands


class RowBlocks(NamedTuple):
    """How much a program of logits.py takes at once."""

    block_m: int
    block_n: int
    warps: int


@dataclass(frozen=True)
class KernelConfig:
    """What a call's kernels are.

    strategy: "fused" (the kernel that makes a block of logits accumulates it) or "tiles" (cuBLAS makes a tile of logits
        in float32, a kernel accumulates it).
    programs: the vocabulary is split until so many programs are at work; they fill a device a few times over.
    """

    arch: Arch
    strategy: str
    product: ProductBlocks
    rows: RowBlocks
    programs: int = 512
    widest_split: int = 8192

    def split(self, block: ProductBlocks | RowBlocks, tokens: int, vocab_size: int, widest: int) -> int:
        """Vocabulary entries that one program walks, `block_n` times a power of two: as many as may be with enough
        programs at work. Of the whole call: then neither tiles nor modes move the places where sums are cut."""
        blocks = -(-max(tokens, 1) // block.block_m)
        width = block.block_n
        while 2 * width <= min(widest, self.widest_split) and blocks * (vocab_size // (2 * width)) >= self.programs:
            width *= 2
        return width


# By device class, bytes of an operand, and kind of call: "plain" (log-probs alone), "options" (a bias, a cap or
# statistics, which take registers; "plain" serves where there is none). The last row of a kind of device serves its
# later ones. Three products of TF32 parts ("tf32x3") come near float32 and run on tensor cores. All of them compile
# without spills by triton 3.6 and 3.7, which larger blocks do not.
PRODUCTS = {
    (Arch("cuda", 8), 2, "plain"): ProductBlocks(128, 128, 64, 16, 8, 3),
    (Arch("cuda", 8), 2, "options"): ProductBlocks(128, 64, 64, 16, 8, 3),
    (Arch("cuda", 8), 4, "plain"): ProductBlocks(128, 64, 32, 16, 8, 3, precision="tf32x3"),
    (Arch("cuda", 9), 2, "plain"): ProductBlocks(128, 256, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 9), 2, "options"): ProductBlocks(128, 128, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 9), 4, "plain"): ProductBlocks(128, 128, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 9), 4, "options"): ProductBlocks(128, 64, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 10), 2, "plain"): ProductBlocks(128, 128, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 10), 2, "options"): ProductBlocks(128, 64, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 10), 4, "plain"): ProductBlocks(128, 128, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 10), 4, "options"): ProductBlocks(128, 64, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 12), 2, "plain"): ProductBlocks(128, 64, 64, 16, 8, 3),
    (Arch("cuda", 12), 4, "plain"): ProductBlocks(128, 64, 16, 16, 8, 3, precision="tf32x3"),
    (Arch("hip", 9), 2, "plain"): ProductBlocks(128, 128, 64, 8, 8, 2),
    (Arch("hip", 9), 4, "plain"): ProductBlocks(128, 128, 32, 8, 8, 2),
    (Arch("interpreted", 0), 2, "plain"): ProductBlocks(64, 64, 32, 2, 4, 1),
    (Arch("interpreted", 0), 4, "plain"): ProductBlocks(64, 64, 32, 2, 4, 1, descriptors=True),
    (Arch("interpreted", 0), 4, "options"): ProductBlocks(64, 64, 32, 2, 4, 1),
}

ROWS = {
    "cuda": RowBlocks(1, 4096, 8),
    "hip": RowBlocks(1, 4096, 8),
    "interpreted": RowBlocks(64, 512, 4),
}

# "fused" holds no float32 tile, and saves any number of tokens. A traffic model says that it is faster, more clearly on
# "hip", where no L2 cache could hold a tile. It waits for a measurement.
STRATEGIES = {"cuda": "fused", "hip": "fused", "interpreted": "fused"}


def resolve(
    arch: Arch, features: int, operand: torch.dtype, options: bool, changes: Mapping[str, Any] | None = None
) -> KernelConfig:
    """options: a bias, a cap or statistics. changes: `Overrides.kernels`.

    The fused kernels read 16 bytes at a time: rows that do not start on a multiple of 16 numbers go to cuBLAS, unless
    the strategy is asked for (the fused kernels are right there too).

    Raises:
        ValueError: a strategy that does not exist.
        TypeError: a field that does not exist.
    """
    changes = dict(changes or {})
    product = product_blocks(arch, operand, options)._replace(**changes.pop("product", {}))
    rows = ROWS[arch.kind]._replace(**changes.pop("rows", {}))
    strategy = changes.pop("strategy", "tiles" if features % 16 else STRATEGIES[arch.kind])
    if strategy not in ("fused", "tiles"):
        raise ValueError(f"strategy is {strategy!r}; expected 'fused' or 'tiles'")
    return replace(KernelConfig(arch, strategy, product, rows), **changes)


def product_blocks(arch: Arch, operand: torch.dtype, options: bool) -> ProductBlocks:
    """Decided by the call alone, not by tile or mode: whoever scores the same call gets the same bits."""
    arch = max(a for a, _, _ in PRODUCTS if a.kind == arch.kind and a.major <= arch.major)
    plain = PRODUCTS[arch, operand.itemsize, "plain"]
    return PRODUCTS.get((arch, operand.itemsize, "options"), plain) if options else plain
