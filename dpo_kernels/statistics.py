"""The statistics of a row of logits: what is summed over the vocabulary, how two parts merge, how the label joins.

A state covers a part of the vocabulary. States of two parts merge into the state of both, so tiles, programs on a GPU
and ranks can each see a part. The names of the fields are the same in every language: `SoftmaxState` here,
kernels/softmax_state.py for Triton, csrc/softmax_state.h for C++. The C++ state counts in base 2 and adds one field,
`base`; a test compares the names.

Mathematics: the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). The label's own logit stays out of the
sums and joins at the end: where the model is sure, the other logits are all that the log-prob consists of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.layout import rows_of

# exp of anything below is 0 in float32 and float64. It keeps 0 * log 0 out of the entropy.
LOG_ZERO = -1e4


class TokenStats(NamedTuple):
    """Per-token statistics of p = softmax(z), each of the labels' shape, 0 (False) where the label is ignored.

    log_probs: log p[label]; differentiable.
    entropy: -sum p log p, in nats; differentiable. None unless asked for, like all that follow.
    log_sum_sq_probs: log sum p^2 (minus the Renyi-2 entropy); not differentiable.
    mean_logits: the mean of z over the vocabulary; not differentiable.
    is_top1: bool, whether the label is the first maximum of z; not differentiable.
    dropped_mass: the sum of the probabilities (times the cap's derivative) that a gradient_filter leaves out of the
        gradients; 0 without one, and in a call without gradients.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    dropped_mass: Tensor | None = None


OUTPUTS = TokenStats._fields[1:]


class SoftmaxState(NamedTuple):
    """Of M rows over a part of the vocabulary: (M,) each, of the accumulation dtype. m is the field `maximum`."""

    maximum: Tensor  # of all logits but the label's
    total: Tensor  # sum of exp(z - m), without the label
    label_logit: Tensor  # NaN where the label is not in this part
    shifted: Tensor  # sum of exp(z - m) (z - m), without the label
    squares: Tensor  # sum of exp(z - m)^2, without the label
    logits: Tensor  # sum of z, the label's too
    argmax: Tensor  # vocabulary entry of the first maximum

    def rows(self, rows: slice) -> SoftmaxState:
        """Views of some rows."""
        return SoftmaxState(*(t[rows] for t in self))


# The field that an output needs beside the first three. Fields that no output needs are never computed.
FIELD_OF_OUTPUT = {
    "entropy": "shifted", "log_sum_sq_probs": "squares", "mean_logits": "logits", "is_top1": "argmax",
}  # fmt: skip
OPTIONAL_OUTPUTS = tuple(FIELD_OF_OUTPUT)


class Finished(NamedTuple):
    """Rows whose label has joined, (M,) each.

    maximum and log_sum: max z and log sum exp(z - max z), apart, since their sum would cost the probabilities of
    backward their last digits. others: the factor that turns exp(z - state.maximum) into probabilities.
    """

    stats: TokenStats
    maximum: Tensor
    log_sum: Tensor
    others: Tensor
    label_logit: Tensor

    def rows(self, rows: slice) -> Finished:
        """Some rows, without the optional statistics; of all of them the tensors themselves."""
        return Finished(TokenStats(rows_of(self.stats.log_probs, rows)), *(rows_of(t, rows) for t in self[1:]))


def empty_state(rows: int, outputs: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> SoftmaxState:
    """The state of no logit at all; fields that no output needs are empty tensors."""
    wanted = {"maximum", "total", "label_logit", *(FIELD_OF_OUTPUT[name] for name in outputs)}
    start = {"maximum": -torch.inf, "label_logit": torch.nan}

    def vector(name: str) -> Tensor:
        size = rows if name in wanted else 0
        if name == "argmax":
            return torch.zeros(size, dtype=torch.int64, device=device)
        return torch.full((size,), start.get(name, 0.0), dtype=dtype, device=device)

    return SoftmaxState(*(vector(name) for name in SoftmaxState._fields))


class Scales(NamedTuple):
    """What brings sums relative to the maxima of two states to the maximum of both, and the logarithms of it."""

    first: Tensor
    second: Tensor
    log_first: Tensor
    log_second: Tensor


def merge_into(state: SoftmaxState, part: SoftmaxState, outputs: tuple[str, ...]) -> Scales:
    """`state` becomes that of its own vocabulary and, behind it, of the part's: every field, in place.

    Sums of a part in which all logits are banned are 0, relative to the smallest number instead of to -inf.
    """
    old = state.maximum.clone()
    maximum = torch.maximum(old, part.maximum)
    log_first, log_second = old - finite(maximum), finite(part.maximum) - finite(maximum)
    scale = Scales(log_first.exp(), log_second.exp(), log_first, log_second)
    state.label_logit.copy_(torch.where(part.label_logit.isnan(), state.label_logit, part.label_logit))
    if "mean_logits" in outputs:
        state.logits.add_(part.logits)
    if "is_top1" in outputs:
        state.argmax.copy_(torch.where(part.maximum > old, part.argmax, state.argmax))
    if "entropy" in outputs:
        before = scale.first * (state.shifted + state.total * scale.log_first.clamp(min=LOG_ZERO))
        now = scale.second * (part.shifted + part.total * scale.log_second.clamp(min=LOG_ZERO))
        state.shifted.copy_(before + now)
    if "log_sum_sq_probs" in outputs:
        state.squares.copy_(state.squares * scale.first.square() + scale.second.square() * part.squares)
    state.total.copy_(state.total * scale.first + scale.second * part.total)
    state.maximum.copy_(maximum)
    return scale


def finish(state: SoftmaxState, labels: Tensor, vocab_size: int, outputs: tuple[str, ...]) -> Finished:
    """Joins the label and makes the statistics; `state` covers the whole vocabulary.

    log p = log sigmoid(y - lse of the others) keeps its relative precision down to the smallest numbers.
    """
    label_logit, largest = state.label_logit, state.maximum
    floor = finite(largest)
    maximum = torch.maximum(floor, label_logit)
    below = (floor - maximum).exp()
    total = state.total * below + (label_logit - maximum).exp()
    # A row that holds NaN or +inf is NaN, also where the label's own logit is the infinite one.
    log_probs = F.logsigmoid((label_logit - floor) - state.total.log()) + 0 * total
    log_sum, others = total.log(), below / total
    stats = {"log_probs": log_probs}
    p = log_probs.exp() if outputs else log_probs
    if "entropy" in outputs:
        shifted = state.shifted + state.total * (floor - maximum).clamp(min=LOG_ZERO)  # beyond it others is 0
        stats["entropy"] = log_sum - others * shifted - p * (label_logit - maximum).clamp(min=LOG_ZERO)
    if "log_sum_sq_probs" in outputs:
        stats["log_sum_sq_probs"] = (state.squares * others.square() + p.square()).log()
    if "mean_logits" in outputs:
        stats["mean_logits"] = state.logits / vocab_size
    if "is_top1" in outputs:
        tie = (label_logit == largest) & (labels < state.argmax)
        stats["is_top1"] = (label_logit > largest) | tie
    return Finished(TokenStats(**stats), maximum, log_sum, others, label_logit)


def finite(maximum: Tensor) -> Tensor:
    """The smallest number in place of -inf, the maximum of logits that are all banned: -inf - -inf never arises."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)
