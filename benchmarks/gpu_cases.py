"""What `benchmarks.gpu` measures: shapes of real heads, and the ways that dpo_kernels can take on each of them.

A way is planted into the tables of `dpo_kernels` while a step runs and taken out again; nothing else about the package
changes, so the number of a row is the number of a package whose tables say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.cases import Case
from dpo_kernels import plan
from dpo_kernels.impls import triton_impl
from dpo_kernels.kernels import tables
from dpo_kernels.plan import FACTS, Plan

UNLIMITED = 2**50  # bytes: the plan takes what the shape can use


@dataclass(frozen=True)
class Way:
    """One way to run a case.

    name: what follows "dpo_kernels" in the row's name.
    path: "fused" or "tiles"; None leaves the choice to the table.
    keeps: False where a full step recomputes every logit.
    product: fields of `tables.Product` to replace. rows: of `tables.Rows`. tile: the plan's first,
        (tokens, vocabulary).
    """

    name: str = ""
    path: str | None = None
    keeps: bool = True
    product: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    tile: tuple[int, int] | None = None

    @property
    def peer(self) -> str:
        return f"dpo_kernels {self.name}".strip()

    @contextlib.contextmanager
    def planted(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """The tables of this way, for calls on the device in the dtype."""
        arch = triton_impl._arch(device)
        known, paths, rows = f"triton, {arch.kind}", tables.PATHS[arch.kind], tables.ROWS[arch.kind]
        products, facts = dict(tables.PRODUCTS), FACTS[known]
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
            tables.PATHS[arch.kind], tables.ROWS[arch.kind], FACTS[known] = paths, rows, facts
            tables.PRODUCTS.update(products)

    def plan(self, case: Case, device: torch.device) -> Plan | None:
        """What dpo_kernels will do while this way is planted; None at the logits level, which has no plan."""
        if case.level == "logits":
            return None

        def of(budget: int | None) -> Plan:
            return plan(
                case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
                memory_budget=budget, device=device, impl="triton", labels=case.tokens,
            )  # fmt: skip

        if case.mode != "full":
            return of(None)
        most = of(UNLIMITED)
        kept = ("kept probabilities", "hidden states, gathered and converted once")
        return of(most.bytes - (0 if self.keeps else sum(most.memory[name] for name in kept)))


@dataclass(frozen=True)
class Contest:
    """A case, the ways of ours and the peers that meet in it. needs: seconds that it should have, to be started."""

    case: Case
    ways: tuple[Way, ...]
    peers: tuple[str, ...] = ()
    needs: float = 10.0
    min_rounds: int = 5


PATHS = tuple(Way(path, path) for path in ("fused", "tiles"))
FULL_PATHS = tuple(
    Way(f"{path}, {'keep' if keeps else 'recompute'}", path, keeps)
    for keeps in (True, False) for path in ("fused", "tiles")
)  # fmt: skip

# Those that compile for a minute a shape, or say nothing new on a GPU, are left to `pytest benchmarks/ --size real`.
PEERS_AT_HIDDEN = (
    "Liger fused linear cross entropy", "Liger scaled cross entropy", "CCE exact", "CCE default",
    "TRL ChunkedLogProbFunction", "torch F.linear_cross_entropy", "torch F.linear_cross_entropy, chunked",
    "quack linear cross entropy", "plain PyTorch",
)  # fmt: skip
PEERS_AT_LOGITS = (
    "Liger cross entropy", "TRL selective_log_softmax", "torch F.cross_entropy", "quack cross entropy", "plain PyTorch",
)  # fmt: skip

# Tried at the first shape on the forward, each beside the table's own row (the one without a replacement).
PRODUCTS: tuple[dict[str, Any], ...] = (
    {},
    {"group": 8},
    {"group": 32},
    {"stages": 2},
    {"stages": 4},
    {"depth": 128, "stages": 2},
    {"columns": 128},
    {"columns": 128, "stages": 4},
    {"columns": 128, "warps": 4},
    {"columns": 64},
    {"columns": 128, "descriptors": False},
)
# And on the full step that keeps: writing what it keeps takes registers and shared memory.
KEEPING_PRODUCTS: tuple[dict[str, Any], ...] = (
    {},
    {"stages": 2},
    {"columns": 128},
    {"columns": 128, "stages": 4},
)
TILES = ((4096, 4096), (8192, 4096), (4096, 8192), (8192, 8192), (2048, 4096), (4096, 2048), (2048, 2048))
ROWS: tuple[dict[str, int], ...] = (
    {},
    {"columns": 2048, "warps": 4},
    {"columns": 8192},
    {"columns": 8192, "warps": 16},
    {"warps": 4},
)


def _said(replacement: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in replacement.items()) or "as in the table"


def _at(name: str, level: str, mode: str, shape: tuple[int, int, int], dtype: str) -> Case:
    return Case(f"{name}-{mode}", level, mode, *shape, dtype)


def _shape(name: str, shape: tuple[int, int, int], dtype: str, peers: tuple[str, ...], **options: Any) -> list[Contest]:
    return [
        Contest(_at(name, "hidden", mode, shape, dtype), FULL_PATHS if mode == "full" else PATHS, peers, **options)
        for mode in ("score", "frozen", "full")
    ]


def _logits(shape: tuple[int, int, int], dtype: str, peers: tuple[str, ...]) -> list[Contest]:
    return [Contest(_at("logits", "logits", mode, shape, dtype), (Way(),), peers) for mode in ("score", "full")]


def _alternatives(
    hidden: tuple[int, int, int], logits: tuple[int, int, int], dtype: str, products: tuple[dict[str, Any], ...],
    keeping: tuple[dict[str, Any], ...],
    tiles: tuple[tuple[int, int], ...], rows: tuple[dict[str, int], ...],
) -> list[Contest]:  # fmt: skip
    return [
        Contest(_at("products", "hidden", "score", hidden, dtype),
                tuple(Way(f"fused, {_said(p)}", "fused", product=p) for p in products), min_rounds=3),
        Contest(_at("products", "hidden", "full", hidden, dtype),
                tuple(Way(f"fused, keep, {_said(p)}", "fused", product=p) for p in keeping), min_rounds=3),
        Contest(_at("tiles", "hidden", "score", hidden, dtype),
                tuple(Way(f"tiles, {n:,} x {v:,}", "tiles", tile=(n, v)) for n, v in tiles), min_rounds=3),
        *(Contest(_at("rows", "logits", mode, logits, dtype), tuple(Way(_said(r), rows=r) for r in rows), min_rounds=3)
          for mode in ("score", "full")),
    ]  # fmt: skip


def contests() -> list[Contest]:
    """The most telling first: what time leaves out are the last ones."""
    first, logits = (8192, 4096, 151_936), (8192, 64, 151_936)
    return [
        *_shape("8k-152k", first, "bfloat16", PEERS_AT_HIDDEN, needs=20.0),
        *_logits(logits, "bfloat16", PEERS_AT_LOGITS),
        *_shape("4k-128k", (4096, 4096, 128_256), "bfloat16", PEERS_AT_HIDDEN),
        *_alternatives(first, logits, "bfloat16", PRODUCTS, KEEPING_PRODUCTS, TILES, ROWS),
        *_shape("16k-248k", (16_384, 2048, 248_320), "bfloat16", PEERS_AT_HIDDEN, needs=20.0),
        *_shape("131k-128k", (131_072, 4096, 128_256), "bfloat16", PEERS_AT_HIDDEN, needs=30.0, min_rounds=2),
    ]


def tiny_contests() -> list[Contest]:
    """The same kinds of contest for Triton's interpreter: they prove the code and time nothing."""
    shape, peers = (64, 32, 320), ("plain PyTorch", "quack linear cross entropy")
    return [
        *_shape("tiny", shape, "bfloat16", peers, needs=0.0, min_rounds=1),
        *_logits(shape, "bfloat16", ("plain PyTorch",)),
        *_alternatives(shape, shape, "bfloat16", ({}, {"group": 1}), ({},), ((64, 64),), ({"columns": 64},)),
    ]
