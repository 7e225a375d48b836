"""The implementation in plain PyTorch: the tiled driver with folds of a few tensor operations each. It runs anywhere.

Mathematics: the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) over vocabulary tiles; the
gradient at the label is -g * expm1(log p), since 1 - p loses every digit where the model is sure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import tiled
from dpo_kernels.head import Call, Grads, TokenStats, Transform, accumulate_dtype
from dpo_kernels.plan import FACTS, MIB, Facts, Plan, Sweep

# exp of anything below is 0 in float32 and float64; keeps 0 * log 0 out of the entropy.
LOG_ZERO = -1e4
# Logits are folded this many bytes at a time, in the accumulation dtype: a block stays in a CPU's L2 cache, and fills
# an accelerator.
LOGITS_BLOCK = {"cpu": 4 * MIB}
LOGITS_BLOCK_ELSEWHERE = 256 * MIB


def _warm_up() -> None:
    """Calls each vector function once, on one thread.

    MKL's vector functions pick their code on first use, and two threads that do so at once can end up with its
    low-accuracy one: in 1 of 300 fresh processes the first torch.exp was off by 1.5e-4 (float32, torch 2.13).
    """
    for dtype in (torch.float32, torch.float64):
        torch.ones(1, dtype=dtype).exp_().log_().expm1_().tanh_()


_warm_up()


DEVICES = ()  # made for no device in particular


def unavailable(device: torch.device) -> str | None:
    return None


cannot_run = unavailable


def facts(device: torch.device, tokens: int = 0, features: int = 0) -> Facts:
    return FACTS.get(f"torch, {device.type}", FACTS["torch, cpu"])


def hidden_forward(call: Call, tokens: int, index: Tensor | None) -> tiled.Forward:
    """index (M,): flat positions of the `tokens` rows that count; None where all do."""
    return tiled.forward(call, tokens, index, facts(call.hidden.device), TorchFolds)


def hidden_backward(
    call: Call, wanted: Grads, index: Tensor | None, grads: tiled.RowGrads, saved: tiled.Forward
) -> tiled.InputGrads:
    """call: as forward got it; wanted: the gradients wanted now."""
    return tiled.backward(call, wanted, index, grads, saved, facts(call.hidden.device), TorchFolds)


def apply_transform(product: Tensor, transform: Transform) -> Tensor:
    """z from a, in place."""
    if transform.softcap is None:
        return product.mul_(transform.slope) if transform.slope != 1 else product
    product.mul_(transform.logit_scale / transform.softcap).tanh_()
    return product.mul_(transform.softcap / transform.temperature)


def cap_derivative(z: Tensor, transform: Transform) -> Tensor | None:
    """1 - tanh^2(u / softcap) from z, a new tensor; None without a cap."""
    if transform.softcap is None:
        return None
    return (z * (transform.temperature / transform.softcap)).square_().neg_().add_(1)


class Folded(NamedTuple):
    """exp(z - base) (n, v) in place of z, base (n,) the tile's finite maximum; shrink and grow (n,) bring sums relative
    to the old maximum and to base to the new maximum."""

    e: Tensor
    base: Tensor
    shrink: Tensor
    grow: Tensor


class TorchRowStats:
    """Online statistics of M rows over all columns but the label's, which joins at the end: the maximum m, sums of
    exp(z - m) and, where asked for, of exp(z - m) (z - m), exp(z - m)^2 and z, and the index of the first maximum.

    Apart, because where the model is sure the others' sum is what the log-prob consists of, and 1 + it would lose it.
    """

    def __init__(self, call: Call, labels: Tensor) -> None:
        wide = accumulate_dtype(call.hidden.dtype)
        self.labels = labels
        self.vocab_size = call.weight.shape[0]
        self.outputs = call.outputs

        def vector(value: float, name: str | None = None) -> Tensor:
            size = len(labels) if name is None or name in call.outputs else 0
            return torch.full((size,), value, dtype=wide, device=labels.device)

        self.max = vector(-torch.inf)
        self.sum = vector(0)
        self.label_logit = vector(torch.nan)  # stays NaN where the label is not in the vocabulary
        self.sum_shifted = vector(0, "entropy")
        self.sum_squares = vector(0, "log_sum_sq_probs")
        self.sum_logits = vector(0, "mean_logits")
        self.top = torch.zeros_like(labels)

    def fold(self, rows: slice, z: Tensor, first: int) -> Folded:
        """Folds logits z (n, v), the label's being -inf, relative to the tile's own maximum in every mode, so that all
        modes give the same log-prob to the last bit."""
        old = self.max[rows].clone()
        if "is_top1" in self.outputs:
            tile_max, at = z.max(1)
            self.top[rows] = torch.where(tile_max > old, at + first, self.top[rows])
        else:
            tile_max = z.amax(1)
        new = torch.maximum(old, tile_max)
        base = _finite(tile_max)
        shifted = z.sub_(base[:, None])
        if "entropy" in self.outputs:
            e = shifted.exp()
            tile_shifted = _row_dot(e, shifted.clamp_(min=LOG_ZERO))
        else:
            e = shifted.exp_()
        tile_sum = e.sum(1)
        below, above = old - _finite(new), base - _finite(new)  # the old sums' and this tile's distance to the maximum
        shrink, grow = below.exp(), above.exp()
        if "entropy" in self.outputs:
            before = shrink * (self.sum_shifted[rows] + self.sum[rows] * below.clamp(min=LOG_ZERO))
            self.sum_shifted[rows] = before + grow * (tile_shifted + tile_sum * above.clamp(min=LOG_ZERO))
        if "log_sum_sq_probs" in self.outputs:
            self.sum_squares[rows] = self.sum_squares[rows] * shrink.square() + grow.square() * _row_dot(e, e)
        self.sum[rows] = self.sum[rows] * shrink + grow * tile_sum
        self.max[rows] = new
        return Folded(e, base, shrink, grow)

    def transform(self, call: Call, rows: slice, tile: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Logits from products, in place, and the cap's derivative; takes the label's logit out (-inf stays)."""
        z = apply_transform(tile, call.transform)
        derivative = cap_derivative(z, call.transform)
        if "mean_logits" in self.outputs:
            self.sum_logits[rows] += z.sum(1)
        logit = take_label(z, self.labels[rows] - first)
        self.label_logit[rows] = torch.where(logit.isnan(), self.label_logit[rows], logit)
        return z, derivative

    def finish(self) -> tuple[TokenStats, Tensor, Tensor]:
        log_probs, top, log_sum, others = join_label(self.label_logit, self.max, self.sum)
        stats = {"log_probs": log_probs}
        p = log_probs.exp()
        if "entropy" in self.outputs:
            shifted = self.sum_shifted + self.sum * (_finite(self.max) - top)
            stats["entropy"] = log_sum - others * shifted - p * (self.label_logit - top).clamp(min=LOG_ZERO)
        if "log_sum_sq_probs" in self.outputs:
            stats["log_sum_sq_probs"] = (self.sum_squares * others.square() + p.square()).log()
        if "mean_logits" in self.outputs:
            stats["mean_logits"] = self.sum_logits / self.vocab_size
        if "is_top1" in self.outputs:
            tie = (self.label_logit == self.max) & (self.labels < self.top)
            stats["is_top1"] = (self.label_logit > self.max) | tie
        return TokenStats(**stats), top, log_sum


