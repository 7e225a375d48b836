"""Log-probs of the tokens of pairs, by a policy and its reference, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.formats import SIDES

Score = Callable[[PairBatch], Tensor | None]  # (2B, S) log-probs of the labels; None: there are none


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer behind its prompt, as the model sees it.

    ids: token ids, (T,). counted: whether a token counts in the loss. log_probs, ref_log_probs: of the tokens that
    count, 0 of the others and of the first, which nothing predicts; ref_log_probs is None without a reference.
    """

    ids: list[int]
    counted: list[bool]
    log_probs: list[float]
    ref_log_probs: list[float] | None

    def rewards(self, beta: float) -> list[float] | None:
        """beta (log pi - log pi_ref) of each token, whose sum is the answer's reward; None without a reference."""
        if self.ref_log_probs is None:
            return None
        return [beta * (own - ref) for own, ref in zip(self.log_probs, self.ref_log_probs, strict=True)]


@dataclass(frozen=True)
class ScoredPair:
    chosen: ScoredAnswer
    rejected: ScoredAnswer


def score_of(model: nn.Module, accelerator: Accelerator) -> Score:
    """What a model says whose head is fused (`FusedHead`), in evaluation mode, with the run's autocast."""

    def score(batch: PairBatch) -> Tensor:
        with evaluating(model), accelerator.autocast():
            return batch.run(model)["log_probs"]

    return score


@torch.no_grad()
def score_pairs(
    dataset: Any,
    indices: Sequence[int],
    policy: Score,
    reference: Score,
    *,
    batch_size: int = 8,
    as_batch: Callable[[dict[str, Tensor]], PairBatch] = PairBatch,
) -> Iterator[ScoredPair]:
    """Scores the pairs at these positions, in their order.

    Args:
        dataset: a `DPODataset`, or one with the same tensors.
        policy, reference: give the log-probs of a batch.
        as_batch: makes a batch of what `PairCollator` gives: its layout, its device.
    """
    collate = PairCollator()
    for first in range(0, len(indices), batch_size):
        items = [dataset[i] for i in indices[first : first + batch_size]]
        batch = as_batch(collate(items))
        own, ref = policy(batch), reference(batch)
        assert own is not None
        sides = zip(batch.sides(own.float().cpu()), (None, None) if ref is None else batch.sides(ref.float().cpu()),
                    strict=True)  # fmt: skip
        scored = [_answers(items, side, mine, other) for side, (mine, other) in zip(SIDES, sides, strict=True)]
        yield from (ScoredPair(*pair) for pair in zip(*scored, strict=True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each of its modules as it was after it."""
    modes = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in modes:
            module.training = True


def _answers(items: list[dict[str, Tensor]], side: str, own: Tensor, ref: Tensor | None) -> Iterator[ScoredAnswer]:
    for i, item in enumerate(items):
        mask = item[f"mask_{side}"]
        count = int(mask.nonzero().max()) + 1 if mask.any() else 0
        x, y, counted = item[f"x_{side}"][:count], item[f"y_{side}"][:count], mask[:count]
        last = y[-1:] if count else y
        yield ScoredAnswer(
            torch.cat([x, last]).tolist(), [False, *counted.tolist()], _behind_first(own[i, :count], counted),
            None if ref is None else _behind_first(ref[i, :count], counted),
        )  # fmt: skip


def _behind_first(values: Tensor, counted: Tensor) -> list[float]:
    return [0.0, *torch.where(counted, values, 0.0).tolist()]
