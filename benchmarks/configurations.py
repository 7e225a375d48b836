"""Other strategies, tiles and budgets of the Triton kernels than those that the package chooses, to be measured beside.

Nothing else differs while one is applied, so a row's number is that of a package whose own configurations say the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo_kernels.backends.triton import CAPABILITIES
from dpo_kernels.kernels.launch import arch_of
from dpo_kernels.overrides import override


@dataclass(frozen=True)
class Configuration:
    """What differs from `dpo_kernels.kernels.configs`.

    strategy: "fused" or "tiles"; None leaves the choice to the package.
    keeps: False where a full step recomputes every logit.
    product, rows: fields of `ProductBlocks` and `RowBlocks` to replace.
    tile: the plan's first, (tokens, vocabulary).
    one_base: False where what is kept is relative to blocks' maxima, and becomes a gradient before it is multiplied.
    """

    strategy: str | None = None
    keeps: bool = True
    product: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    tile: tuple[int, int] | None = None
    one_base: bool = True

    @contextlib.contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        kernels = {"product": self.product, "rows": self.rows} | ({"strategy": self.strategy} if self.strategy else {})
        capabilities: dict[str, Any] = {} if self.one_base else {"one_base": False}
        if self.tile:
            capabilities["tiles"] = (self.tile, *CAPABILITIES[arch_of(device).kind].tiles)
        with override(kernels=kernels, capabilities=capabilities):
            yield


def _said(replacement: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in replacement.items()) or "as chosen"


def _products(name: str, *replacements: dict[str, Any]) -> dict[str, Configuration]:
    return {f"dpo_kernels {name}, {_said(r)}": Configuration("fused", product=r) for r in replacements}


def _rows(*replacements: dict[str, int]) -> dict[str, Configuration]:
    return {f"dpo_kernels {_said(r)}": Configuration(rows=r) for r in replacements}


def _tiles(*tiles: tuple[int, int]) -> dict[str, Configuration]:
    return {f"dpo_kernels tiles, {n:,} x {v:,}": Configuration("tiles", tile=(n, v)) for n, v in tiles}


_BY_BLOCKS = {"dpo_kernels fused, keep by blocks": Configuration("fused", one_base=False)}

# By what a case compares; each by the name of its row. Those for Triton's interpreter prove the code.
TABLES: dict[str, dict[str, Configuration]] = {
    "triton": {"dpo_kernels triton": Configuration()},
    "strategies": {f"dpo_kernels {name}": Configuration(name) for name in ("tiles", "fused")},
    "modes": {
        f"dpo_kernels {name}, {mode}": Configuration(name, keeps=mode == "keep")
        for mode in ("keep", "recompute") for name in ("tiles", "fused")
    },
    "products": _products(
        "fused", {}, {"group": 8}, {"group": 32}, {"stages": 2}, {"stages": 4}, {"block_k": 128, "stages": 2},
        {"block_n": 128}, {"block_n": 128, "stages": 4}, {"block_n": 128, "warps": 4}, {"block_n": 64},
        {"block_n": 128, "descriptors": False}, {"specialized": True}, {"block_n": 128, "specialized": True},
    ),
    # Of a full step: writing what it keeps takes registers and shared memory.
    "products that keep": _products(
        "fused, keep", {}, {"stages": 2}, {"block_n": 128}, {"block_n": 128, "stages": 4}, {"specialized": True},
        {"block_n": 128, "specialized": True},
    ) | _BY_BLOCKS,
    "tiles": _tiles(
        (4096, 4096), (8192, 4096), (4096, 8192), (8192, 8192), (2048, 4096), (4096, 2048), (2048, 2048)
    ),
    "rows": _rows({}, {"block_n": 2048, "warps": 4}, {"block_n": 8192}, {"block_n": 8192, "warps": 16}, {"warps": 4}),
    "tiny products": _products("fused", {}, {"group": 1}),
    "tiny products that keep": _products("fused, keep", {}) | _BY_BLOCKS,
    "tiny tiles": _tiles((64, 64)),
    "tiny rows": _rows({"block_n": 64}),
}  # fmt: skip
CONFIGURATIONS = {name: configuration for table in TABLES.values() for name, configuration in table.items()}
