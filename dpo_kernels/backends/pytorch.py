"""The back end in plain PyTorch: a few tensor operations a tile. It runs anywhere.

The gradient at the label is -g * expm1(log p), since 1 - p loses every digit where the model is sure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.backends.base import MIB, Execution, Product, SavedTile, Tile, TileOps
from dpo_kernels.call import Call, TokenGrads, Tokens, Transform, accumulate_dtype
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.host_memory import with_memory
from dpo_kernels.layout import put_rows, take_rows
from dpo_kernels.planner import Plan
from dpo_kernels.sparse import Rule
from dpo_kernels.statistics import (
    LOG_ZERO,
    Finished,
    Scales,
    SoftmaxState,
    empty_state,
    finish,
    finite,
    merge_into,
)
from dpo_kernels.workload import GROUP

# Logits are read this many bytes at a time, in the accumulation dtype: a block stays in a CPU's L2 cache, and fills an
# accelerator.
LOGITS_BLOCK = {"cpu": 4 * MIB}
LOGITS_BLOCK_ELSEWHERE = 256 * MIB

CAPABILITIES = {
    "cpu": Capabilities(
        ((512, 2048), (256, 1024), (128, 512), (64, 256), (32, 128), (16, 64)), 12 * MIB,
        widens=(torch.bfloat16, torch.float16), filters="keep",
    ),
    "cuda": Capabilities(
        ((4096, 8192), (2048, 4096), (1024, 2048), (512, 1024), (256, 512), (128, 256), (64, 128)), 32 * MIB,
        filters="keep",
    ),
}  # fmt: skip


def _warm_up() -> None:
    """Calls each vector function once, on one thread.

    MKL's vector functions pick their code on first use, and two threads that do so at once can end up with its
    low-accuracy one: in 1 of 300 fresh processes the first torch.exp was off by 1.5e-4 (float32, torch 2.13).
    """
    for dtype in (torch.float32, torch.float64):
        torch.ones(1, dtype=dtype).exp_().log_().expm1_().tanh_()


_warm_up()


class PyTorchBackend:
    """See `dpo_kernels.backends.base.Backend` for what each method does."""

    name = "torch"
    devices: tuple[str, ...] = ()  # made for no device in particular
    largest_vocabulary = sys.maxsize

    def unavailable(self, device: torch.device) -> str | None:
        return None

    cannot_run = unavailable

    def declines_head(self, hidden: Tensor, weight: Tensor) -> bool:
        return False

    def declines_logits(self, logits: Tensor) -> bool:
        return False

    def configure(self, device: torch.device, features: int, compute_dtype: torch.dtype, extras: bool) -> None:
        return None

    def capabilities(self, device: torch.device, configuration: None = None) -> Capabilities:
        known = CAPABILITIES.get(device.type, CAPABILITIES["cpu"])
        return with_memory(known) if device.type == "cpu" else known

    def tile_ops(self, call: Call, plan: Plan, execution: Execution) -> PyTorchTileOps:
        return PyTorchTileOps(call, plan, execution)

    def logits_forward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, configuration: None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = accumulate_dtype(logits.dtype)
        results = tuple(torch.empty(tokens.count, dtype=wide, device=logits.device) for _ in range(4))
        for rows in _row_blocks(logits, tokens.count):
            z = transform.logits(_own(take_rows(logits, tokens.index, rows), wide))
            labels = tokens.labels[rows]
            label_logit = take_label(z, labels)
            maximum = z.amax(1)
            total = z.sub_(finite(maximum)[:, None]).exp_().sum(1)
            state = empty_state(0, (), wide, z.device)._replace(maximum=maximum, total=total, label_logit=label_logit)
            done = finish(state, labels, logits.shape[-1], ())
            for result, value in zip(results, (done.stats.log_probs, *done[1:3], done.label_logit), strict=True):
                result[rows] = value
        return results  # type: ignore[return-value]

    def logits_backward(
        self,
        logits: Tensor,
        tokens: Tokens,
        transform: Transform,
        grads: TokenGrads,
        out: Tensor,
        configuration: None = None,
    ) -> None:
        wide = accumulate_dtype(logits.dtype)
        for rows in _row_blocks(logits, tokens.count):
            z = transform.logits(_own(take_rows(logits, tokens.index, rows), wide))
            derivative = transform.cap_derivative(z)
            dz = logits_gradient(z, grads.rows(rows), 0, derivative, transform.slope)
            put_rows(out, tokens.index, rows, dz)

    def out_of_reach(self, maximum: Tensor) -> bool:
        return False

    def empty_cache(self) -> int:
        return 0


class PyTorchState(NamedTuple):
    """The state of all tokens, and what it takes to finish it."""

    fields: SoftmaxState
    labels: Tensor
    vocab_size: int
    outputs: tuple[str, ...]

    def finish(self) -> Finished:
        return finish(self.fields, self.labels, self.vocab_size, self.outputs)

    def part(self) -> SoftmaxState:
        return self.fields

    def scale_to(self, maximum: Tensor) -> Tensor:
        return (finite(self.fields.maximum) - finite(maximum)).exp_()


class Accumulated(NamedTuple):
    """exps (n, v): exp(z - maximum) in place of z. maximum (n,): the tile's, made finite. scales: see `statistics`."""

    exps: Tensor
    maximum: Tensor
    scales: Scales


