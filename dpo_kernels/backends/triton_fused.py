"""Triton's strategy "fused": the kernel that makes a block of logits accumulates it, and can mark what is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.backends.base import Execution, Product, SavedTile, Tile
from dpo_kernels.backends.pytorch import multiply_each
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.backends.triton_tiles import SHARE_TOLERANCE, TritonTileOps
from dpo_kernels.call import Call, TokenGrads
from dpo_kernels.gathering import Marks
from dpo_kernels.kernels import configs, launch
from dpo_kernels.layout import Slice, rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.statistics import Finished
from dpo_kernels.workload import MARKED

COLUMNS = 1024  # flags that a program looks at together
PICKED = 32  # columns of a list that a program takes from saved exponentials
GROUPS = 32  # the like, of each column of a block
HOPPER, HOPPER_STAGES = configs.Arch("cuda", 9), 4  # buffers for slices, 48 KiB each
ROWS = 128  # of a program that reads numbers of rows alone
BASES = 16, 128  # rows of a program that makes their bases, and features that it reads at once
SETTLED = 32  # rows of saved exponentials that a program settles


class Lists(NamedTuple):
    """lists (rows, length) int32, of which the first counts (rows,) int32 are meant: columns of each group; or, of each
    block of columns, which are in an order (v,) int32 then, its groups."""

    lists: Tensor
    counts: Tensor
    order: Tensor | None


class FusedTileOps(TritonTileOps):
    """The kernel that makes a block of logits accumulates it."""

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        super().__init__(call, plan, execution)
        splits = self.config.splits(self.config.product)
        self._split = splits.width(plan.tokens, plan.vocab_size, plan.tile_vocab)  # columns that a program walks
        self._scales = call.hidden  # of saved rows, once backward makes them
        self._scaled: dict[int, Slice] = {}

    def accumulate(self, state: TritonState, tile: Tile, saved: SavedTile | None) -> None:
        if saved is None or not self.plan.one_base:
            self._forward(state, tile, saved)
            return
        if tile.columns.start == 0:
            self._begin_rows(state, tile)
        bases, moved = rows_of(state.bases, tile.rows), rows_of(state.moved, tile.rows)
        self._forward(state, tile, saved, bases=bases, moved=moved, ONE_BASE=True)

    def _begin_rows(self, state: TritonState, tile: Tile) -> None:
        if tile.rows.start == 0:
            state.bases = state.tensor.new_empty(self.plan.kept_tokens)
            state.moved = state.bases.new_empty(self.plan.kept_tokens, dtype=torch.int32)
        (n, features), weight, bias = tile.hidden.shape, self.call.weight, self.call.bias
        launch.run(
            "keep", "base_kernel", -(-n // BASES[0]), 4,
            hidden=tile.hidden, weight=weight, bias=weight if bias is None else bias,
            labels=rows_of(state.labels, tile.rows), bases=rows_of(state.bases, tile.rows),
            moved=rows_of(state.moved, tile.rows), n=n, V=len(weight), D=features, hidden_stride=tile.hidden.stride(0),
            hidden_step=tile.hidden.stride(1), weight_stride=weight.stride(0), weight_step=weight.stride(1),
            bias_step=0 if bias is None else bias.stride(0), outer=self.call.transform.slope, BIASED=bias is not None,
            BLOCK_M=BASES[0], BLOCK_K=BASES[1],
        )  # fmt: skip

    def settle(self, state: TritonState, done: Finished, exps: Tensor, maxima: Tensor) -> Tensor:
        n, v = len(exps), self.plan.vocab_size
        settled = state.bases.new_empty((n, 1))
        kept = done.rows(slice(0, n))
        launch.run(
            "keep", "settle_kernel", -(-n // SETTLED), 4,
            exps=exps, block_maxima=maxima, bases=state.bases, moved=state.moved,
            labels=rows_of(state.labels, slice(0, n)), log_probs=kept.stats.log_probs, maxima=kept.maximum,
            log_sums=kept.log_sum, settled=settled, n=n, V=v, stride=exps.stride(0), maxima_stride=maxima.stride(0),
            **self._maxima(), BLOCK_M=SETTLED, BLOCK_N=min(64, self._maxima_columns()),
        )  # fmt: skip
        return settled

    def row_scales(self, grads: TokenGrads, bases: Tensor) -> Tensor:
        self._scales, n = torch.empty_like(bases), len(bases)
        vectors = launch.vectors(grads, entropies=False)
        launch.run(
            "keep", "scale_kernel", -(-n // ROWS), 4,
            bases=bases, scales=self._scales, maxima=vectors["maxima"], log_sums=vectors["log_sums"],
            grads=vectors["grads"], n=n, slope=self.call.transform.slope, BLOCK_M=ROWS,
        )  # fmt: skip
        return self._scales

    def gradient_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        if saved is None or not self.plan.one_base:
            super().gradient_products(grads, tile, saved, products, bias)
            return
        n, v = saved.exps.shape
        exps = saved.exps if saved.exps.dtype == self.operand else self._dz(n, v).copy_(saved.exps)
        scaled = [
            p._replace(right=self._scaled_hidden(tile.rows, p.right)) if p.by_vocab else p for p in products
        ]  # fmt: skip
        multiply_each(self, exps, scaled)

    def _scaled_hidden(self, rows: slice, hidden: Tensor) -> Tensor:
        held = self._scaled.setdefault(rows.start if self.plan.hold_scaled else 0, Slice())
        return held.get(rows, lambda: hidden, partial(self._scale, rows))

    def _scale(self, rows: slice, hidden: Tensor, out: Tensor | None) -> Tensor:
        """A tile's hidden states (n, D) times their rows' scales."""
        return torch.mul(hidden, rows_of(self._scales, rows), out=torch.empty_like(hidden) if out is None else out)

    def accumulate_marked(self, state: TritonState, tile: Tile, marks: Marks, bound: float) -> None:
        n, split = len(tile.hidden), self._split
        drops = state.tensor.new_empty((-(-len(tile.weight) // split), n))
        partials = self._forward(
            state, tile, None, flags=marks.flags, flags_stride=marks.flags.stride(0), known_maxima=marks.maxima,
            known_totals=marks.totals, drops=drops, bound=bound, MARK=True,
        )  # fmt: skip
        block = 128
        launch.run(
            "columns", "known_kernel", -(-n // block), 4,
            partials=partials, drops=drops, states=state.tensor[:, tile.rows], label_logits=marks.label_logits,
            known_maxima=marks.maxima, known_totals=marks.totals, dropped=marks.dropped, n=n, M=state.tensor.shape[1],
            splits=len(drops), BLOCK_M=block,
        )  # fmt: skip

    def mark_saved(
        self, saved: SavedTile, flags: Tensor, maximum: Tensor, log_sum: Tensor, bound: float
    ) -> Tensor:  # fmt: skip
        (n, v), groups = saved.exps.shape, len(flags)
        drops = maximum.new_empty((-(-v // MARKED), n))
        launch.run(
            "columns", "mark_kernel", groups * len(drops), 8,
            exps=saved.exps, block_maxima=saved.maxima, maxima=maximum, log_sums=log_sum, flags=flags, drops=drops, n=n,
            V=v, stride=saved.exps.stride(0), maxima_stride=saved.maxima.stride(0), flags_stride=flags.stride(0),
            bound=bound, **self._maxima(), WIDTH=MARKED, BLOCK_M=self.plan.group,
            BLOCK_N=min(64, self._maxima_columns()),
        )  # fmt: skip
        return drops.sum(0)

    def count(self, flags: Tensor, tile: int) -> Tensor:
        groups, v = flags.shape
        counts = flags.new_empty((groups, -(-v // tile)), dtype=torch.int32)
        launch.run(
            "columns", "count_kernel", counts.numel(), 4,
            flags=flags, counts=counts, groups=groups, V=v, stride=flags.stride(0), tile=tile, WIDTH=COLUMNS,
        )  # fmt: skip
        return counts

    def _forward(self, state: TritonState, tile: Tile, saved: SavedTile | None, **marks: Any) -> Tensor:
        """marks: what forward_kernel takes to mark columns. Returns the states of the splits, (splits, FIELDS, n)."""
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        split = self._split
        splits = -(-v // split)
        partials = state.tensor.new_empty((splits, len(state.tensor), n))
        labels = rows_of(state.labels, tile.rows)
        exps, maxima = partials, partials
        # Of nothing, 0: a stride that goes by the tokens could compile the kernel anew.
        exps_stride = maxima_stride = 0
        if saved is not None:
            exps, maxima = saved
            exps_stride, maxima_stride = exps.stride(0), maxima.stride(0)
        plain = self._is_plain(arguments, state.outputs)
        specialized = self._specializes(product, state.outputs)
        if specialized and plain and self._fits_hopper(product) and not marks.get("MARK"):
            self._forward_on_hopper(tile, product, arguments, partials, labels, exps, maxima, saved is not None, marks)
            state.merge(tile.rows, partials, labels, split, tile.columns.start, v)
            return partials
        if saved is not None and arguments["DESCRIPTORS"]:
            exps = launch.descriptor(exps, product.block_m, product.block_n)
        unmarked = {"flags": labels, "flags_stride": 0, "known_maxima": partials, "known_totals": partials}
        unmarked |= {"drops": partials, "bound": 0.0, "MARK": False, "ONE_BASE": False}
        unmarked |= {"bases": partials, "moved": partials}
        launch.run(
            "fused", "forward_kernel", -(-n // product.block_m) * splits, product.warps, product.stages,
            labels=labels, partials=partials, exps=exps, block_maxima=maxima, split=split,
            exps_stride=exps_stride, maxima_stride=maxima_stride, OUTPUTS=launch.bits(state.outputs),
            SAVE=saved is not None, PLAIN=plain,
            WIDE=saved is not None and saved.exps.dtype == torch.float32,
            SPECIALIZED=specialized and self.config.arch != HOPPER, MAXIMA_COLUMNS=self.plan.maxima_columns,
            **{**unmarked, **marks}, **arguments,
        )  # fmt: skip
        state.merge(tile.rows, partials, labels, split, tile.columns.start, v)
        return partials

    def _fits_hopper(self, product: configs.ProductBlocks) -> bool:
        """Whether kernels/hopper.py is for these blocks: two products of 64 rows, slices of 128 bytes."""
        return self.config.arch == HOPPER and (product.block_m, product.block_k) == (128, 64) and launch.has_gluon()

    def _forward_on_hopper(
        self, tile: Tile, product: configs.ProductBlocks, arguments: dict[str, Any], partials: Tensor, labels: Tensor,
        exps: Tensor, maxima: Tensor, save: bool, more: dict[str, Any],
    ) -> None:  # fmt: skip
        """A program on each multiprocessor walks as many blocks as it takes."""
        (n, features), v = tile.hidden.shape, len(tile.weight)
        programs = -(-n // product.block_m) * -(-v // self._split)
        at_once = launch.multiprocessors(tile.hidden.device) or self.config.at_once
        launch.run(
            "hopper", "hopper_forward_kernel", min(programs, at_once), 4,
            hidden=launch.shared_descriptor(tile.hidden, product.block_m, product.block_k),
            weight=launch.shared_descriptor(tile.weight, product.block_n, product.block_k), labels=labels,
            partials=partials, exps=exps, block_maxima=maxima, bases=more.get("bases", partials),
            moved=more.get("moved", partials), n=n, V=v, D=features, first=tile.columns.start, split=self._split,
            exps_stride=exps.stride(0) if save else 0, maxima_stride=maxima.stride(0) if save else 0,
            outer=arguments["outer"], SAVE=save, ONE_BASE=bool(more.get("ONE_BASE")),
            MAXIMA_COLUMNS=self.plan.maxima_columns, GROUP=product.group, STAGES=HOPPER_STAGES,
            BLOCK_M=product.block_m, BLOCK_N=product.block_n, BLOCK_K=product.block_k,
        )  # fmt: skip

    def _is_plain(self, arguments: dict[str, Any], outputs: tuple[str, ...]) -> bool:
        """Whether logits are products times a positive number, and nothing else is wanted. In float32 the kernel that
        takes advantage of it spills."""
        more = arguments["BIASED"] or outputs or self.call.compute_dtype == torch.float32
        return not more and launch.scales_last(arguments)

    def _specializes(self, product: configs.ProductBlocks, outputs: tuple[str, ...]) -> bool:
        """What the compiler's specialised warps (triton 3.7) hold: half precision, no statistics."""
        return product.specialized and product.descriptors and not outputs and self.operand.itemsize == 2

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

    def masked_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, flags: Tensor, products: Sequence[Product],
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        dz = self._recompute(grads, tile, flags) if saved is None else self._from_saved(grads, saved, tile, flags)
        self._add_products(dz, products, bias)

    def gathered_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, flags: Tensor, products: Sequence[Product],
        bias: Tensor | None,
    ) -> None:  # fmt: skip
        of_groups = self._lists(flags)
        left = self._gather(grads, tile, saved, of_groups, clear=bias is not None)
        if bias is not None:
            bias += left.sum(1, dtype=bias.dtype)
        of_columns = self._lists(flags, self._order(flags)) if any(p.by_vocab for p in products) else of_groups
        for product in products:
            self._sum(product, left, flags, of_columns if product.by_vocab else of_groups, len(tile.hidden))

    def _order(self, flags: Tensor) -> Tensor:
        """The tile's columns (v,) int32, those that the same groups keep near each other."""
        (groups, v), keys = flags.shape, flags.new_empty(flags.shape[1], dtype=torch.int32)
        launch.run(
            "columns", "key_kernel", -(-v // COLUMNS), 4,
            flags=flags, keys=keys, groups=groups, V=v, stride=flags.stride(0), WIDTH=COLUMNS,
        )  # fmt: skip
        return keys.sort(descending=True, stable=True).indices.int()

    def _lists(self, flags: Tensor, order: Tensor | None = None) -> Lists:
        """Of each group the columns that it keeps; in an order of columns, of each block of them the groups."""
        (groups, v), block = flags.shape, self._sum_blocks(by_vocab=order is not None)[0]
        rows, length = (groups, v) if order is None else (-(-v // block), groups)
        made = flags.new_empty((rows, length), dtype=torch.int32), flags.new_empty(rows, dtype=torch.int32)
        launch.run(
            "columns", "list_kernel", rows, 4,
            flags=flags, order=made[0] if order is None else order, lists=made[0], counts=made[1], groups=groups, V=v,
            stride=flags.stride(0), BY_VOCAB=order is not None, COLUMNS=block,
            WIDTH=COLUMNS if order is None else GROUPS,
        )  # fmt: skip
        return Lists(*made, order)

    def _gather(self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, of: Lists, clear: bool) -> Tensor:
        """d loss / d a of the columns that stay, (v, n and up to whole groups). clear: the others are 0."""
        n, v, groups, slope = len(tile.hidden), len(tile.weight), len(of.counts), self.call.transform.slope
        out = self._dz(v, groups * self.plan.group)
        if clear:
            out.zero_()
        vectors = launch.vectors(grads, entropies=False)
        given = {"out": out, "out_stride": out.stride(0), "lists": of.lists, "counts": of.counts, **vectors}
        if saved is not None:
            launch.run(
                "columns", "pick_kernel", groups * -(-v // PICKED), 8,
                exps=saved.exps, block_maxima=saved.maxima, n=n, V=v, first=tile.columns.start,
                stride=saved.exps.stride(0), maxima_stride=saved.maxima.stride(0), **self._maxima(),
                slope=slope, CAPPED=self.call.transform.softcap is not None, BLOCK_M=self.plan.group, BLOCK_N=PICKED,
                **given,
            )  # fmt: skip
            return out
        arguments, product = self._product_arguments(tile, descriptors=False)
        del arguments["DESCRIPTORS"]
        launch.run(
            "columns", "gather_kernel", groups * -(-v // product.block_n), product.warps, product.stages,
            slope=slope, **arguments, **given,
        )  # fmt: skip
        return out

    def _sum(self, product: Product, left: Tensor, flags: Tensor, of: Lists, n: int) -> None:
        high, wide, deep = self._sum_blocks(product.by_vocab)
        (v, _), columns, sums = left.shape, product.right.shape[1], self.config.sums
        launch.run(
            "columns", "sum_kernel", -(-(v if product.by_vocab else n) // high) * -(-columns // wide), sums.warps,
            sums.stages,
            left=left, right=product.right, out=product.out, lists=of.lists, counts=of.counts,
            order=of.lists if of.order is None else of.order, flags=flags, n=n, V=v, columns=columns,
            left_stride=left.stride(0), right_row=product.right.stride(0), right_step=product.right.stride(1),
            out_row=product.out.stride(0), flags_stride=flags.stride(0), add=int(product.add),
            BY_VOCAB=product.by_vocab, WIDEN=self.config.arch.kind == "interpreted", PRECISION=sums.precision,
            TOKENS=self.plan.group, BLOCK_M=high, BLOCK_N=wide, BLOCK_K=deep,
        )  # fmt: skip

    def _sum_blocks(self, by_vocab: bool) -> tuple[int, int, int]:
        """BLOCK_M, BLOCK_N, BLOCK_K: within a group, whose tokens are the rows, or if by_vocab the depth."""
        of, tokens = self.config.sums, self.plan.group
        return (of.block_m, of.block_n, min(of.block_k, tokens)) if by_vocab else (min(of.block_m, tokens), *of[1:3])

    def _recompute(self, grads: TokenGrads, tile: Tile, flags: Tensor | None = None) -> Tensor:
        """flags: of the groups' columns, where all others are 0."""
        arguments, product = self._product_arguments(tile)
        n, v = len(tile.hidden), len(tile.weight)
        out = self._dz(n, v)
        launch.run(
            "fused", "recompute_kernel", -(-n // product.block_m) * -(-v // product.block_n), product.warps,
            product.stages,
            out=launch.descriptor(out, product.block_m, product.block_n) if arguments["DESCRIPTORS"] else out,
            **launch.vectors(grads), out_stride=out.stride(0), slope=self.call.transform.slope,
            **self._mask(grads, flags), OUTPUTS=launch.gradient_bits(grads), **arguments,
        )  # fmt: skip
        return out

    def _maxima_columns(self) -> int:
        return self.config.product.block_n

    def _product_arguments(self, tile: Tile, descriptors: bool = True) -> tuple[dict[str, Any], configs.ProductBlocks]:
        """What kernels that make logits take: operands, sizes, transform and blocks."""
        hidden, weight, product = tile.hidden, tile.weight, self.config.product
        if not (descriptors and launch.describable(hidden) and launch.describable(weight)):
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
