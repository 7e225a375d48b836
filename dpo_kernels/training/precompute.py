"""The reference's log-probs of a whole dataset in one pass, cached on disk under a key of data, model and precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor, nn

from dpo_kernels.training.data import SIDES, DPODataset, PairCollator
from dpo_kernels.training.data_report import column

if TYPE_CHECKING:
    from dpo_kernels.training.trainer import DPOTrainer

COLUMNS = datasets.Features({f"ref_{side}": datasets.List(datasets.Value("float32")) for side in SIDES})


def with_ref_log_probs(
    dataset: DPODataset, log_probs: Callable[[dict[str, Tensor]], Tensor], fingerprint: str, trainer: DPOTrainer
) -> DPODataset:
    """The dataset with the reference's log-probs beside each token.

    Each process computes a share of the pairs; all read the shares of the others from the cache, which has to be on a
    file system that they share.

    Args:
        log_probs: (2B, S) float32 of a batch of pairs.
        fingerprint: of the model that `log_probs` runs.

    Raises:
        TypeError: the dataset is no `DPODataset`.
        ValueError: the model is sharded (FSDP), so that no process can score its share alone.
    """
    if not isinstance(dataset, DPODataset):
        raise TypeError(f"precompute_ref_log_probs needs a DPODataset, not {type(dataset).__name__}")
    if trainer.is_fsdp_enabled:
        raise ValueError("precompute_ref_log_probs does not work with FSDP; run it once without, or leave it off")
    accelerator, args = trainer.accelerator, trainer.args
    precision = f"{accelerator.mixed_precision} {trainer.ref_head.transform}"
    key = _key(dataset, fingerprint, precision)
    shares = min(accelerator.num_processes, len(dataset))
    paths = [dataset.cache_dir / f"ref-{key}-{i}-of-{shares}.arrow" for i in range(shares)]
    parts = [dataset.rows.shard(shares, i, contiguous=True) for i in range(shares)]
    collate = PairCollator()

    def compute(_: Any, indices: list[int], first: int) -> dict[str, list[list[float]]]:
        batch = collate([dataset[first + i] for i in indices])
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        values = log_probs(batch).float().cpu()
        ids = dataset.rows.select([first + i for i in indices])
        return {
            f"ref_{side}": [row[: len(x) - 1].tolist() for row, x in zip(half, ids[f"{side}_ids"], strict=True)]
            for side, half in zip(SIDES, values.chunk(2), strict=True)
        }

    def share(i: int) -> datasets.Dataset:
        return parts[i].map(
            compute, with_indices=True, batched=True, batch_size=args.per_device_eval_batch_size, features=COLUMNS,
            remove_columns=parts[i].column_names, new_fingerprint=f"{key}-{i}-of-{shares}", desc="Reference log-probs",
            cache_file_name=str(paths[i]), fn_kwargs={"first": sum(len(p) for p in parts[:i])},
        )  # fmt: skip

    if accelerator.process_index < shares:
        share(accelerator.process_index)
    accelerator.wait_for_everyone()
    return dataset.with_reference(datasets.concatenate_datasets([share(i) for i in range(shares)]))


def model_fingerprint(model: nn.Module) -> str:
    """Of everything that a model computes from: class, config, parameters and buffers."""
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    facts = [type(model).__name__, None if config is None else config.to_json_string(use_diff=False), attention]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(dataset: DPODataset, fingerprint: str, precision: str) -> str:
    facts = [dataset.key, column(dataset.rows, "digest"), fingerprint, precision, torch.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