class PyTorchTileOps:
    """See `dpo_kernels.backends.base.TileOps` for what each method does."""

    unit = 1.0

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        self.call, self.rounds = call, execution.capabilities.rounds
        self.wide = call.accumulate_dtype
        self.operand = self.weight_dtype = execution.operand(call.compute_dtype)
        self.room = plan.tile_tokens * plan.tile_vocab
        self._buffer: Tensor | None = None

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self.call.hidden.new_empty((rows, columns), dtype=dtype)

    def new_state(self, labels: Tensor) -> PyTorchState:
        fields = empty_state(len(labels), self.call.outputs, self.wide, labels.device)
        return PyTorchState(fields, labels, self.call.vocab_size, self.call.outputs)

    def accumulate(self, state: PyTorchState, tile: Tile, saved: SavedTile | None) -> None:
        made, derivative = self._accumulate(state, tile)
        if saved is not None:
            saved.maxima.copy_(made.maximum[:, None])
            saved.exps.copy_(made.exps if derivative is None else made.exps.mul_(derivative))

    def accumulate_jacobian(self, state: PyTorchState, tile: Tile, total: Tensor) -> None:
        (e, _, scales), derivative = self._accumulate(state, tile)
        if total.device.type != "cpu" or bool((scales.first != 1).any()):  # asking would stall an accelerator
            total.mul_(scales.first[:, None])
        e.mul_(scales.second[:, None])
        share = e if derivative is None else e.mul_(derivative)
        self.multiply(total, share.to(self.operand), tile.weight, add=True)

    def finish_jacobian(
        self, state: PyTorchState, rows: slice, done: Finished, total: Tensor, label_weight: Callable[[], Tensor]
    ) -> None:
        finish_jacobian(self.call.transform, done, total, label_weight())

    def gradient_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        transform = self.call.transform
        if saved is not None:
            dz = self._from_saved(grads, saved, self._tile(*saved.exps.shape), tile.columns.start)
        else:
            z = transform.logits(self._product(tile))
            derivative = transform.cap_derivative(z)
            dz = logits_gradient(z, grads, tile.columns.start, derivative, transform.slope)
        if bias is not None:
            bias += dz.sum(0)
        multiply_each(self, dz.to(self.operand), products)

    def select(
        self, state: PyTorchState, rows: slice, saved: SavedTile, rule: Rule, room: Tensor
    ) -> tuple[Tensor, list[int]] | None:
        fields, n = state.fields.rows(rows), len(saved.exps)
        base = finite(fields.maximum)
        rule.dropped.mul_((rule.relative - base).double().exp_())
        rule.relative.copy_(base)
        least = rule.bound * (fields.total + (rule.label_logits - base).exp_())
        shrink = (saved.maxima.squeeze(1) - base).exp_()
        groups = [slice(first, min(first + GROUP, n)) for first in range(0, n, GROUP)]
        found, left_out, numbers = [], [], 0
        for group in groups:
            exps = saved.exps[group] * shrink[group, None]
            kept = ~(exps < least[group, None]).all(0)
            columns = kept.nonzero().squeeze(1)
            numbers += len(columns) * len(exps)
            if numbers > len(room):
                return None
            room[numbers - len(columns) * len(exps) : numbers].view(len(columns), len(exps)).copy_(exps[:, columns].T)
            found.append(columns)
            left_out.append(exps.masked_fill_(kept, 0).sum(1, dtype=torch.float64))
        rule.dropped.add_(torch.cat(left_out))
        return torch.cat(found), [len(columns) for columns in found]

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        library_multiply(out, a, b, add)

    def _tile(self, n: int, v: int) -> Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self.room, dtype=self.wide, device=self.call.hidden.device)
        return self._buffer[: n * v].view(n, v)

    def _product(self, tile: Tile) -> Tensor:
        """a = h W^T + b of one tile, in the accumulation dtype."""
        product = self._tile(len(tile.hidden), len(tile.weight))
        self.multiply(product, tile.hidden, tile.weight.T, add=False)
        if self.call.bias is not None:
            product += self.call.bias[tile.columns].to(self.call.compute_dtype)
        return product

    def _accumulate(self, state: PyTorchState, tile: Tile) -> tuple[Accumulated, Tensor | None]:
        """Merges a tile into the state; also gives the cap's derivative. Exponentials are relative to the tile's own
        maximum in every mode, so that all modes give the same log-prob to the last bit."""
        rows, first, outputs = tile.rows, tile.columns.start, state.outputs
        z = self.call.transform.logits(self._product(tile))
        derivative = self.call.transform.cap_derivative(z)
        part = {"logits": z.sum(1)} if "mean_logits" in outputs else {}
        part["label_logit"] = take_label(z, state.labels[rows] - first)  # -inf is left in its place
        if "is_top1" in outputs:
            maximum, at = z.max(1)
            part["argmax"] = at + first
        else:
            maximum = z.amax(1)
        base = finite(maximum)
        below = z.sub_(base[:, None])
        if "entropy" in outputs:
            exps = below.exp()
            part["shifted"] = _row_dot(exps, below.clamp_(min=LOG_ZERO))
        else:
            exps = below.exp_()
        if "log_sum_sq_probs" in outputs:
            part["squares"] = _row_dot(exps, exps)
        made = empty_state(0, (), self.wide, z.device)._replace(maximum=maximum, total=exps.sum(1), **part)
        scales = merge_into(state.fields.rows(rows), made, outputs)
        return Accumulated(exps, base, scales), derivative

    def _from_saved(self, grads: TokenGrads, saved: SavedTile, out: Tensor, first: int) -> Tensor:
        transform = self.call.transform
        base = saved.maxima.squeeze(1)
        factor = (base - grads.maximum).sub_(grads.log_sum).exp_() * grads.grad_log_probs * -transform.slope
        out.copy_(saved.exps).mul_(factor[:, None])
        at_label = torch.expm1(grads.log_probs) * grads.grad_log_probs * -transform.slope
        if transform.softcap is not None:
            at_label *= transform.cap_derivative(grads.label_logit)  # type: ignore[arg-type]
        _put_label(out, grads.labels - first, at_label)
        return out


