"""Kernels for what is left once the whole vocabulary is accumulated. They read little; what they save is launches.

finish_kernel    statistics of rows whose label joins, as `dpo_kernels.statistics.finish`
jacobian_kernel  a frozen head's sum becomes d log_prob / d hidden
"""

import triton
import triton.language as tl

from dpo_kernels.kernels.softmax_state import (
    _MAXIMUM,
    ARGMAX,
    ENTROPY,
    LOG_ZERO,
    LOGITS,
    LOWEST,
    SQUARES,
    empty_state,
    expm1,
    load_state,
    merge_splits,
    store_state,
)


@triton.jit
def log1p(x):
    """log(1 + x) of 0 <= x <= 1, within 3e-7, relative: 2 artanh(s) of s = x / (2 + x) <= 1/3 by its series."""
    s = x / (2.0 + x)
    q = s * s
    tail = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0)))
    return 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * tail))))


@triton.jit(do_not_specialize=["n", "splits"])
def finish_kernel(
    states,  # (FIELDS, n) float32: of the whole vocabulary; written if MERGE
    partials,  # (splits, FIELDS, n) float32, read if MERGE: the states of the splits of the whole vocabulary
    labels,  # (n,) int64
    log_probs,  # (n,) float32, written, like all that follow
    maxima,
    log_sums,
    others,
    label_logits,
    entropies,
    log_sums_sq_probs,
    mean_logits,
    are_top1,  # (n,) bool
    n,
    V,
    splits,
    split,  # vocabulary entries of a split
    MERGE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Joins the label and makes the statistics. If MERGE, of splits that it merges first, as merge_kernel does.

    Traffic: 32 bytes a row, more with statistics; on an H200 (4.3 TB/s) less than a launch takes.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    if MERGE:
        nowhere = tl.full((BLOCK_M,), float("nan"), tl.float32)
        local = tl.load(labels + rows, mask=inside, other=-1)
        state = merge_splits(
            empty_state(BLOCK_M), nowhere, partials, rows, inside, local, n, splits, split, V, OUTPUTS
        )  # fmt: skip
        store_state(states + rows, tl.cast(n, tl.int64), inside, state, OUTPUTS)
    else:
        state = load_state(states + rows, tl.cast(n, tl.int64), inside, OUTPUTS)
    largest, sums, label_logit, shifted, squares, logits, argmax = state
    floor = tl.maximum(largest, LOWEST)
    maximum = tl.where(label_logit > floor, label_logit, floor)  # of NaN, the label of no vocabulary entry, the floor
    below = tl.exp(floor - maximum)
    total = sums * below + tl.exp(label_logit - maximum)
    # log sigmoid keeps its relative precision down to the smallest numbers. A row that holds NaN or +inf is NaN, also
    # where the label's own logit is the infinite one.
    odds = (label_logit - floor) - tl.log(sums)
    log_prob = tl.where(odds < 0.0, odds, 0.0) - log1p(tl.exp(-tl.abs(odds))) + 0.0 * total
    log_sum, share = tl.log(total), below / total
    tl.store(log_probs + rows, log_prob, mask=inside)
    tl.store(maxima + rows, maximum, mask=inside)
    tl.store(log_sums + rows, log_sum, mask=inside)
    tl.store(others + rows, share, mask=inside)
    tl.store(label_logits + rows, label_logit, mask=inside)
    p = tl.exp(log_prob)
    if ENTROPY & OUTPUTS:
        shifted += sums * tl.maximum(floor - maximum, LOG_ZERO)  # beyond it the share of the others is 0
        entropy = log_sum - share * shifted - p * tl.maximum(label_logit - maximum, LOG_ZERO)
        tl.store(entropies + rows, entropy, mask=inside)
    if SQUARES & OUTPUTS:
        tl.store(log_sums_sq_probs + rows, tl.log(squares * share * share + p * p), mask=inside)
    if LOGITS & OUTPUTS:
        tl.store(mean_logits + rows, logits / V, mask=inside)
    if ARGMAX & OUTPUTS:
        label = tl.load(labels + rows, mask=inside, other=0).to(tl.float32)
        first = (label_logit > largest) | ((label_logit == largest) & (label < argmax))
        tl.store(are_top1 + rows, first, mask=inside)


@triton.jit(do_not_specialize=["n", "M", "row"])
def jacobian_kernel(
    total,  # (n, D) float32: sum of exp(z - share_base) W times the cap's derivative; becomes d log_prob / d hidden
    states,  # (FIELDS, M) float32, of which these are rows row.. row + n
    share_base,  # (n,) float32
    log_probs,  # (n,) float32, like the next two
    others,
    label_logits,
    labels,  # (n,) int64
    weight,  # (V, D)
    n,
    M,
    row,
    V,
    D,
    total_stride,
    weight_stride,
    weight_step,
    to_cap,  # temperature / softcap
    slope,
    CAPPED: tl.constexpr,
    ROUND: tl.constexpr,  # the dtype that the weight is rounded to
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """At the label the derivative is 1 - p = -expm1(log p): 1 - p loses every digit where the model is sure. The
    label's row of W is 0 where it is not here: on another rank, or nowhere, where the log-prob is NaN already.

    Traffic: n D float32 read and written, and n D of W.
    """
    column_blocks = tl.cdiv(D, BLOCK_N)
    rows = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    first = tl.cast(M, tl.int64) * _MAXIMUM + row
    maximum = tl.load(states + first + rows, mask=inside, other=0.0)
    base = tl.load(share_base + rows, mask=inside, other=0.0)
    of_others = -tl.load(others + rows, mask=inside, other=0.0) * tl.exp(base - tl.maximum(maximum, LOWEST))
    at_label = -expm1(tl.load(log_probs + rows, mask=inside, other=0.0))
    if CAPPED:
        capped = tl.load(label_logits + rows, mask=inside, other=0.0) * to_cap
        at_label *= 1.0 - capped * capped
    label = tl.load(labels + rows, mask=inside, other=-1)
    mask = inside[:, None] & (columns < D)[None, :]
    here = mask & ((label >= 0) & (label < V))[:, None]
    w = tl.load(
        weight + (label * weight_stride)[:, None] + (columns.to(tl.int64) * weight_step)[None, :], mask=here, other=0.0
    )
    if ROUND == "bfloat16":
        w = w.to(tl.bfloat16)
    if ROUND == "float16":
        w = w.to(tl.float16)
    pointer = total + (rows.to(tl.int64) * total_stride)[:, None] + columns[None, :]
    summed = tl.load(pointer, mask=mask, other=0.0) * of_others[:, None] + at_label[:, None] * w.to(tl.float32)
    tl.store(pointer, summed * slope, mask=mask)
