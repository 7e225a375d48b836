"""The public functions: check once, then one torch.library op each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import (
    checks,
    dispatch,
    dtensors,
    flops,
    ops,  # noqa: F401  (registers the operators)
    planner,
)
from dpo_kernels.call import Grads, LowRank, Options, compute_dtype, whole
from dpo_kernels.layout import is_one_of_several, overlaps
from dpo_kernels.statistics import TokenStats
from dpo_kernels.vocab_shard import VocabShard
from dpo_kernels.workload import Workload


def logits_to_log_probs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int | None = -100,
    tokens: int | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Log-probabilities of the labels from logits: log softmax(z)[label], without ever holding the softmax.

    z = cap(logit_scale * logits) / temperature with cap(u) = softcap * tanh(u / softcap). Where you still have the
    hidden states, `hidden_to_log_probs` saves the logits too.

    Args:
        logits: (..., V), float16, bfloat16, float32 or float64, any strides.
        labels: (...), integer, already shifted: the label at a position is the token that this position predicts.
        ignore_index: rows with this label are 0 and have no gradient. None: every label counts.
        tokens: how many labels count, where you know (a number of Python's; under torch.compile an argument of what is
            compiled): then on a GPU the host need not wait for the device to find them, a captured CUDA graph computes
            them alone, and torch.compile knows all sizes. It is checked where labels are; else, on a GPU, another
            number makes every result NaN, and every gradient of what was computed. None, or 0: they are counted.
        temperature: greater than 0.
        logit_scale: finite.
        softcap: None, or > 0.
        inplace_backward: backward overwrites the logits with their gradient instead of allocating one. A later use of
            the logits' values in backward, a second backward among them, raises. Without effect under torch.compile,
            on logits that overlap in memory, such as expanded ones, and on a part that `split` or `chunk` made, which
            autograd protects. Slices of one tensor share their version: use it for one of them only.
        impl: "triton", "cpp", "torch", or None for the fastest that can run.

    Returns:
        (...), float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, device or range.
        IndexError: a label outside [0, V), on the CPU or with DPO_KERNELS_VALIDATE=1; else, on a GPU, its row is NaN.
        RuntimeError: `impl` cannot run here; double backward.
    """
    checks.logits_and_labels(logits, labels)
    options = Options(
        ignore_index=ignore_index,
        tokens=checks.tokens(tokens, labels, ignore_index),
        transform=checks.transform(temperature, logit_scale, softcap),
        grads=Grads(),  # written out: torch.compile cannot take a default that is an object
        impl=impl,
        inplace_backward=inplace_backward
        and not torch.compiler.is_compiling()
        and not overlaps(logits)
        and not is_one_of_several(logits),
    )
    return torch.ops.dpo_kernels.logits_log_probs(logits, labels, *options.encode())[0]


