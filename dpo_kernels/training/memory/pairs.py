"""Pairs to measure a step with: the longest of a dataset, or such of given lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.training.batch import PairCollator, pair_tokens
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import lengths
from dpo_kernels.training.layouts import Layout, PairTokens, most_tokens
from dpo_kernels.training.token_batches import TokenBatches


def longest_pairs(
    dataset: Any, layout: Layout, count: int, multiple_of: int | None = None, batches: TokenBatches | None = None
) -> dict[str, Tensor]:
    """A batch of a dataset that runs the most tokens, as `PairCollator` makes it.

    Args:
        count: pairs a batch, of any of the dataset.
        batches: which pairs come together, where that is known: then of their first epoch.
    """
    sizes = pair_sizes(dataset)
    if batches is not None:
        chosen = max(batches, key=lambda batch: most_tokens(layout, [sizes[i] for i in batch]))
    else:
        each = np.array([most_tokens(layout, [size]) for size in sizes])
        chosen = np.argsort(-each, kind="stable")[:count].tolist()
    return PairCollator(multiple_of)([dataset[i] for i in chosen])


def pair_sizes(dataset: Any) -> list[PairTokens]:
    """How long each pair is. Of a `DPODataset` from its columns, before a prompt is known to reach into the answers."""
    if not isinstance(dataset, DPODataset):
        return [pair_tokens(dataset[i]) for i in range(len(dataset))]
    tokens = lengths(dataset.rows).astype(np.int64)
    answers = np.minimum(tokens[:, 1:], dataset.max_length - 1)
    prompts = np.minimum(tokens[:, :1], dataset.max_length - 1 - answers.max(1, keepdims=True)).clip(0)
    return [PairTokens(int(p), int(c), int(r)) for p, c, r in np.concatenate([prompts, answers], 1)]


def made_pairs(prompt: int, chosen: int, rejected: int, count: int = 1) -> dict[str, Tensor]:
    """Pairs of these lengths in tokens, as `PairCollator` makes them; what they say is nothing."""
    width = prompt + max(chosen, rejected)
    found: dict[str, Tensor] = {}
    for token, (side, answer) in enumerate((("chosen", chosen), ("rejected", rejected)), start=2):
        ids = torch.ones(count, width, dtype=torch.long)
        ids[:, prompt:] = token
        mask = torch.zeros(count, width, dtype=torch.bool)
        mask[:, max(0, prompt - 1) : prompt + answer] = True
        found |= {f"x_{side}": ids, f"y_{side}": torch.where(mask, ids, -100), f"mask_{side}": mask}
    return found
