"""Kernels of columns that stay: gradients without what the softmax hardly holds (`dpo_kernels.gathering`).

    known_kernel     what rows know of their sums after a part of the vocabulary, and what they have left out so far
    mark_kernel      columns that stay, of saved exponentials
    count_kernel     how many do, of each group and tile
    key_kernel       by what a tile's columns are sorted, so that groups that keep them lie together
    list_kernel      the columns of a group that stay, or the groups of a block of columns
    gather_kernel    d loss / d a of the columns that stay, from logits made again
    pick_kernel      the same, from exponentials that were saved
    sum_kernel       products of those alone

A group is the tokens of a block of forward_kernel, and has a flag for each column. What is computed of a tile lies by
columns: every group has its part of a column in one piece, wherever the column is.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.fused import add_bias, multiply_rows
from dpo_kernels.kernels.logits import load_row_grads, row_gradient, saved_row_gradient
from dpo_kernels.kernels.softmax_state import FIELDS, LOWEST, rescaled, transform


@triton.jit(do_not_specialize=["n", "M", "splits"])
def known_kernel(
    partials,  # (splits, FIELDS, n) float32: as forward_kernel left them
    drops,  # (splits, n) float32: what it left out, relative to the maximum of the same split
    states,  # (FIELDS, n) float32, M apart: with those splits merged
    label_logits,  # (n,) float32, which no state has in its sum
    known_maxima,  # (n,) float32, like the next two read and written: each row's maximum so far
    known_totals,  # (n,) float32: its sum of exponentials, relative to that
    dropped,  # (n,) float32: what it has left out, relative to that
    n,
    M,
    splits,
    BLOCK_M: tl.constexpr,
):
    """Traffic: 8 bytes a row and split, 32 a row: on an H200 (4.3 TB/s) 3 us of 8,192 rows x 149 splits."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    maximum = tl.load(states + rows, mask=inside, other=0.0)
    total = tl.load(states + tl.cast(M, tl.int64) + rows, mask=inside, other=0.0)
    label_logit = tl.load(label_logits + rows, mask=inside, other=0.0)
    known = tl.maximum(tl.maximum(maximum, label_logit), LOWEST)
    left = tl.load(dropped + rows, mask=inside, other=0.0)
    left = rescaled(left, tl.load(known_maxima + rows, mask=inside, other=0.0) - known)
    for i in tl.range(0, splits, num_stages=4):
        of_split = tl.load(partials + tl.cast(i, tl.int64) * FIELDS * n + rows, mask=inside, other=0.0)
        left += rescaled(tl.load(drops + tl.cast(i, tl.int64) * n + rows, mask=inside, other=0.0), of_split - known)
    tl.store(known_maxima + rows, known, mask=inside)
    tl.store(known_totals + rows, rescaled(total, maximum - known) + tl.exp(label_logit - known), mask=inside)
    tl.store(dropped + rows, left, mask=inside)


