"""What the kernels share: the transform of a product to a logit, and the softmax state of rows.

A state is a tuple of float32 vectors, one number a row, with the fields of `dpo_kernels.statistics.SoftmaxState` in
their order, over the vocabulary entries seen so far but the label's; `dpo_kernels.statistics.finish` joins the label.
Fields that `OUTPUTS` does not ask for are never computed. In a partial state label_logit is 0 where the label is
elsewhere: `merge` adds, `merge_kernel` knows where it is.
"""

import triton
import triton.language as tl

from dpo_kernels.statistics import FIELD_OF_OUTPUT, OPTIONAL_OUTPUTS, SoftmaxState

# Bits of OUTPUTS, one for each optional output.
ENTROPY = tl.constexpr(1 << OPTIONAL_OUTPUTS.index("entropy"))
SQUARES = tl.constexpr(1 << OPTIONAL_OUTPUTS.index("log_sum_sq_probs"))
LOGITS = tl.constexpr(1 << OPTIONAL_OUTPUTS.index("mean_logits"))
ARGMAX = tl.constexpr(1 << OPTIONAL_OUTPUTS.index("is_top1"))

FIELDS = tl.constexpr(len(SoftmaxState._fields))  # rows of the tensors that hold states, (FIELDS, tokens)
_MAXIMUM, _TOTAL, _LABEL_LOGIT, _SHIFTED, _SQUARES, _LOGITS, _ARGMAX = (
    tl.constexpr(SoftmaxState._fields.index(name))
    for name in ("maximum", "total", "label_logit", *(FIELD_OF_OUTPUT[name] for name in OPTIONAL_OUTPUTS))
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for -inf where it is subtracted: -inf - -inf never arises
LOG2E = tl.constexpr(1.4426950408889634)
LOG_ZERO = tl.constexpr(-1e4)  # exp of anything below is 0; keeps 0 * log 0 out of the entropy


@triton.jit
def tanh(x):
    """tanh x within 4e-7, and its derivative, both relative: 1 - tanh^2 would lose the derivative's digits where a cap
    holds a logit, and (1 - e) / (1 + e) those of tanh itself near 0, where its series stands in."""
    e = tl.exp(-2.0 * tl.abs(x))
    part = 1.0 / (1.0 + e)
    large = (1.0 - e) * part
    s = x * x
    small = x + x * s * (-0.33333334 + s * (0.13333334 + s * (-0.05396825 + s * 0.021869488)))
    return tl.where(s < 0.0625, small, tl.where(x < 0, -large, large)), 4.0 * e * part * part


@triton.jit
def expm1(x):
    """exp(x) - 1 of x <= 0, within 3e-7, relative; above -0.5 by its series."""
    tail = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0) * (1.0 + x * (1.0 / 9.0)))
    head = 1.0 + x * (1.0 / 4.0) * (1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * tail))
    series = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * head))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def transform(a, inner, outer, CAPPED: tl.constexpr):
    """z from a product a, and the cap's own derivative if CAPPED; inner: logit_scale / softcap, outer: softcap /
    temperature (logit_scale / temperature if not CAPPED)."""
    if CAPPED:
        t, derivative = tanh(a * inner)
        z = t * outer
    else:
        z = a * outer
        derivative = z
    return z, derivative


@triton.jit
def rescaled(part, below):
    """part * exp(below), and 0 of nothing, even where a maximum is no number."""
    return tl.where(part == 0.0, 0.0, part * tl.exp(below))