def take_label(z: Tensor, local: Tensor) -> Tensor:
    """z[i, local[i]] (n,), NaN where that is no column; puts -inf in its place."""
    inside = ((local >= 0) & (local < z.shape[1]))[:, None]
    at = local.clamp(0, z.shape[1] - 1)[:, None]
    found = z.gather(1, at)
    z.scatter_(1, at, torch.where(inside, -torch.inf, found))
    return torch.where(inside, found, torch.nan).squeeze(1)


def join_label(label_logit: Tensor, maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the label's logit y and the others' maximum m and sum of exp(z - m), all (M,): the log-prob, the maximum of
    all, log sum exp(z - that maximum), and the factor that turns the others' exp(z - m) into probabilities.

    log p = log sigmoid(y - lse of the others) keeps its relative precision down to the smallest numbers.
    """
    floor = _finite(maximum)
    top = torch.maximum(floor, label_logit)
    below = (floor - top).exp()
    total_of_all = total * below + (label_logit - top).exp()
    log_probs = F.logsigmoid((label_logit - floor) - total.log())
    # A row that holds NaN or +inf is NaN, also where the label's own logit is the infinite one.
    return log_probs + 0 * total_of_all, top, total_of_all.log(), below / total_of_all


class TorchFolds:
    """`tiled.Folds` of library products and tensor operations; see there for what each method does."""

    rounds = False

    def __init__(self, call: Call, plan: Plan) -> None:
        self.call = call
        self.wide = accumulate_dtype(call.hidden.dtype)
        widened = call.compute_dtype in facts(call.hidden.device).widens
        self.operand = self.wide if widened else call.compute_dtype
        self.room = plan.tile_tokens * plan.tile_vocab
        self._buffer: Tensor | None = None

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self.call.hidden.new_empty((rows, columns), dtype=dtype)

    def stats(self, labels: Tensor) -> TorchRowStats:
        return TorchRowStats(self.call, labels)

    def score(self, stats: TorchRowStats, tile: tiled.Tile) -> None:
        z, _ = stats.transform(self.call, tile.rows, self._product(tile), tile.columns.start)
        stats.fold(tile.rows, z, tile.columns.start)

    def keep(self, stats: TorchRowStats, tile: tiled.Tile, kept: tiled.Kept) -> None:
        z, derivative = stats.transform(self.call, tile.rows, self._product(tile), tile.columns.start)
        folded = stats.fold(tile.rows, z, tile.columns.start)
        kept.bases.copy_(folded.base[:, None])
        kept.exp.copy_(folded.e if derivative is None else folded.e.mul_(derivative))

    def jacobian(self, stats: TorchRowStats, tile: tiled.Tile, total: Tensor) -> None:
        z, derivative = stats.transform(self.call, tile.rows, self._product(tile), tile.columns.start)
        e, _, shrink, grow = stats.fold(tile.rows, z, tile.columns.start)
        if total.device.type != "cpu" or bool((shrink != 1).any()):  # asking would stall an accelerator
            total.mul_(shrink[:, None])
        e.mul_(grow[:, None])
        share = e if derivative is None else e.mul_(derivative)
        self.multiply(total, share.to(self.operand), tile.weight, add=True)

    def finish_jacobian(self, stats: TorchRowStats, rows: slice, total: Tensor, label_weight: Tensor) -> None:
        log_probs, _, _, others = join_label(stats.label_logit[rows], stats.max[rows], stats.sum[rows])
        at_label = torch.expm1(log_probs).neg_()
        derivative = cap_derivative(stats.label_logit[rows], self.call.transform)
        if derivative is not None:
            at_label *= derivative
        total.mul_(others.neg_()[:, None]).addcmul_(at_label[:, None], label_weight)
        total.mul_(self.call.transform.slope)

    def dz(
        self, grads: tiled.RowGrads, tile: tiled.Tile, kept: tiled.Kept | None, wanted: Sweep, bias: Tensor | None
    ) -> tiled.Dz:
        transform = self.call.transform
        if kept is not None:
            dz = self._from_kept(grads, kept, self._tile(*kept.exp.shape), tile.columns.start)
        else:
            z = apply_transform(self._product(tile), transform)
            derivative = cap_derivative(z, transform)
            dz = logits_gradient(z, grads, tile.columns.start, derivative, transform.slope)
        if bias is not None:
            bias += dz.sum(0)
        dz = dz.to(self.operand)
        return tiled.Dz(dz, dz.T)

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        if a.dtype == out.dtype:
            out.addmm_(a, b, beta=float(add))
        elif add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)

    def _tile(self, n: int, v: int) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.room, dtype=self.wide, device=self.call.hidden.device)
        return self._buffer[: n * v].view(n, v)

    def _product(self, tile: tiled.Tile) -> Tensor:
        """a = h W^T + b of one tile, in the accumulation dtype."""
        product = self._tile(len(tile.hidden), len(tile.weight))
        self.multiply(product, tile.hidden, tile.weight.T, add=False)
        if self.call.bias is not None:
            product += self.call.bias[tile.columns].to(self.call.compute_dtype)
        return product

    def _from_kept(self, grads: tiled.RowGrads, kept: tiled.Kept, out: Tensor, first: int) -> Tensor:
        transform = self.call.transform
        base = kept.bases.squeeze(1)
        factor = (base - grads.max).sub_(grads.log_sum).exp_() * grads.grad_log_probs * -transform.slope
        out.copy_(kept.exp).mul_(factor[:, None])
        at_label = torch.expm1(grads.log_probs) * grads.grad_log_probs * -transform.slope
        if transform.softcap is not None:
            label_logit = grads.log_probs + grads.log_sum + grads.max
            at_label *= 1 - (label_logit * (transform.temperature / transform.softcap)).square()
        _put_label(out, grads.labels - first, at_label)
        return out


def logits_gradient(
    z: Tensor,  # (n, v), overwritten
    grads: tiled.RowGrads,
    first: int,
    derivative: Tensor | None,  # (n, v)
    slope: float,
) -> Tensor:
    """d loss / d a from logits z: -p [g + gH (log p + H)] off the label, through the transform."""
    shifted = z.sub_(grads.max[:, None])
    g = grads.grad_log_probs
    at_label = -g * torch.expm1(grads.log_probs)
    if grads.grad_entropy is None or grads.entropy is None:
        dz = shifted.exp_().mul_((-g * torch.exp(-grads.log_sum))[:, None])
    else:
        g_entropy, entropy = grads.grad_entropy, grads.entropy
        log_p = shifted.sub_(grads.log_sum[:, None])
        p = log_p.exp()
        dz = log_p.clamp_(min=LOG_ZERO).add_(entropy[:, None]).mul_(g_entropy[:, None]).add_(g[:, None])
        dz.mul_(p).neg_()
        at_label -= g_entropy * grads.log_probs.exp() * (grads.log_probs.clamp(min=LOG_ZERO) + entropy)
    _put_label(dz, grads.labels - first, at_label)
    if derivative is not None:
        dz.mul_(derivative)
    return dz if slope == 1 else dz.mul_(slope)


def logits_forward(
    logits: Tensor, labels: Tensor, transform: Transform, index: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, maximum and log sum exp(z - maximum), (M,) each, of the rows that count of logits (..., V)."""
    wide = accumulate_dtype(logits.dtype)
    log_probs, maximum, log_sum = (torch.empty(tokens, dtype=wide, device=logits.device) for _ in range(3))
    for rows in _row_blocks(logits, tokens):
        z = apply_transform(_own(tiled.take_rows(logits, index, rows), wide), transform)
        label_logit = take_label(z, labels[rows])
        top = z.amax(1)
        total = z.sub_(_finite(top)[:, None]).exp_().sum(1)
        log_probs[rows], maximum[rows], log_sum[rows], _ = join_label(label_logit, top, total)
    return log_probs, maximum, log_sum


def logits_backward(
    logits: Tensor, transform: Transform, index: Tensor | None, grads: tiled.RowGrads, out: Tensor
) -> None:
    """Writes d loss / d logits of the rows that count to out (..., V), which may be logits itself."""
    wide = accumulate_dtype(logits.dtype)
    for rows in _row_blocks(logits, len(grads.labels)):
        z = apply_transform(_own(tiled.take_rows(logits, index, rows), wide), transform)
        derivative = cap_derivative(z, transform)
        dz = logits_gradient(z, grads.block(rows), 0, derivative, transform.slope)
        tiled.put_rows(out, index, rows, dz)


def _own(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the given dtype that may be overwritten."""
    return rows.to(dtype, copy=True)


def _row_blocks(logits: Tensor, tokens: int) -> list[slice]:
    block = LOGITS_BLOCK.get(logits.device.type, LOGITS_BLOCK_ELSEWHERE)
    step = max(1, block // (logits.shape[-1] * accumulate_dtype(logits.dtype).itemsize))
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _finite(maximum: Tensor) -> Tensor:
    """The smallest number in place of -inf, the maximum of logits that are all banned: -inf - -inf never arises."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row, without a temporary of their size."""
    return torch.bmm(a[:, None], b[:, :, None]).view(-1)


def _put_label(tile: Tensor, local: Tensor, values: Tensor) -> None:
    """tile[i, local[i]] = values[i] wherever local[i] is a column of the tile."""
    inside = (local >= 0) & (local < tile.shape[1])
    at = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, at, torch.where(inside[:, None], values[:, None], tile.gather(1, at)))
