"""Whether the head's memory budget works for the longest batch of a run, told before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_kernels.functional import least_budget
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import column
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.head_adapter import rank_of
from dpo_kernels.training.output_head import find_head

PROBED = 128  # tokens that the checks at start give a model at most


@dataclass(frozen=True)
class Longest:
    """The longest batch that can come: its pairs, the tokens whose label counts, and all labels, padding too."""

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
    needed: list[tuple[int, Longest]] = []
    for batch in longest_batches(args, train, held_out):
        for one, trains in ((model, batch.what == "training"), (ref_model, False)):
            if one is not None:
                needed.append((_needed(args, one, batch, trains, device), batch))
    if needed and budget < (most := max(needed, key=lambda pair: pair[0]))[0]:
        least, batch = most
        raise ValueError(
            f"memory_budget is {budget:,} bytes, and the longest batch that {batch.what} can meet ({batch.pairs:,} "
            f"pairs, {batch.tokens:,} tokens whose label counts) needs at least {least:,}: give --memory_budget {least}"
            f" ({-(-least // 2**20):,}MiB), a smaller batch, or a smaller --max_length"
        )


def _needed(args: DPOConfig, model: Any, batch: Longest, trains: bool, device: torch.device) -> int:
    """Bytes of the head for a batch, in forward and backward."""
    head: Any = find_head(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return 0  # no head to fuse, as whoever fuses it says
    grads = []
    if trains:
        bias = getattr(head, "bias", None)
        of_head = (("weight", weight), ("bias", bias))
        grads = ["hidden", *(name for name, p in of_head if p is not None and p.requires_grad)]
        grads += ["low_rank"] if rank_of(head) else []
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype
    return least_budget(
        max(batch.tokens, PROBED), weight.shape[1], weight.shape[0], weight.dtype, grads=grads,
        outputs=("log_sum_sq_probs",) if args.use_weighting else (),
        softcap=getattr(text, "final_logit_softcapping", None), compute_dtype=mixed, device=device, impl=args.impl,
        labels=max(batch.labels, PROBED), rank=rank_of(head),
    )  # fmt: skip


def longest_batches(args: DPOConfig, train: Any, held_out: Any) -> Iterator[Longest]:
    """Of training, of each evaluation, and of a pass of the reference; arguments as of `check_budget`."""
    parts = held_out.values() if isinstance(held_out, dict) else [held_out]
    for what, datasets, pairs in (
        ("training", [train], args.per_device_train_batch_size),
        ("evaluation", parts, args.per_device_eval_batch_size),
        ("the reference's pass", [train, *parts], args.precompute_ref_batch_size or 0),
    ):
        for dataset in datasets:
            if not hasattr(dataset, "__len__") or not len(dataset) or not pairs:
                continue
            counted, longest = _sizes(dataset)
            if args.pad_to_multiple_of is not None:
                longest = -(-longest // args.pad_to_multiple_of) * args.pad_to_multiple_of
            most = np.sort(counted)[::-1]
            if what == "training" and args.tokens_per_batch is not None:
                # A prompt's last token predicts the first of both answers.
                tokens = min(int(most.sum()), args.tokens_per_batch * 2)
                yield Longest(what, min(len(most), args.tokens_per_batch), tokens, tokens)
            else:
                yield Longest(what, min(pairs, len(most)), int(most[:pairs].sum()), 2 * pairs * longest)


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
