"""The implementation for CPUs: the tiled driver with the C++ kernels of csrc/, which fold logits in cache.

Built just in time at the first call (see `dpo_kernels.build`). Products run in bfloat16 where the CPU has them, and in
float32 for float32 and float16.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import tiled
from dpo_kernels.head import Call, Grads, TokenStats, Transform
from dpo_kernels.impls import torch_impl
from dpo_kernels.plan import FACTS, Facts, Plan, Sweep

DEVICES = ("cpu",)
# The running statistics of csrc/hidden.cpp before the first tile, in its order: base, five sums and maxima, the label.
NO_STATS = (-1.5e38, 0.0, 0.0, 0.0, 0.0, -torch.inf, 0.0, torch.nan)
FAR = 7e5
_failure: str | None = None  # why the kernels could not be built or loaded


def unavailable(device: torch.device) -> str | None:
    from dpo_kernels import build  # here, so that `python -m dpo_kernels.build` runs a module that nobody imported yet

    if device.type not in DEVICES:
        return f"it runs on CPUs only, not on {device.type}"
    return _failure or (None if _loaded() else build.missing())


def cannot_run(device: torch.device) -> str | None:
    """As `unavailable`, but knows: builds and loads the kernels if that was not tried yet."""
    from dpo_kernels import build

    global _failure
    if device.type in DEVICES and _failure is None and not _loaded():
        try:
            build.load()
        except build.BuildError as error:
            _failure = str(error)
    return unavailable(device)


def facts(device: torch.device, tokens: int = 0, features: int = 0) -> Facts:
    return FACTS["cpp" if _multiplies_bfloat16() else "cpp, no bfloat16 products"]


def release() -> int:
    """Gives the memory of buffers that wait for their next use back; returns its bytes."""
    return _ops().release() if _loaded() else 0


def hidden_forward(call: Call, tokens: int, index: Tensor | None) -> tiled.Forward:
    if not tiled.in_rows(call.weight):  # the kernels read it where it lies
        return torch_impl.hidden_forward(call, tokens, index)
    made = tiled.forward(call, tokens, index, facts(call.hidden.device), CppFolds)
    if not _beyond_reach(made.max):
        return made
    del made
    release()
    made = torch_impl.hidden_forward(call, tokens, index)
    # Our maximum is up to 1 above the true one, which backward sees: what sent us here must be beyond reach there too.
    far = torch.where(made.max.abs() > FAR - 1, made.max.sign() * 2, 0)
    return made._replace(max=made.max + far, log_sum=made.log_sum - far)


def hidden_backward(
    call: Call, wanted: Grads, index: Tensor | None, grads: tiled.RowGrads, saved: tiled.Forward
) -> tiled.InputGrads:
    if not tiled.in_rows(call.weight) or _beyond_reach(grads.max):
        return torch_impl.hidden_backward(call, wanted, index, grads, saved)
    return tiled.backward(call, wanted, index, grads, saved, facts(call.hidden.device), CppFolds)


def logits_forward(
    logits: Tensor, labels: Tensor, transform: Transform, index: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, maximum and log sum exp(z - maximum), (M,) each, of the rows that count of logits (..., V)."""
    flat = tiled.as_matrix(logits)
    if flat is None:
        return torch_impl.logits_forward(logits, labels, transform, index, tokens)
    log_probs, maximum, log_sum = _ops().logits_forward(flat, index, labels, *_options(transform))
    if _beyond_reach(maximum):
        return torch_impl.logits_forward(logits, labels, transform, index, tokens)
    return log_probs, maximum, log_sum


def logits_backward(
    logits: Tensor, transform: Transform, index: Tensor | None, grads: tiled.RowGrads, out: Tensor
) -> None:
    """Writes d loss / d logits of the rows that count to out (..., V), which may be logits itself."""
    flat, to = tiled.as_matrix(logits), tiled.as_matrix(out)
    if flat is None or to is None or _beyond_reach(grads.max):
        torch_impl.logits_backward(logits, transform, index, grads, out)
        return
    _ops().logits_backward(
        flat, index, grads.labels, *_options(transform), grads.grad_log_probs.contiguous(), grads.log_probs, grads.max,
        grads.log_sum, to,
    )  # fmt: skip