@triton.jit(do_not_specialize=["n"])
def mark_kernel(
    exps,  # (n, V) as forward_kernel wrote it
    block_maxima,  # (n, slots) float32
    maxima,  # (n,) float32, like log_sums: of the whole row
    log_sums,
    flags,  # (groups, V) int8, read and written: those that are 1 stay so, as labels' do
    drops,  # (chunks, n) float32, written: what rows have in a chunk's columns that do not stay, as a share of the row
    n,
    V,
    stride,
    maxima_stride,
    flags_stride,
    bound,
    MAXIMA_COLUMNS: tl.constexpr,  # that share a base
    SLOTS: tl.constexpr,  # of block_maxima for as many columns, the first of which holds it
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Flags 1 where a token of the group has a share of at least the bound in a column, or is no number: exactly, since
    the rows' sums are known.

    Traffic: n V numbers read in the compute dtype. On an H200 (4.3 TB/s): 0.6 ms of (8192, 151936).
    """
    chunks = tl.cdiv(V, WIDTH)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    rows = group * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    place = rows.to(tl.int64)
    log_sum = tl.load(maxima + rows, mask=inside, other=0.0) + tl.load(log_sums + rows, mask=inside, other=0.0)
    of_group = flags + tl.cast(group, tl.int64) * flags_stride
    left = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(chunk * WIDTH, tl.minimum((chunk + 1) * WIDTH, V), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (columns < V)[None, :]
        slot = start // MAXIMA_COLUMNS * SLOTS
        base = tl.load(block_maxima + place * maxima_stride + slot, mask=inside, other=0.0)
        e = tl.load(exps + (place * stride)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        p = e * tl.exp(base - log_sum)[:, None]
        stays = tl.max((mask & ~(p < bound)).to(tl.int32), 0)
        stays |= tl.load(of_group + columns, mask=columns < V, other=1).to(tl.int32)
        tl.store(of_group + columns, stays.to(tl.int8), mask=columns < V)
        left += tl.sum(tl.where((stays != 0)[None, :], 0.0, p), 1)
    tl.store(drops + tl.cast(chunk, tl.int64) * n + rows, left, mask=inside)


@triton.jit(do_not_specialize=["groups"])
def count_kernel(
    flags,  # (groups, V) int8
    counts,  # (groups, tiles) int32, written: how many columns of each tile stay
    groups,
    V,
    stride,
    tile,  # columns of a tile
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(V, tile)
    group, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * tile
    end = tl.minimum(first + tile, V)
    found = tl.zeros((WIDTH,), tl.int32)
    for start in tl.range(first, end, WIDTH):
        at = start + tl.arange(0, WIDTH)
        found += tl.load(flags + tl.cast(group, tl.int64) * stride + at, mask=at < end, other=0).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@triton.jit(do_not_specialize=["groups"])
def key_kernel(
    flags,  # (groups, V) int8
    keys,  # (V,) int32, written
    groups,
    V,
    stride,
    WIDTH: tl.constexpr,
):
    """The larger, the more groups keep a column, to a factor of two; among those, the earlier the first of them.

    Sorted by it, columns of many groups lie together, and of the others those that share their first group: a block of
    128 then has few more groups than each of its columns.
    """
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < V
    count = tl.zeros((WIDTH,), tl.int32)
    earliest = tl.zeros((WIDTH,), tl.int32) + groups
    for group in tl.range(0, groups):
        flag = tl.load(flags + tl.cast(group, tl.int64) * stride + at, mask=inside, other=0).to(tl.int32)
        count += flag
        earliest = tl.where((flag != 0) & (earliest == groups), group, earliest)
    octave = tl.floor(tl.log2(tl.maximum(count, 1).to(tl.float32))).to(tl.int32) + 1
    tl.store(keys + at, tl.where(count > 0, octave * 65536 - earliest, 0), mask=inside)


@triton.jit(do_not_specialize=["groups"])
def list_kernel(
    flags,  # (groups, V) int8
    order,  # (V,) int32: columns, sorted; read if BY_VOCAB
    lists,  # (groups, V) int32, written; (blocks of columns, groups) if BY_VOCAB
    counts,  # (groups,) or (blocks of columns,) int32, written
    groups,
    V,
    stride,
    BY_VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program's list: the columns of its group whose flag is 1; or of its block of COLUMNS sorted columns the groups
    in which some flag is."""
    program = tl.program_id(0)
    candidates = groups if BY_VOCAB else V
    chosen = order + program * COLUMNS + tl.arange(0, COLUMNS)
    real = program * COLUMNS + tl.arange(0, COLUMNS) < V
    here = lists + tl.cast(program, tl.int64) * candidates
    found = 0
    for first in tl.range(0, candidates, WIDTH):
        at = first + tl.arange(0, WIDTH)
        if BY_VOCAB:
            columns = tl.load(chosen, mask=real, other=0)
            place = tl.cast(at, tl.int64)[:, None] * stride + columns[None, :]
            flag = tl.load(flags + place, mask=(at < candidates)[:, None] & real[None, :], other=0)
            stays = tl.max(flag.to(tl.int32), 1)
        else:
            place = tl.cast(program, tl.int64) * stride + at
            stays = tl.load(flags + place, mask=at < candidates, other=0).to(tl.int32)
        tl.store(here + found + tl.cumsum(stays, 0) - stays, at, mask=stays != 0)
        found += tl.sum(stays, 0)
    tl.store(counts + program, found)


@triton.jit(do_not_specialize=["n"])
def gather_kernel(
    hidden,  # (n, D)
    weight,  # (V, D)
    bias,  # (V,)
    out,  # (V, n and up) in the compute dtype: columns that stay are written, 0 beyond the last token
    lists,  # (groups, V) int32: the columns of each group that stay come first
    counts,  # (groups,) int32: how many those are
    labels,  # (n,) int64
    log_probs,  # (n,) float32, like all that follow
    maxima,
    log_sums,
    grads,
    n,
    V,
    D,
    first,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    out_stride,
    inner,
    outer,
    slope,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """d loss / d a of a tile's columns that stay, BLOCK_N of a group's list at a time.

    FLOP: 2 n D V, times the share that stays. Traffic: as recompute_kernel's, each row of the weight by itself.
    """
    groups = tl.cdiv(n, BLOCK_M)
    chunks = tl.cdiv(V, BLOCK_N)
    program = tl.program_id(0)
    band = program // (GROUP * chunks)
    height = tl.minimum(groups - band * GROUP, GROUP)
    within = program % (GROUP * chunks)
    group = band * GROUP + within % height
    start = within // height * BLOCK_N
    count = tl.load(counts + group)
    if start >= count:
        return
    at = start + tl.arange(0, BLOCK_N)
    columns = tl.load(lists + tl.cast(group, tl.int64) * V + at, mask=at < count, other=0)
    row = group * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < n
    a = multiply_rows(
        hidden, weight, tl.minimum(rows, n - 1), columns, D, hidden_stride, hidden_step, weight_stride, weight_step,
        WIDEN, PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    local, log_prob, maximum, log_sum, grad, _, _ = load_row_grads(
        labels, log_probs, maxima, log_sums, grads, grads, grads, rows, inside, first, 0
    )
    z, derivative = transform(add_bias(a, bias, columns, V, BIASED), inner, outer, CAPPED)
    dz = row_gradient(
        z, columns, local, log_prob, maximum, log_sum, grad, grad, grad, derivative, slope, CAPPED, 0
    )  # fmt: skip
    dz = tl.where(inside[:, None], dz, 0.0).to(out.dtype.element_ty)
    # A tile has fewer than 2^31 numbers.
    tl.store(out + columns[:, None] * out_stride + rows[None, :], dz.T, mask=(at < count)[:, None])


@triton.jit(do_not_specialize=["n"])
def pick_kernel(
    exps,  # (n, V) as forward_kernel wrote it
    block_maxima,  # (n, slots) float32
    out,  # (V, n and up), as gather_kernel writes it
    lists,  # (groups, V) int32: the columns of each group that stay come first
    counts,  # (groups,) int32: how many those are
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
    CAPPED: tl.constexpr,
    MAXIMA_COLUMNS: tl.constexpr,  # that share a base
    SLOTS: tl.constexpr,  # of block_maxima for as many columns, the first of which holds it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As gather_kernel, from exponentials that forward saved; those stay as they are.

    Traffic: the columns that stay read and written; where a few of 16 do, all are read. On an H200 (4.3 TB/s): less
    than 0.7 ms of (8192, 151936) where a fifth stays.
    """
    chunks = tl.cdiv(V, BLOCK_N)
    group = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * BLOCK_N
    count = tl.load(counts + group)
    if start >= count:
        return
    at = start + tl.arange(0, BLOCK_N)
    columns = tl.load(lists + tl.cast(group, tl.int64) * V + at, mask=at < count, other=0)
    rows = group * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    local, log_prob, maximum, log_sum, grad, _, _ = load_row_grads(
        labels, log_probs, maxima, log_sums, grads, grads, grads, rows, inside, first, 0
    )
    mask = inside[:, None] & (at < count)[None, :]
    place = rows.to(tl.int64)[:, None]
    slot = (columns // MAXIMA_COLUMNS * SLOTS)[None, :]
    base = tl.load(block_maxima + place * maxima_stride + slot, mask=mask, other=0.0)
    e = tl.load(exps + place * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    dz = saved_row_gradient(e, base, columns, local, log_prob, maximum, log_sum, grad, slope, CAPPED)
    dz = tl.where(inside[:, None], dz, 0.0).to(out.dtype.element_ty)
    tl.store(out + columns[:, None] * out_stride + rows[None, :], dz.T, mask=(at < count)[:, None])


@triton.jit(do_not_specialize=["n", "add"])
def sum_kernel(
    left,  # (V, n and up): d loss / d a by columns, as gather_kernel wrote it
    right,  # (V, columns), or if BY_VOCAB (n, columns)
    out,  # (n, columns), or if BY_VOCAB (V, columns), written
    lists,  # of list_kernel: (groups, V) int32, or if BY_VOCAB (blocks of columns, groups)
    counts,  # (groups,) or (blocks of columns,) int32
    order,  # (V,) int32, like flags read if BY_VOCAB
    flags,  # (groups, V) int8
    n,
    V,
    columns,
    left_stride,
    right_row,
    right_step,
    out_row,
    flags_stride,
    add,  # 1: to what is in `out`, 0: not
    BY_VOCAB: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile's part of the hidden states' gradient, out = left^T @ right of each group's columns alone; or of the
    weight's, out = left @ right, of each BLOCK_M sorted columns the groups that keep any.

    Programs of a block of rows run together: they read the same of `left`.
    FLOP: 2 n V columns, times the share that stays; BY_VOCAB: that stays in blocks.
    """
    across = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    block = program // across
    c = program % across * BLOCK_N + tl.arange(0, BLOCK_N)
    c_inside = c < columns
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    of_right = right + c[None, :].to(tl.int64) * right_step
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BY_VOCAB:
        inside = position < V
        rows = tl.load(order + position, mask=inside, other=0)
        chosen = lists + tl.cast(block, tl.int64) * tl.cdiv(n, TOKENS)
        of_left = left + rows[:, None] * left_stride
        parts: tl.constexpr = TOKENS // BLOCK_K
        last = tl.load(counts + block) * parts - 1
        group = tl.load(chosen)
        for step in tl.range(0, last + 1):
            token = group * TOKENS + step % parts * BLOCK_K + k
            stays = inside & (tl.load(flags + tl.cast(group, tl.int64) * flags_stride + rows) != 0)
            # The next group's number is on its way while this one is multiplied.
            group = tl.load(chosen + tl.minimum(step + 1, last) // parts)
            a = tl.load(of_left + token[None, :], mask=stays[:, None], other=0.0)
            b = tl.load(
                of_right + token.to(tl.int64)[:, None] * right_row, mask=(token < n)[:, None] & c_inside[None, :],
                other=0.0,
            )  # fmt: skip
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            if PRECISION == "tf32x3":
                total += tl.dot(a, b, input_precision=PRECISION)
            else:
                total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        inside = position < n
        rows = position
        group = block * BLOCK_M // TOKENS
        chosen = lists + tl.cast(group, tl.int64) * V
        count = tl.load(counts + group)
        column = tl.load(chosen + k, mask=k < count, other=0)
        for start in tl.range(0, count, BLOCK_K):
            known = start + k < count
            at = column[:, None]
            column = tl.load(chosen + start + BLOCK_K + k, mask=start + BLOCK_K + k < count, other=0)
            a = tl.load(left + at * left_stride + position[None, :], mask=known[:, None], other=0.0)
            b = tl.load(of_right + at.to(tl.int64) * right_row, mask=known[:, None] & c_inside[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            if PRECISION == "tf32x3":
                total += tl.dot(a.T, b, input_precision=PRECISION)
            else:
                total = tl.dot(a.T, b, total, input_precision=PRECISION)
    place = out + rows.to(tl.int64)[:, None] * out_row + c[None, :]
    mask = inside[:, None] & c_inside[None, :]
    total += tl.load(place, mask=mask & (add != 0), other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)
