"""The back end for GPUs, NVIDIA's and AMD's: the Triton kernels of `dpo_kernels.kernels`.

Two strategies (`kernels.configs`): in "fused" the kernel that makes a block of logits accumulates it; in "tiles" cuBLAS
makes a tile of logits in float32 and a kernel accumulates it. On a CPU the same kernels run in Triton's interpreter, to
be tested: TRITON_INTERPRET=1 must be set before the first import of triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import overrides
from dpo_kernels.backends.base import MIB, Execution, Product, SavedTile, Tile
from dpo_kernels.backends.pytorch import library_multiply, multiply_each
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.call import DTYPE_NAMES, Call, TokenGrads, Tokens, Transform
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.kernels import configs, launch
from dpo_kernels.kernels.configs import KernelConfig
from dpo_kernels.layout import in_matrix, lies_in_rows, rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished
from dpo_kernels.workload import aligned

# The frozen head's sum is rescaled where the maximum has grown by more than this; exp of it fits float16 20 times.
SHARE_TOLERANCE = 8.0
WHOLE = 2**31  # columns: a tile of products is never split

# Sums of gradients are read and written once a tile: at 4096 features tiles of 4096 x 4096 spend more on them than a
# tile of 8192 x 8192 spends on going through memory (benchmarks/predict.py; waits for a measurement).
_TILES = (
    (8192, 8192), (8192, 4096), (4096, 4096), (2048, 2048), (1024, 1024), (512, 512), (256, 256), (128, 256),
)  # fmt: skip
# A call of few tokens is bound by the host, which launches as much for a narrow tile as for a wide one. 32 MiB of half
# precision stay in the cache of an H100 (waits for a measurement).
_WIDE_TILES = ((256, 65536), (512, 32768), (1024, 16384))
# What the library of products holds, by PyTorch's choice: a workspace a handle, and a handle a thread, of which
# autograd has one of its own for backward. LOADED: what else a first call loads, a guess that no GPU has measured.
HANDLES, LOADED = 2, 16 * MIB
WORKSPACES = {("cuda", 8): 65 * MIB // 8, ("cuda", 9): 32 * MIB, ("hip", 9): 128 * MIB}
_ON_GPUS = Capabilities(
    _TILES,
    LOADED,
    one_pass=True,
    no_temporaries=True,
    rounds=True,
    maxima_columns=64,
    saved_multiple=128,
    wide_tiles=_WIDE_TILES,
)
CAPABILITIES = {
    "cuda": _ON_GPUS,
    "hip": _ON_GPUS,
    "interpreted": Capabilities(
        ((256, 512), (128, 256), (64, 128), (64, 64)), 12 * MIB, widens=(torch.bfloat16, torch.float16),
        one_pass=True, no_temporaries=True, maxima_columns=32, saved_multiple=64,
    ),
}  # fmt: skip


class TritonBackend:
    """See `dpo_kernels.backends.base.Backend` for what each method does."""

    name = "triton"
    largest_vocabulary = 2**24  # argmax is held in float32
    devices: tuple[str, ...] = ("cuda",)  # ROCm's devices have this name too

    def unavailable(self, device: torch.device) -> str | None:
        return None if overrides.current().arch is not None else launch.unavailable(device)

    cannot_run = unavailable  # nothing is built ahead, so there is nothing more to know

    def declines_head(self, hidden: Tensor, weight: Tensor) -> bool:
        return False

    def declines_logits(self, logits: Tensor) -> bool:
        return not lies_in_rows(logits)

    def configure(self, device: torch.device, features: int, compute_dtype: torch.dtype, extras: bool) -> KernelConfig:
        changes = overrides.current()
        arch = changes.arch or launch.arch_of(device)
        operand = torch.float32 if compute_dtype in CAPABILITIES[arch.kind].widens else compute_dtype
        return configs.resolve(arch, features, operand, extras, changes.kernels)

    def capabilities(self, device: torch.device, configuration: KernelConfig) -> Capabilities:
        """cuBLAS may sum a row in another order in a tile of another height: there saved tokens are whole tiles.

        A block of columns has a maximum of its own: it shares a slot with no other.
        """
        arch = configuration.arch
        known = CAPABILITIES[arch.kind]
        workspaces = [room for (kind, major), room in WORKSPACES.items() if kind == arch.kind and major <= arch.major]
        if workspaces:
            known = replace(known, scratch=HANDLES * workspaces[-1] + known.scratch)
        if configuration.strategy == "tiles":
            whole = replace(configuration.splits(configuration.rows), columns=WHOLE)
            # A tile of float32 products is written and read: it stays as small as it is.
            return replace(known, one_pass=False, saved_multiple=None, splits=(whole,), wide_tiles=())
        assert known.maxima_columns is not None
        return replace(
            known, maxima_columns=min(known.maxima_columns, configuration.product.block_n),
            splits=tuple(map(configuration.splits, dict.fromkeys(configuration.either))),
        )  # fmt: skip

    def tile_ops(self, call: Call, plan: Plan, execution: Execution) -> TritonTileOps:
        fused = execution.configuration.strategy == "fused"
        block = execution.configuration.product.block_n if fused else plan.maxima_columns
        if block % plan.maxima_columns or (plan.vocab_tiles > 1 and plan.tile_vocab % block):
            raise ValueError(
                f"tiles of {plan.tile_vocab} vocabulary entries in blocks of {block}, whose maxima are held for every "
                f"{plan.maxima_columns}; expected multiples of each other"
            )
        return (FusedTileOps if fused else CublasTileOps)(call, plan, execution)

    def logits_forward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, configuration: KernelConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix, index = in_matrix(logits, tokens.index)
        vocab_size = matrix.shape[1]
        state = TritonState(tokens.labels, vocab_size, ())
        if tokens.count:
            block = configuration.rows
            split = configuration.splits(block).width(tokens.count, vocab_size, vocab_size)
            rows = slice(0, tokens.count)
            _accumulate_rows(state, rows, matrix, index, tokens.labels, None, transform, 0, split, configuration)
        done = state.finish()
        return done.stats.log_probs, done.maximum, done.log_sum, done.label_logit

    def logits_backward(
        self,
        logits: Tensor,
        tokens: Tokens,
        transform: Transform,
        grads: TokenGrads,
        out: Tensor,
        configuration: KernelConfig,
    ) -> None:
        matrix, index = in_matrix(logits, tokens.index)
        to, out_index = (matrix, index) if out is logits else in_matrix(out, tokens.index)
        _gradient(matrix, index, to, out_index, None, grads, transform, 0, configuration)

    def out_of_reach(self, maximum: Tensor) -> bool:
        return False

    def empty_cache(self) -> int:
        return 0


class TritonTileOps:
    """What both strategies share; see `dpo_kernels.backends.base.TileOps` for what each method does."""

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        self.call, self.plan = call, plan
        self.config: KernelConfig = execution.configuration
        self.rounds = execution.capabilities.rounds
        self.operand = self.weight_dtype = execution.operand(call.compute_dtype)
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self.call.hidden.new_empty((rows, columns), dtype=dtype)

    def new_state(self, labels: Tensor) -> TritonState:
        return TritonState(labels, self.call.vocab_size, self.call.outputs)

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
        column)."""
        if name not in self._held:
            room = self.plan.tile_tokens * aligned(-(-self.plan.tile_vocab // shared))
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

    def _from_saved(self, grads: TokenGrads, saved: SavedTile, tile: Tile) -> Tensor:
        n, v = saved.exps.shape
        block, out = self.config.rows, self._dz(n, v)
        vectors = launch.vectors(grads)
        for unused in ("entropies", "grad_entropies"):
            del vectors[unused]
        launch.run(
            "logits", "saved_kernel", -(-n // block.block_m) * -(-v // block.block_n), block.warps,
            exps=saved.exps, block_maxima=saved.maxima, out=out, out_stride=out.stride(0), **vectors, n=n, V=v,
            first=tile.columns.start, stride=saved.exps.stride(0), maxima_stride=saved.maxima.stride(0),
            slope=self.call.transform.slope, CAPPED=self.call.transform.softcap is not None, **self._maxima(),
            BLOCK_M=block.block_m, BLOCK_N=block.block_n,
        )  # fmt: skip
        return out


class FusedTileOps(TritonTileOps):
    """The kernel that makes a block of logits accumulates it."""

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        super().__init__(call, plan, execution)
        splits = self.config.splits(self.config.product)
        self._split = splits.width(plan.tokens, plan.vocab_size, plan.tile_vocab)  # columns that a program walks

    def accumulate(self, state: TritonState, tile: Tile, saved: SavedTile | None) -> None:
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        split = self._split
        splits = -(-v // split)
        partials = state.tensor.new_empty((splits, len(state.tensor), n))
        labels = rows_of(state.labels, tile.rows)
        exps, maxima = (partials, partials) if saved is None else saved
        # Of nothing, 0: a stride that goes by the tokens could compile the kernel anew.
        exps_stride, maxima_stride = (0, 0) if saved is None else (exps.stride(0), maxima.stride(0))
        if saved is not None and arguments["DESCRIPTORS"]:
            exps = launch.descriptor(exps, product.block_m, product.block_n)
        launch.run(
            "fused", "forward_kernel", -(-n // product.block_m) * splits, product.warps, product.stages,
            labels=labels, partials=partials, exps=exps, block_maxima=maxima, split=split, exps_stride=exps_stride,
            maxima_stride=maxima_stride, OUTPUTS=launch.bits(state.outputs), SAVE=saved is not None,
            PLAIN=self._is_plain(arguments, state.outputs),
            WIDE=saved is not None and saved.exps.dtype == torch.float32,
            MAXIMA_COLUMNS=self.plan.maxima_columns, **arguments,
        )  # fmt: skip
        state.merge(tile.rows, partials, labels, split, tile.columns.start, v)

    def _is_plain(self, arguments: dict[str, Any], outputs: tuple[str, ...]) -> bool:
        """Whether logits are products times a positive number, and nothing else is wanted. In float32 the kernel that
        takes advantage of it spills."""
        more = arguments["BIASED"] or outputs or self.call.compute_dtype == torch.float32
        return not more and launch.scales_last(arguments)

    def accumulate_jacobian(self, state: TritonState, tile: Tile, total: Tensor) -> None:
        n, v, shared = len(tile.hidden), len(tile.weight), self.plan.maxima_columns
        share, maxima = self._dz(n, v), self._scratch("maxima", n, -(-v // shared), torch.float32, shared)
        self.accumulate(state, tile, SavedTile(share, maxima))
        block = self.config.rows
        launch.run(
            "logits", "rebase_kernel", -(-n // block.block_m), block.warps,
            exps=share, block_maxima=maxima, labels=rows_of(state.labels, tile.rows), first=tile.columns.start,
            share_base=state.share_base(tile.rows), total=total, n=n, V=v, D=total.shape[1], stride=share.stride(0),
            maxima_stride=maxima.stride(0), slots=-(-v // self._maxima_columns()), total_stride=total.stride(0),
            tolerance=SHARE_TOLERANCE, **self._maxima(), BLOCK_M=block.block_m, BLOCK_N=block.block_n,
        )  # fmt: skip
        self.multiply(total, share, tile.weight, add=True)

    def _recompute(self, grads: TokenGrads, tile: Tile) -> Tensor:
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        out = self._dz(n, v)
        launch.run(
            "fused", "recompute_kernel", -(-n // product.block_m) * -(-v // product.block_n), product.warps,
            product.stages,
            out=launch.descriptor(out, product.block_m, product.block_n) if arguments["DESCRIPTORS"] else out,
            **launch.vectors(grads), out_stride=out.stride(0), slope=self.call.transform.slope,
            OUTPUTS=launch.gradient_bits(grads), **arguments,
        )  # fmt: skip
        return out

    def _maxima_columns(self) -> int:
        return self.config.product.block_n

    def _product_arguments(self, tile: Tile) -> tuple[dict[str, Any], configs.ProductBlocks]:
        """What forward_kernel and recompute_kernel both take: operands, sizes, transform and blocks."""
        hidden, weight, product = tile.hidden, tile.weight, self.config.product
        if not (launch.describable(hidden) and launch.describable(weight)):
            product = product._replace(descriptors=False)
        bias = self._bias(tile)
        arguments = {
            "hidden": launch.descriptor(hidden, product.block_m, product.block_k) if product.descriptors else hidden,
            "weight": launch.descriptor(weight, product.block_n, product.block_k) if product.descriptors else weight,
            "bias": hidden if bias is None else bias,
            "n": len(hidden), "V": len(weight), "D": hidden.shape[1], "first": tile.columns.start,
            "hidden_stride": hidden.stride(0), "hidden_step": hidden.stride(1),
            "weight_stride": weight.stride(0), "weight_step": weight.stride(1),
            **launch.transform_arguments(self.call.transform),
            "BIASED": bias is not None, "DESCRIPTORS": product.descriptors,
            "WIDEN": self.config.arch.kind == "interpreted",
            "PRECISION": product.precision, "EVEN": hidden.shape[1] % product.block_k == 0,
            "BLOCK_M": product.block_m, "BLOCK_N": product.block_n, "BLOCK_K": product.block_k, "GROUP": product.group,
        }  # fmt: skip
        return arguments, product


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
        _gradient(product, None, dz, None, self._bias(tile), grads, transform, first, self.config)
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
        return _accumulate_rows(
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


def _accumulate_rows(
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


def _gradient(
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
