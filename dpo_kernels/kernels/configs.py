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

from dpo_kernels.splits import Splits
from dpo_kernels.statistics import SoftmaxState

STATE_BYTES = 4 * len(SoftmaxState._fields)  # kernels/softmax_state.py


class Arch(NamedTuple):
    """A class of devices. kind: "cuda", "hip" or "interpreted"; major: of the compute capability (gfx942 is 9)."""

    kind: str
    major: int


class ProductBlocks(NamedTuple):
    """How a kernel of fused.py multiplies: a block is (BLOCK_M, BLOCK_K) x (BLOCK_N, BLOCK_K).

    specialized: forward has warps of their own load and multiply the next block while others accumulate the last: of
    plain calls on compute capability 9 (kernels/hopper.py), and from 10 on. No row says so: it waits for a measurement
    (`benchmarks/gpu.sh` takes one).
    """

    block_m: int
    block_n: int
    block_k: int
    group: int  # blocks of tokens that run together
    warps: int
    stages: int
    descriptors: bool = False
    precision: str = "ieee"  # of float32 operands
    specialized: bool = False


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
    at_once: programs of a product's kernel that the device is taken to run at a time, one on each of its
        multiprocessors. It decides how the vocabulary is split among them.
    sums: the blocks of products of what a filter leaves.
    either: the blocks of products with these operands, with options and without: a plan counts on both, since it need
        not know of a bias.
    """

    arch: Arch
    strategy: str
    product: ProductBlocks
    rows: RowBlocks
    at_once: int
    sums: ProductBlocks
    either: tuple[ProductBlocks, ...] = ()
    widest_split: int = 8192

    def splits(self, block: ProductBlocks | RowBlocks) -> Splits:
        """Of the vocabulary among programs of a kernel that takes these blocks."""
        together = self.at_once * (1 if isinstance(block, ProductBlocks) else ROWS_AT_ONCE)
        return Splits(block.block_m, block.block_n, together, self.widest_split, STATE_BYTES)


# By device class, bytes of an operand, and kind of call: "plain" (log-probs alone), "options" (a bias, a cap or
# statistics, which take registers; "plain" serves where there is none). The last row of a kind of device serves its
# later ones. Three products of TF32 parts ("tf32x3") come near float32 and run on tensor cores. All of them compile
# without spills by triton 3.6 and 3.7, which larger blocks do not (but for what tests/aot.py knows).
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

# Of `columns.sum_kernel`, by device class and bytes of an operand (waits for a measurement).
SUMS = {
    (Arch("cuda", 8), 2): ProductBlocks(128, 64, 64, 1, 8, 3),
    (Arch("cuda", 8), 4): ProductBlocks(64, 64, 32, 1, 4, 3, precision="tf32x3"),
    (Arch("cuda", 9), 2): ProductBlocks(128, 128, 64, 1, 8, 3),
    (Arch("cuda", 9), 4): ProductBlocks(64, 64, 32, 1, 4, 3, precision="tf32x3"),
    (Arch("cuda", 12), 2): ProductBlocks(128, 128, 32, 1, 8, 3),
    (Arch("hip", 9), 2): ProductBlocks(128, 128, 32, 1, 8, 2),
    (Arch("hip", 9), 4): ProductBlocks(64, 64, 32, 1, 4, 2),
    (Arch("interpreted", 0), 2): ProductBlocks(64, 64, 32, 1, 4, 1),
    (Arch("interpreted", 0), 4): ProductBlocks(64, 64, 64, 1, 4, 1),
}

ROWS = {
    "cuda": RowBlocks(1, 4096, 8),
    "hip": RowBlocks(1, 4096, 8),
    "interpreted": RowBlocks(64, 512, 4),
}

# Of A100, H200, B200, RTX PRO 6000 and MI300X, whatever the device of their class: then all of a class get the same
# bits. In the interpreter few, so that small vocabularies are split too.
MULTIPROCESSORS = {
    Arch("cuda", 8): 108, Arch("cuda", 9): 132, Arch("cuda", 10): 148, Arch("cuda", 12): 188, Arch("hip", 9): 304,
    Arch("interpreted", 0): 8,
}  # fmt: skip
ROWS_AT_ONCE = 8  # programs of logits.py on a multiprocessor

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
    replaced = changes.pop("product", {})
    product = product_blocks(arch, operand, options)._replace(**replaced)
    rows = ROWS[arch.kind]._replace(**changes.pop("rows", {}))
    strategy = changes.pop("strategy", "tiles" if features % 16 else STRATEGIES[arch.kind])
    if strategy not in ("fused", "tiles"):
        raise ValueError(f"strategy is {strategy!r}; expected 'fused' or 'tiles'")
    either = (product, product_blocks(arch, operand, not options)._replace(**replaced))
    sums = sum_blocks(arch, operand)._replace(**changes.pop("sums", {}))
    return replace(KernelConfig(arch, strategy, product, rows, multiprocessors(arch), sums, either), **changes)


def multiprocessors(arch: Arch) -> int:
    return MULTIPROCESSORS[max(a for a in MULTIPROCESSORS if a.kind == arch.kind and a.major <= arch.major)]


def sum_blocks(arch: Arch, operand: torch.dtype) -> ProductBlocks:
    """How products of columns that stay are multiplied."""
    known = [a for a, size in SUMS if (a.kind, size) == (arch.kind, operand.itemsize) and a.major <= arch.major]
    return SUMS[max(known), operand.itemsize]


def product_blocks(arch: Arch, operand: torch.dtype, options: bool) -> ProductBlocks:
    """Decided by the call alone, not by tile or mode: whoever scores the same call gets the same bits."""
    arch = max(a for a, _, _ in PRODUCTS if a.kind == arch.kind and a.major <= arch.major)
    plain = PRODUCTS[arch, operand.itemsize, "plain"]
    return PRODUCTS.get((arch, operand.itemsize, "options"), plain) if options else plain
