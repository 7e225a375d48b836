"""Whether the head's memory budget works for the longest batch of a run, told before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kernels.functional import least_budget
from dpo_kernels.training import adapters
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import column
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.head_adapter import rank_of
from dpo_kernels.training.output_head import OutputHead, find_head
from dpo_kernels.training.parallel_head import ranks_of

PROBED = 128  # tokens that the checks at start give a model at most
OF_REFERENCE = "the reference's pass"
COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}  # a run's mixed precision -> dtype of its products


@dataclass(frozen=True)
class Longest:
    """The longest batch that can come: its pairs, the tokens whose label counts, and all labels, padding too. Where
    batches go in parts, of one part, at most: answers of so many pairs."""

    what: str
    pairs: int
    tokens: int
    labels: int


def check_budget(
    args: DPOConfig, model: nn.Module, ref_model: nn.Module | None, train: Any, held_out: Any, device: torch.device
) -> None:
    """
    Args:
        model, ref_model: before they are fused.
        train, held_out: datasets of pairs, one, several by name, or none.

    Raises:
        ValueError: args.memory_budget is too small for a batch that training or evaluation can meet; names the least
            that works for all of them.
    """
    budget = args.memory_budget_bytes
    if budget is None:
        return
    reference = reference_of(args, model, ref_model)
    beforehand = args.precompute_ref_log_probs and reference is not None
    needed: list[tuple[int, Longest]] = []
    for batch in longest_batches(args, train, held_out, beforehand):
        policies = [] if batch.what == OF_REFERENCE else [(model, batch.what == "training")]
        runs = (batch.what == OF_REFERENCE) == beforehand
        references = [(reference, False)] if reference is not None and runs else []
        needed += [(_needed(args, one, batch, trains, device), batch) for one, trains in (*policies, *references)]
    if needed and budget < (most := max(needed, key=lambda pair: pair[0]))[0]:
        least, batch = most
        raise ValueError(
            f"memory_budget is {budget:,} bytes, and the longest batch that {batch.what} can meet ({batch.pairs:,} "
            f"pairs, {batch.tokens:,} tokens whose label counts) needs at least {least:,}: give --memory_budget {least}"
            f" ({-(-least // 2**20):,}MiB), a smaller batch, or a smaller --max_length"
        )


def reference_of(args: DPOConfig, model: Any, ref_model: Any) -> Any:
    """The model that the reference's log-probs are computed with: a second one, or the policy where its adapter makes
    it its own reference; None: there is none, and none is computed."""
    if ref_model is not None:
        return ref_model
    return model if args.loss_options.needs_reference and adapters.is_adapted(model) else None


def head_call(args: DPOConfig, model: Any, batch: Longest, trains: bool, device: torch.device) -> dict[str, Any] | None:
    """The arguments of `plan` and `least_budget` for a model's head and a batch, fused or not; without the budget.

    Args:
        trains: whether there is a backward, into what is trained.

    Returns: None where there is no whole head to fuse, as whoever fuses it says (or ZeRO-3 keeps it elsewhere).
    """
    head: Any = find_head(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2 or not weight.numel():
        return None
    grads = []
    if trains:
        of_head = (("weight", weight), ("bias", getattr(head, "bias", None)))
        grads = ["hidden", *(name for name, p in of_head if p is not None and p.requires_grad)]
        grads += ["low_rank"] if rank_of(head) else []
    return {
        "tokens": batch.tokens, "hidden_size": weight.shape[1], "vocab_size": weight.shape[0], "dtype": weight.dtype,
        "grads": grads, "outputs": ("log_sum_sq_probs",) if args.use_weighting else (),
        "softcap": _softcap(model, head),
        "compute_dtype": COMPUTE.get(str(args.mixed_precision), weight.dtype), "device": device, "impl": args.impl,
        "labels": batch.labels, "rank": rank_of(head), "ranks": ranks_of(head),
        "gradient_filter": args.gradient_filter if trains else None,
    }  # fmt: skip


def _softcap(model: Any, head: Any) -> float | None:
    """As it was measured, of a fused head; else as the model's config has it."""
    if isinstance(head, OutputHead):
        return head.fused.transform.softcap
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "final_logit_softcapping", None)


def _needed(args: DPOConfig, model: Any, batch: Longest, trains: bool, device: torch.device) -> int:
    """Bytes of the head for a batch, in forward and backward; of the checks at start too."""
    probed = replace(batch, tokens=max(batch.tokens, PROBED), labels=max(batch.labels, PROBED))
    call = head_call(args, model, probed, trains, device)
    return 0 if call is None else least_budget(**call)


def longest_batches(args: DPOConfig, train: Any, held_out: Any, beforehand: bool = False) -> Iterator[Longest]:
    """Of training, and of each evaluation; arguments as of `check_budget`.

    Args:
        beforehand: whether the reference's log-probs are computed before training: then of that pass too.
    """
    parts = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
    passes = [
        ("training", [train], args.per_device_train_batch_size),
        ("evaluation", parts, args.per_device_eval_batch_size),
    ]
    if beforehand:
        passes.append((OF_REFERENCE, [train, *parts], reference_batch_size(args)))
    for what, datasets, pairs in passes:
        for dataset in datasets:
            if not hasattr(dataset, "__len__") or not len(dataset):
                continue
            counted, longest = _sizes(dataset)
            if args.pad_to_multiple_of is not None and what != OF_REFERENCE:
                longest = -(-longest // args.pad_to_multiple_of) * args.pad_to_multiple_of
            most = np.sort(counted)[::-1]
            if what == "training" and args.tokens_per_batch is not None:
                # A prompt's last token predicts the first of both answers.
                tokens = min(int(most.sum()), args.tokens_per_batch * 2)
                batch = Longest(what, min(len(most), args.tokens_per_batch), tokens, tokens)
            else:
                batch = Longest(what, min(pairs, len(most)), int(most[:pairs].sum()), 2 * pairs * longest)
            yield batch if args.answers_at_once is None else _longest_part(batch, args, most, longest)


def _longest_part(batch: Longest, args: DPOConfig, most: np.ndarray, longest: int) -> Longest:
    """Of a batch that goes in parts.

    Args:
        most: tokens of each pair whose label counts, from the most on. longest: tokens of a sequence.
    """
    answers = args.answers_at_once or 0
    pairs = min(batch.pairs, answers // 2 if args.layout in ("packed", "shared") else answers)
    labels = min(batch.labels, answers * longest)
    return replace(batch, pairs=pairs, tokens=min(labels, int(most[:pairs].sum())), labels=labels)


def reference_batch_size(args: DPOConfig) -> int:
    """Pairs that the reference is given at once where its log-probs are computed before training."""
    return args.precompute_ref_batch_size or args.per_device_eval_batch_size


def _sizes(dataset: Any) -> tuple[np.ndarray, int]:
    """Of each pair the tokens whose label counts; and how long a sequence can be."""
    if isinstance(dataset, DPODataset):
        tokens = max(column(dataset.rows, "tokens"))
        return np.asarray(column(dataset.rows, "counted")), min(dataset.max_length - 1, tokens)
    items = [dataset[i] for i in range(len(dataset))]
    return np.asarray([_counted(item) for item in items]), max(len(item["x_chosen"]) for item in items)


def _counted(item: Any) -> int:
    masks: Iterable[Any] = (item[f"mask_{side}"] for side in SIDES)
    return sum(int(mask.count_nonzero()) for mask in masks)
