"""The log-probs that a model gives pairs, without training, and what rewards they are beside a reference's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from dpo_kernels.losses import aggregate_log_probs
from dpo_kernels.training import layout_check
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.model import FusedHead

Scores = dict[str, list[float]]  # a name of a figure -> one number a pair


def score(
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
    training, wants = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with FusedHead(model, memory_budget, impl) as head:
            head.check(model, deterministic=False)
            chosen = layout_check.choose(model, layout, dataset, batch_size).layout
            use_branches(model, chosen.attention == "branches")
            mixed = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
            with torch.no_grad(), mixed:
                batches = [_of_batch(model, batch.lying(chosen)) for batch in _batches(dataset, batch_size, device)]
    finally:
        model.train(training)
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


def _of_batch(model: Any, batch: PairBatch) -> dict[str, Tensor]:
    log_probs = batch.run(model)["log_probs"].double()  # rewards are small differences of large sums
    sums = batch.sides(aggregate_log_probs(log_probs, batch.mask))
    means = batch.sides(aggregate_log_probs(log_probs, batch.mask, "mean"))
    tokens = batch.sides(batch.mask.sum(1))
    found = {f"logps/{side}": values.cpu() for side, values in zip(SIDES, sums, strict=True)}
    found |= {f"tokens/{side}": values.cpu() for side, values in zip(SIDES, tokens, strict=True)}
    return found | {"logps/accuracies": (means.chosen > means.rejected).float().cpu()}
