"""The back end for CPUs: the C++ kernels of csrc/, which make and accumulate logits in cache.

Built just in time at the first call (see `dpo_kernels.build`). Products run in bfloat16 where the CPU has fast ones,
and in float32 for float32 and float16.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.backends.base import MIB, Execution, Product, SavedTile, Tile
from dpo_kernels.backends.pytorch import finish_jacobian
from dpo_kernels.call import Call, TokenGrads, Tokens, Transform
from dpo_kernels.capabilities import Capabilities
from dpo_kernels.host_memory import with_memory
from dpo_kernels.layout import in_matrix, in_rows, lies_in_rows, rows_of
from dpo_kernels.planner import Plan
from dpo_kernels.sparse import Rule
from dpo_kernels.statistics import LOG_ZERO, OPTIONAL_OUTPUTS, Finished, SoftmaxState, TokenStats, finite
from dpo_kernels.workload import GROUP

# Rows whose largest logit is beyond this, either way, are not the kernels': float32 numbers beside it lie 0.06 apart,
# and the kernels' exponents in base 2 are numbers of their own (csrc/softmax_state.h).
LARGEST_LOGIT = 7e5

# A call of few tokens is many short kernels, and each ends with a wait for its last thread, which may have no core just
# then (docs/cpp.md). Of 64 tokens the weight is packed by who multiplies it, and wide strips leave the cache (1.2 times
# slower in float32).
WIDE_TILES = ((64, 8192), (256, 16384), (512, 8192))
CAPABILITIES = Capabilities(
    ((1024, 4096), (1024, 2048), (512, 2048), (256, 1024), (128, 512), (64, 256), (64, 64)), 18 * MIB,
    widens=(torch.float16,), packs=True, rounds=True, maxima_columns=64, saved_by_vocab=True, saved_multiple=64,
    wide_tiles=WIDE_TILES, widest_copy=16 * MIB, filters="keep",
)  # fmt: skip
# Sapphire Rapids and Emerald Rapids.
SLOW_BFLOAT16 = (("GenuineIntel", "6", "143"), ("GenuineIntel", "6", "207"))
WITHOUT_BFLOAT16 = replace(CAPABILITIES, widens=(torch.float16, torch.bfloat16))


class CppBackend:
    """See `dpo_kernels.backends.base.Backend` for what each method does."""

    name = "cpp"
    devices: tuple[str, ...] = ("cpu",)
    largest_vocabulary = 2**24  # argmax is held in float32
    failure: str | None = None  # why the kernels could not be built or loaded

    def unavailable(self, device: torch.device) -> str | None:
        from dpo_kernels import build  # here, so that `python -m dpo_kernels.build` runs a module that is not imported

        if device.type not in self.devices:
            return f"it runs on CPUs only, not on {device.type}"
        return self.failure or (None if _loaded() else build.missing())

    def cannot_run(self, device: torch.device) -> str | None:
        from dpo_kernels import build

        if device.type in self.devices and self.failure is None and not _loaded():
            try:
                build.load()
            except build.BuildError as error:
                self.failure = str(error)
        return self.unavailable(device)

    def declines_head(self, hidden: Tensor, weight: Tensor) -> bool:
        """The kernels read the weight where it lies."""
        return not in_rows(weight)

    def declines_logits(self, logits: Tensor) -> bool:
        return not lies_in_rows(logits)

    def configure(self, device: torch.device, features: int, compute_dtype: torch.dtype, extras: bool) -> None:
        return None

    def capabilities(self, device: torch.device, configuration: None = None) -> Capabilities:
        return with_memory(CAPABILITIES if _multiplies_bfloat16() else WITHOUT_BFLOAT16)

    def tile_ops(self, call: Call, plan: Plan, execution: Execution) -> CppTileOps:
        return CppTileOps(call, plan, execution)

    def logits_forward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, configuration: None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix, index = in_matrix(logits, tokens.index)
        return tuple(_ops().logits_forward(matrix, index, tokens.labels, *_numbers(transform)))

    def logits_backward(
        self, logits: Tensor, tokens: Tokens, transform: Transform, grads: TokenGrads, out: Tensor, configuration: None
    ) -> None:
        matrix, index = in_matrix(logits, tokens.index)
        to = (matrix, index) if out is logits else in_matrix(out, tokens.index)
        _ops().logits_backward(matrix, index, tokens.labels, *_numbers(transform), *_vectors(grads)[:5], *to)

    def out_of_reach(self, maximum: Tensor) -> bool:
        return bool(((maximum.abs() > LARGEST_LOGIT) & maximum.isfinite()).any())

    def empty_cache(self) -> int:
        return _ops().release() if _loaded() else 0


class CppState:
    """The state of csrc/softmax_state.h of M tokens: (fields, M) float32."""

    def __init__(self, call: Call, labels: Tensor) -> None:
        self.outputs, self.labels, self.vocab_size = call.outputs, labels, call.vocab_size
        self.fields = _ops().new_state(len(labels))

    def finish(self) -> Finished:
        made = _ops().finish(self.fields, self.labels, self.vocab_size)
        log_probs, maximum, log_sum, others, label_logit, *optional = made
        stats = dict(zip(OPTIONAL_OUTPUTS, optional, strict=True))
        stats["is_top1"] = stats["is_top1"] > 0
        wanted = TokenStats(log_probs, **{name: stats[name] for name in self.outputs})
        return Finished(wanted, maximum, log_sum, others, label_logit)

    def part(self) -> SoftmaxState:
        """From base 2 to the natural one. Exponents go through float64: rounded, they would cost sums their digits."""
        given = dict(zip(_state_fields(), self.fields, strict=True))
        largest, relative = self._logs()
        total = given["total"].double()
        # The largest logit is known only beside its place.
        maximum = given["maximum"] if "is_top1" in self.outputs else largest.float()
        floor = finite(maximum).double()
        # 0 sums where no logit is finite
        scale = torch.where(given["total"] == 0, 1.0, (relative - floor).exp())
        shifted = scale * (given["shifted"] * math.log(2) + total * (largest - floor).clamp(min=LOG_ZERO))
        return SoftmaxState(
            maximum=maximum, total=(total * scale).float(), label_logit=given["label_logit"], shifted=shifted.float(),
            squares=(given["squares"] * scale.square()).float(), logits=given["logits"], argmax=given["argmax"].long(),
        )  # fmt: skip

    def shrink(self, rows: slice) -> Tensor:
        """(n,): from what the sums are relative to, to `base`: powers of two."""
        base = rows_of(self.fields[_state_fields().index("base")], rows)
        return torch.exp2((_ops().reference(base) - base).double()).float()

    def scale_to(self, maximum: Tensor) -> Tensor:
        return (self._logs()[0] - finite(maximum).double()).exp_().float()

    def _logs(self) -> tuple[Tensor, Tensor]:
        """The largest logit, or a number near it, and what the sums are relative to: float64, -inf in rows without a
        finite logit."""
        base = self.fields[_state_fields().index("base")]
        both = torch.stack((base, _ops().reference(base))).double() * math.log(2)
        return tuple(torch.where(base < -1e38, -torch.inf, both))


class CppTileOps:
    """See `dpo_kernels.backends.base.TileOps` for what each method does."""

    unit = math.log(2)

    def __init__(self, call: Call, plan: Plan, execution: Execution) -> None:
        self.call, self.plan, self.rounds = call, plan, execution.capabilities.rounds
        self.operand = execution.operand(call.compute_dtype)
        if self.operand == torch.bfloat16 and not _multiplies_bfloat16():
            self.operand = torch.float32  # oneDNN was switched off since forward
        self.weight_dtype = call.compute_dtype
        self._packed: tuple[slice, Tensor] | None = None
        self._buffers: dict[str, Tensor] = {}

    def empty(self, purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return _ops().empty(purpose, rows, columns, dtype)

    def new_state(self, labels: Tensor) -> CppState:
        return CppState(self.call, labels)

    def accumulate(self, state: CppState, tile: Tile, saved: SavedTile | None) -> None:
        if saved is None:
            self._accumulate(state, tile)
        else:
            self._accumulate(state, tile, by_vocab=saved.exps.T, maxima=saved.maxima.T)

    def accumulate_jacobian(self, state: CppState, tile: Tile, total: Tensor) -> None:
        n, v = len(tile.hidden), len(tile.weight)
        share = self._buffer("by_token", n, v)
        maxima = self._buffer("maxima", -(-v // self.plan.maxima_columns), n, torch.float32)
        self._accumulate(state, tile, by_token=share, maxima=maxima, total=total)
        self.multiply(total, share, tile.weight, add=True)

    def select(
        self, state: CppState, rows: slice, saved: SavedTile, rule: Rule, room: Tensor
    ) -> tuple[Tensor, list[int]] | None:
        base, total = (rows_of(state.fields[_state_fields().index(name)], rows) for name in ("base", "total"))
        to = reference = _ops().reference(base)
        if saved.exps.dtype == torch.float16:
            to, total = base, total * torch.exp2(reference - base)
        rule.dropped.mul_(torch.exp2((rule.relative - to).double()))
        rule.relative.copy_(to)
        least = rule.bound * (total + torch.exp2(rule.label_logits / math.log(2) - to))
        found = _ops().select(saved.exps.T, saved.maxima.T, rule.relative, least, GROUP, room, rule.dropped)
        return (found[0], found[1].tolist()) if found else None

    def finish_jacobian(
        self, state: CppState, rows: slice, done: Finished, total: Tensor, label_weight: Callable[[], Tensor]
    ) -> None:
        # `others` is relative to `base`: relative to 0 it could be smaller than a float32 can be.
        total.mul_(state.shrink(rows)[:, None])
        finish_jacobian(self.call.transform, done, total, label_weight())

    def gradient_products(
        self, grads: TokenGrads, tile: Tile, saved: SavedTile | None, products: Sequence[Product], bias: Tensor | None
    ) -> None:
        """In one kernel, whose threads need not wait for all others before each of its parts."""
        n, v = len(tile.hidden), len(tile.weight)
        by_token = self._buffer("by_token", n, v) if any(not p.by_vocab for p in products) else None
        # What is saved is a left operand itself.
        by_vocab = self._buffer("by_vocab", v, n) if saved is None and any(p.by_vocab for p in products) else None
        exps, maxima = (None, None) if saved is None else (saved.exps.T, saved.maxima.T)
        rights = [_rows_contiguous(p.right) for p in products]
        rooms = [
            self._room(f"{right.shape[1]} columns of {'hidden' if p.by_vocab else 'weight'}, {i}", right)
            for i, (p, right) in enumerate(zip(products, rights, strict=True))
        ]
        _ops().gradient(
            *self._tile(tile, grads.labels), *_vectors(grads), by_token, by_vocab, bias, exps, maxima,
            [p.out for p in products], rights, rooms, [p.by_vocab for p in products], [p.add for p in products],
        )  # fmt: skip

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        right = _rows_contiguous(b)
        _ops().multiply(out, a, right, add, self._room(f"{right.shape[1]} columns", right))

    def _room(self, what: str, right: Tensor) -> Tensor:
        """For a right operand (k, n), packed."""
        (k, n), pair = right.shape, 1 if self.operand == torch.float32 else 2
        return self._buffer(f"packed {what}", n, -(-k // pair) * pair).view(-1)

    def _accumulate(
        self, state: CppState, tile: Tile, by_token: Tensor | None = None, by_vocab: Tensor | None = None,
        maxima: Tensor | None = None, total: Tensor | None = None,
    ) -> None:  # fmt: skip
        _ops().accumulate(
            *self._tile(tile, state.labels[tile.rows]), state.fields, tile.rows.start, ",".join(state.outputs),
            by_token, by_vocab, maxima, total,
        )  # fmt: skip

    def _tile(self, tile: Tile, labels: Tensor) -> tuple[Any, ...]:
        """The arguments that say which tile, with the hidden states packed; those of the last rows are held."""
        if self._packed is None or self._packed[0] != tile.rows:
            self._packed = None
            self._packed = (tile.rows, _ops().pack(_rows_contiguous(tile.hidden)))
        bias = self.call.bias
        if bias is not None:
            bias = bias[tile.columns].to(self.call.compute_dtype).float().contiguous()
        weight = _rows_contiguous(tile.weight)
        return self._packed[1], weight, bias, labels, tile.columns.start, *_numbers(self.call.transform)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._buffers or self._buffers[name].numel() < rows * columns:
            self._buffers.pop(name, None)
            self._buffers[name] = self.empty(f"{name} of a tile", rows, columns, dtype or self.operand).view(-1)
        return self._buffers[name][: rows * columns].view(rows, columns)


def _numbers(transform: Transform) -> tuple[float, float, float | None]:
    return transform.temperature, transform.logit_scale, transform.softcap


def _vectors(grads: TokenGrads) -> tuple[Tensor | None, ...]:
    """In the order of the operators."""
    made = (
        grads.grad_log_probs, grads.log_probs, grads.maximum, grads.log_sum, grads.label_logit, grads.entropy,
        grads.grad_entropy,
    )  # fmt: skip
    return tuple(None if t is None else t.contiguous() for t in made)


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if in_rows(matrix) else matrix.contiguous()


def _ops() -> Any:
    return torch.ops.dpo_kernels_cpp


@functools.cache
def _state_fields() -> tuple[str, ...]:
    return tuple(_ops().state_fields())


def _loaded() -> bool:
    return hasattr(torch.ops.dpo_kernels_cpp, "accumulate")


def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.enabled is True and _has_dot_products()


@functools.cache
def _has_dot_products() -> bool:
    """Whether oneDNN multiplies bfloat16 when asked to, and faster than float32."""
    try:
        if not multiplies_bfloat16_faster(Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return False
        ones = torch.ones(16, 16, dtype=torch.bfloat16)
        _ops().multiply(torch.empty(16, 16, dtype=torch.float32), ones, ones, False, ones.new_empty(256))
    except (OSError, RuntimeError):
        return False
    return True


def multiplies_bfloat16_faster(cpuinfo: str) -> bool:
    """Whether a CPU has bfloat16 dot products that are faster than products in float32. cpuinfo: as in /proc/cpuinfo.

    Those of Intel's Golden Cove are not: where a virtual machine hides their AMX, 84 GFLOP/s a core against 149
    (docs/cpp.md). It is decided by the model, not by a clock, so that a run has the same numbers each time.
    """
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    flags = fields.get("flags", "").split()
    if "avx512_bf16" not in flags:
        return False
    model = (fields.get("vendor_id"), fields.get("cpu family"), fields.get("model"))
    return "amx_bf16" in flags or model not in SLOW_BFLOAT16
