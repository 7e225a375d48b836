"""Kernels that multiply: a block of logits is made, accumulated and forgotten by one program, never in memory.

    forward_kernel     states of splits of the vocabulary, and exponentials to be saved or summed by a frozen head
    recompute_kernel   d loss / d a, from logits made again

hidden (n, D) and weight (V, D) are read through tensor descriptors (DESCRIPTORS) or pointers. Sums are float32; float32
operands are multiplied as `PRECISION` says.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.keep import FAR
from dpo_kernels.kernels.logits import load_row_grads, plain_row_gradient, row_gradient
from dpo_kernels.kernels.softmax_state import (
    FIELDS,
    LOG_ZERO,  # noqa: F401  (read by the functions that are inlined here)
    LOWEST,
    block_state,
    empty_state,
    merge,
    plain_block_state,
    rescaled,
    store_state,
    transform,
)


@triton.jit
def multiply(
    hidden, weight, row, column, n, V, D, hidden_stride, hidden_step, weight_stride, weight_step,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[row:] @ weight[column:].T, (BLOCK_M, BLOCK_N) float32. Rows and columns beyond the last are finite
    or copies: the caller leaves them out. EVEN: D is a multiple of BLOCK_K.

    Tensor cores truncate as they accumulate: products of TF32 parts are added to the sum outside of them, rounded."""
    if DESCRIPTORS:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            h = hidden.load([row, k])
            w = weight.load([column, k])
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            if PRECISION == "tf32x3":
                total += tl.dot(h, w.T, input_precision=PRECISION)
            else:
                total = tl.dot(h, w.T, total, input_precision=PRECISION)
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), n - 1)
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), V - 1)
        total = multiply_rows(
            hidden, weight, rows, columns, D, hidden_stride, hidden_step, weight_stride, weight_step, WIDEN, PRECISION,
            EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return total


@triton.jit
def multiply_rows(
    hidden, weight, rows, columns, D, hidden_stride, hidden_step, weight_stride, weight_step,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[rows] @ weight[columns].T through pointers, of whatever rows (BLOCK_M,) and columns (BLOCK_N,)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    h_pointer = hidden + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :] * hidden_step
    w_pointer = weight + columns.to(tl.int64)[None, :] * weight_stride + depth[:, None] * weight_step
    for k in tl.range(0, D, BLOCK_K):
        if EVEN:
            h = tl.load(h_pointer)
            w = tl.load(w_pointer)
        else:
            h = tl.load(h_pointer, mask=(depth < D - k)[None, :], other=0.0)
            w = tl.load(w_pointer, mask=(depth < D - k)[:, None], other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        if PRECISION == "tf32x3":
            total += tl.dot(h, w, input_precision=PRECISION)
        else:
            total = tl.dot(h, w, total, input_precision=PRECISION)
        h_pointer += BLOCK_K * hidden_step
        w_pointer += BLOCK_K * weight_step
    return total


@triton.jit
def add_bias(a, bias, columns, V, BIASED: tl.constexpr):
    if BIASED:
        a += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    return a


@triton.jit
def store_block(
    out, block, row, column, stride, inside, end,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the rows `inside` and the columns before `end` of a block; a descriptor knows both itself."""
    if DESCRIPTORS:
        out.store([row, column], block.to(out.dtype))
    else:
        # Only the block's own place needs 64 bits: an offset for every element would fill the registers.
        corner = out + tl.cast(row, tl.int64) * stride + column
        offsets = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (column + tl.arange(0, BLOCK_N) < end)[None, :]
        tl.store(corner + offsets, block.to(out.dtype.element_ty), mask=mask)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def mark_columns(
    flags, known_maximum, known_total, exps, share, base, old, new, dropped, bound, column, end, inside,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a block (BLOCK_M, BLOCK_N) the columns in which some row has a share of at least the bound of its sum so far,
    or is no number: their flags become 1. Those that were 1 stay, as labels' do.

    flags: pointer to the group's. known_maximum, known_total (M,): of the rows before this program, labels included.
    exps (M, N) relative to base (M,); share: the same, times the cap's derivative; old, new: the program's states
    before and after the block. Returns `dropped` (M,), what the program left out, relative to the new one's maximum.

    A bit a column: 32 of them go from thread to thread as one number, and are no flag each in every thread's registers.
    """
    finite = tl.maximum(new[0], LOWEST)
    # Sums only grow: a share of what is known so far is no smaller than of the whole.
    so_far = known_total * tl.exp(known_maximum - base) + new[1] * tl.exp(finite - base)
    limit = tl.where(inside, bound * so_far, float("inf"))
    words: tl.constexpr = BLOCK_N // 32
    bit = tl.arange(0, 32)
    passes = tl.reshape(~(exps < limit[:, None]), (BLOCK_M, words, 32))
    stays = tl.reduce(tl.reduce(tl.where(passes, 1 << bit, 0), 2, either), 0, either)
    at = column + tl.arange(0, words)[:, None] * 32 + bit[None, :]
    before = tl.load(flags + at, mask=at < end, other=1).to(tl.int32)
    stays |= tl.reduce(before << bit[None, :], 1, either)
    tl.store(flags + at, (stays[:, None] >> bit[None, :] & 1).to(tl.int8), mask=at < end)
    out = (stays[None, :, None] >> bit & 1) == 0
    left = tl.sum(tl.sum(tl.where(out, tl.reshape(share, (BLOCK_M, words, 32)), 0.0), 2), 1)
    return rescaled(dropped, old[0] - finite) + rescaled(left, base - finite)


@triton.jit
def accumulate_block(
    state, dropped, a, row, column, end, inside, local, bias, exps, block_maxima, bases, moved, flags,
    known_maximum, known_total, V, first, exps_stride, maxima_stride, flags_stride, inner, outer, bound,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, PLAIN: tl.constexpr, OUTPUTS: tl.constexpr, SAVE: tl.constexpr,
    ONE_BASE: tl.constexpr, MARK: tl.constexpr, MAXIMA_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state after the products a (R, BLOCK_N) from `column` on, and what was left out if MARK, which writes flags;
    writes their exponentials if SAVE."""
    if PLAIN:
        block, e, base = plain_block_state(a, column, local, end, outer, BLOCK_N)
    else:
        columns = column + tl.arange(0, BLOCK_N)
        z, derivative = transform(add_bias(a, bias, columns, V, BIASED), inner, outer, CAPPED)
        block, e, base = block_state(z, columns, local, end, first, OUTPUTS)
    if SAVE:
        tl.static_assert(not (ONE_BASE and CAPPED), "a cap's exponentials are relative to each block's maximum")
        if ONE_BASE:
            rows = row + tl.arange(0, BLOCK_M)
            of_row = tl.load(bases + rows, mask=inside, other=0.0)  # again: held, it would fill registers
            near = base - of_row < FAR
            e *= tl.exp(tl.where(near, base - of_row, 0.0))[:, None]
            base = tl.where(near, of_row, base)
            tl.store(moved + rows, 1, mask=inside & ~near)
        if CAPPED:
            e = tl.where(columns[None, :] == local[:, None], 1.0, e)
            if not WIDE:
                t = z / outer  # holds no registers while states merge; absolutely within 2e-7, below half precision's
                derivative = 1.0 - t * t
            e *= derivative
        store_block(exps, e, row, column, exps_stride, inside, end, DESCRIPTORS, BLOCK_M, BLOCK_N)
        corner = block_maxima + tl.cast(row, tl.int64) * maxima_stride + column // MAXIMA_COLUMNS
        tl.store(corner + tl.arange(0, BLOCK_M) * maxima_stride, base, mask=inside & (column < end))
    if MARK:
        share = e
        if CAPPED:
            share = e * derivative
        of_group = flags + tl.cast(row // BLOCK_M, tl.int64) * flags_stride
        merged = merge(state, block, OUTPUTS)
        dropped = mark_columns(
            of_group, known_maximum, known_total, e, share, base, state, merged, dropped, bound, column, end, inside,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        return merged, dropped
    else:  # noqa: RET505  (the compiler wants one of two)
        return merge(state, block, OUTPUTS), dropped


@triton.jit(do_not_specialize=["n"])
def forward_kernel(
    hidden,  # (n, D), or its descriptor
    weight,  # (V, D), or its descriptor
    bias,  # (V,)
    labels,  # (n,) int64
    partials,  # (splits, FIELDS, n) float32, written
    exps,  # (n, V) in the compute dtype, written if SAVE: exp(z - base), 0 at the label; if CAPPED 1 at the
    #     label, all times the cap's derivative, which WIDE numbers hold to the last digit
    block_maxima,  # (n, slots) float32, written if SAVE: a row's maximum over a block of columns, in the first of the
    #     block's slots of MAXIMA_COLUMNS columns; if ONE_BASE, the row's base
    bases,  # (n,) float32, read if ONE_BASE: what rows are relative to, but for blocks far above it
    moved,  # (n,) int32, written if ONE_BASE: 1 where there is such a block
    n,
    V,
    D,
    first,
    split,  # columns of a split, a multiple of BLOCK_N
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    exps_stride,
    maxima_stride,
    inner,
    outer,
    flags,  # (groups of BLOCK_M tokens, V) int8, written if MARK: 1 where a column stays; those that are 1 already do
    known_maxima,  # (n,) float32, like known_totals read if MARK: each row's maximum, and sum of exponentials relative
    #     to it, before this part of the vocabulary, its label's included
    known_totals,
    drops,  # (splits, n) float32, written if MARK: what rows have in columns that do not stay, relative to the split's
    #     maximum, times the cap's derivative
    flags_stride,
    bound,  # the least share of a column that stays
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    PLAIN: tl.constexpr,  # not BIASED, not CAPPED, no OUTPUTS, outer > 0, half precision
    OUTPUTS: tl.constexpr,
    SAVE: tl.constexpr,
    ONE_BASE: tl.constexpr,
    MARK: tl.constexpr,
    MAXIMA_COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """States of rows, one of each split of the vocabulary: product, online log-sum-exp and gather in one kernel.

    Programs that run together are GROUP blocks of rows, whose hidden states stay in the L2 cache, by a few splits, of
    whose weight each column block is read once for the group.

    FLOP: 2 n D V. Traffic: the weight once for every GROUP * BLOCK_M rows, hidden states once; if SAVE, n V numbers
    written. On an H200 (780 TFLOP/s): 13.1 ms of (8192, 4096, 151936).
    """
    row_blocks = tl.cdiv(n, BLOCK_M)
    splits = tl.cdiv(V, split)
    program = tl.program_id(0)
    group = program // (GROUP * splits)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * splits)
    row = (group * GROUP + within % height) * BLOCK_M
    part = within // height
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < n
    local = (tl.load(labels + rows, mask=inside, other=-1) - first).to(tl.int32)
    start = part * split
    end = tl.minimum(start + split, V)
    state = empty_state(BLOCK_M)
    dropped = tl.zeros((BLOCK_M,), tl.float32)
    known_maximum, known_total = dropped, dropped
    tl.static_assert(not (SAVE and MARK), "saved exponentials are marked when all sums are known")
    if MARK:
        known_maximum = tl.load(known_maxima + rows, mask=inside, other=0.0)
        known_total = tl.load(known_totals + rows, mask=inside, other=0.0)
    for column in tl.range(start, end, BLOCK_N, warp_specialize=SPECIALIZED):
        a = multiply(
            hidden, weight, row, column, n, V, D, hidden_stride, hidden_step, weight_stride, weight_step,
            DESCRIPTORS, WIDEN, PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        state, dropped = accumulate_block(
            state, dropped, a, row, column, end, inside, local, bias, exps, block_maxima, bases, moved, flags,
            known_maximum, known_total, V, first, exps_stride, maxima_stride, flags_stride, inner, outer, bound, BIASED,
            CAPPED, PLAIN, OUTPUTS, SAVE, ONE_BASE, MARK, MAXIMA_COLUMNS, WIDE, DESCRIPTORS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if MARK:
        tl.store(drops + tl.cast(part, tl.int64) * n + rows, dropped, mask=inside)
    store_state(partials + tl.cast(part, tl.int64) * FIELDS * n + rows, n, inside, state, OUTPUTS)


@triton.jit(do_not_specialize=["n"])
def recompute_kernel(
    hidden,  # (n, D), or its descriptor
    weight,  # (V, D), or its descriptor
    bias,  # (V,)
    out,  # (n, V) in the compute dtype, written
    flags,  # (groups of BLOCK_M tokens, V) int8, read if MASK: a column whose flag is 0 is 0
    labels,  # (n,) int64
    log_probs,  # (n,) float32, like all that follow
    maxima,
    log_sums,
    grads,
    entropies,
    grad_entropies,
    n,
    V,
    D,
    first,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    out_stride,
    flags_stride,
    inner,
    outer,
    slope,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """d loss / d a of a tile, from logits made again by the products that forward_kernel formed, in the same order.

    FLOP: 2 n D V. Traffic: n V numbers written in the compute dtype, the operands as in forward_kernel. On an H200
    (780 TFLOP/s, 4.3 TB/s): 176 us for a tile of (4096, 4096) at D = 4096, of which the stores would take 8.
    """
    row_blocks = tl.cdiv(n, BLOCK_M)
    column_blocks = tl.cdiv(V, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = program % (GROUP * column_blocks)
    row = (group * GROUP + within % height) * BLOCK_M
    column = within // height * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < n
    a = multiply(
        hidden, weight, row, column, n, V, D, hidden_stride, hidden_step, weight_stride, weight_step,
        DESCRIPTORS, WIDEN, PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    local, log_prob, maximum, log_sum, grad, entropy, grad_entropy = load_row_grads(
        labels, log_probs, maxima, log_sums, grads, entropies, grad_entropies, rows, inside, first, OUTPUTS
    )
    if BIASED or CAPPED or OUTPUTS != 0:
        columns = column + tl.arange(0, BLOCK_N)
        z, derivative = transform(add_bias(a, bias, columns, V, BIASED), inner, outer, CAPPED)
        dz = row_gradient(
            z, columns, local, log_prob, maximum, log_sum, grad, entropy, grad_entropy, derivative, slope, CAPPED,
            OUTPUTS,
        )  # fmt: skip
    else:
        dz = plain_row_gradient(a, column, local, log_prob, maximum, log_sum, grad, outer, slope, BLOCK_N)
    if MASK:
        of_group = flags + tl.cast(row // BLOCK_M, tl.int64) * flags_stride
        at = column + tl.arange(0, BLOCK_N)
        dz = tl.where((tl.load(of_group + at, mask=at < V, other=0) != 0)[None, :], dz, 0.0)
    store_block(out, dz, row, column, out_stride, inside, V, DESCRIPTORS, BLOCK_M, BLOCK_N)
