"""Logs of runs that are made up: what a report and its sentences are made from."""

from __future__ import annotations

from dpo_kernels.training.report.metrics import LOG_2


def trained(losses, margins=None, chosen=None, first=1, **more):
    """A log of training steps; margins grow as losses fall unless they are given."""
    margins = [LOG_2 - loss for loss in losses] if margins is None else margins
    chosen = [margin / 2 for margin in margins] if chosen is None else chosen
    return [
        {"step": first + i, "loss": loss, "rewards/margins": m, "rewards/chosen": c, "rewards/rejected": c - m,
         "rewards/accuracies": 0.9, "logps/accuracies": 0.8} | more
        for i, (loss, m, c) in enumerate(zip(losses, margins, chosen, strict=True))
    ]  # fmt: skip


def evaluated(step, loss, accuracy=0.9, name="", chosen=0.5, rejected=-0.5, **more):
    found = {"loss": loss, "rewards/accuracies": accuracy, "logps/accuracies": accuracy, "rewards/chosen": chosen,
             "rewards/rejected": rejected, "rewards/margins": chosen - rejected} | more  # fmt: skip
    return {"step": step} | {f"eval_{name}{key}": value for key, value in found.items()}


FALLING = [LOG_2 - 0.02 * i for i in range(30)]
GOOD = [evaluated(0, LOG_2, 0.5), *trained(FALLING), evaluated(30, 0.2, 0.95)]
