"""What a model makes of pairs, without a gradient: log-probs and rewards of each pair, or of each token of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor, nn

from dpo_kernels.losses import aggregate_log_probs
from dpo_kernels.training import layout_check
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.model import FusedHead

Score = Callable[[PairBatch], Tensor | None]  # (2B, S) log-probs of the labels; None: there are none
Scores = dict[str, list[float]]  # a name of a figure -> one number a pair


def score_dataset(
    model: Any,
    dataset: DPODataset,
    *,
    batch_size: int = 8,
    layout: str = "auto",
    memory_budget: int | None = None,
    impl: str | None = None,
    bf16: bool = False,
) -> Scores:
    """The log-probs that a model gives the answers of each pair, summed over the tokens that count.

    Args:
        model: an `AutoModelForCausalLM`, on its device; it is left as it was.
        batch_size: pairs at once.
        layout: as `DPOConfig.layout`. memory_budget: in bytes. impl: as in `hidden_to_log_probs`.
        bf16: whether products are bfloat16.

    Returns: of both sides "logps/chosen", the sum, "tokens/chosen", how many count, and "logps/accuracies", 1 where the
    chosen answer has the higher log-prob a token.

    Raises:
        HeadError: the model's log-probs would be computed wrong.
    """
    device = next(model.parameters()).device
    wants = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model), FusedHead(model, memory_budget, impl) as head:
            head.check(model, deterministic=False)
            chosen = layout_check.choose(model, layout, dataset, batch_size).layout
            use_branches(model, chosen.attention == "branches")
            mixed = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
            with torch.no_grad(), mixed:
                batches = [_sums(model, batch.lying(chosen)) for batch in _batches(dataset, batch_size, device)]
    finally:
        for p, want in zip(model.parameters(), wants, strict=True):
            p.requires_grad_(want)
    return {name: torch.cat([batch[name] for batch in batches]).tolist() for name in batches[0]}


def with_rewards(policy: Scores, ref: Scores, beta: float) -> Scores:
    """The policy's scores with the reference's, and rewards beta (log pi - log pi_ref), their margins and accuracies;
    names as in the log of a run."""
    found = dict(policy)
    for side in SIDES:
        found[f"ref_logps/{side}"] = ref[f"logps/{side}"]
        pairs = zip(policy[f"logps/{side}"], ref[f"logps/{side}"], strict=True)
        found[f"rewards/{side}"] = [beta * (own - other) for own, other in pairs]
    both = list(zip(found["rewards/chosen"], found["rewards/rejected"], strict=True))
    found["rewards/margins"] = [chosen - rejected for chosen, rejected in both]
    found["rewards/accuracies"] = [float(chosen > rejected) for chosen, rejected in both]
    return found


def _batches(dataset: DPODataset, size: int, device: torch.device) -> Iterator[PairBatch]:
    collate = PairCollator()
    for begin in track(range(0, len(dataset), size), "scoring", transient=True):
        items = [dataset[i] for i in range(begin, min(begin + size, len(dataset)))]
        yield PairBatch({name: tensor.to(device) for name, tensor in collate(items).items()})


def _sums(model: Any, batch: PairBatch) -> dict[str, Tensor]:
    log_probs = batch.run(model)["log_probs"].double()  # rewards are small differences of large sums
    sums = batch.sides(aggregate_log_probs(log_probs, batch.mask))
    means = batch.sides(aggregate_log_probs(log_probs, batch.mask, "mean"))
    tokens = batch.sides(batch.mask.sum(1))
    found = {f"logps/{side}": values.cpu() for side, values in zip(SIDES, sums, strict=True)}
    found |= {f"tokens/{side}": values.cpu() for side, values in zip(SIDES, tokens, strict=True)}
    return found | {"logps/accuracies": (means.chosen > means.rejected).float().cpu()}


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
