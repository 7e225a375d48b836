"""Argument checks of the public functions: once, complete, both sides printed. Below them code trusts its arguments."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpo_kernels.call import DTYPE_NAMES, INPUTS, Grads, LowRank, Transform, autocasts, flat_labels, ignored, whole
from dpo_kernels.statistics import OUTPUTS
from dpo_kernels.vocab_shard import VocabShard, chunk

FLOATS = tuple(DTYPE_NAMES)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def transform(temperature: float, logit_scale: float, softcap: float | None) -> Transform:
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if not isinstance(value, (int, float)) and not (name == "softcap" and value is None):
            raise TypeError(f"{name} is {value!r}; expected a number")
    if not 0 < temperature < math.inf:  # comparisons, not math.isfinite: torch.compile can trace them on a symbol
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected None or a finite number > 0")
    made = Transform(float(temperature), float(logit_scale), None if softcap is None else float(softcap))
    _within_float32(made)
    return made


def _within_float32(transform: Transform) -> None:
    """Kernels compute in float32, where a number beyond its range would be 0 or infinite.

    Raises:
        ValueError: an option, or a ratio of two that the kernels multiply with, is not a normal float32.
    """
    t, low, high = transform, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    numbers = [("temperature", t.temperature), ("logit_scale / temperature", t.slope)]
    if t.softcap is not None:
        numbers += [
            ("softcap", t.softcap), ("logit_scale / softcap", t.logit_scale / t.softcap),
            ("softcap / temperature", t.softcap / t.temperature),
        ]  # fmt: skip
    for name, value in numbers:
        if not (low <= value <= high or -high <= value <= -low or value == 0):
            raise ValueError(f"{name} is {value}; expected a number within float32's range, {low:.1e} to {high:.1e}")


def outputs(names: Sequence[str]) -> tuple[str, ...]:
    _names("outputs", names, ("log_probs", *OUTPUTS))
    return tuple(name for name in OUTPUTS if name in names)


def grads(names: Sequence[str]) -> Grads:
    _names("grads", names, INPUTS)
    return Grads.of(names)


def _names(name: str, given: Sequence[str], known: tuple[str, ...]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{name} is the string {given!r}; expected a sequence of names, such as ({given!r},)")
    if unknown := [one for one in given if one not in known]:
        raise ValueError(f"{name} has {unknown}; expected names from {known}")


def sizes(
    tokens: int, hidden_size: int, vocab_size: int, labels: int | None, rank: int
) -> tuple[int, int, int, int, int]:
    tokens = whole("tokens", tokens, 0)
    labels = tokens if labels is None else whole("labels", labels, tokens)
    vocab_size, rank = whole("vocab_size", vocab_size, 1), whole("rank", rank, 0)
    return tokens, whole("hidden_size", hidden_size, 1), vocab_size, labels, rank


def dtypes(**given: object) -> None:
    for name, dtype in given.items():
        if dtype not in FLOATS:
            raise TypeError(f"{name} is {dtype!r}; expected one of {', '.join(map(str, FLOATS))}")


def tokens(value: int | None, labels: Tensor, ignore_index: int | None) -> int | None:
    """What a caller says of how many labels count, as far as it can be seen without a look at them.

    Raises:
        TypeError, ValueError: no whole number, negative, more than there are labels, or not all where all count.
    """
    if value is None:
        return None
    # While torch.compile traces, a number may stand for any: as an index it would become this one.
    count, every = value if torch.compiler.is_compiling() else whole("tokens", value, 0), labels.numel()
    if count > every or (ignore_index is None and count != every):
        why = "" if ignore_index is not None else ", and every one counts (ignore_index is None)"
        raise ValueError(f"tokens is {count}, but there are {every} labels{why}; give how many of them count")
    return count


def memory_budget(value: int | None) -> int | None:
    return None if value is None else whole("memory_budget", value, 1)


def gradient_filter(value: float | None, outputs: Sequence[str], is_split: bool) -> float:
    """0 where nothing is left out.

    Raises:
        TypeError, ValueError: it is no number from 0 to 1, or the call is one that has no such gradient.
    """
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"gradient_filter is {value!r}; expected a probability, such as 2**-12, or None")
    if not 0 <= value < 1:
        raise ValueError(f"gradient_filter {value} must be >= 0 and < 1: it is a probability, such as 2**-12")
    if value and "entropy" in outputs:
        raise ValueError("gradient_filter does not go with outputs=('entropy',): an entropy's gradient is in the tail")
    if value and is_split:
        raise ValueError("gradient_filter does not go with a vocabulary that is split over ranks")
    return float(value)


def first_derivatives(*tensors: Tensor | None) -> None:
    """Only autograd's backward is served. What else would come out wrong without a word is refused.

    Raises:
        NotImplementedError: under a transform of torch.func (grad, vmap, jvp, ...), or a tensor with a forward-mode
            tangent.
        TypeError: a DTensor.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "dpo_kernels does not run under transforms of torch.func (grad, vmap, jvp, ...); use torch.autograd.grad, "
            "or the functions in dpo_kernels.reference, which they can transform"
        )
    distributed = sys.modules.get("torch.distributed.tensor")
    for tensor in tensors:
        if tensor is None:
            continue
        if distributed is not None and isinstance(tensor, distributed.DTensor):
            raise TypeError(
                f"a tensor is a DTensor with placements {tensor.placements}; give its local part (to_local) where "
                "every rank holds all of it, or gather it first (full_tensor)"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "dpo_kernels has no forward-mode derivatives (dual tensors, jvp); use backward, or the functions in "
                "dpo_kernels.reference"
            )


def logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    _tensor("logits", logits)
    first_derivatives(logits, labels)
    _floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits are {_shape(logits)}; expected (..., V) with V >= 1")
    _labels("logits", logits, labels)


def head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None = None,
    shard: VocabShard | None = None,
) -> None:
    """hidden (..., D), weight (V, D), labels (...), bias (V,) or None; one device, one dtype unless autocast is on.

    shard: V is of this rank, and hidden its piece where it is split too.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), *((("bias", bias),) if bias is not None else ())):
        _tensor(name, tensor)
        _floating(name, tensor)
    first_derivatives(hidden, weight, bias, labels)
    if weight.ndim != 2 or (weight.shape[0] == 0 and shard is None):
        raise ValueError(f"weight is {_shape(weight)}; expected (V, D) with V >= 1")
    if hidden.ndim < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden is {_shape(hidden)}; expected (..., D) with D >= 1")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has {hidden.shape[-1]} features, weight {weight.shape[1]}: {_shape(hidden)} x {_shape(weight)}"
        )
    if shard is None:
        _labels("hidden", hidden, labels)
    else:
        _shard(shard, hidden, weight, labels)
    _same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias is {_shape(bias)}, weight {_shape(weight)}; expected a bias of ({weight.shape[0]},)"
            )
        _same_device("bias", bias, "hidden", hidden)
    if low_rank is not None:
        check_low_rank(low_rank, hidden, weight)
    autocast = autocasts(hidden.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == hidden.dtype:
            continue
        if not autocast or torch.float64 in (tensor.dtype, hidden.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype}, hidden {hidden.dtype}; cast one to the other, or run under torch.autocast"
            )


def _shard(shard: object, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """A rank's part of the vocabulary, and its piece of the hidden states where they are split too."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard is {type(shard).__name__}; expected dpo_kernels.VocabShard(process_group, ...)")
    first, rows = shard.first_row, weight.shape[0]
    if first + rows > shard.vocab_size:
        raise ValueError(
            f"weight {_shape(weight)} from row {first} on ends at {first + rows}; expected at most the "
            f"{shard.vocab_size} rows of the shard's vocabulary"
        )
    dim = shard.hidden_dim
    if dim is None:
        _labels("hidden", hidden, labels)
        return
    if dim >= hidden.ndim - 1:
        raise ValueError(
            f"hidden is {_shape(hidden)}, hidden_dim of the shard {dim}; expected a dimension before the features, "
            f"less than {hidden.ndim - 1}"
        )
    _tensor("labels", labels)
    size = labels.shape[dim] if labels.ndim == hidden.ndim - 1 else 0
    piece = chunk(size, shard.ranks, shard.rank)
    if labels.ndim != hidden.ndim - 1 or piece.stop - piece.start != hidden.shape[dim]:
        raise ValueError(
            f"labels are {_shape(labels)}, hidden {_shape(hidden)}, its dimension {dim} split over {shard.ranks} "
            f"ranks of which this is {shard.rank}; expected labels of all ranks' hidden states, and a piece of them as "
            "torch.chunk makes it"
        )
    _labels("hidden", hidden.new_empty(()).expand(*hidden.shape[:dim], size, *hidden.shape[dim + 1 :]), labels)