def hidden_to_log_probs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int | None = -100,
    tokens: int | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: LowRank | None = None,
    gradient_filter: float | None = None,
    memory_budget: int | None = None,
    impl: str | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Log-probabilities of the labels straight from hidden states and the head's weight; logits are never held.

    log softmax(z)[label] with z = cap(logit_scale * (h W^T + b)) / temperature, cap(u) = softcap * tanh(u / softcap).
    Logits, statistics and gradient sums are float32 whatever the inputs' dtype; gradients are cast once. Rows whose
    label is ignored never enter a product. `plan` tells what a call will do and what it will hold.

    Args:
        hidden: (..., D), float16, bfloat16, float32 or float64, any strides.
        weight: (V, D) of the same dtype (under autocast of any; products then take autocast's dtype). Never written.
        labels: (...), integer, already shifted: the label at a position is the token that this position predicts.
        bias: (V,), or None.
        low_rank: `LowRank(a, b, scale)`, of a LoRA on the head: the weight is W + scale * b a, which is never held, and
            neither is its gradient; None without.
        ignore_index: rows with this label are 0 and have no gradient. None: every label counts.
        tokens: how many labels count, where you know (a number of Python's; under torch.compile an argument of what is
            compiled): then on a GPU the host need not wait for the device to find them, a captured CUDA graph computes
            them alone, and torch.compile knows all sizes. It is checked where labels are; else, on a GPU, another
            number makes every result NaN, and every gradient of what was computed. None, or 0: they are counted.
        temperature: greater than 0.
        logit_scale: finite.
        softcap: None, or > 0.
        gradient_filter: a probability, such as 2**-12, below which entries of the softmax may be left out of the
            gradients, but for the label's; log-probs stay exact. Where a model is sure backward takes a fraction of its
            time then. What each row leaves out `token_stats` tells as "dropped_mass"; the hidden states get it back as
            the mean row of W: no row of their gradient is off by more than twice the longest row of W times that, for
            a gradient of 1 by logits (docs/gradient_filter.md). None or 0: nothing. Not with a gradient of "entropy", a
            split vocabulary, or "triton" where features are no multiple of 16.
        memory_budget: bytes that forward and backward together may hold beyond inputs, outputs and the gradients
            returned. None: 1 GiB (on CPUs an eighth of the memory, where that is more), or twice the bytes of hidden
            and weight where that is more. More budget, fewer GEMMs.
        impl: "triton", "cpp", "torch", or None for the fastest that can run.
        shard: `VocabShard`, where weight, bias and low_rank.b are this rank's rows of a vocabulary that is split over
            ranks; None: they are whole. A weight that is a DTensor with `Shard(0)` says so itself (bias and low_rank.b
            alike; hidden plain, `Replicate` or `Shard` of a dimension before the features), and its gradient is one
            too. Each rank computes its part, with any implementation and budget; two small all-reduces a forward and
            one of the hidden states' gradient, in float32, are exchanged (docs/scale.md).

    Returns:
        (...), float32, or float64 for float64 inputs; a plain tensor, the same on every rank to the last bit.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range, or the memory budget is
            too small to run at all (says the least that works).
        IndexError: a label outside [0, V), on the CPU or with DPO_KERNELS_VALIDATE=1; else, on a GPU, its row is NaN.
        RuntimeError: `impl` cannot run here; double backward; another rank failed (on CPUs; on GPUs the others wait
            for it, as in any collective).
    """
    return token_stats(
        hidden, weight, labels, bias, outputs=(), ignore_index=ignore_index, tokens=tokens, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, low_rank=low_rank, gradient_filter=gradient_filter,
        memory_budget=memory_budget, impl=impl, shard=shard,
    ).log_probs  # fmt: skip


def token_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    outputs: Sequence[str] = ("entropy",),
    ignore_index: int | None = -100,
    tokens: int | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: LowRank | None = None,
    gradient_filter: float | None = None,
    memory_budget: int | None = None,
    impl: str | None = None,
    shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probs of the labels and, in the same pass, the statistics named in `outputs`.

    All other arguments, and what is raised, are those of `hidden_to_log_probs`.

    Args:
        outputs: names from "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" and "dropped_mass" ("log_probs"
            always comes).
            The entropy is differentiable; asking for it in a call with gradients rules out the modes frozen and keep.

    Returns:
        `TokenStats`; each field of the labels' shape, 0 (False) where the label is ignored, None where not asked for.

    Raises:
        ValueError, TypeError: also where `outputs` has a name that does not exist, or is a string.
    """
    names = checks.outputs(outputs)
    given = dtensors.Head(hidden, weight, labels, bias, low_rank, shard)
    hidden, weight, labels, bias, low_rank, shard = dtensors.local_head(given)
    checks.head(hidden, weight, labels, bias, low_rank, shard)
    # The scale goes with the smaller matrix.
    a, b = (None, None) if low_rank is None else (low_rank.a * low_rank.scale, low_rank.b)
    tracked = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias, a, b)]
    options = Options(
        ignore_index=ignore_index,
        tokens=checks.tokens(tokens, labels, ignore_index),
        transform=checks.transform(temperature, logit_scale, softcap),
        outputs=names,
        grads=Grads(tracked[0], tracked[1], tracked[2], tracked[3] or tracked[4]),
        compute_dtype=compute_dtype(hidden.dtype, hidden.device),
        memory_budget=checks.memory_budget(memory_budget),
        impl=impl,
        shard=shard,
        gradient_filter=checks.gradient_filter(gradient_filter, names if any(tracked) else (), shard is not None),
    )
    flops.register()
    made = torch.ops.dpo_kernels.token_stats(hidden, weight, bias, a, b, labels, *options.encode())
    of_name = dict(zip(TokenStats._fields, made, strict=False))
    return TokenStats(made[0], **{name: of_name[name] for name in names})


