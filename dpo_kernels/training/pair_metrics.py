"""What the log says of pairs: the figures of each, and what an evaluation makes of them."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction

from dpo_kernels.training.report.metrics import LONGER, SHORTER

ENOUGH_PAIRS = 10  # for an accuracy of their own
PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip


def mean_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of an evaluation: the means of the loss and of `PAIR_METRICS`, and the reward accuracy by which answer is longer.

    Args:
        prediction: predictions (pairs, 9): loss, `PAIR_METRICS`, and by how many tokens the chosen answer is longer.
    """
    *columns, longer = np.asarray(prediction.predictions).T
    # The loss too is averaged here: over the pairs, without those that were repeated to fill the last batch.
    means = {name: float(column.mean()) for name, column in zip(("loss", *PAIR_METRICS), columns, strict=True)}
    accuracies = columns[1 + PAIR_METRICS.index("rewards/accuracies")]
    for name, chosen in ((LONGER, longer > 0), (SHORTER, longer < 0)):
        if chosen.sum() >= ENOUGH_PAIRS:
            means[name] = float(accuracies[chosen].mean())
    return means
