"""The figures of a run's log: what each is called wherever a person reads it, and where its curves are found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

LOG_NAME = "log.jsonl"
LOG_2 = math.log(2)  # the loss of a pair that the policy ranks as the reference does
CHANCE = 0.5

Log = Sequence[dict[str, Any]]  # entries as `transformers.Trainer` keeps them: a step each, and its figures by key

# Key of the log -> its name on the bar, in the pictures, in the report and at the end. One name for one figure.
NAMES = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "logps/accuracies": "ranking accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of the chosen answers",
    "rewards/rejected": "reward of the rejected answers",
    "logps/chosen": "log-prob of the chosen answers",
    "logps/rejected": "log-prob of the rejected answers",
    "tokens_per_second": "tokens/s",
}
MEANINGS = {
    "rewards/accuracies": "share of pairs whose chosen answer has gained more over the reference than the rejected one",
    "logps/accuracies": "share of pairs whose chosen answer is the likelier one, a token, without the reference",
    "rewards/margins": "reward of the chosen answer, beta (log pi - log pi_ref), less that of the rejected one",
}
# Reward accuracy of those evaluated pairs whose chosen answer is the longer one, and the shorter one.
LONGER, SHORTER = "rewards/accuracies_longer", "rewards/accuracies_shorter"
# Losses of which a pair costs log 2 where policy and reference agree.
START_AT_LOG_2 = {"sigmoid", "sigmoid_norm"}


def loss_without_learning(loss_type: Sequence[str]) -> float | None:
    """The loss of a policy that is its reference, where it is log 2; None of other losses."""
    return LOG_2 if len(loss_type) == 1 and loss_type[0] in START_AT_LOG_2 else None


def points(log: Log, key: str) -> list[tuple[int, float]]:
    """(step, value) of the entries that have the key, the last of a step, in order; what is no number is left out, and
    so is a reward accuracy of pairs that are all even: policy and reference are the same, so it says nothing."""
    margin = key.replace("rewards/accuracies", "rewards/margins") if key.endswith("rewards/accuracies") else None
    found = {
        int(entry.get("step", 0)): float(entry[key])
        for entry in log
        if _is_number(entry.get(key)) and (margin is None or entry.get(margin) != 0)
    }
    return sorted(found.items())


def held_out(log: Log, key: str) -> dict[str, str]:
    """Keys of the log that hold a figure of the held-out pairs, by the name of the set: "" where there is one."""
    keys = dict.fromkeys(name for entry in log for name in entry)
    if f"eval_{key}" in keys:
        return {"": f"eval_{key}"}
    rest = f"_{key}"
    return {name[5 : -len(rest)]: name for name in keys if name.startswith("eval_") and name.endswith(rest)}


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Means over each value and its neighbours, a share of all to either side, and as many on both: the first and the
    last value stay what they are."""
    reach, last = round(share * len(values)), len(values) - 1
    totals = [0.0]
    for value in values:
        totals.append(totals[-1] + value)

    def mean(i: int) -> float:
        near = min(reach, i, last - i)
        return (totals[i + near + 1] - totals[i - near]) / (2 * near + 1)

    return [mean(i) for i in range(len(values))]


def shown(logs: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and figure, as a person reads it, of those keys that an entry has."""
    for key in keys:
        if _is_number(logs.get(key)) or isinstance(logs.get(key), float):
            yield NAMES[key], figure(key, logs[key])


def figure(key: str, value: float) -> str:
    """A number with the digits that are of use: 0.6931, 0.94, 10,500."""
    if not math.isfinite(value):
        return str(value)
    if key == "tokens_per_second":
        return f"{value:,.0f}"
    if key.endswith("accuracies"):
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def peak_memory_mib() -> float:
    """On a GPU the most that PyTorch had allocated, on a CPU the most that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
