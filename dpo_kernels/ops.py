"""The torch.library operators behind the public functions, with their fakes and autograd formulas.

Which tokens count depends on the labels, so an operator finds them itself: to torch.compile it is one opaque node with
outputs whose sizes may depend on data, and no graph break. Arguments were checked by the caller.

An operator takes tensors, numbers and strings, so two objects are written down for it. The options of a call are the
last four arguments of every operator (`call.Options.encode`). What forward decided is a tensor of bytes on the CPU,
which is saved with the rest and given to backward (`_pack`).

While a CUDA graph is captured sizes may not depend on data: then every token is computed (`call.Tokens.masked`).
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks, collectives, dispatch
from dpo_kernels.backends.base import Execution, Saved
from dpo_kernels.call import Call, Grads, LowRank, Options, TokenGrads, Tokens, accumulate_dtype, ignored
from dpo_kernels.statistics import OUTPUTS, TokenStats
from dpo_kernels.workload import aligned

OPTIONS = "float[] numbers, SymInt[] limits, bool[] wants_grad, str spec"
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_rank_a, Tensor? low_rank_b, Tensor labels"
HEAD_TENSORS = HEAD.count("Tensor")
LOGITS = "Tensor logits, Tensor labels"
EXECUTION_BYTES = 4096
FIRST_DERIVATIVES = (
    "dpo_kernels computes first derivatives only: double backward (create_graph=True) is not supported; "
    "use the functions in dpo_kernels.reference, which autograd can differentiate twice"
)
STATS = len(TokenStats._fields)
# What forward of the head saves for backward, behind the statistics.
SAVED = (
    "index",
    "log_probs",
    "entropy",
    "maximum",
    "log_sum",
    "label_logit",
    "exps",
    "maxima",
    "jacobian",
    "table",
    "execution",
)
SAVED_OF_LOGITS = ("index", "log_probs", "maximum", "log_sum", "label_logit", "execution")


def _tensors(count: int) -> str:
    """That many results. A list would be one result, and cost each call a tenth of a millisecond more."""
    return f"({', '.join(['Tensor'] * count)})"


@torch.library.custom_op(
    "dpo_kernels::token_stats",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}) -> {_tensors(STATS + len(SAVED))}",
)
def token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    labels: Tensor,
    *encoded: Any,
) -> tuple[Tensor, ...]:
    """The fields of `TokenStats` (empty where not asked for), of the labels' shape; then `SAVED`."""
    options = Options.decode(*encoded)
    shard = options.shard

    def find() -> Tokens:
        checks.labels_in_range(labels, options.ignore_index, weight.shape[0] if shard is None else shard.vocab_size)
        checks.counted_labels(labels, options.ignore_index, options.tokens)
        return Tokens.of(labels, options.ignore_index, options.tokens)

    tokens = collectives.agree(shard, labels, find).seen_from(shard)
    call = _call((hidden, weight, bias, _low_rank(low_rank_a, low_rank_b)), labels, tokens, options)
    execution, made = dispatch.forward(call)
    stats = (
        labels.new_empty(0, dtype=dtype) if value is None else tokens.spread(value, labels, options.ignore_index)
        for value, dtype in zip(made.stats, _dtypes(made.maximum.dtype), strict=True)
    )
    saved = made._asdict() | {
        "index": _index(tokens, labels),
        # Apart from the results, which their owner may change in place.
        "log_probs": made.stats.log_probs,
        "entropy": made.maximum.new_empty(0) if made.stats.entropy is None else made.stats.entropy,
        "execution": _pack(execution),
    }
    return (*stats, *(saved[name] for name in SAVED))


