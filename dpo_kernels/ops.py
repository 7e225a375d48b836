"""The torch.library ops behind the public functions, with their fakes and autograd formulas.

Which rows count depends on the labels, so an op finds them itself: to torch.compile it is one opaque node with outputs
whose sizes may depend on data, and no graph break. Arguments were checked by the caller.

While a CUDA graph is captured sizes may not depend on data: then every row is computed, ignored ones with a stand-in
label and hidden states of 0, and their results and gradients are set to 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks, impls, tiled
from dpo_kernels.head import OPTIONAL_OUTPUTS, Call, Grads, TokenStats, Transform, accumulate_dtype
from dpo_kernels.plan import aligned

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("dpo_kernels::token_stats", mutates_args=())
def token_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: str,
    grads: str,
    compute_dtype: torch.dtype,
    memory_budget: int | None,
    impl: str | None,
) -> Saved:
    """log_probs and the four optional statistics (empty where not asked for), of the labels' shape; then, for
    backward and of the rows that count alone, max, log_sum, kept, bases and jacobian."""
    checks.labels_in_range(labels, ignore_index, weight.shape[0])
    call = _call(
        hidden, weight, bias, labels, ignore_index, temperature, logit_scale, softcap, outputs, grads, compute_dtype,
        memory_budget,
    )  # fmt: skip
    call, index, tokens = _rows_of_call(call)
    module = impls.choose(impl, hidden.device, hidden.dtype)
    with _no_autocast(hidden):
        made = module.hidden_forward(call, tokens, index)
    dtypes = (torch.bool if name == "is_top1" else made.max.dtype for name in made.stats._fields)
    stats = (
        labels.new_empty(0, dtype=dtype) if value is None else _spread(value, labels, index, ignore_index)
        for value, dtype in zip(made.stats, dtypes, strict=True)
    )
    return (*stats, made.max, made.log_sum, made.kept, made.bases, made.jacobian)


@token_stats_op.register_fake
def _(
    hidden, weight, bias, labels, ignore_index, temperature, logit_scale, softcap, outputs, grads, compute_dtype,
    memory_budget, impl,
):  # fmt: skip
    wide = accumulate_dtype(hidden.dtype)
    names = outputs.split(",")
    stats = [hidden.new_empty(labels.shape, dtype=wide)]
    for name in OPTIONAL_OUTPUTS:
        dtype = torch.bool if name == "is_top1" else wide
        stats.append(hidden.new_empty(labels.shape if name in names else (0,), dtype=dtype))
    # How many labels count, and what is kept of them, are sizes that only a run can tell.
    counted: Any = torch.library.get_ctx().new_dynamic_size()
    kept: Any = 0
    tiles: Any = 0
    rows: Any = 0
    if grads == "hidden" and "entropy" not in names:
        rows = torch.library.get_ctx().new_dynamic_size()
    if grads and "entropy" not in names:
        kept, tiles = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    return (
        *stats,
        hidden.new_empty((counted,), dtype=wide),
        hidden.new_empty((counted,), dtype=wide),
        hidden.new_empty((kept, aligned(weight.shape[0])), dtype=compute_dtype),
        hidden.new_empty((kept, tiles), dtype=wide),
        hidden.new_empty((rows, hidden.shape[-1]), dtype=wide),
    )


@torch.library.custom_op("dpo_kernels::token_stats_backward", mutates_args=())
def token_stats_backward_op(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    log_probs: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    kept: Tensor,
    bases: Tensor,
    jacobian: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: str,
    grads: str,
    wanted: str,
    compute_dtype: torch.dtype,
    memory_budget: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted. grads: what forward planned for."""
    call = _call(
        hidden, weight, bias, labels, ignore_index, temperature, logit_scale, softcap, outputs, grads, compute_dtype,
        memory_budget,
    )  # fmt: skip
    call, index, tokens = _rows_of_call(call)
    if tokens != len(maximum):
        raise RuntimeError(
            f"backward has {tokens} rows, forward had {len(maximum)}: capture both in one CUDA graph, or neither"
        )
    module = impls.choose(impl, hidden.device, hidden.dtype)
    grad_log_probs, grad_entropy = (_of_counted(g, labels, ignore_index) for g in (grad_log_probs, grad_entropy))
    rows = _row_grads(call.labels, index, log_probs, maximum, log_sum, grad_log_probs, entropy, grad_entropy)
    kept, bases = kept.contiguous(), bases.contiguous()  # as forward made them, whatever a hook returned
    saved = tiled.Forward(TokenStats(rows.log_probs), rows.max, rows.log_sum, kept, bases, jacobian)
    with _no_autocast(hidden):
        made = module.hidden_backward(call, _grads(wanted), index, rows, saved)
    return tuple(hidden.new_empty(0) if g is None else g for g in made)  # type: ignore[return-value]


