"""Kernels over a matrix of products or logits that is in memory: the logits themselves, or a tile that cuBLAS made.

    accumulate_kernel states of rows
    fold_kernel       the same of plain calls, faster
    exps_kernel       exponentials, to be saved or summed by a frozen head
    gradient_kernel   d loss / d a from a
    saved_kernel      d loss / d a from saved exponentials
    rebase_kernel     saved exponentials as the frozen head's operand

Each program reads a split of a few rows; rows lie `stride` numbers apart, in int64, and programs on grid axis 0.
`index` names the matrix' row of each token that counts, `out_index` the result's (INDEXED), else they are the first n
rows.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.softmax_state import (
    ENTROPY,
    FIELDS,
    LOG2E,
    LOG_ZERO,
    LOWEST,
    beyond,
    block_state,
    empty_state,
    expm1,
    merge,
    store_state,
    transform,
)


@triton.jit
def load_block(a, offsets, columns, end, bias, inner, outer, inside, CAPPED: tl.constexpr, BIASED: tl.constexpr):
    """Logits of a block and the cap's derivative; a: its pointer, offsets (R,) of its rows. Products of columns from
    `end` on are 0."""
    mask = inside[:, None] & (columns < end)[None, :]
    z = tl.load(a + offsets[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + columns, mask=columns < end, other=0.0).to(tl.float32)[None, :]
    return transform(z, inner, outer, CAPPED)


@triton.jit
def follow(maximum, share_base, total, rows, inside, D, total_stride, tolerance, BLOCK_N: tl.constexpr):
    """The base of the rows' shares: it moves to the maximum only where that is larger by more than `tolerance`, and the
    row of `total`, a sum relative to the old base, is rescaled there."""
    old = tl.load(share_base + rows, mask=inside, other=0.0)
    grown = maximum - old > tolerance
    if tl.max(grown.to(tl.int32), 0) > 0:
        scale = tl.where(grown, tl.exp(old - maximum), 1.0)
        for column in tl.range(0, D, BLOCK_N):
            columns = column + tl.arange(0, BLOCK_N)
            mask = (inside & grown)[:, None] & (columns < D)[None, :]
            pointer = total + rows.to(tl.int64)[:, None] * total_stride + columns[None, :]
            tl.store(pointer, tl.load(pointer, mask=mask, other=0.0) * scale[:, None], mask=mask)
    base = tl.where(grown, maximum, old)
    tl.debug_barrier()  # every warp has read the old base before one of them writes the new one
    tl.store(share_base + rows, base, mask=inside)
    return base


@triton.jit
def split_of_rows(index, labels, n, V, first, split, stride, INDEXED: tl.constexpr, BLOCK_M: tl.constexpr):
    """What a program reads: its rows, which of them are there, where they begin, their labels in the tile, and which
    split of the columns, from where to where."""
    row_blocks = tl.cdiv(n, BLOCK_M)
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // row_blocks
    inside = rows < n
    offsets = (tl.load(index + rows, mask=inside, other=0) if INDEXED else rows.to(tl.int64)) * stride
    local = (tl.load(labels + rows, mask=inside, other=-1) - first).to(tl.int32)
    start = part * split
    return rows, inside, offsets, local, part, start, tl.minimum(start + split, V)


@triton.jit(do_not_specialize=["n"])
def accumulate_kernel(
    a,  # (rows, V) any floating dtype
    index,  # (n,) int64
    labels,  # (n,) int64
    bias,  # (V,)
    partials,  # (splits, FIELDS, n) float32, written
    n,
    V,
    first,
    split,
    stride,
    inner,
    outer,
    INDEXED: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """States of rows, one of each split, in one read of a.

    Traffic: n V numbers read. On an H200 (4.3 TB/s): 0.6 ms for bfloat16 logits of (8192, 151936).
    """
    rows, inside, offsets, local, part, start, end = split_of_rows(
        index, labels, n, V, first, split, stride, INDEXED, BLOCK_M
    )
    state = empty_state(BLOCK_M)
    for column in tl.range(start, end, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        z, _ = load_block(a, offsets, columns, end, bias, inner, outer, inside, CAPPED, BIASED)
        block, _, _ = block_state(z, columns, local, end, first, OUTPUTS)
        state = merge(state, block, OUTPUTS)
    store_state(partials + tl.cast(part, tl.int64) * FIELDS * n + rows, n, inside, state, OUTPUTS)


@triton.jit(do_not_specialize=["n"])
def fold_kernel(
    a,  # (rows, V) any floating dtype
    index,  # (n,) int64
    labels,  # (n,) int64
    partials,  # (splits, FIELDS, n) float32, written
    n,
    V,
    first,
    split,
    stride,
    outer,
    INDEXED: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether each row starts on a multiple of 16 numbers
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """accumulate_kernel without bias, cap and statistics, outer > 0. It takes GROUPS x WIDTH columns at a time, WIDTH
    of them one load of 16 bytes (GROUPS apart where rows do not start so, and loads are narrow): each group
    has its own state, so that no thread waits for another until the end.

    As in `plain_block_state` the largest is subtracted before anything is scaled, and few blocks look for the label.

    Traffic: as accumulate_kernel's; 138 instructions of a warp for 4,096 columns on sm_90, not 374 and 9 barriers.
    """
    rows, inside, offsets, local, part, start, end = split_of_rows(
        index, labels, n, V, first, split, stride, INDEXED, BLOCK_M
    )
    scale = outer * LOG2E
    if ALIGNED:
        block = (tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, :]
    else:
        block = (tl.arange(0, GROUPS)[:, None] + tl.arange(0, WIDTH)[None, :] * GROUPS)[None, :, :]
    largest = tl.zeros((BLOCK_M, GROUPS), tl.float32) - float("inf")
    total = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    label_logit = tl.zeros((BLOCK_M, GROUPS), tl.float32)
    for column in tl.range(start, end, GROUPS * WIDTH):
        columns = column + block
        mask = inside[:, None, None] & (columns < end)
        z = tl.load(a + offsets[:, None, None] + columns, mask=mask, other=float("-inf")).to(tl.float32)
        at = local - column
        if tl.max(((at >= 0) & (at < GROUPS * WIDTH)).to(tl.int32), 0) > 0:
            at_label = columns == local[:, None, None]
            label_logit += tl.sum(tl.where(at_label, z, 0.0), 2)
            z = tl.where(at_label, float("-inf"), z)
        grown = tl.maximum(largest, tl.max(z, 2))
        base = tl.maximum(grown, LOWEST)
        total = total * tl.exp2((largest - base) * scale) + tl.sum(tl.exp2((z - base[:, :, None]) * scale), 2)
        largest = grown
    of_row = tl.max(largest, 1)
    total = tl.sum(total * tl.exp2((largest - tl.maximum(of_row, LOWEST)[:, None]) * scale), 1)
    maximum = of_row * outer
    total = beyond(maximum, total)
    state = (maximum, total, tl.sum(label_logit, 1) * outer, total, total, total, total)
    store_state(partials + tl.cast(part, tl.int64) * FIELDS * n + rows, n, inside, state, 0)


@triton.jit(do_not_specialize=["n", "slots"])
def exps_kernel(
    a,  # (n, V) float32
    labels,  # (n,) int64
    bias,  # (V,)
    maxima,  # (n,) float32: of the rows in this tile
    exps,  # (n, V), written; may be a
    block_maxima,  # (n, slots) float32, written if SAVED: the base, in every slot
    share_base,  # (n,) float32, read and written if not SAVED
    total,  # (n, D) float32, rescaled if not SAVED
    n,
    V,
    D,
    first,
    stride,
    exps_stride,
    maxima_stride,
    slots,
    total_stride,
    inner,
    outer,
    tolerance,
    SAVED: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Exponentials of a tile's logits, times the cap's derivative. A kernel apart from accumulate_kernel: whether
    they are wanted does not change how the statistics are summed.

    SAVED: relative to the row's maximum in this tile, 0 at the label, or 1 if CAPPED. Else the frozen head's operand: 0
    at the label, and relative to a base that follows the maximum only when that has grown by more than `tolerance`.

    Traffic: n V numbers of a read (from cache, if the tile is there) and n V written. On an H200 (4.3 TB/s): 94 us for
    a tile of (8192, 8192), float32 to bfloat16.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    place = rows.to(tl.int64)
    local = (tl.load(labels + rows, mask=inside, other=-1) - first).to(tl.int32)
    base = tl.maximum(tl.load(maxima + rows, mask=inside, other=0.0), LOWEST)
    AT_LABEL: tl.constexpr = 1.0 if SAVED and CAPPED else 0.0
    if SAVED:
        for start in tl.range(0, slots, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            mask = inside[:, None] & (at < slots)[None, :]
            tl.store(block_maxima + (place * maxima_stride)[:, None] + at[None, :], base[:, None], mask=mask)
    else:
        base = follow(base, share_base, total, rows, inside, D, total_stride, tolerance, BLOCK_N)
    for column in tl.range(0, V, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        z, derivative = load_block(a, place * stride, columns, V, bias, inner, outer, inside, CAPPED, BIASED)
        e = tl.where(columns[None, :] == local[:, None], AT_LABEL, tl.exp(z - base[:, None]))
        if CAPPED:
            e *= derivative
        mask = inside[:, None] & (columns < V)[None, :]
        tl.store(exps + (place * exps_stride)[:, None] + columns[None, :], e.to(exps.dtype.element_ty), mask=mask)


@triton.jit
def row_gradient(
    z, columns, labels, log_prob, maximum, log_sum, grad, entropy, grad_entropy, derivative, slope,
    CAPPED: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """d loss / d a (R, C) from logits: -p (g + gH (log p + H)), -g expm1(log p) - ... at the label, through the cap."""
    at_label = -grad * expm1(log_prob)
    below = z - maximum[:, None]
    if ENTROPY & OUTPUTS:
        log_p = below - log_sum[:, None]
        spread = tl.maximum(log_p, LOG_ZERO) + entropy[:, None]
        dz = -tl.exp(log_p) * (grad[:, None] + grad_entropy[:, None] * spread)
        at_label -= grad_entropy * tl.exp(log_prob) * (tl.maximum(log_prob, LOG_ZERO) + entropy)
    else:
        dz = tl.exp(below) * (-grad * tl.exp(-log_sum))[:, None]
    dz = tl.where(columns[None, :] == labels[:, None], at_label[:, None], dz)
    if CAPPED:
        dz *= derivative
    return dz * slope


@triton.jit
def plain_row_gradient(
    a, column, labels, log_prob, maximum, log_sum, grad, outer, slope, BLOCK_N: tl.constexpr
):  # fmt: skip
    """`row_gradient` of products a (R, C) from `column` on, whose logits are a * outer, without a cap or an entropy.

    The label is in few blocks, and the others do not look for it."""
    below = a * outer - maximum[:, None]
    dz = tl.exp2(below * LOG2E) * (-grad * tl.exp(-log_sum) * slope)[:, None]
    at = labels - column
    if tl.max(((at >= 0) & (at < BLOCK_N)).to(tl.int32), 0) > 0:
        columns = column + tl.arange(0, BLOCK_N)
        dz = tl.where(columns[None, :] == labels[:, None], (-grad * expm1(log_prob) * slope)[:, None], dz)
    return dz


@triton.jit
def load_row_grads(
    labels, log_probs, maxima, log_sums, grads, entropies, grad_entropies, rows, inside, first, OUTPUTS: tl.constexpr
):
    """The label in the tile and the six numbers of each row that `row_gradient` takes."""
    local = (tl.load(labels + rows, mask=inside, other=-1) - first).to(tl.int32)
    log_prob = tl.load(log_probs + rows, mask=inside, other=0.0)
    maximum = tl.load(maxima + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + rows, mask=inside, other=0.0)
    grad = tl.load(grads + rows, mask=inside, other=0.0)
    entropy, grad_entropy = grad, grad
    if ENTROPY & OUTPUTS:
        entropy = tl.load(entropies + rows, mask=inside, other=0.0)
        grad_entropy = tl.load(grad_entropies + rows, mask=inside, other=0.0)
    return local, log_prob, maximum, log_sum, grad, entropy, grad_entropy


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    a,  # (rows, V) any floating dtype
    index,  # (n,) int64
    out,  # (rows, V) any floating dtype; may be a
    out_index,  # (n,) int64: rows of out
    bias,  # (V,)
    labels,  # (n,) int64
    log_probs,  # (n,) float32, like all that follow
    maxima,
    log_sums,
    grads,
    entropies,
    grad_entropies,
    n,
    V,
    first,
    stride,
    out_stride,
    inner,
    outer,
    slope,
    INDEXED: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d loss / d a of rows of a, in one read and one write; out may be a itself.

    Traffic: n V numbers read and n V written. On an H200 (4.3 TB/s): 1.2 ms for bfloat16 logits of (8192, 151936).
    """
    column_blocks = tl.cdiv(V, BLOCK_N)
    rows = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    place = rows.to(tl.int64)
    to = place
    if INDEXED:
        place = tl.load(index + rows, mask=inside, other=0)
        to = tl.load(out_index + rows, mask=inside, other=0)
    local, log_prob, maximum, log_sum, grad, entropy, grad_entropy = load_row_grads(
        labels, log_probs, maxima, log_sums, grads, entropies, grad_entropies, rows, inside, first, OUTPUTS
    )
    z, derivative = load_block(a, place * stride, columns, V, bias, inner, outer, inside, CAPPED, BIASED)
    dz = row_gradient(
        z, columns, local, log_prob, maximum, log_sum, grad, entropy, grad_entropy, derivative, slope, CAPPED, OUTPUTS
    )
    mask = inside[:, None] & (columns < V)[None, :]
    tl.store(out + (to * out_stride)[:, None] + columns[None, :], dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def saved_row_gradient(
    e, base, columns, labels, log_prob, maximum, log_sum, grad, slope, CAPPED: tl.constexpr
):  # fmt: skip
    """`row_gradient` of saved exponentials (R, C), which are relative to base (R, C)."""
    at_label = (-grad * expm1(log_prob))[:, None]
    dz = -grad[:, None] * e * tl.exp(base - maximum[:, None] - log_sum[:, None])
    if CAPPED:
        at_label *= e  # the cap's derivative
    return tl.where(columns[None, :] == labels[:, None], at_label, dz) * slope


@triton.jit(do_not_specialize=["n"])
def saved_kernel(
    exps,  # (n, V) as exps_kernel or forward_kernel wrote it
    block_maxima,  # (n, slots) float32
    out,  # (n, V), written
    labels,  # (n,) int64
    log_probs,  # (n,) float32, like all that follow
    maxima,
    log_sums,
    grads,
    n,
    V,
    first,
    stride,
    maxima_stride,
    out_stride,
    slope,
    flags,  # (groups of TOKENS, V) int8, read if MASK: a column whose flag is 0 is 0
    flags_stride,
    CAPPED: tl.constexpr,
    MASK: tl.constexpr,
    TOKENS: tl.constexpr,
    MAXIMA_COLUMNS: tl.constexpr,  # that share a base
    SLOTS: tl.constexpr,  # of block_maxima for as many columns, the first of which holds it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d loss / d a from saved exponentials, which stay as they are: backward may run again.

    Traffic: n V numbers read and written, in the compute dtype. On an H200 (4.3 TB/s): 1.2 ms of (8192, 151936).
    """
    column_blocks = tl.cdiv(V, BLOCK_N)
    rows = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    place = rows.to(tl.int64)
    local, log_prob, maximum, log_sum, grad, _, _ = load_row_grads(
        labels, log_probs, maxima, log_sums, grads, grads, grads, rows, inside, first, 0
    )
    mask = inside[:, None] & (columns < V)[None, :]
    slot = (columns // MAXIMA_COLUMNS * SLOTS)[None, :]
    base = tl.load(block_maxima + (place * maxima_stride)[:, None] + slot, mask=mask, other=0.0)
    e = tl.load(exps + (place * stride)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    dz = saved_row_gradient(e, base, columns, local, log_prob, maximum, log_sum, grad, slope, CAPPED)
    if MASK:
        of_group = flags + (place // TOKENS * flags_stride)[:, None]
        dz = tl.where(tl.load(of_group + columns[None, :], mask=mask, other=0) != 0, dz, 0.0)
    tl.store(out + (place * out_stride)[:, None] + columns[None, :], dz.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "slots"])
def rebase_kernel(
    exps,  # (n, V) as forward_kernel wrote it; overwritten
    block_maxima,  # (n, slots) float32
    labels,  # (n,) int64
    share_base,  # (n,) float32, read and written
    total,  # (n, D) float32, rescaled
    n,
    V,
    D,
    first,
    stride,
    maxima_stride,
    slots,
    total_stride,
    tolerance,
    MAXIMA_COLUMNS: tl.constexpr,  # that share a base
    SLOTS: tl.constexpr,  # of block_maxima for as many columns, the first of which holds it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Saved exponentials, but 0 at the label, relative to one base a row: what exps_kernel writes for a frozen head.

    Traffic: n V numbers read and written, in the compute dtype; n D float32 where a row's base moves.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    place = rows.to(tl.int64)
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + LOWEST
    for start in tl.range(0, slots, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (at < slots)[None, :]
        found = tl.load(
            block_maxima + (place * maxima_stride)[:, None] + (at * SLOTS)[None, :], mask=mask, other=LOWEST
        )
        largest = tl.maximum(largest, found)
    local = (tl.load(labels + rows, mask=inside, other=-1) - first).to(tl.int32)
    base = follow(tl.max(largest, 1), share_base, total, rows, inside, D, total_stride, tolerance, BLOCK_N)
    for column in tl.range(0, V, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (columns < V)[None, :]
        slot = (columns // MAXIMA_COLUMNS * SLOTS)[None, :]
        from_base = tl.load(block_maxima + (place * maxima_stride)[:, None] + slot, mask=mask, other=0.0)
        pointer = exps + (place * stride)[:, None] + columns[None, :]
        e = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) * tl.exp(from_base - base[:, None])
        e = tl.where(columns[None, :] == local[:, None], 0.0, e)
        tl.store(pointer, e.to(exps.dtype.element_ty), mask=mask)