@token_stats_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    labels: Tensor,
    *encoded: Any,
) -> tuple[Tensor, ...]:
    options = Options.decode(*encoded)
    wide, outputs, grads = accumulate_dtype(hidden.dtype), options.outputs, options.grads
    stats = [
        hidden.new_empty(labels.shape if name in ("log_probs", *outputs) else (0,), dtype=dtype)
        for name, dtype in zip(TokenStats._fields, _dtypes(wide), strict=True)
    ]
    counted, index = _counted(labels, options)
    every = labels.numel()
    frozen = grads == Grads(hidden=True) and "entropy" not in outputs and low_rank_a is None
    rows = _size(every) if frozen else 0
    kept, blocks = (_size(0), _size(0)) if grads and "entropy" not in outputs else (0, 0)
    saved = {
        "index": labels.new_empty((index,), dtype=torch.int64),
        "log_probs": hidden.new_empty((counted,), dtype=wide),
        "entropy": hidden.new_empty((counted if "entropy" in outputs else 0,), dtype=wide),
        "maximum": hidden.new_empty((counted,), dtype=wide),
        "log_sum": hidden.new_empty((counted,), dtype=wide),
        "label_logit": hidden.new_empty((counted,), dtype=wide),
        "exps": hidden.new_empty((kept, aligned(weight.shape[0])), dtype=options.compute_dtype),
        "maxima": hidden.new_empty((kept, blocks), dtype=wide),
        "jacobian": hidden.new_empty((rows, hidden.shape[-1]), dtype=wide),
        "table": labels.new_empty((_size(0) if options.gradient_filter else 0,), dtype=torch.int64),
        "execution": torch.empty(EXECUTION_BYTES, dtype=torch.uint8, device="cpu"),
    }
    return (*stats, *(saved[name] for name in SAVED))


@torch.library.custom_op(
    "dpo_kernels::token_stats_backward",
    mutates_args=(),
    schema=f"(Tensor?[] grads, Tensor[] made, bool[] wanted, {HEAD}, {OPTIONS}) -> Tensor[]",
)
def token_stats_backward_op(
    grads: list[Tensor | None],
    made: list[Tensor],
    wanted: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    labels: Tensor,
    *encoded: Any,
) -> list[Tensor]:
    """Gradients of those that are `wanted` now, in the order of the tensors: some of those that forward was told of.

    grads: of the log-probs and of the entropy. made: what forward saved, as in `SAVED`.
    """
    options = Options.decode(*encoded)
    saved = dict(zip(SAVED, made, strict=True))
    execution = _unpack(saved["execution"])
    tokens = _tokens(labels, options, execution, saved["index"])
    call = _call((hidden, weight, bias, _low_rank(low_rank_a, low_rank_b)), labels, tokens, options)
    rows = _token_grads(tokens, labels, options, saved, grads)
    # As forward made them, whatever a hook returned.
    exps, maxima = saved["exps"].contiguous(), saved["maxima"].contiguous()
    of_forward = Saved(
        TokenStats(rows.log_probs), rows.maximum, rows.log_sum, rows.label_logit, exps, maxima, saved["jacobian"],
        saved["table"].contiguous(),
    )  # fmt: skip
    found = dispatch.backward(
        call, Grads(wanted[0], wanted[1], wanted[2], wanted[3] or wanted[4]), execution, rows, of_forward
    )
    gradients = []
    for name, gradient, want in zip(found._fields, found, wanted, strict=True):
        if want:
            assert gradient is not None, name
            gradients.append(gradient)
    return gradients


@token_stats_backward_op.register_fake
def _(
    grads: list[Tensor | None],
    made: list[Tensor],
    wanted: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
    labels: Tensor,
    *encoded: Any,
) -> list[Tensor]:
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, want in zip((hidden, weight, bias, low_rank_a, low_rank_b), wanted, strict=True)
        if t is not None and want
    ]


def _setup_token_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.encoded = inputs[HEAD_TENSORS:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:HEAD_TENSORS], *output[STATS:])


def _token_stats_backward(ctx: Any, *output_grads: Tensor | None) -> Any:
    none = (None,) * (HEAD_TENSORS + len(ctx.encoded))
    wanted = list(ctx.needs_input_grad[: HEAD_TENSORS - 1])
    outputs = Options.decode(*ctx.encoded).outputs
    # The gradient of an entropy that was not asked for is that of an empty placeholder.
    grads = [output_grads[0], output_grads[1] if "entropy" in outputs else None]
    if all(g is None for g in grads):
        return none
    saved = ctx.saved_tensors  # once: a checkpoint computes them for one reader
    head, made = saved[:HEAD_TENSORS], saved[HEAD_TENSORS:]
    found = torch.ops.dpo_kernels.token_stats_backward(grads, made, wanted, *head, *ctx.encoded)
    each = dict(zip((i for i, want in enumerate(wanted) if want), found, strict=True))
    return (*map(each.get, range(len(wanted))), *none[len(wanted) :])


