"""fused.forward_kernel of plain calls with specialised warps, for compute capability 9, in Gluon: Triton's own compiler
has one set of warps do all there is to do, so that nothing multiplies while a block is accumulated.

One warp loads. Two groups of four warps multiply and accumulate half of a block's rows each, by the same slices of the
weight. The second begins when the first is LEAD slices ahead, and stays behind: while one accumulates its block, the
other has the tensor cores. A program walks many blocks, and the slices of the next are loaded meanwhile.

Gluon cannot be interpreted. tests/gluon_model.py runs this very source on a model of its barriers, copies and products;
tests/aot.py compiles it; no GPU has run it, and no row of the tables chooses it (`configs.ProductBlocks`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from dpo_kernels.kernels.keep import FAR as _FAR
from dpo_kernels.kernels.softmax_state import _LABEL_LOGIT as _OF_LABEL
from dpo_kernels.kernels.softmax_state import _MAXIMUM as _OF_MAXIMUM
from dpo_kernels.kernels.softmax_state import _TOTAL as _OF_TOTAL
from dpo_kernels.kernels.softmax_state import FIELDS as _FIELDS

FIELDS, FAR = gl.constexpr(_FIELDS.value), gl.constexpr(_FAR.value)
MAXIMUM, TOTAL, LABEL_LOGIT = (gl.constexpr(field.value) for field in (_OF_MAXIMUM, _OF_TOTAL, _OF_LABEL))
LOWEST = gl.constexpr(-3.4028234663852886e38)
LOG2E = gl.constexpr(1.4426950408889634)
LEAD = gl.constexpr(2)  # slices, fewer than STAGES: by the model of benchmarks.predict the best of any latency


@gluon.jit
def place(program, row_blocks, splits, GROUP: gl.constexpr):
    """Of a program in the order of fused.forward_kernel's grid: its block of rows, and its split."""
    group = program // (GROUP * splits)
    height = min(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * splits)
    return group * GROUP + within % height, within // height