def check_low_rank(given: object, hidden: Tensor, weight: Tensor) -> None:
    """a (r, D), b (V, r) of the hidden states' device, and a finite scale.

    Raises:
        TypeError, ValueError: another kind, shape, dtype, device or scale.
    """
    if not isinstance(given, LowRank):
        raise TypeError(f"low_rank is {type(given).__name__}; expected dpo_kernels.LowRank(a, b, scale)")
    vocab_size, features = weight.shape
    for name, tensor in (("low_rank.a", given.a), ("low_rank.b", given.b)):
        _tensor(name, tensor)
        _floating(name, tensor)
        _same_device(name, tensor, "hidden", hidden)
        if tensor.dtype == torch.float64 and hidden.dtype != torch.float64:
            raise TypeError(f"{name} is {tensor.dtype}, hidden {hidden.dtype}; cast it down, or hidden up")
    first_derivatives(given.a, given.b)
    rank = given.a.shape[0] if given.a.ndim == 2 else 0
    if rank == 0 or given.a.shape != (rank, features) or given.b.shape != (vocab_size, rank):
        raise ValueError(
            f"low_rank.a is {_shape(given.a)}, low_rank.b {_shape(given.b)}, weight {_shape(weight)}; expected "
            f"(r, {features}) and ({vocab_size}, r) with r >= 1"
        )
    if not isinstance(given.scale, (int, float)) or not -math.inf < given.scale < math.inf:
        raise ValueError(f"low_rank.scale is {given.scale!r}; expected a finite number")


def labels_in_range(labels: Tensor, ignore_index: int | None, vocab_size: int) -> None:
    """On the CPU, and on any device under DPO_KERNELS_VALIDATE=1, a bad label raises; else its row becomes NaN.

    Raises:
        IndexError: a label that is neither ignore_index nor in [0, vocab_size); names the first and its position.
    """
    if labels.device.type != "cpu" and os.environ.get("DPO_KERNELS_VALIDATE") != "1":
        return
    values = flat_labels(labels)
    bad = ((values < 0) | (values >= vocab_size)) & ~ignored(values, ignore_index)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), labels.shape)]
        raise IndexError(
            f"labels{position or ''} is {int(values[first])}; expected a token in [0, {vocab_size}) "
            + ("" if ignore_index is None else f"or ignore_index {ignore_index}")
        )


def counted_labels(labels: Tensor, ignore_index: int | None, tokens: int | None) -> None:
    """That so many labels count: on the CPU, and on any device under DPO_KERNELS_VALIDATE=1; else all becomes NaN.

    Raises:
        ValueError: it is another number.
    """
    if tokens is None or (labels.device.type != "cpu" and os.environ.get("DPO_KERNELS_VALIDATE") != "1"):
        return
    found = labels.numel() - int(ignored(flat_labels(labels), ignore_index).count_nonzero())
    if found != tokens:
        raise ValueError(
            f"tokens is {tokens}, but {found} of {labels.numel()} labels count (are not ignore_index {ignore_index}); "
            "give their number, or leave tokens out"
        )


def pairs(ref: Tensor | None, policy: Tensor, mask: Tensor, log_sum_sq_probs: Tensor | None) -> None:
    """ref, policy and log_sum_sq_probs (2B, S) floating, mask (2B, S) of any dtype; one device."""
    _tensor("policy_log_probs", policy)
    _floating("policy_log_probs", policy)
    _tensor("mask", mask)
    _same_device("mask", mask, "policy_log_probs", policy)
    for name, tensor in (("ref_log_probs", ref), ("log_sum_sq_probs", log_sum_sq_probs)):
        if tensor is None:
            continue
        _tensor(name, tensor)
        _floating(name, tensor)
        _same_device(name, tensor, "policy_log_probs", policy)
        if tensor.shape != policy.shape:
            raise ValueError(
                f"{name} are {_shape(tensor)}, policy_log_probs {_shape(policy)}; expected two equal shapes (2B, S)"
            )
    if policy.ndim != 2 or mask.shape != policy.shape:
        raise ValueError(f"log_probs are {_shape(policy)}, mask {_shape(mask)}; expected two equal shapes (R, S)")
    if len(policy) == 0 or len(policy) % 2:
        raise ValueError(
            f"the batch has {len(policy)} sequences: {_shape(policy)}; "
            "expected an even number, first the chosen, then as many rejected"
        )


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; expected a torch.Tensor")


def _floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")


def _labels(name: str, rows: Tensor, labels: Tensor) -> None:
    _tensor("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels are {labels.dtype}; expected an integer dtype, such as torch.int64")
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels are {_shape(labels)}, {name} {_shape(rows)}; expected labels of {tuple(rows.shape[:-1])}"
        )
    _same_device("labels", labels, name, rows)


def _same_device(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, {other} on {like.device}; move both to one device")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
