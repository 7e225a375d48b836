"""Tiles of Triton's back end: what both strategies share, and the strategy "tiles", in which cuBLAS multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.backends.base import Execution, Product, SavedTile, Tile
from dpo_kernels.backends.pytorch import library_multiply, multiply_each
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.call import DTYPE_NAMES, Call, TokenGrads, Transform
from dpo_kernels.kernels import launch
from dpo_kernels.kernels.configs import KernelConfig
from dpo_kernels.layout import rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished
from dpo_kernels.workload import aligned

# The frozen head's sum is rescaled where the maximum has grown by more than this; exp of it fits float16 20 times.
SHARE_TOLERANCE = 8.0


class TritonTileOps:
    """What both strategies share; see `dpo_kernels.backends.base.TileOps` for what each method does."""

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        self.call, self.plan = call, plan
        self.config: KernelConfig = execution.configuration
        self.rounds, self.tallest = execution.capabilities.rounds, execution.capabilities.tiles[0][0]
        self.operand = self.weight_dtype = execution.operand(call.compute_dtype)
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self.call.hidden.new_empty((rows, columns), dtype=dtype)

    def new_state(self, labels: Tensor) -> TritonState:
        waits = self.call.label_count <= self.tallest
        return TritonState(labels, self.call.vocab_size, self.call.outputs, waits)

    def accumulate(self, state: TritonState, tile: Tile, saved: SavedTile | None) -> None:
        raise NotImplementedError

    def accumulate_jacobian(self, state: TritonState, tile: Tile, total: Tensor) -> None:
        raise NotImplementedError

    def finish_jacobian(
        self, state: TritonState, rows: slice, done: Finished, total: Tensor, label_weight: Callable[[], Tensor]
    ) -> None:
        """In one kernel, which reads the labels' rows of W where they are."""
        (n, features), block = total.shape, self.config.rows
        weight, transform, compute = self.call.weight, self.call.transform, self.call.compute_dtype
        launch.run(
            "finish", "jacobian_kernel", -(-n // block.block_m) * -(-features // block.block_n), block.warps,
            total=total, states=state.tensor, share_base=state.share_base(rows), log_probs=done.stats.log_probs,
            others=done.others, label_logits=done.label_logit, labels=rows_of(state.labels, rows), weight=weight, n=n,
            M=state.tensor.shape[1], row=rows.start, V=len(weight), D=features, total_stride=total.stride(0),
            weight_stride=weight.stride(0), weight_step=weight.stride(1),
            to_cap=0.0 if transform.softcap is None else transform.temperature / transform.softcap,
            slope=transform.slope, CAPPED=transform.softcap is not None,
            ROUND="" if weight.dtype == compute else DTYPE_NAMES[compute], BLOCK_M=block.block_m, BLOCK_N=block.block_n,
        )  # fmt: skip

    def gradient_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        dz = self._recompute(grads, tile) if saved is None else self._from_saved(grads, saved, tile)
        self._add_products(dz, products, bias)

    def _add_products(self, dz: Tensor, products: Sequence[Product], bias: Tensor | None) -> None:
        if bias is not None:
            bias += dz.sum(0, dtype=bias.dtype)
        multiply_each(self, dz, products)

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        library_multiply(out, a, b, add)

    def _recompute(self, grads: TokenGrads, tile: Tile) -> Tensor:
        """d loss / d a (n, v) from logits that are made again."""
        raise NotImplementedError

    def _maxima_columns(self) -> int:
        """How many vocabulary entries share a block maximum: as many as forward takes at once."""
        raise NotImplementedError

    def _maxima(self) -> dict[str, int]:
        """SLOTS: how many of the plan's slots for block maxima that is."""
        columns = self._maxima_columns()
        return {"MAXIMA_COLUMNS": columns, "SLOTS": columns // self.plan.maxima_columns}

    def _scratch(self, name: str, rows: int, columns: int, dtype: torch.dtype, shared: int = 1) -> Tensor:
        """A buffer (rows, columns) whose rows start aligned, from the first as large as a tile's (of every shared-th
        column), either way round where groups of tokens lie by columns."""
        if name not in self._held:
            tokens = -(-self.plan.tile_tokens // max(1, self.plan.group)) * max(1, self.plan.group)
            room = tokens * aligned(-(-self.plan.tile_vocab // shared))
            self._held[name] = torch.empty(room, dtype=dtype, device=self.call.hidden.device)
        if (name, rows, columns) not in self._views:
            self._views[name, rows, columns] = self._held[name].as_strided((rows, columns), (aligned(columns), 1))
        return self._views[name, rows, columns]

    def _dz(self, n: int, v: int) -> Tensor:
        """The left operand of the products that follow: the tile of logits itself, where it has that dtype."""
        return self._scratch("product" if self.operand == torch.float32 else "dz", n, v, self.operand)

    def _bias(self, tile: Tile) -> Tensor | None:
        """Kernels read it without a stride."""
        bias = self.call.bias
        return None if bias is None else rows_of(bias, tile.columns).to(self.call.compute_dtype).contiguous()

    def _from_saved(
        self, grads: TokenGrads, saved: SavedTile, tile: Tile, flags: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """flags: of the groups' columns, where all others are 0."""
        n, v = saved.exps.shape
        block, out = self.config.rows, self._dz(n, v)
        vectors = launch.vectors(grads, entropies=False)
        launch.run(
            "logits", "saved_kernel", -(-n // block.block_m) * -(-v // block.block_n), block.warps,
            exps=saved.exps, block_maxima=saved.maxima, out=out, out_stride=out.stride(0), **vectors, n=n, V=v,
            first=tile.columns.start, stride=saved.exps.stride(0), maxima_stride=saved.maxima.stride(0),
            slope=self.call.transform.slope, CAPPED=self.call.transform.softcap is not None, **self._maxima(),
            **self._mask(grads, flags), TOKENS=max(1, self.plan.group), BLOCK_M=block.block_m, BLOCK_N=block.block_n,
        )  # fmt: skip
        return out

    def _mask(self, grads: TokenGrads, flags: Tensor | None) -> dict[str, Any]:
        """flags: (groups, v) int8, of which columns are meant; None: of all."""
        stride = 0 if flags is None else flags.stride(0)
        return {"flags": grads.labels if flags is None else flags, "flags_stride": stride, "MASK": flags is not None}


class CublasTileOps(TritonTileOps):
    """cuBLAS makes a tile of products in float32, a kernel accumulates it."""

    def accumulate(self, state: TritonState, tile: Tile, saved: SavedTile | None) -> None:
        product = self._multiplied(tile)
        maximum = self._accumulate(state, tile, product)
        if saved is not None:
            self._exps(state, tile, product, maximum, saved.exps, saved.maxima, None)

    def accumulate_jacobian(self, state: TritonState, tile: Tile, total: Tensor) -> None:
        product = self._multiplied(tile)
        maximum = self._accumulate(state, tile, product)
        share = self._dz(*product.shape)
        self._exps(state, tile, product, maximum, share, None, total)
        self.multiply(total, share, tile.weight, add=True)

    def _recompute(self, grads: TokenGrads, tile: Tile) -> Tensor:
        product = self._multiplied(tile)
        dz = self._dz(*product.shape)
        transform, first = self.call.transform, tile.columns.start
        gradient(product, None, dz, None, self._bias(tile), grads, transform, first, self.config)
        return dz

    def _maxima_columns(self) -> int:
        return self.plan.maxima_columns

    def _multiplied(self, tile: Tile) -> Tensor:
        """h W^T of a tile in float32; the kernels add the bias."""
        product = self._scratch("product", len(tile.hidden), len(tile.weight), torch.float32)
        self.multiply(product, tile.hidden, tile.weight.T, add=False)
        return product

    def _accumulate(self, state: TritonState, tile: Tile, product: Tensor) -> Tensor:
        """Returns the rows' maxima (n,) in this tile."""
        labels, first = rows_of(state.labels, tile.rows), tile.columns.start
        return accumulate_rows(
            state, tile.rows, product, None, labels, self._bias(tile), self.call.transform, first, product.shape[1],
            self.config,
        )  # fmt: skip

    def _exps(
        self, state: TritonState, tile: Tile, product: Tensor, maximum: Tensor, exps: Tensor, maxima: Tensor | None,
        total: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes a tile's exponentials: to be saved with their block maxima, or as the share added to total."""
        (n, v), block, bias, saved = product.shape, self.config.rows, self._bias(tile), maxima is not None
        maxima, total = exps if maxima is None else maxima, exps if total is None else total
        launch.run(
            "logits", "exps_kernel", -(-n // block.block_m), block.warps,
            a=product, labels=rows_of(state.labels, tile.rows), bias=product if bias is None else bias, maxima=maximum,
            exps=exps, block_maxima=maxima, share_base=maximum if saved else state.share_base(tile.rows), total=total,
            n=n, V=v, D=total.shape[1], first=tile.columns.start, stride=product.stride(0), exps_stride=exps.stride(0),
            maxima_stride=maxima.stride(0), slots=maxima.shape[1], total_stride=total.stride(0),
            tolerance=SHARE_TOLERANCE, **launch.transform_arguments(self.call.transform), SAVED=saved,
            BIASED=bias is not None, BLOCK_M=block.block_m, BLOCK_N=block.block_n,
        )  # fmt: skip


def accumulate_rows(
    state: TritonState,
    rows: slice,
    matrix: Tensor,
    index: Tensor | None,
    labels: Tensor,
    bias: Tensor | None,
    transform: Transform,
    first: int,
    split: int,
    config: KernelConfig,
) -> Tensor:
    """Merges products or logits (n, v), or rows `index`, into the state; the maxima (n,) of the first split."""
    n, v, block = len(labels), matrix.shape[1], config.rows
    splits = -(-v // split)
    partials = state.tensor.new_empty((splits, len(state.tensor), n))
    aligned_rows = matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0  # as the compiler will know
    programs, scale = -(-n // block.block_m) * splits, launch.transform_arguments(transform)
    shared: dict[str, Any] = {
        "a": matrix, "index": labels if index is None else index, "labels": labels, "partials": partials, "n": n,
        "V": v, "first": first, "split": split, "stride": matrix.stride(0), "INDEXED": index is not None,
        "BLOCK_M": block.block_m,
    }  # fmt: skip
    if bias is None and not state.outputs and launch.scales_last(scale):
        width = 16 // matrix.element_size()
        launch.run(
            "logits", "fold_kernel", programs, block.warps, **shared, outer=scale["outer"],
            ALIGNED=aligned_rows, GROUPS=block.block_n // width, WIDTH=width,
        )  # fmt: skip
    else:
        launch.run(
            "logits", "accumulate_kernel", programs, block.warps, **shared, **scale,
            bias=matrix if bias is None else bias, BIASED=bias is not None, OUTPUTS=launch.bits(state.outputs),
            BLOCK_N=block.block_n if aligned_rows else block.block_n // 2,  # narrow loads take more registers
        )  # fmt: skip
    state.merge(rows, partials, labels, split, first, v)
    return partials[0, 0]


def gradient(
    matrix: Tensor,
    index: Tensor | None,
    out: Tensor,
    out_index: Tensor | None,
    bias: Tensor | None,
    grads: TokenGrads,
    transform: Transform,
    first: int,
    config: KernelConfig,
) -> None:
    """d loss / d a of a matrix of products or logits, (n, v) or its rows `index`, into rows `out_index` of out, which
    may be the matrix."""
    n, v, block = len(grads.labels), matrix.shape[1], config.rows
    if n == 0:
        return
    indexed = index is not None or out_index is not None
    rows = torch.arange(n, device=matrix.device) if indexed and (index is None or out_index is None) else grads.labels
    launch.run(
        "logits", "gradient_kernel", -(-n // block.block_m) * -(-v // block.block_n), block.warps,
        a=matrix, index=rows if index is None else index, out=out, out_index=rows if out_index is None else out_index,
        bias=matrix if bias is None else bias, **launch.vectors(grads), n=n, V=v, first=first,
        stride=matrix.stride(0), out_stride=out.stride(0),
        **launch.transform_arguments(transform), slope=transform.slope, INDEXED=indexed,
        BIASED=bias is not None, OUTPUTS=launch.gradient_bits(grads), BLOCK_M=block.block_m, BLOCK_N=block.block_n,
    )  # fmt: skip
