"""Kernels for exponentials that are saved relative to one number a row, its base (`dpo_kernels.settling`).

base_kernel    each row's base: the logit of one token, as a rule its label
settle_kernel  once the rows' sums are known: the label's entry, and rows whose logits lie far above their base
scale_kernel   in backward, what each row is multiplied with

With e = exp(z - base) but at the label, row r of d loss / d a is scale_r * e_r for scale = -slope * grad * exp(base -
log sum exp z): a number a row, which is multiplied into what stands on the other side of a product.
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.softmax_state import LOWEST, expm1

# How far below a block's maximum a row's base may lie: exp of it, its inverse times small gradients, and sums over a
# vocabulary are far within bfloat16.
FAR = tl.constexpr(28.0)
FARTHEST = tl.constexpr(42.0)  # below the logarithm of the whole row's sum, of which other ranks may have the most


@triton.jit(do_not_specialize=["n", "V"])
def base_kernel(
    hidden,  # (n, D)
    weight,  # (V, D), of any floating dtype
    bias,  # (V,), any stride
    labels,  # (n,) int64
    bases,  # (n,) float32, written
    moved,  # (n,) int32, written: 0
    n,
    V,
    D,
    hidden_stride,
    hidden_step,
    weight_stride,
    weight_step,
    bias_step,
    outer,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The label's logit, or where the label is not here that of the entry at its place in what is here. Any number near
    the row's logits would do: it is no result of anything.

    Traffic: n D numbers of hidden states and as many of the weight. On an H200 (4.3 TB/s): 31 us of (8192, 4096).
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    label = tl.load(labels + rows, mask=inside, other=0) % V
    entry = tl.where(label < 0, label + V, label)
    depth = tl.arange(0, BLOCK_K)
    h_row = hidden + (rows.to(tl.int64) * hidden_stride)[:, None]
    w_row = weight + (entry * weight_stride)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in tl.range(0, D, BLOCK_K):
        at = k + depth
        mask = inside[:, None] & (at < D)[None, :]
        h = tl.load(h_row + (at.to(tl.int64) * hidden_step)[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_row + (at.to(tl.int64) * weight_step)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += h * w
    a = tl.sum(total, 1)
    if BIASED:
        a += tl.load(bias + entry * bias_step, mask=inside, other=0.0).to(tl.float32)
    z = a * outer
    tl.store(bases + rows, tl.where(z < LOWEST, LOWEST, z), mask=inside)
    tl.store(moved + rows, tl.zeros((BLOCK_M,), tl.int32), mask=inside)


@triton.jit
def below_sum(bases, maxima, log_sums, rows, inside):
    """How far a row's base lies below the logarithm of its sum, times -1: the same bits wherever it is asked for."""
    below = tl.load(bases + rows, mask=inside, other=0.0) - tl.load(maxima + rows, mask=inside, other=0.0)
    return below - tl.load(log_sums + rows, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n", "V"])
def settle_kernel(
    exps,  # (n, V) as forward_kernel wrote it, read and written
    block_maxima,  # (n, slots) float32: what a block of rows that are `moved` is relative to
    bases,  # (n,) float32: what rows are relative to that are not
    moved,  # (n,) int32: whether some block of a row is not
    labels,  # (n,) int64
    log_probs,  # (n,) float32, like the next two
    maxima,
    log_sums,
    settled,  # (n,) float32, written: what all of a row is relative to
    n,
    V,
    stride,
    maxima_stride,
    MAXIMA_COLUMNS: tl.constexpr,  # that share a block maximum
    SLOTS: tl.constexpr,  # of block_maxima for as many columns, the first of which holds it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows far above their base become relative to the logarithm of their sum. The entry at the label becomes what
    makes its gradient by the same scale: -(1 - p) / exp(base - log sum exp z). What rounding takes from it the scale
    gives back.

    Traffic: a few numbers a row; V numbers of a row that is moved, read and written in the compute dtype.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    place = rows.to(tl.int64) * stride
    label = tl.load(labels + rows, mask=inside, other=-1)
    below = below_sum(bases, maxima, log_sums, rows, inside)
    moves = inside & ((tl.load(moved + rows, mask=inside, other=0) != 0) | (below < -FARTHEST))
    log_sum = tl.load(maxima + rows, mask=inside, other=0.0) + tl.load(log_sums + rows, mask=inside, other=0.0)
    base = tl.where(moves, log_sum, tl.load(bases + rows, mask=inside, other=0.0))
    here = inside & (label >= 0) & (label < V)
    value = expm1(tl.load(log_probs + rows, mask=inside, other=0.0)) * tl.exp(tl.where(moves, 0.0, -below))
    rounded = value.to(exps.dtype.element_ty)
    tl.store(exps + place + label, rounded, mask=here)
    back = rounded.to(tl.float32)
    off = tl.where(here & (back != 0.0), value / back, 1.0)  # of a label that is sure, nothing is left
    tl.store(settled + rows, base + tl.log(off), mask=inside)
    if tl.max(moves.to(tl.int32), 0) > 0:
        for start in tl.range(0, V, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            mask = moves[:, None] & (columns < V)[None, :] & (columns[None, :] != label[:, None])
            slot = start // MAXIMA_COLUMNS * SLOTS
            before = tl.load(block_maxima + rows.to(tl.int64) * maxima_stride + slot, mask=moves, other=0.0)
            pointer = exps + place[:, None] + columns[None, :]
            e = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) * tl.exp(before - base)[:, None]
            tl.store(pointer, e.to(exps.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def scale_kernel(
    bases,  # (n,) float32, like all that follow: what settled rows are relative to
    scales,  # written: what they are to be multiplied with
    maxima,
    log_sums,
    grads,
    n,
    slope,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    below = below_sum(bases, maxima, log_sums, rows, inside)
    tl.store(scales + rows, tl.exp(below) * tl.load(grads + rows, mask=inside, other=0.0) * -slope, mask=inside)