def plan(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    grads: Sequence[str] = ("hidden", "weight"),
    outputs: Sequence[str] = (),
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    device: torch.device | str = "cpu",
    impl: str | None = None,
    labels: int | None = None,
    rank: int = 0,
    ranks: int | None = None,
    hidden_split: bool = False,
    gradient_filter: float | None = None,
) -> planner.Plan:
    """What `hidden_to_log_probs` or `token_stats` will do here: mode, tiles, GEMMs and bytes. Print it.

    Two things are known only once the call is made. A weight whose rows are not contiguous, and logits of 1e6 and more,
    go from "cpp" to "torch", whose plan is another.

    Args:
        tokens: N, rows whose label counts.
        hidden_size: D.
        vocab_size: V.
        dtype: of hidden states and weight.
        grads: which inputs want a gradient, of "hidden", "weight", "bias" and "low_rank".
        outputs: the statistics asked for; a gradient through "entropy" rules out the modes frozen and keep.
        softcap: whether (any number) or not (None) logits are capped.
        compute_dtype: autocast's dtype, where it differs from `dtype`.
        memory_budget: bytes; None is the default of `hidden_to_log_probs`.
        device: where the call will be.
        impl: as in the call; None is the implementation that a call without one would take.
        labels: all of them, with those that are ignored, of which a few bytes are held too; default: tokens.
        rank: of a low-rank adapter of the weight; 0 without one.
        ranks: over which the vocabulary is split, as `torch.chunk` does; the plan is that of the first, whose part is
            the largest. None: it is not split.
        hidden_split: whether the hidden states are split over them too.
        gradient_filter: as in the call.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range; the budget is too small to run at all (names the
            least that works).
        RuntimeError: `impl` cannot run here.
    """
    workload = _workload(
        tokens, hidden_size, vocab_size, dtype, grads=grads, outputs=outputs, softcap=softcap,
        compute_dtype=compute_dtype, device=device, impl=impl, labels=labels, rank=rank, ranks=ranks,
        hidden_split=hidden_split, gradient_filter=gradient_filter,
    )  # fmt: skip
    return planner.plan(workload, checks.memory_budget(memory_budget))


def least_budget(tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, **options: Any) -> int:
    """The smallest memory budget, in bytes, that a call works with; arguments and errors as of `plan`."""
    return planner.least_budget(_workload(tokens, hidden_size, vocab_size, dtype, **options))


def _workload(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    *,
    grads: Sequence[str] = ("hidden", "weight"),
    outputs: Sequence[str] = (),
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    impl: str | None = None,
    labels: int | None = None,
    rank: int = 0,
    ranks: int | None = None,
    hidden_split: bool = False,
    gradient_filter: float | None = None,
) -> Workload:
    device, compute = torch.device(device), dtype if compute_dtype is None else compute_dtype
    checks.dtypes(dtype=dtype, compute_dtype=compute)
    tokens, hidden_size, vocab_size, labels, rank = checks.sizes(tokens, hidden_size, vocab_size, labels, rank)
    if ranks is not None:
        vocab_size = -(-vocab_size // whole("ranks", ranks, 1))
    elif hidden_split:
        raise ValueError("hidden_split is True, ranks None; say over how many ranks they are split")
    backend = dispatch.choose(impl, device, dtype, vocab_size)
    configuration = backend.configure(device, hidden_size, compute, False)
    capable = dispatch.capabilities(backend, device, configuration)
    names, wanted = checks.outputs(outputs), checks.grads(grads)
    share = checks.gradient_filter(gradient_filter, names, bool(ranks))
    return Workload(
        tokens, hidden_size, vocab_size, dtype, compute, wanted, entropy="entropy" in names,
        softcap=softcap is not None, labels=labels, capabilities=capable, rank=rank,
        statistics=len(names) - ("dropped_mass" in names), ranks=ranks or 0, hidden_split=hidden_split,
        filter=dispatch.filter_of(share, wanted, capable, backend, hidden_size),
    )  # fmt: skip
