"""Kernels of blocks that stay and blocks that are left out (`dpo_kernels.skipping`).

    flag_kernel       which blocks have an entry that passes the filter
    left_out_kernel   what rows have in the others
    sum_kernel        products of the blocks that stay alone

A block is TOKENS x ENTRIES of the matrix of logits, as forward_kernel marked it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "bound"])
def flag_kernel(
    block_maxima,  # (blocks, M and up) float32
    labels,  # (M,) int64
    maxima,  # (M,) float32, like log_sums
    log_sums,
    flags,  # (blocks of tokens, blocks) int8, written
    M,
    blocks,
    stride,
    bound,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """1 where a row of the block has a share of at least the bound in some entry, or its label, or is no number.

    Traffic: 4 bytes a row and block: on an H200 (4.3 TB/s) 5 us of 8,192 rows x 594 blocks.
    """
    chunks = tl.cdiv(blocks, WIDTH)
    of_tokens, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * WIDTH
    rows = of_tokens * TOKENS + tl.arange(0, TOKENS)
    inside = rows < M
    maximum = tl.load(maxima + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + rows, mask=inside, other=0.0)
    label = tl.load(labels + rows, mask=inside, other=-1)
    at = tl.where(label < 0, -1, label // ENTRIES)
    block = first + tl.arange(0, WIDTH)
    place = tl.cast(block, tl.int64)[:, None] * stride + rows[None, :]
    known = inside[None, :] & (block < blocks)[:, None]
    base = tl.load(block_maxima + place, mask=known, other=0.0)
    small = tl.exp(base - maximum[None, :] - log_sum[None, :]) < bound
    stays = (known & ~small) | (at[None, :] == block[:, None])
    found = tl.max(stays.to(tl.int32), 1)
    tl.store(flags + tl.cast(of_tokens, tl.int64) * blocks + block, found.to(tl.int8), mask=block < blocks)


@triton.jit(do_not_specialize=["M"])
def left_out_kernel(
    block_maxima,  # (blocks, M and up) float32, like block_sums
    block_sums,
    maxima,  # (M,) float32, like log_sums
    log_sums,
    flags,  # (blocks of tokens, blocks) int8
    left_out,  # (M,) float32, written
    M,
    blocks,
    stride,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum of a row's shares in blocks whose flag is 0.

    Traffic: 8 bytes a row and block: on an H200 (4.3 TB/s) 9 us of 8,192 rows x 594 blocks.
    """
    of_tokens = tl.program_id(0)
    rows = of_tokens * TOKENS + tl.arange(0, TOKENS)
    inside = rows < M
    maximum = tl.load(maxima + rows, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + rows, mask=inside, other=0.0)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in tl.range(0, blocks, WIDTH):
        block = first + tl.arange(0, WIDTH)
        flag = tl.load(flags + tl.cast(of_tokens, tl.int64) * blocks + block, mask=block < blocks, other=1)
        place = tl.cast(block, tl.int64)[:, None] * stride + rows[None, :]
        out = (flag == 0)[:, None] & inside[None, :]
        base = tl.load(block_maxima + place, mask=out, other=0.0)
        sums = tl.load(block_sums + place, mask=out, other=0.0)
        total += tl.sum(tl.where(out, tl.exp(base - maximum[None, :] - log_sum[None, :]) * sums, 0.0), 0)
    tl.store(left_out + rows, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "depth", "length", "add"])
def sum_kernel(
    left,  # (rows, depth): d loss / d a of a tile, or its transpose
    right,  # (depth, columns)
    out,  # (rows, columns), written
    lists,  # (blocks of rows, length) int64: first the blocks of `depth` that stay
    counts,  # (blocks of rows,) int64: how many those are
    rows,
    depth,
    columns,
    length,
    left_row,
    left_step,
    right_row,
    right_step,
    out_row,
    add,  # 1: to what is in `out`, 0: not
    BY_VOCAB: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = left @ right, of the blocks OUTER x INNER of `left` that stay; no other is read.

    Programs of a block of rows run together: they read the same blocks of `left`. BY_VOCAB: its rows are the
    vocabulary, not its columns; ALIGNED: whose size is a multiple of 16, so that loads are wide.
    FLOP: 2 rows depth columns, times the share that stays.
    """
    if ALIGNED and BY_VOCAB:
        rows = rows // 16 * 16
    if ALIGNED and not BY_VOCAB:
        depth = depth // 16 * 16
    across = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    row, column = program // across * BLOCK_M, program % across * BLOCK_N
    block = row // OUTER
    r = row + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r_inside, c_inside = r < rows, c < columns
    of_left = left + r[:, None].to(tl.int64) * left_row
    of_right = right + c[None, :].to(tl.int64) * right_step
    steps = tl.load(counts + block) * (INNER // BLOCK_K)
    chosen = lists + tl.cast(block, tl.int64) * length
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stays = tl.load(chosen)
    for step in tl.range(0, steps):
        at = stays * INNER + step % (INNER // BLOCK_K) * BLOCK_K + k
        # The next block's number is on its way while this one is multiplied.
        stays = tl.load(chosen + tl.minimum((step + 1) // (INNER // BLOCK_K), length - 1))
        known = at < depth
        a = tl.load(of_left + at[None, :] * left_step, mask=r_inside[:, None] & known[None, :], other=0.0)
        b = tl.load(of_right + at[:, None] * right_row, mask=known[:, None] & c_inside[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if PRECISION == "tf32x3":
            total += tl.dot(a, b, input_precision=PRECISION)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    place = out + r[:, None].to(tl.int64) * out_row + c[None, :]
    mask = r_inside[:, None] & c_inside[None, :]
    total += tl.load(place, mask=mask & (add != 0), other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)
