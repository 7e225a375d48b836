"""Pure: which path runs where, and with what tiles. Everything that a device class decides is a row in here.

A row says what it rests on. None of them was measured on its device yet: they come from the traffic models beside the
kernels and from what the compiler makes of each tile (`pytest -m aot`: registers, spills, shared memory), and
`benchmarks/gpu.sh` measures both paths of every shape. Nothing here looks at the number of tokens but the choice of
the path and the width of a strip, which are no compile-time constants: no shape compiles a kernel anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

WAITS = "waits for a measurement"


class Arch(NamedTuple):
    """A class of devices. kind: "cuda", "hip" or "interpreted"; major: of the compute capability (gfx942 is 9)."""

    kind: str
    major: int


class Product(NamedTuple):
    """How a kernel of fused.py multiplies: a block is (rows, depth) x (columns, depth)."""

    rows: int
    columns: int
    depth: int
    group: int  # blocks of rows that run together
    warps: int
    stages: int
    descriptors: bool = False
    precision: str = "ieee"  # of float32 operands


class Rows(NamedTuple):
    """How much a program of rows.py takes at once."""

    rows: int
    columns: int
    warps: int


# By device class, bytes of an operand, and kind of call: "plain" (log-probs alone), "options" (a bias, a cap or
# statistics, which take registers; "plain" serves where there is none). The last row of a kind of device serves its
# later ones. Three products of TF32 parts ("tf32x3") come near float32 and run on tensor cores. All of them compile
# without spills by triton 3.6 and 3.7, which larger blocks do not.
PRODUCTS = {
    (Arch("cuda", 8), 2, "plain"): Product(128, 128, 64, 16, 8, 3),
    (Arch("cuda", 8), 2, "options"): Product(128, 64, 64, 16, 8, 3),
    (Arch("cuda", 8), 4, "plain"): Product(128, 64, 32, 16, 8, 3, precision="tf32x3"),
    (Arch("cuda", 9), 2, "plain"): Product(128, 256, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 9), 2, "options"): Product(128, 128, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 9), 4, "plain"): Product(128, 128, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 9), 4, "options"): Product(128, 64, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 10), 2, "plain"): Product(128, 128, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 10), 2, "options"): Product(128, 64, 64, 16, 8, 3, descriptors=True),
    (Arch("cuda", 10), 4, "plain"): Product(128, 128, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 10), 4, "options"): Product(128, 64, 32, 16, 8, 3, descriptors=True, precision="tf32x3"),
    (Arch("cuda", 12), 2, "plain"): Product(128, 64, 64, 16, 8, 3),
    (Arch("cuda", 12), 4, "plain"): Product(128, 64, 16, 16, 8, 3, precision="tf32x3"),
    (Arch("hip", 9), 2, "plain"): Product(128, 128, 64, 8, 8, 2),
    (Arch("hip", 9), 4, "plain"): Product(128, 128, 32, 8, 8, 2),
    (Arch("interpreted", 0), 2, "plain"): Product(64, 64, 32, 2, 4, 1),
    (Arch("interpreted", 0), 4, "plain"): Product(64, 64, 32, 2, 4, 1, descriptors=True),
    (Arch("interpreted", 0), 4, "options"): Product(64, 64, 32, 2, 4, 1),
}

ROWS = {
    "cuda": Rows(1, 4096, 8),
    "hip": Rows(1, 4096, 8),
    "interpreted": Rows(64, 512, 4),
}


class Path(NamedTuple):
    """From which number of tokens and of features on, the others being 0 and up, and what runs there.

    fused: logits are folded in the kernel that makes them. tiles: cuBLAS makes a tile in float32, a kernel folds it.
    """

    tokens: int
    features: int
    name: str
    because: str


PATHS = {
    "cuda": (Path(0, 0, "fused", f"no float32 tile, and kept tokens of any number: model, {WAITS}"),),
    "hip": (Path(0, 0, "fused", f"no float32 tile, and no L2 cache to hold one: model, {WAITS}"),),
    "interpreted": (Path(0, 0, "fused", "the path with the most kernels; tests force either"),),
}

PROGRAMS = 512  # that fill a device a few times over
WIDEST_STRIP = 8192


def product(arch: Arch, dtype: torch.dtype, options: bool) -> Product:
    """options: a bias, a cap or statistics."""
    arch = max(a for a, _, _ in PRODUCTS if a.kind == arch.kind and a.major <= arch.major)
    plain = PRODUCTS[arch, dtype.itemsize, "plain"]
    return PRODUCTS.get((arch, dtype.itemsize, "options"), plain) if options else plain


def path(arch: Arch, tokens: int, features: int) -> str:
    """The fused kernels read 16 bytes at a time: rows that do not start on a multiple of 16 numbers go to cuBLAS."""
    if features % 16:
        return "tiles"
    return next(p.name for p in PATHS[arch.kind] if tokens >= p.tokens and features >= p.features)


def strip(block_rows: int, columns: int, tokens: int, vocab_size: int, widest: int) -> int:
    """Columns of a strip, `columns` times a power of two: as wide as may be with enough programs at work."""
    rows = -(-max(tokens, 1) // block_rows)
    width = columns
    while 2 * width <= min(widest, WIDEST_STRIP) and rows * (vocab_size // (2 * width)) >= PROGRAMS:
        width *= 2
    return width
