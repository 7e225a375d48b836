"""The reference's log-probs of a whole dataset in one pass, cached on disk under a key of data, model and precision."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import column
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.processes import anywhere
from dpo_kernels.training.reference import Reference

COLUMNS = datasets.Features({f"ref_{side}": datasets.List(datasets.Value("float32")) for side in SIDES})


def with_ref_log_probs(
    dataset: DPODataset, reference: Reference, accelerator: Accelerator, batch_size: int
) -> DPODataset:
    """The dataset with the reference's log-probs beside each token.

    Each process computes a share of the pairs; all read the shares of the others from the cache, which has to be on a
    file system that they share. Where processes have to run the model together, as its weights are in parts, all
    compute if any has to, and those with fewer batches run one again for the others.

    Raises:
        TypeError: the dataset is no `DPODataset`.
        ValueError: the reference cannot be asked beforehand, or computes nothing.
    """
    if not isinstance(dataset, DPODataset):
        raise TypeError(f"precompute_ref_log_probs needs a DPODataset, not {type(dataset).__name__}")
    if (identity := reference.identity()) is None:
        raise ValueError(f"a {type(reference).__name__} reference computes no log-probs; leave the dataset as it is")
    facts = [dataset.key, column(dataset.rows, "digest"), identity, torch.__version__]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    shares = min(accelerator.num_processes, len(dataset))
    paths = [dataset.cache_dir / f"ref-{key}-{i}-of-{shares}.arrow" for i in range(shares)]
    parts = [dataset.rows.shard(shares, i, contiguous=True) for i in range(shares)]
    collate = PairCollator()

    most, ran = -(-max(map(len, parts)) // batch_size), 0  # batches

    def compute(_: Any, indices: list[int], first: int) -> dict[str, list[list[float]]]:
        nonlocal ran
        ran += 1
        inputs = collate([dataset[first + i] for i in indices])
        batch = PairBatch({name: tensor.to(accelerator.device) for name, tensor in inputs.items()})
        with torch.no_grad():
            log_probs = reference.score(batch, True)  # of this model, also where the dataset holds another's
        assert log_probs is not None
        ids = dataset.rows.select([first + i for i in indices])
        return {
            f"ref_{side}": [row[: len(x) - 1].tolist() for row, x in zip(half, ids[f"{side}_ids"], strict=True)]
            for side, half in zip(SIDES, batch.sides(log_probs.float().cpu()), strict=True)
        }

    def share(i: int, again: bool = False) -> datasets.Dataset:
        return parts[i].map(
            compute, with_indices=True, batched=True, batch_size=batch_size, features=COLUMNS,
            remove_columns=parts[i].column_names, new_fingerprint=f"{key}-{i}-of-{shares}", desc="Reference log-probs",
            cache_file_name=str(paths[i]), fn_kwargs={"first": sum(len(p) for p in parts[:i])},
            load_from_cache_file=not again,
        )  # fmt: skip

    own = accelerator.process_index
    together = reference.runs_together and anywhere(accelerator, own < shares and not paths[own].exists())
    if own < shares:
        share(own, again=together)
    for _ in range(most - ran if together else 0):
        compute(None, [0], 0)
    accelerator.wait_for_everyone()
    return dataset.with_reference(datasets.concatenate_datasets([share(i) for i in range(shares)]))