@torch.library.custom_op(
    "dpo_kernels::logits_log_probs",
    mutates_args=(),
    schema=f"({LOGITS}, {OPTIONS}) -> {_tensors(1 + len(SAVED_OF_LOGITS))}",
)
def logits_log_probs_op(logits: Tensor, labels: Tensor, *encoded: Any) -> tuple[Tensor, ...]:
    """log_probs, of the labels' shape; then `SAVED_OF_LOGITS`."""
    options = Options.decode(*encoded)
    checks.labels_in_range(labels, options.ignore_index, logits.shape[-1])
    checks.counted_labels(labels, options.ignore_index, options.tokens)
    tokens = Tokens.of(labels, options.ignore_index, options.tokens)
    execution, (log_probs, *vectors) = dispatch.logits_forward(logits, tokens, options)
    spread = tokens.spread(log_probs, labels, options.ignore_index)
    return spread, _index(tokens, labels), log_probs, *vectors, _pack(execution)


@logits_log_probs_op.register_fake
def _(logits: Tensor, labels: Tensor, *encoded: Any) -> tuple[Tensor, ...]:
    wide = accumulate_dtype(logits.dtype)
    counted, index = _counted(labels, Options.decode(*encoded))
    return (
        logits.new_empty(labels.shape, dtype=wide),
        labels.new_empty((index,), dtype=torch.int64),
        *(logits.new_empty((counted,), dtype=wide) for _ in range(4)),
        torch.empty(EXECUTION_BYTES, dtype=torch.uint8, device="cpu"),
    )


BACKWARD_OF_LOGITS = f"(Tensor grad, Tensor[] made, {{logits}}, Tensor labels, {OPTIONS}) -> "


@torch.library.custom_op(
    "dpo_kernels::logits_log_probs_backward",
    mutates_args=(),
    schema=BACKWARD_OF_LOGITS.format(logits="Tensor logits") + "Tensor",
)
def logits_log_probs_backward_op(
    grad: Tensor, made: list[Tensor], logits: Tensor, labels: Tensor, *encoded: Any
) -> Tensor:
    """made: what forward saved, as in `SAVED_OF_LOGITS`."""
    options = Options.decode(*encoded)
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    tokens = _write_logits_gradient(grad, made, logits, labels, options, out)
    if tokens.masked:
        out.masked_fill_(ignored(labels, options.ignore_index).unsqueeze(-1), 0)
    return out


@logits_log_probs_backward_op.register_fake
def _(grad: Tensor, made: list[Tensor], logits: Tensor, labels: Tensor, *encoded: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    "dpo_kernels::logits_log_probs_backward_",
    mutates_args=("logits",),
    schema=BACKWARD_OF_LOGITS.format(logits="Tensor(a!) logits") + "()",
)
def logits_log_probs_backward_inplace_op(
    grad: Tensor, made: list[Tensor], logits: Tensor, labels: Tensor, *encoded: Any
) -> None:
    """Overwrites the logits with their gradient; rows that do not count become 0."""
    options = Options.decode(*encoded)
    _write_logits_gradient(grad, made, logits, labels, options, logits)
    if options.ignore_index is not None:
        logits.masked_fill_(ignored(labels, options.ignore_index).unsqueeze(-1), 0)


def _write_logits_gradient(
    grad: Tensor, made: list[Tensor], logits: Tensor, labels: Tensor, options: Options, out: Tensor
) -> Tokens:
    saved = dict(zip(SAVED_OF_LOGITS, made, strict=True))
    execution = _unpack(saved["execution"])
    tokens = _tokens(labels, options, execution, saved["index"])
    rows = _token_grads(tokens, labels, options, saved, [grad, None])
    dispatch.logits_backward(logits, tokens, options, execution, rows, out)
    return tokens


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.encoded = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, *output[1:])


def _logits_backward(ctx: Any, *output_grads: Tensor | None) -> Any:
    none = (None,) * (1 + len(ctx.encoded))
    grad = output_grads[0]
    if grad is None:
        return (None, *none)
    logits, labels, *made = ctx.saved_tensors  # raises if the logits were modified since forward, by us or by anyone
    if Options.decode(*ctx.encoded).inplace_backward:
        with torch.no_grad():
            torch.ops.dpo_kernels.logits_log_probs_backward_(grad, made, logits, labels, *ctx.encoded)
        gradient = logits.detach()
        if torch.is_grad_enabled():  # create_graph: who differentiates this gradient is told that there is none
            gradient = _Once.apply(gradient, logits, grad)
        return (gradient, *none)
    return (torch.ops.dpo_kernels.logits_log_probs_backward(grad, made, logits, labels, *ctx.encoded), *none)


