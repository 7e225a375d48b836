"""Other paths, tiles and budgets of the Triton kernels than those that the package chooses, to be measured beside.

All that the benchmarks override in dpo_kernels is in this file: `Configuration.applied` for measurements,
`plan_of_path` for predictions. Nothing else differs while a configuration is applied, so a row's number is that of a
package whose tables say the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from dpo_kernels import plan
from dpo_kernels.impls import triton_impl
from dpo_kernels.kernels import tables
from dpo_kernels.plan import FACTS, Plan
from dpo_kernels.plan import plan as plan_by_facts

if TYPE_CHECKING:
    from benchmarks.cases import Case

UNLIMITED = 2**50  # bytes: the plan takes what the shape can use


@dataclass(frozen=True)
class Configuration:
    """What differs from the tables of dpo_kernels.

    path: "fused" or "tiles"; None leaves the choice to the table.
    keeps: False where a full step recomputes every logit.
    product, rows: fields of `tables.Product` and `tables.Rows` to replace.
    tile: the plan's first, (tokens, vocabulary).
    """

    path: str | None = None
    keeps: bool = True
    product: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    tile: tuple[int, int] | None = None

    @contextlib.contextmanager
    def applied(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """For calls on the device in the dtype; afterwards the tables are as before."""
        arch = triton_impl._arch(device)
        known = f"triton, {arch.kind}"
        path, rows, facts = tables.PATHS[arch.kind], tables.ROWS[arch.kind], FACTS[known]
        products = dict(tables.PRODUCTS)
        try:
            if self.path is not None:
                tables.PATHS[arch.kind] = (tables.Path(0, 0, self.path, "asked for by a benchmark"),)
            for key, product in products.items():
                if key[0].kind == arch.kind and key[1] == dtype.itemsize:
                    tables.PRODUCTS[key] = product._replace(**self.product)
            tables.ROWS[arch.kind] = rows._replace(**self.rows)
            if self.tile is not None:
                FACTS[known] = replace(facts, tiles=(self.tile, *facts.tiles))
            yield
        finally:
            tables.PATHS[arch.kind], tables.ROWS[arch.kind], FACTS[known] = path, rows, facts
            tables.PRODUCTS.update(products)


def plan_of(case: Case, device: torch.device, impl: str | None, configuration: Configuration | None) -> Plan | None:
    """What dpo_kernels will do in a case; None where it plans nothing.

    A configuration has a budget of its own: in a full step all that the shape can use, or that without what is kept.
    """
    if case.level not in ("hidden", "dpo"):
        return None

    def under(budget: int | None) -> Plan:
        return plan(
            case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
            memory_budget=budget, device=device, impl=impl, labels=case.tokens,
        )  # fmt: skip

    if configuration is None:
        return under(case.memory_budget)
    with configuration.applied(device, case.torch_dtype):
        if case.mode != "full":
            return under(None)
        most = under(UNLIMITED)
        kept = ("kept probabilities", "hidden states, gathered and converted once")
        return under(most.bytes - (0 if configuration.keeps else sum(most.memory[name] for name in kept)))


def plan_of_path(path: str, tokens: int, features: int, vocab: int, grads: tuple[str, ...], budget: int) -> Plan:
    """Of a bfloat16 call on a CUDA device, which need not be there."""
    facts = replace(FACTS["triton, cuda"], streams=path == "fused")
    return plan_by_facts(
        tokens, features, vocab, torch.bfloat16, grads=grads, memory_budget=budget, facts=facts
    )  # fmt: skip


def chosen_path(tokens: int, features: int) -> str:
    """The table's choice on Hopper."""
    return tables.path(tables.Arch("cuda", 9), tokens, features)


def _said(replacement: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in replacement.items()) or "as in the table"


def _products(name: str, *replacements: dict[str, Any]) -> dict[str, Configuration]:
    return {f"dpo_kernels {name}, {_said(r)}": Configuration("fused", product=r) for r in replacements}


def _rows(*replacements: dict[str, int]) -> dict[str, Configuration]:
    return {f"dpo_kernels {_said(r)}": Configuration(rows=r) for r in replacements}


def _tiles(*tiles: tuple[int, int]) -> dict[str, Configuration]:
    return {f"dpo_kernels tiles, {n:,} x {v:,}": Configuration("tiles", tile=(n, v)) for n, v in tiles}


# Each by the name of its row.
TRITON = {"dpo_kernels triton": Configuration()}
PATHS = {f"dpo_kernels {path}": Configuration(path) for path in ("fused", "tiles")}
MODES = {
    f"dpo_kernels {path}, {mode}": Configuration(path, keeps=mode == "keep")
    for mode in ("keep", "recompute") for path in ("fused", "tiles")
}  # fmt: skip
PRODUCTS = _products(
    "fused", {}, {"group": 8}, {"group": 32}, {"stages": 2}, {"stages": 4}, {"depth": 128, "stages": 2},
    {"columns": 128}, {"columns": 128, "stages": 4}, {"columns": 128, "warps": 4}, {"columns": 64},
    {"columns": 128, "descriptors": False},
)  # fmt: skip
# Of a full step: writing what it keeps takes registers and shared memory.
KEEPING_PRODUCTS = _products("fused, keep", {}, {"stages": 2}, {"columns": 128}, {"columns": 128, "stages": 4})
TILES = _tiles((4096, 4096), (8192, 4096), (4096, 8192), (8192, 8192), (2048, 4096), (4096, 2048), (2048, 2048))
ROWS = _rows({}, {"columns": 2048, "warps": 4}, {"columns": 8192}, {"columns": 8192, "warps": 16}, {"warps": 4})
# For Triton's interpreter.
TINY_PRODUCTS, TINY_KEEPING_PRODUCTS = _products("fused", {}, {"group": 1}), _products("fused, keep", {})
TINY_TILES, TINY_ROWS = _tiles((64, 64)), _rows({"columns": 64})

CONFIGURATIONS = {
    **TRITON, **PATHS, **MODES, **PRODUCTS, **KEEPING_PRODUCTS, **TILES, **ROWS,
    **TINY_PRODUCTS, **TINY_KEEPING_PRODUCTS, **TINY_TILES, **TINY_ROWS,
}  # fmt: skip