@triton.jit
def empty_state(BLOCK_M: tl.constexpr):
    """The state of rows over no vocabulary at all."""
    zero = tl.zeros((BLOCK_M,), tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero


@triton.jit
def block_state(z, columns, labels, end, first, OUTPUTS: tl.constexpr):
    """The state of a block of logits alone, and its exponentials.

    z (M, N); columns (N,) and labels (M,): vocabulary entries of the tile, `end` of which are real; first: the tile's
    place in the vocabulary. Returns the state, exps = exp(z - base) (M, N), 0 at the label, and base (M,), the maximum
    made finite.
    """
    zero = tl.zeros_like(labels).to(tl.float32)
    label_logit, shifted, squares, logits, argmax = zero, zero, zero, zero, zero
    real = (columns < end)[None, :]
    if LOGITS & OUTPUTS:
        logits = tl.sum(tl.where(real, z, 0.0), 1)
    at_label = columns[None, :] == labels[:, None]
    label_logit = tl.sum(tl.where(at_label, z, 0.0), 1)
    z = tl.where(at_label | (columns >= end)[None, :], float("-inf"), z)
    if ARGMAX & OUTPUTS:
        maximum, at = tl.max(z, 1, return_indices=True)
        argmax = (at + tl.min(columns, 0) + first).to(tl.float32)
    else:
        maximum = tl.max(z, 1)
    base = tl.maximum(maximum, LOWEST)
    below = z - base[:, None]
    exps = tl.exp(below)
    if ENTROPY & OUTPUTS:
        shifted = tl.sum(exps * tl.maximum(below, LOG_ZERO), 1)
    if SQUARES & OUTPUTS:
        squares = tl.sum(exps * exps, 1)
    return (maximum, tl.sum(exps, 1), label_logit, shifted, squares, logits, argmax), exps, base


@triton.jit
def beyond(maximum, total):
    """Sums of logits that were scaled last, which may be beyond float32 then: their row is NaN, and on the other side
    they are nothing, as if each had been scaled first."""
    return tl.where(maximum == float("inf"), float("nan"), tl.where(maximum == float("-inf"), 0.0 * total, total))


@triton.jit
def plain_block_state(a, column, local, end, outer, BLOCK_N: tl.constexpr):
    """`block_state` of products a (M, N) from `column` on, without statistics; logits are a * outer, outer > 0.

    A subtraction, a product and exp2 for each: the largest product is subtracted before anything is scaled, so that an
    exponential is off by its own distance from the maximum alone. The label and the vocabulary's end are in few blocks,
    and the others do not look for them.
    """
    at = local - column
    label_logit = tl.zeros_like(local).to(tl.float32)
    if (tl.max(((at >= 0) & (at < BLOCK_N)).to(tl.int32), 0) > 0) | (column + BLOCK_N > end):
        columns = column + tl.arange(0, BLOCK_N)
        at_label = columns[None, :] == local[:, None]
        label_logit = tl.sum(tl.where(at_label, a, 0.0), 1) * outer
        a = tl.where(at_label | (columns >= end)[None, :], float("-inf"), a)
    largest = tl.max(a, 1)
    exps = tl.exp2((a - tl.maximum(largest, LOWEST)[:, None]) * (outer * LOG2E))
    maximum = largest * outer
    total = beyond(maximum, tl.sum(exps, 1))
    zero = tl.zeros_like(label_logit)
    return (maximum, total, label_logit, zero, zero, zero, zero), exps, tl.maximum(maximum, LOWEST)


@triton.jit
def merge(a, b, OUTPUTS: tl.constexpr):
    """The state of the vocabulary of a and, behind it, of b."""
    a_maximum, a_total, a_label_logit, a_shifted, a_squares, a_logits, a_argmax = a
    b_maximum, b_total, b_label_logit, b_shifted, b_squares, b_logits, b_argmax = b
    maximum = tl.maximum(a_maximum, b_maximum)
    finite = tl.maximum(maximum, LOWEST)
    a_below, b_below = a_maximum - finite, b_maximum - finite
    a_scale, b_scale = tl.exp(a_below), tl.exp(b_below)
    shifted, squares, logits, argmax = a_shifted, a_squares, a_logits, a_argmax
    if ENTROPY & OUTPUTS:
        shifted = a_scale * (a_shifted + a_total * tl.maximum(a_below, LOG_ZERO))
        shifted += b_scale * (b_shifted + b_total * tl.maximum(b_below, LOG_ZERO))
    if SQUARES & OUTPUTS:
        squares = a_squares * a_scale * a_scale + b_squares * b_scale * b_scale
    if LOGITS & OUTPUTS:
        logits = a_logits + b_logits
    if ARGMAX & OUTPUTS:
        argmax = tl.where(b_maximum > a_maximum, b_argmax, a_argmax)
    total = a_total * a_scale + b_total * b_scale
    return maximum, total, a_label_logit + b_label_logit, shifted, squares, logits, argmax


@triton.jit
def load_state(pointer, stride, inside, OUTPUTS: tl.constexpr):
    """pointer (M,): to the first field of a state; the others lie `stride` numbers apart."""
    maximum = tl.load(pointer + _MAXIMUM * stride, mask=inside, other=float("-inf"))
    total = tl.load(pointer + _TOTAL * stride, mask=inside, other=0.0)
    label_logit = tl.load(pointer + _LABEL_LOGIT * stride, mask=inside, other=0.0)
    shifted, squares, logits, argmax = total, total, total, total
    if ENTROPY & OUTPUTS:
        shifted = tl.load(pointer + _SHIFTED * stride, mask=inside, other=0.0)
    if SQUARES & OUTPUTS:
        squares = tl.load(pointer + _SQUARES * stride, mask=inside, other=0.0)
    if LOGITS & OUTPUTS:
        logits = tl.load(pointer + _LOGITS * stride, mask=inside, other=0.0)
    if ARGMAX & OUTPUTS:
        argmax = tl.load(pointer + _ARGMAX * stride, mask=inside, other=0.0)
    return maximum, total, label_logit, shifted, squares, logits, argmax


@triton.jit
def store_state(pointer, stride, inside, state, OUTPUTS: tl.constexpr):
    maximum, total, label_logit, shifted, squares, logits, argmax = state
    tl.store(pointer + _MAXIMUM * stride, maximum, mask=inside)
    tl.store(pointer + _TOTAL * stride, total, mask=inside)
    tl.store(pointer + _LABEL_LOGIT * stride, label_logit, mask=inside)
    if ENTROPY & OUTPUTS:
        tl.store(pointer + _SHIFTED * stride, shifted, mask=inside)
    if SQUARES & OUTPUTS:
        tl.store(pointer + _SQUARES * stride, squares, mask=inside)
    if LOGITS & OUTPUTS:
        tl.store(pointer + _LOGITS * stride, logits, mask=inside)
    if ARGMAX & OUTPUTS:
        tl.store(pointer + _ARGMAX * stride, argmax, mask=inside)


@triton.jit
def merge_splits(state, label_logit, partials, rows, inside, local, n, splits, split, width, OUTPUTS: tl.constexpr):
    """The state of rows and, one after the other, of the splits behind it. The label's logit comes from the split that
    has it, where it is within `width`; else it stays what it is."""
    for i in tl.range(0, splits, num_stages=4):  # each split's numbers are on their way while the last are merged
        pointer = partials + tl.cast(i, tl.int64) * FIELDS * n + rows
        part = load_state(pointer, n, inside, OUTPUTS)
        here = (local >= i * split) & (local < (i + 1) * split) & (local < width)
        label_logit = tl.where(here, tl.load(pointer + _LABEL_LOGIT * n, mask=inside, other=0.0), label_logit)
        state = merge(state, part, OUTPUTS)
    maximum, total, _, shifted, squares, logits, argmax = state
    return maximum, total, label_logit, shifted, squares, logits, argmax


@triton.jit(do_not_specialize=["n", "M", "row", "splits", "first", "width"])
def merge_kernel(
    partials,  # (splits, FIELDS, n) float32: the states of the splits of a tile
    states,  # (FIELDS, M) float32: the states so far, of which the tile has rows row.. row + n
    labels,  # (n,) int64, in the whole vocabulary
    n,
    M,
    row,
    splits,
    split,  # vocabulary entries of a split
    first,  # the tile's first vocabulary entry; where it is 0, `states` is of nothing yet, and not read
    width,  # the tile's vocabulary entries
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merges a tile's splits into the states, one by one in their order: how a vocabulary is cut into tiles of whole
    splits does not change a bit of the result.

    Traffic: 12 bytes a row and split, 24 a row, more with statistics: on an H200 (4.3 TB/s) 1 us of 8,192 rows x 19
    splits.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    so_far = states + tl.cast(row, tl.int64) + rows
    stride = tl.cast(M, tl.int64)
    before = inside & (first > 0)
    state = load_state(so_far, stride, before, OUTPUTS)
    label_logit = tl.load(so_far + _LABEL_LOGIT * stride, mask=before, other=float("nan"))  # where the label is nowhere
    local = tl.load(labels + rows, mask=inside, other=-1) - first
    state = merge_splits(state, label_logit, partials, rows, inside, local, n, splits, split, width, OUTPUTS)
    store_state(so_far, stride, inside, state, OUTPUTS)
