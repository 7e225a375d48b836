"""What the kernels share: the transform of a product to a logit, and the online softmax statistics of rows.

Mathematics: the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). The label's logit stays out of the
running sum and joins it at the end (`torch_impl.join_label`): where the model is sure, the others are all there is.

A state is a tuple of seven vectors of float32, one number a row, over the columns seen so far but the label's: maximum
m, sum of exp(z - m), the label's logit, sum of exp(z - m) (z - m), sum of exp(z - m)^2, sum of z (the label's too) and
the column of the first maximum. Those that `OUTPUTS` does not ask for are never computed.
"""

import triton
import triton.language as tl

# Bits of OUTPUTS, in the order of head.OPTIONAL_OUTPUTS.
ENTROPY = tl.constexpr(1)
SQUARES = tl.constexpr(2)
MEAN = tl.constexpr(4)
TOP1 = tl.constexpr(8)

VECTORS = tl.constexpr(7)  # rows of the tensors that hold states, (VECTORS, tokens)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for -inf where it is subtracted: -inf - -inf never arises
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
def no_rows(ROWS: tl.constexpr):
    """The state of rows before their first column."""
    zero = tl.zeros((ROWS,), tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero


@triton.jit
def fold(z, columns, labels, end, first, OUTPUTS: tl.constexpr):
    """The state of a block of logits alone, and what is kept of it.

    z (R, C); columns (C,) and labels (R,): columns of the tile, `end` of which are real; first: the tile's place in
    the vocabulary. Returns the state, e = exp(z - base) (R, C), 0 at the label, and base (R,), the finite maximum.
    """
    zero = tl.zeros_like(labels).to(tl.float32)
    label, shifted, squares, total, top = zero, zero, zero, zero, zero
    real = (columns < end)[None, :]
    if MEAN & OUTPUTS:
        total = tl.sum(tl.where(real, z, 0.0), 1)
    at_label = columns[None, :] == labels[:, None]
    label = tl.sum(tl.where(at_label, z, 0.0), 1)
    z = tl.where(at_label | (columns >= end)[None, :], float("-inf"), z)
    if TOP1 & OUTPUTS:
        maximum, at = tl.max(z, 1, return_indices=True)
        top = (at + tl.min(columns, 0) + first).to(tl.float32)
    else:
        maximum = tl.max(z, 1)
    base = tl.maximum(maximum, LOWEST)
    below = z - base[:, None]
    e = tl.exp(below)
    if ENTROPY & OUTPUTS:
        shifted = tl.sum(e * tl.maximum(below, LOG_ZERO), 1)
    if SQUARES & OUTPUTS:
        squares = tl.sum(e * e, 1)
    return (maximum, tl.sum(e, 1), label, shifted, squares, total, top), e, base


@triton.jit
def merge(a, b, OUTPUTS: tl.constexpr):
    """The state of the columns of a and, behind them, of b."""
    a_max, a_sum, a_label, a_shifted, a_squares, a_total, a_top = a
    b_max, b_sum, b_label, b_shifted, b_squares, b_total, b_top = b
    maximum = tl.maximum(a_max, b_max)
    finite = tl.maximum(maximum, LOWEST)
    a_below, b_below = a_max - finite, b_max - finite
    a_scale, b_scale = tl.exp(a_below), tl.exp(b_below)
    shifted, squares, total, top = a_shifted, a_squares, a_total, a_top
    if ENTROPY & OUTPUTS:
        shifted = a_scale * (a_shifted + a_sum * tl.maximum(a_below, LOG_ZERO))
        shifted += b_scale * (b_shifted + b_sum * tl.maximum(b_below, LOG_ZERO))
    if SQUARES & OUTPUTS:
        squares = a_squares * a_scale * a_scale + b_squares * b_scale * b_scale
    if MEAN & OUTPUTS:
        total = a_total + b_total
    if TOP1 & OUTPUTS:
        top = tl.where(b_max > a_max, b_top, a_top)
    return maximum, a_sum * a_scale + b_sum * b_scale, a_label + b_label, shifted, squares, total, top


@triton.jit
def load_state(pointer, stride, inside, OUTPUTS: tl.constexpr):
    """pointer (R,): to the first vector of a state; the others lie `stride` numbers apart."""
    maximum = tl.load(pointer, mask=inside, other=float("-inf"))
    total = tl.load(pointer + stride, mask=inside, other=0.0)
    label = tl.load(pointer + 2 * stride, mask=inside, other=0.0)
    shifted, squares, logits, top = total, total, total, total
    if ENTROPY & OUTPUTS:
        shifted = tl.load(pointer + 3 * stride, mask=inside, other=0.0)
    if SQUARES & OUTPUTS:
        squares = tl.load(pointer + 4 * stride, mask=inside, other=0.0)
    if MEAN & OUTPUTS:
        logits = tl.load(pointer + 5 * stride, mask=inside, other=0.0)
    if TOP1 & OUTPUTS:
        top = tl.load(pointer + 6 * stride, mask=inside, other=0.0)
    return maximum, total, label, shifted, squares, logits, top


@triton.jit
def store_state(pointer, stride, inside, state, OUTPUTS: tl.constexpr):
    maximum, total, label, shifted, squares, logits, top = state
    tl.store(pointer, maximum, mask=inside)
    tl.store(pointer + stride, total, mask=inside)
    tl.store(pointer + 2 * stride, label, mask=inside)
    if ENTROPY & OUTPUTS:
        tl.store(pointer + 3 * stride, shifted, mask=inside)
    if SQUARES & OUTPUTS:
        tl.store(pointer + 4 * stride, squares, mask=inside)
    if MEAN & OUTPUTS:
        tl.store(pointer + 5 * stride, logits, mask=inside)
    if TOP1 & OUTPUTS:
        tl.store(pointer + 6 * stride, top, mask=inside)


@triton.jit(do_not_specialize=["n", "M", "row", "strips"])
def merge_kernel(
    partials,  # (strips, VECTORS, n) float32: the states of the strips of a tile
    states,  # (VECTORS, M) float32: the running states, of which the tile has rows row.. row + n
    labels,  # (n,) int64, in the whole vocabulary
    n,
    M,
    row,
    strips,
    strip,  # columns of a strip
    first,  # the tile's first column
    width,  # the tile's columns
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Folds a tile's strips into the running states, one by one in their order: how a vocabulary is cut into tiles of
    whole strips does not change a bit of the result.

    Traffic: 12 bytes a row and strip, 24 a row, more with statistics: on an H200 (4.3 TB/s) 1 us of 8,192 rows x 19
    strips.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    running = states + tl.cast(row, tl.int64) + rows
    stride = tl.cast(M, tl.int64)
    state = load_state(running, stride, inside, OUTPUTS)
    label_logit = tl.load(running + 2 * stride, mask=inside, other=0.0)
    local = tl.load(labels + rows, mask=inside, other=-1) - first
    for i in tl.range(0, strips, num_stages=4):  # each strip's numbers are on their way while the last are merged
        pointer = partials + tl.cast(i, tl.int64) * VECTORS * n + rows
        part = load_state(pointer, n, inside, OUTPUTS)
        here = (local >= i * strip) & (local < (i + 1) * strip) & (local < width)
        label_logit = tl.where(here, tl.load(pointer + 2 * n, mask=inside, other=0.0), label_logit)
        state = merge(state, part, OUTPUTS)
    maximum, total, _, shifted, squares, logits, top = state
    store_state(running, stride, inside, (maximum, total, label_logit, shifted, squares, logits, top), OUTPUTS)