def finish_jacobian(transform: Transform, done: Finished, total: Tensor, label_weight: Tensor) -> None:
    """total (n, D), sum of exp(z - m) W times the cap's derivative relative to what `done.others` is for, becomes
    d log_prob / d hidden.

    label_weight (n, D): W at the labels. At the label the derivative is 1 - p = -expm1(log p): 1 - p loses every digit
    where the model is sure.
    """
    at_label = torch.expm1(done.stats.log_probs).neg_()
    derivative = transform.cap_derivative(done.label_logit)
    if derivative is not None:
        at_label *= derivative
    total.mul_(done.others.neg()[:, None]).addcmul_(at_label[:, None], label_weight)
    total.mul_(transform.slope)


def multiply_each(ops: TileOps, gradient: Tensor, products: Sequence[Product]) -> None:
    """gradient: d loss / d a of a tile (n, v)."""
    for out, right, by_vocab, add in products:
        ops.multiply(out, gradient.T if by_vocab else gradient, right, add)


def library_multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """`TileOps.multiply` by the library's product: cuBLAS and its like write a sum wider than the operands."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=float(add))
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def take_label(z: Tensor, local: Tensor) -> Tensor:
    """z[i, local[i]] (n,), NaN where that is no column; puts -inf in its place."""
    inside = ((local >= 0) & (local < z.shape[1]))[:, None]
    at = local.clamp(0, z.shape[1] - 1)[:, None]
    found = z.gather(1, at)
    z.scatter_(1, at, torch.where(inside, -torch.inf, found))
    return torch.where(inside, found, torch.nan).squeeze(1)


def logits_gradient(
    z: Tensor,  # (n, v), overwritten
    grads: TokenGrads,
    first: int,
    derivative: Tensor | None,  # (n, v)
    slope: float,
) -> Tensor:
    """d loss / d a from logits z: -p [g + gH (log p + H)] off the label, through the transform."""
    shifted = z.sub_(grads.maximum[:, None])
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


def _own(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the given dtype that may be overwritten."""
    return rows.to(dtype, copy=True)


def _row_blocks(logits: Tensor, tokens: int) -> list[slice]:
    block = LOGITS_BLOCK.get(logits.device.type, LOGITS_BLOCK_ELSEWHERE)
    step = max(1, block // (logits.shape[-1] * accumulate_dtype(logits.dtype).itemsize))
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row, without a temporary of their size."""
    return torch.bmm(a[:, None], b[:, :, None]).view(-1)


def _put_label(tile: Tensor, local: Tensor, values: Tensor) -> None:
    """tile[i, local[i]] = values[i] wherever local[i] is a column of the tile."""
    inside = (local >= 0) & (local < tile.shape[1])
    at = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, at, torch.where(inside[:, None], values[:, None], tile.gather(1, at)))
