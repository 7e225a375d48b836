"""Which checkpoint a run goes on from, and whether it goes on with what the checkpoint was trained on."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets

from dpo_kernels.losses import LossOptions
from dpo_kernels.training import checkpoints
from dpo_kernels.training.checkpoints import CheckpointError
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.data_report import column
from dpo_kernels.warn import warn

# Options that decide the numbers of a step: a resume with another value warns.
NUMBERS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "tokens_per_batch", "answers_at_once",
    "gradient_accumulation_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm", "seed",
    "data_seed", "bf16", "fp16", "dataloader_drop_last", "train_sampling_strategy", "disable_dropout",
    "router_aux_loss_coef", "gradient_filter", "world_size", "adapter_reference", "sync_ref_model",
    "ref_model_mixup_alpha", "ref_model_sync_steps",
    *("dpo_aggregate" if field.name == "aggregate" else field.name for field in fields(LossOptions)),
)  # fmt: skip


class DataChangedError(CheckpointError):
    """The pairs are not those that the checkpoint was trained on."""


def newest_whole(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole, None where there is no checkpoint; warns of damaged ones.

    Raises:
        CheckpointError: there are checkpoints, and each is damaged.
    """
    found = dict.fromkeys(reversed(checkpoints.all_of(output_dir)), "")
    for path in found:
        found[path] = checkpoints.damage(path)
        if not found[path]:
            break
    damaged = ", ".join(f"{path.name} {said}" for path, said in found.items() if said)
    whole = next((path for path, said in found.items() if not said), None)
    if damaged and whole is None:
        raise CheckpointError(
            f"no checkpoint in {output_dir} is whole: {damaged}; bring one back from a copy, or start again in another "
            "--output_dir"
        )
    if damaged:
        warn(f"{damaged}: going on from {whole.name if whole else ''}, the newest that is whole")
    return whole


def check_folder(wanted: str | os.PathLike[str]) -> None:
    """
    Raises:
        CheckpointError: this is no checkpoint, or it is damaged.
    """
    folder = Path(wanted)
    if not (folder / checkpoints.STATE_NAME).is_file():
        raise CheckpointError(
            f"resume_from_checkpoint is {str(wanted)!r}, which is no checkpoint (it has no {checkpoints.STATE_NAME})"
        )
    if said := checkpoints.damage(folder):
        raise CheckpointError(
            f"resume_from_checkpoint is {str(wanted)!r}, which {said}; give an older one, or --resume_from_checkpoint "
            "alone for the newest of output_dir that is whole"
        )


def facts(args: DPOConfig, dataset: Any, reference: str | None) -> dict[str, Any]:
    """What a checkpoint says of its training, in JSON's types."""
    options = args.to_dict() | {"world_size": args.world_size}
    return {
        "data": data_facts(dataset), "options": {name: _plain(options.get(name)) for name in NUMBERS},
        "reference": reference,
    }  # fmt: skip


def data_facts(dataset: Any) -> dict[str, Any]:
    """The number of pairs, and of a `DPODataset` a hash of their tokens, which of them count, and their order."""
    known: dict[str, Any] = {"pairs": len(dataset)} if hasattr(dataset, "__len__") else {}
    if isinstance(dataset, DPODataset):
        known["hash"] = _hash(dataset.rows)
    return known


@functools.lru_cache(maxsize=1)  # before the models are loaded, for the checkpoints, and at the training's start
def _hash(rows: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for tokens, counted in zip(column(rows, "digest"), column(rows, "counted"), strict=True):
        digest.update(f"{tokens} {counted}\n".encode())
    return digest.hexdigest()[:32]


def check_data(checkpoint: str | os.PathLike[str], dataset: Any, allow_changed: bool) -> None:
    """
    Raises:
        DataChangedError: these are other pairs than the checkpoint was trained on, and that was not allowed.
    """
    saved, now = checkpoints.read_facts(Path(checkpoint)).get("data"), data_facts(dataset)
    if saved is None:
        warn(f"{checkpoint} does not say what data it was trained on: that was not compared")
        return
    if all(saved[name] == now[name] for name in saved.keys() & now.keys()):
        return
    numbers = f"{saved.get('pairs'):,} then, {now.get('pairs'):,} now"
    if saved.get("pairs") == now.get("pairs"):
        numbers = f"{now.get('pairs'):,} pairs as before, with other tokens or in another order"
    if not allow_changed:
        raise DataChangedError(
            f"the pairs are not those that {checkpoint} was trained on ({numbers}): it would go on in the middle of an "
            "order that it never began. Give the data, tokenizer, --max_length, --eval_size and --seed that it was "
            "begun with; or go on all the same with --allow_changed_data true"
        )
    warn(f"other pairs than {checkpoint} was trained on ({numbers}), as allowed")


def warn_of_changes(checkpoint: Path, now: dict[str, Any]) -> None:
    """Warns of options that are not those of the checkpoint, and of what it does not hold."""
    saved = checkpoints.read_facts(checkpoint)
    before, after = ({**found.get("options", {}), "reference": found.get("reference")} for found in (saved, now))
    changed = [f"{name} {before[name]!r} -> {after[name]!r}" for name in before if before[name] != after.get(name)]
    if saved and changed:
        warn(f"{checkpoint.name} was trained with other options: {', '.join(changed)}")
    if not any("optim" in path.name or path.name.startswith("global_step") for path in checkpoint.iterdir()):
        warn(
            f"{checkpoint.name} holds no state of the optimizer (save_only_model): optimizer and learning rate start "
            "anew, and the weights will not be those of a run that was never interrupted"
        )


def set_aside_newer(checkpoint: Path, output_dir: Path) -> None:
    """Takes checkpoints of the same run that come after this one out of the way: the run makes those steps again."""
    if checkpoint.resolve().parent != output_dir.resolve():
        return
    newer = [
        path for path in checkpoints.all_of(output_dir) if checkpoints.step_of(path) > checkpoints.step_of(checkpoint)
    ]
    if newer:
        names = [checkpoints.set_aside(path).name for path in newer]
        warn(
            f"kept, and taken up by no run: {', '.join(names)} in {output_dir}; to go on from one, rename it back to "
            f"{checkpoints.PREFIX}N"
        )


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