@gluon.jit
def load_slices(
    hidden, weight, of_hidden, of_weight, full, empty, n, V, D, split, GROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The warp that loads: slice by slice, each into the next of STAGES buffers once both groups are done with it."""
    row_blocks, splits = gl.cdiv(n, BLOCK_M), gl.cdiv(V, split)
    step = 0
    for program in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        block, part = place(program, row_blocks, splits, GROUP)
        for column in range(part * split, min((part + 1) * split, V), BLOCK_N):
            for k in range(0, D, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)  # the first round finds all of them free
                mbarrier.expect(full.index(stage), hidden.block_type.nbytes + weight.block_type.nbytes)
                tma.async_copy_global_to_shared(hidden, [block * BLOCK_M, k], full.index(stage), of_hidden.index(stage))
                tma.async_copy_global_to_shared(weight, [column, k], full.index(stage), of_weight.index(stage))
                step += 1


@gluon.jit
def accumulate_blocks(
    of_hidden, of_weight, full, empty, ahead, labels, partials, exps, block_maxima, bases, moved, n, V, D, first, split,
    exps_stride, maxima_stride, outer, HALF: gl.constexpr, SAVE: gl.constexpr, ONE_BASE: gl.constexpr,
    MAXIMA_COLUMNS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Four warps: the products of one half of a block's rows, and what fused.accumulate_block does with them."""
    rows_here: gl.constexpr = BLOCK_M // 2
    product: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )  # fmt: skip
    by_row: gl.constexpr = gl.SliceLayout(1, product)
    by_column: gl.constexpr = gl.SliceLayout(0, product)
    row_blocks, splits = gl.cdiv(n, BLOCK_M), gl.cdiv(V, split)
    if HALF == 1:
        mbarrier.wait(ahead.index(0), 0)
    step = 0
    for program in range(gl.program_id(0), row_blocks * splits, gl.num_programs(0)):
        block, part = place(program, row_blocks, splits, GROUP)
        rows = block * BLOCK_M + HALF * rows_here + gl.arange(0, rows_here, by_row)
        inside = rows < n
        local = (gl.load(labels + rows, mask=inside, other=-1) - first).to(gl.int32)
        end = min((part + 1) * split, V)
        maximum = gl.full([rows_here], float("-inf"), gl.float32, by_row)
        total = gl.zeros([rows_here], gl.float32, by_row)
        label_logit = gl.zeros([rows_here], gl.float32, by_row)
        for column in range(part * split, end, BLOCK_N):
            sums = warpgroup_mma_init(gl.zeros([rows_here, BLOCK_N], gl.float32, product))
            for k in range(0, D, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                h = of_hidden.index(stage).slice(HALF * rows_here, rows_here)
                w = of_weight.index(stage).permute((1, 0))
                sums = warpgroup_mma(h, w, sums, use_acc=k > 0, is_async=True)
                # The product before this one is done then: its buffers are free.
                sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[sums]))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
                if HALF == 0:
                    mbarrier.arrive(ahead.index(0), pred=step == LEAD)
                step += 1
            a = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

            at = local - column
            here = gl.max(((at >= 0) & (at < BLOCK_N)).to(gl.int32), 0)
            columns = column + gl.arange(0, BLOCK_N, by_column)
            if (here > 0) | (column + BLOCK_N > end):
                at_label = columns[None, :] == local[:, None]
                label_logit += gl.sum(gl.where(at_label, a, 0.0), 1) * outer
                a = gl.where(at_label | (columns >= end)[None, :], float("-inf"), a)
            largest = gl.max(a, 1)
            e = gl.exp2((a - gl.maximum(largest, LOWEST)[:, None]) * (outer * LOG2E))
            of_block = largest * outer
            sum_of_block = gl.sum(e, 1)
            sum_of_block = gl.where(of_block == float("inf"), float("nan"), sum_of_block)
            sum_of_block = gl.where(of_block == float("-inf"), 0.0 * sum_of_block, sum_of_block)
            if SAVE:
                base = gl.maximum(of_block, LOWEST)
                if ONE_BASE:
                    of_row = gl.load(bases + rows, mask=inside, other=0.0)
                    near = base - of_row < FAR
                    e = e * gl.exp(gl.where(near, base - of_row, 0.0))[:, None]
                    base = gl.where(near, of_row, base)
                    gl.store(moved + rows, gl.full([rows_here], 1, gl.int32, by_row), mask=inside & (near == 0))
                place_of_rows = (rows.to(gl.int64) * exps_stride)[:, None]
                mask = inside[:, None] & (columns < end)[None, :]
                gl.store(exps + place_of_rows + columns[None, :], e.to(exps.dtype.element_ty), mask=mask)
                slot = column // MAXIMA_COLUMNS
                gl.store(block_maxima + rows.to(gl.int64) * maxima_stride + slot, base, mask=inside)
            merged = gl.maximum(maximum, of_block)
            finite = gl.maximum(merged, LOWEST)
            total = total * gl.exp(maximum - finite) + sum_of_block * gl.exp(of_block - finite)
            maximum = merged
        state = partials + part.to(gl.int64) * FIELDS * n + rows
        gl.store(state + MAXIMUM * n, maximum, mask=inside)
        gl.store(state + TOTAL * n, total, mask=inside)
        gl.store(state + LABEL_LOGIT * n, label_logit, mask=inside)
    if HALF == 0:
        mbarrier.arrive(ahead.index(0), pred=step <= LEAD)  # of so few slices in all


@gluon.jit(do_not_specialize=["n"])
def hopper_forward_kernel(
    hidden,  # descriptor of (n, D), blocks of (BLOCK_M, BLOCK_K)
    weight,  # descriptor of (V, D), blocks of (BLOCK_N, BLOCK_K)
    labels,  # as of fused.forward_kernel, like all that follow
    partials,
    exps,
    block_maxima,
    bases,
    moved,
    n,
    V,
    D,
    first,
    split,
    exps_stride,
    maxima_stride,
    outer,
    SAVE: gl.constexpr,
    ONE_BASE: gl.constexpr,
    MAXIMA_COLUMNS: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """As fused.forward_kernel of a plain call, to the order of its sums. Launched with a program a multiprocessor and
    four warps, which become the first group.

    Shared memory: STAGES * (BLOCK_M + BLOCK_N) * BLOCK_K numbers; 192 KiB of 128 x 256 x 64 in 4 stages.
    """
    of_hidden = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_M, BLOCK_K], hidden.layout)
    of_weight = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_N, BLOCK_K], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ahead.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                accumulate_blocks,
                (
                    of_hidden, of_weight, full, empty, ahead, labels, partials, exps, block_maxima, bases, moved, n, V,
                    D, first, split, exps_stride, maxima_stride, outer, 0, SAVE, ONE_BASE, MAXIMA_COLUMNS, GROUP,
                    STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                accumulate_blocks,
                (
                    of_hidden, of_weight, full, empty, ahead, labels, partials, exps, block_maxima, bases, moved, n, V,
                    D, first, split, exps_stride, maxima_stride, outer, 1, SAVE, ONE_BASE, MAXIMA_COLUMNS, GROUP,
                    STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                load_slices,
                (
                    hidden, weight, of_hidden, of_weight, full, empty, n, V, D, split, GROUP, STAGES, BLOCK_M, BLOCK_N,
                    BLOCK_K,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