class CppRowStats:
    """Running statistics of M rows, (8, M) float32; see csrc/hidden.cpp."""

    def __init__(self, call: Call, labels: Tensor) -> None:
        self.outputs, self.labels, self.vocab_size = call.outputs, labels, call.weight.shape[0]
        start = torch.tensor(NO_STATS, dtype=torch.float32, device="cpu")
        self.rows = start.repeat_interleave(len(labels)).view(len(start), len(labels))

    def finish(self) -> tuple[TokenStats, Tensor, Tensor]:
        made = _ops().finish(self.rows, self.labels, self.vocab_size)
        log_probs, maximum, log_sum, _, entropy, log_squares, mean, top1 = made
        optional = {
            "entropy": entropy, "log_sum_sq_probs": log_squares, "mean_logits": mean, "is_top1": top1 > 0,
        }  # fmt: skip
        return TokenStats(log_probs, **{name: optional[name] for name in self.outputs}), maximum, log_sum

    def finish_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The log-probs, and the factors that turn exp(z - base) into probabilities, of some rows."""
        made = _ops().finish(self.rows[:, rows].contiguous(), self.labels[rows], self.vocab_size)
        return made[0], made[3]


class CppFolds:
    """`tiled.Folds` of the C++ kernels; see there for what each method does."""

    rounds = True

    def __init__(self, call: Call, plan: Plan) -> None:
        self.call, self.plan = call, plan
        widened = call.compute_dtype in facts(call.hidden.device).widens
        self.operand = torch.float32 if widened else call.compute_dtype
        self._packed: tuple[slice, Tensor] | None = None
        self._buffers: dict[str, Tensor] = {}

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return _ops().empty(purpose, rows, columns, dtype)

    def stats(self, labels: Tensor) -> CppRowStats:
        return CppRowStats(self.call, labels)

    def score(self, stats: CppRowStats, tile: tiled.Tile) -> None:
        self._fold(stats, tile)

    def keep(self, stats: CppRowStats, tile: tiled.Tile, kept: tiled.Kept) -> None:
        self._fold(stats, tile, by_vocab=kept.exp.T, bases=kept.bases.T)

    def jacobian(self, stats: CppRowStats, tile: tiled.Tile, total: Tensor) -> None:
        n, v = len(tile.hidden), len(tile.weight)
        share = self._buffer("by_token", n, v)
        bases = self._buffer("bases", -(-v // self.plan.base_columns), n, torch.float32)
        self._fold(stats, tile, by_token=share, bases=bases, total=total)
        self.multiply(total, share, tile.weight, add=True)

    def finish_jacobian(self, stats: CppRowStats, rows: slice, total: Tensor, label_weight: Tensor) -> None:
        log_probs, others = stats.finish_rows(rows)
        at_label = torch.expm1(log_probs).neg_()
        transform = self.call.transform
        if transform.softcap is not None:
            back = transform.temperature / transform.softcap
            at_label *= 1 - (stats.rows[-1, rows] * back).square()
        total.mul_(others.neg_()[:, None]).addcmul_(at_label[:, None], label_weight)
        total.mul_(transform.slope)

    def dz(
        self, grads: tiled.RowGrads, tile: tiled.Tile, kept: tiled.Kept | None, wanted: Sweep, bias: Tensor | None
    ) -> tiled.Dz:
        n, v = len(tile.hidden), len(tile.weight)
        made = tiled.Dz(
            self._buffer("by_token", n, v) if wanted.hidden else None,
            self._buffer("by_vocab", v, n) if wanted.weight else None,
        )
        exp, bases = (None, None) if kept is None else (kept.exp.T, kept.bases.T)
        _ops().gradient(
            *self._tile(tile, grads.labels), grads.grad_log_probs.contiguous(), grads.log_probs, grads.max,
            grads.log_sum, grads.entropy, None if grads.grad_entropy is None else grads.grad_entropy.contiguous(),
            *made, bias, exp, bases,
        )  # fmt: skip
        return made

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        k, n = b.shape
        pair = 1 if b.dtype == torch.float32 else 2
        _ops().multiply(out, a, _rows_contiguous(b), add, self._buffer("right", n, -(-k // pair) * pair).view(-1))

    def _fold(
        self, stats: CppRowStats, tile: tiled.Tile, by_token: Tensor | None = None, by_vocab: Tensor | None = None,
        bases: Tensor | None = None, total: Tensor | None = None,
    ) -> None:  # fmt: skip
        _ops().fold(
            *self._tile(tile, stats.labels[tile.rows]), stats.rows, tile.rows.start, ",".join(stats.outputs), by_token,
            by_vocab, bases, total,
        )  # fmt: skip

    def _tile(self, tile: tiled.Tile, labels: Tensor) -> tuple[Any, ...]:
        """The arguments that say which tile, with the hidden states packed; those of the last rows are held."""
        if self._packed is None or self._packed[0] != tile.rows:
            self._packed = None
            self._packed = (tile.rows, _ops().pack(_rows_contiguous(tile.hidden)))
        bias = self.call.bias
        if bias is not None:
            bias = bias[tile.columns].to(self.call.compute_dtype).float().contiguous()
        return self._packed[1], tile.weight, bias, labels, tile.columns.start, *_options(self.call.transform)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers[name] = torch.empty(rows * columns, dtype=dtype or self.operand)
        return self._buffers[name][: rows * columns].view(rows, columns)


def _beyond_reach(maximum: Tensor) -> bool:
    """Whether a row's largest logit is so large, or so negative, that float32 numbers beside it lie 0.06 apart: the
    kernels' exponents in base 2 would be a number of its own (csrc/transform.h)."""
    return bool(((maximum.abs() > FAR) & maximum.isfinite()).any())


def _options(transform: Transform) -> tuple[float, float, float | None]:
    return transform.temperature, transform.logit_scale, transform.softcap


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _ops() -> Any:
    return torch.ops.dpo_kernels_cpp


def _loaded() -> bool:
    return hasattr(torch.ops.dpo_kernels_cpp, "fold")


def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.enabled is True and _has_dot_products()


@functools.cache
def _has_dot_products() -> bool:
    """Whether the CPU has bfloat16 dot products, and oneDNN multiplies with them when asked to."""
    try:
        if " avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
            return False
        ones = torch.ones(16, 16, dtype=torch.bfloat16)
        _ops().multiply(torch.empty(16, 16, dtype=torch.float32), ones, ones, False, ones.new_empty(256))
    except (OSError, RuntimeError):
        return False
    return True
