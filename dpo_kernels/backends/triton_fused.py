"""Triton's strategy "fused": the kernel that makes a block of logits accumulates it. It can skip blocks in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.backends.base import Execution, Product, SavedTile, Tile
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.backends.triton_tiles import SHARE_TOLERANCE, TritonTileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.kernels import configs, launch
from dpo_kernels.layout import rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.skipping import Marks

FLAGS = 32  # blocks that a program looks at together


class FusedTileOps(TritonTileOps):
    """The kernel that makes a block of logits accumulates it."""

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        super().__init__(call, plan, execution)
        splits = self.config.splits(self.config.product)
        self._split = splits.width(plan.tokens, plan.vocab_size, plan.tile_vocab)  # columns that a program walks

    def accumulate(self, state: TritonState, tile: Tile, saved: SavedTile | None) -> None:
        self._forward(state, tile, saved, None)

    def accumulate_marked(self, state: TritonState, tile: Tile, marks: Marks) -> None:
        first = tile.columns.start // self.config.product.block_n
        self._forward(state, tile, None, Marks(*(each[first:, tile.rows] for each in marks)))

    def _forward(self, state: TritonState, tile: Tile, saved: SavedTile | None, marks: Marks | None) -> None:
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        split = self._split
        splits = -(-v // split)
        partials = state.tensor.new_empty((splits, len(state.tensor), n))
        labels = rows_of(state.labels, tile.rows)
        exps, maxima, sums = partials, partials, partials
        # Of nothing, 0: a stride that goes by the tokens could compile the kernel anew.
        exps_stride = maxima_stride = 0
        if saved is not None:
            exps, maxima = saved
            exps_stride, maxima_stride = exps.stride(0), maxima.stride(0)
        elif marks is not None:
            maxima, sums = marks
            maxima_stride = maxima.stride(0)
        if saved is not None and arguments["DESCRIPTORS"]:
            exps = launch.descriptor(exps, product.block_m, product.block_n)
        launch.run(
            "fused", "forward_kernel", -(-n // product.block_m) * splits, product.warps, product.stages,
            labels=labels, partials=partials, exps=exps, block_maxima=maxima, block_sums=sums, split=split,
            exps_stride=exps_stride, maxima_stride=maxima_stride, OUTPUTS=launch.bits(state.outputs),
            SAVE=saved is not None, MARK=marks is not None,
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

    def passing(self, marks: Marks, labels: Tensor, maximum: Tensor, log_sum: Tensor, bound: float) -> Tensor:
        product, blocks, tokens = self.config.product, len(marks.maxima), len(labels)
        flags = labels.new_empty((-(-tokens // product.block_m), blocks), dtype=torch.int8)
        launch.run(
            "blocks", "flag_kernel", len(flags) * -(-blocks // FLAGS), 4,
            block_maxima=marks.maxima, labels=labels.contiguous(), maxima=maximum, log_sums=log_sum, flags=flags,
            M=tokens, blocks=blocks, stride=marks.maxima.stride(0), bound=bound, ENTRIES=product.block_n,
            TOKENS=product.block_m, WIDTH=FLAGS,
        )  # fmt: skip
        return flags

    def left_out(self, marks: Marks, flags: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
        found = torch.empty_like(maximum)
        launch.run(
            "blocks", "left_out_kernel", len(flags), 4,
            block_maxima=marks.maxima, block_sums=marks.sums, maxima=maximum, log_sums=log_sum, flags=flags,
            left_out=found, M=len(found), blocks=flags.shape[1], stride=marks.maxima.stride(0),
            TOKENS=self.config.product.block_m, WIDTH=FLAGS,
        )  # fmt: skip
        return found

    def block_products(
        self, grads: TokenGrads, tile: Tile, flags: Tensor, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """The blocks that stay come first in a list of all, sorted: nothing waits for how many they are."""
        flags = flags.clone(memory_format=torch.contiguous_format)
        dz = self._recompute(grads, tile, flags, clear=bias is not None)
        if bias is not None:
            bias += dz.sum(0, dtype=bias.dtype)
        sides: dict[bool, tuple[Tensor, Tensor]] = {}
        for product in products:
            of = flags.T if product.by_vocab else flags
            if product.by_vocab not in sides:
                lists = of.sort(stable=True, dim=1, descending=True).indices.contiguous()
                sides[product.by_vocab] = lists, of.sum(1)
            self._sum(product, dz.T if product.by_vocab else dz, *sides[product.by_vocab])

    def _sum(self, product: Product, left: Tensor, lists: Tensor, counts: Tensor) -> None:
        block, (rows, depth), columns = self.config.product, left.shape, product.right.shape[1]
        outer, inner = block.block_m, block.block_n
        if product.by_vocab:
            outer, inner = inner, outer
        of = self.config.sums
        high, wide, deep = min(of.block_m, outer), of.block_n, min(of.block_k, inner)
        launch.run(
            "blocks", "sum_kernel", -(-rows // high) * -(-columns // wide), of.warps, of.stages,
            left=left, right=product.right, out=product.out, lists=lists, counts=counts, rows=rows, depth=depth,
            columns=columns, length=lists.shape[1], left_row=left.stride(0), left_step=left.stride(1),
            right_row=product.right.stride(0), right_step=product.right.stride(1), out_row=product.out.stride(0),
            add=int(product.add), BY_VOCAB=product.by_vocab, ALIGNED=(rows if product.by_vocab else depth) % 16 == 0,
            WIDEN=self.config.arch.kind == "interpreted", PRECISION=of.precision, OUTER=outer,
            INNER=inner, BLOCK_M=high, BLOCK_N=wide, BLOCK_K=deep,
        )  # fmt: skip

    def _recompute(self, grads: TokenGrads, tile: Tile, flags: Tensor | None = None, clear: bool = False) -> Tensor:
        """flags: of the blocks that are wanted; None: all. clear: the others are 0."""
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        out = self._dz(n, v)
        if clear:
            out.zero_()
        launch.run(
            "fused", "recompute_kernel", -(-n // product.block_m) * -(-v // product.block_n), product.warps,
            product.stages,
            out=launch.descriptor(out, product.block_m, product.block_n) if arguments["DESCRIPTORS"] else out,
            **launch.vectors(grads), out_stride=out.stride(0), slope=self.call.transform.slope,
            flags=grads.labels if flags is None else flags, SKIP=flags is not None, OUTPUTS=launch.gradient_bits(grads),
            **arguments,
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
