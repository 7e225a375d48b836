"""The datasets that a trainer is given: none, one, or several by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.loading import check_positions


def each(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """The change of a dataset, of each in a dict of them, or of none."""
    if isinstance(dataset, dict):
        return {name: change(one) for name, one in dataset.items()}
    return None if dataset is None else change(dataset)


def named(**given: Any) -> list[tuple[str, Any]]:
    """Every dataset that is given, by a name for messages; those in a dict one by one."""
    found = []
    for name, dataset in given.items():
        if isinstance(dataset, dict):
            found += [(f"{name}[{key!r}]", one) for key, one in dataset.items()]
        elif dataset is not None:
            found.append((name, dataset))
    return found


def check_dataset(name: str, dataset: Any, model: nn.Module) -> None:
    """
    Raises:
        TypeError: it holds no tensors of pairs; says how to make them.
        ValueError: its sequences are longer than what the model has positions for.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "x_chosen" not in columns:
        raise TypeError(
            f"{name} is a datasets.{type(dataset).__name__} with the columns {sorted(columns)}, which are no tensors "
            "yet; give DPODataset.from_dataset(dataset, tokenizer, max_length)"
        )
    if isinstance(dataset, DPODataset) and (config := getattr(model, "config", None)) is not None:
        check_positions(config, dataset.max_length)