class _Once(torch.autograd.Function):
    """A gradient as a function of what it came from, which cannot be differentiated."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(FIRST_DERIVATIVES)


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(FIRST_DERIVATIVES)


token_stats_op.register_autograd(_token_stats_backward, setup_context=_setup_token_stats)
logits_log_probs_op.register_autograd(_logits_backward, setup_context=_setup_logits)
for op in (token_stats_backward_op, logits_log_probs_backward_op):
    op.register_autograd(_no_double_backward)


def _counted(labels: Tensor, options: Options) -> tuple[Any, Any]:
    """How many labels count and how long their index is: only a run can tell, unless the caller has."""
    every = labels.numel()
    known = every if options.ignore_index is None else options.tokens or None
    return (_size(every), _size(every)) if known is None else (known, 0 if known == every else known)


def _size(otherwise: Any) -> Any:
    """A size that depends on data; `otherwise` for meta and fake tensors that stand in no graph."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except (AttributeError, RuntimeError):
        return otherwise


def _dtypes(wide: torch.dtype) -> list[torch.dtype]:
    """Of the fields of TokenStats."""
    return [torch.bool if name == "is_top1" else wide for name in ("log_probs", *OUTPUTS)]


def _low_rank(a: Tensor | None, b: Tensor | None) -> LowRank | None:
    return None if a is None or b is None else LowRank(a, b)


def _call(
    head: tuple[Tensor, Tensor, Tensor | None, LowRank | None], labels: Tensor, tokens: Tokens, options: Options
) -> Call:
    hidden, weight, bias, low_rank = head
    shard = options.shard
    if shard is not None and shard.hidden_dim is not None:
        hidden = collectives.gather_hidden(hidden, shard, labels.shape[shard.hidden_dim])
    if tokens.masked:
        # Not even NaN in a token that is ignored may reach the weight's gradient; the copy counts in the budget.
        hidden = hidden.masked_fill(ignored(labels, options.ignore_index).unsqueeze(-1), 0)
    return Call(hidden, weight, bias, low_rank, tokens, labels.numel(), options)


def _index(tokens: Tokens, labels: Tensor) -> Tensor:
    return labels.new_empty(0, dtype=torch.int64) if tokens.index is None else tokens.index


def _tokens(labels: Tensor, options: Options, execution: Execution, index: Tensor) -> Tokens:
    """The tokens that forward found; nothing waits for the device."""
    if execution.masked:
        return Tokens.all_masked(labels, options.ignore_index).seen_from(options.shard)
    return Tokens.found(labels, None if execution.all_count else index).seen_from(options.shard)


def _token_grads(
    tokens: Tokens,
    labels: Tensor,
    options: Options,
    saved: dict[str, Tensor],
    grads: Sequence[Tensor | None],
) -> TokenGrads:
    def counted(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        # Results that are 0 whatever the inputs have no gradient.
        return tokens.take(grad.masked_fill(ignored(labels, options.ignore_index), 0) if tokens.masked else grad)

    of_log_probs, of_entropy = (counted(g) for g in grads)
    log_probs = saved["log_probs"]
    of_log_probs = torch.zeros_like(log_probs) if of_log_probs is None else of_log_probs
    entropy = None if of_entropy is None else saved["entropy"]
    return TokenGrads(
        tokens.labels, log_probs, saved["maximum"], saved["log_sum"], saved["label_logit"], of_log_probs, entropy,
        of_entropy,
    )  # fmt: skip


def _pack(execution: Execution) -> Tensor:
    """What forward decided as bytes, always as many: a size that depends on it would be one more dynamic size."""
    written = pickle.dumps(execution)
    if len(written) > EXECUTION_BYTES:
        raise ValueError(
            f"what was decided of this call takes {len(written)} bytes, at most {EXECUTION_BYTES} can be "
            "saved; give override fewer tiles"
        )
    return torch.frombuffer(bytearray(written.ljust(EXECUTION_BYTES, b"\0")), dtype=torch.uint8)


def _unpack(record: Tensor) -> Execution:
    """By address: `tolist` takes ten times as long, and numpy need not be there."""
    record = record.cpu().contiguous()  # a hook on saved tensors may have moved it
    return pickle.loads(ctypes.string_at(record.data_ptr(), EXECUTION_BYTES))