@token_stats_backward_op.register_fake
def _(
    grad_log_probs, grad_entropy, hidden, weight, bias, labels, log_probs, entropy, maximum, log_sum, kept, bases,
    jacobian, ignore_index, temperature, logit_scale, softcap, outputs, grads, wanted, compute_dtype, memory_budget,
    impl,
):  # fmt: skip
    names = wanted.split(",")
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if name in names else hidden.new_empty(0)
        for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias))
    )


def _setup_token_stats(ctx: Any, inputs: tuple[Any, ...], output: Saved) -> None:
    hidden, weight, bias, labels, *options = inputs
    log_probs, entropy, _, _, _, *vectors = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, log_probs, entropy, *vectors)
    ctx.options = options
    ctx.weight_in_rows = tiled.in_rows(weight)


def _token_stats_backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> Any:
    *transform, outputs, grads, compute_dtype, memory_budget, impl = ctx.options
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
    wanted = ",".join(name for name, need in zip(("hidden", "weight", "bias"), needs, strict=True) if need)
    if "entropy" not in outputs.split(","):
        grad_entropy = None  # of the empty placeholder
    if grad_log_probs is None and grad_entropy is None:
        return (None,) * 13
    hidden, weight, *saved = ctx.saved_tensors
    if tiled.in_rows(weight) != ctx.weight_in_rows:
        # Hooks on saved tensors (offloading) may lay it out anew, and what forward kept is of the implementation that
        # its layout chose.
        weight = weight.contiguous() if ctx.weight_in_rows else weight.T.contiguous().T
    made = torch.ops.dpo_kernels.token_stats_backward(
        grad_log_probs, grad_entropy, hidden, weight, *saved, *transform, outputs, grads, wanted, compute_dtype,
        memory_budget, impl,
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(made, needs, strict=True)), *(None,) * 10)


@torch.library.custom_op("dpo_kernels::logits_log_probs", mutates_args=())
def logits_log_probs_op(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    inplace_backward: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs and, for backward, the maximum and log_sum, each of the labels' shape."""
    checks.labels_in_range(labels, ignore_index, logits.shape[-1])
    known, index, tokens = _labels_and_rows(labels, ignore_index)
    module = impls.choose(impl, logits.device, logits.dtype)
    transform = Transform(temperature, logit_scale, softcap)
    with _no_autocast(logits):
        made = module.logits_forward(logits, _rows(known, index).long(), transform, index, tokens)
    return tuple(_spread(value, labels, index, ignore_index) for value in made)  # type: ignore[return-value]


@logits_log_probs_op.register_fake
def _(logits, labels, ignore_index, temperature, logit_scale, softcap, inplace_backward, impl):
    wide = accumulate_dtype(logits.dtype)
    return tuple(logits.new_empty(labels.shape, dtype=wide) for _ in range(3))


@torch.library.custom_op("dpo_kernels::logits_log_probs_backward", mutates_args=())
def logits_log_probs_backward_op(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    impl: str | None,
) -> Tensor:
    out = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    transform = Transform(temperature, logit_scale, softcap)
    _write_logits_gradient(grad, logits, labels, log_probs, maximum, log_sum, ignore_index, transform, impl, out)
    if _capturing(labels):
        out.masked_fill_((labels == ignore_index).unsqueeze(-1), 0)
    return out


@logits_log_probs_backward_op.register_fake
def _(
    grad, logits, labels, log_probs, maximum, log_sum, ignore_index, temperature, logit_scale, softcap, impl,
):  # fmt: skip
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("dpo_kernels::logits_log_probs_backward_", mutates_args=("logits",))
def logits_log_probs_backward_inplace_op(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    impl: str | None,
) -> None:
    """Overwrites the logits with their gradient; rows that do not count become 0."""
    transform = Transform(temperature, logit_scale, softcap)
    _write_logits_gradient(grad, logits, labels, log_probs, maximum, log_sum, ignore_index, transform, impl, logits)
    logits.masked_fill_((labels == ignore_index).unsqueeze(-1), 0)


def _write_logits_gradient(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    log_probs: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    transform: Transform,
    impl: str | None,
    out: Tensor,
) -> None:
    known, index, _ = _labels_and_rows(labels, ignore_index)
    maximum, log_sum = _rows(maximum, index), _rows(log_sum, index)
    rows = _row_grads(
        known, index, log_probs, maximum, log_sum, _of_counted(grad, labels, ignore_index), None, None
    )  # fmt: skip
    with _no_autocast(logits):
        impls.choose(impl, logits.device, logits.dtype).logits_backward(logits, transform, index, rows, out)


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, *output)


def _logits_backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
    *transform, inplace, impl = ctx.options
    if grad is None:
        return (None,) * 8
    logits, *others = ctx.saved_tensors  # raises if the logits were modified since forward, by us or by anyone
    if inplace:
        torch.ops.dpo_kernels.logits_log_probs_backward_(grad, logits, *others, *transform, impl)
        return (logits.detach(), *(None,) * 7)
    return (torch.ops.dpo_kernels.logits_log_probs_backward(grad, logits, *others, *transform, impl), *(None,) * 7)


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "dpo_kernels computes first derivatives only: double backward (create_graph=True) is not supported; "
        "use the functions in dpo_kernels.reference, which autograd can differentiate twice"
    )


token_stats_op.register_autograd(_token_stats_backward, setup_context=_setup_token_stats)
logits_log_probs_op.register_autograd(_logits_backward, setup_context=_setup_logits)
for op in (token_stats_backward_op, logits_log_probs_backward_op):
    op.register_autograd(_no_double_backward)


def _call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    outputs: str,
    grads: str,
    compute_dtype: torch.dtype,
    memory_budget: int | None,
) -> Call:
    return Call(
        hidden, weight, bias, labels, ignore_index, Transform(temperature, logit_scale, softcap),
        tuple(filter(None, outputs.split(","))), _grads(grads), compute_dtype, memory_budget,
    )  # fmt: skip


def _grads(names: str) -> Grads:
    return Grads(**dict.fromkeys(filter(None, names.split(",")), True))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Where operands are rounded is the driver's decision: autocast would round statistics too."""
    return torch.autocast(tensor.device.type, enabled=False)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _labels_and_rows(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None, int]:
    """The labels, flat positions of those that count, None where all do, and how many they are."""
    if _capturing(labels):
        return labels.masked_fill(labels == ignore_index, 0), None, labels.numel()
    index = (checks.flat(labels) != ignore_index).nonzero().squeeze(1)
    return labels, (None if len(index) == labels.numel() else index), len(index)


def _rows_of_call(call: Call) -> tuple[Call, Tensor | None, int]:
    """The call as an implementation gets it, with the positions and the number of rows that enter its products."""
    labels, index, tokens = _labels_and_rows(call.labels, call.ignore_index)
    if _capturing(labels):
        # Not even NaN in a row that is ignored may reach the weight's gradient; the copy counts in the budget.
        hidden = call.hidden.masked_fill((call.labels == call.ignore_index).unsqueeze(-1), 0)
        budget = call.memory_budget
        left = None if budget is None else max(1, budget - hidden.numel() * hidden.element_size())
        call = replace(call, hidden=hidden, labels=labels, memory_budget=left)
    return call, index, tokens


def _of_counted(grad: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor | None:
    """The gradients of results that are 0 whatever the inputs are dropped, where rows are not."""
    return grad.masked_fill(labels == ignore_index, 0) if grad is not None and _capturing(labels) else grad


def _rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.contiguous() if index is None else flat.index_select(0, index)


def _spread(values: Tensor, labels: Tensor, index: Tensor | None, ignore_index: int) -> Tensor:
    """Values (M,) of the rows that count, in the labels' shape, 0 elsewhere."""
    out = values.new_zeros(labels.shape)  # no view of anything: FSDP hangs hooks on what a module returns
    if index is None:
        out.view(-1).copy_(values)
        if _capturing(labels):
            out.masked_fill_(labels == ignore_index, 0)
    else:
        out.view(-1).index_copy_(0, index, values)
    return out


def _row_grads(
    labels: Tensor,
    index: Tensor | None,
    log_probs: Tensor,
    maximum: Tensor,  # (M,), like log_sum
    log_sum: Tensor,
    grad: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
) -> tiled.RowGrads:
    log_probs = _rows(log_probs, index)
    grad = torch.zeros_like(log_probs) if grad is None else _rows(grad, index)
    if grad_entropy is None or entropy is None:
        entropy = grad_entropy = None
    else:
        entropy, grad_entropy = _rows(entropy, index), _rows(grad_entropy, index)
    return tiled.RowGrads(_rows(labels, index).long(), log_probs, maximum, log_sum, grad, entropy, grad_entropy)
