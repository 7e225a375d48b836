"""TRL's trainers on a file of pairs, as they are and with `enable()`: what they log, from equal weights."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import options_of

TRAINERS = ("dpo", "kto", "grpo", "rloo")


def run(
    trainer: str, enabled: bool, model: str, data_path: str, steps: int, batch: int, length: int
) -> dict[str, list[float]]:
    """Trains; the log's losses and gradient norms."""
    from dpo_kernels.integrations.trl import enable

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # the trainer's log is not the table
        enable() if enabled else contextlib.nullcontext(),
    ):
        made = make_trainer(trainer, folder, model, data_path, steps, batch, length)
        made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")}


def make_trainer(trainer: str, folder: str, model: str, data_path: str, steps: int, batch: int, length: int) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    pairs = [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines()]
    pairs = [pair for pair in pairs if sum(len(m["content"]) for m in pair["chosen"]) < 4 * length][: 2 * steps * batch]
    options: dict[str, Any] = {"max_length": length}
    more: dict[str, Any] = {"ref_model": reference}
    if trainer == "dpo":
        rows = pairs
    elif trainer == "kto":
        rows = [
            {"prompt": pair[side][:-1], "completion": pair[side][-1:], "label": side == "chosen"}
            for pair in pairs for side in ("chosen", "rejected")
        ]  # fmt: skip
    else:
        rows = [{"prompt": pair["chosen"][:-1]} for pair in pairs]
        options = {"num_generations": batch, "max_completion_length": 16, "beta": 0.04}
        more = {"reward_funcs": _distinct_letters}
    config = getattr(trl, f"{trainer.upper()}Config")(
        **options_of(torch.device("cpu"), folder), **options, max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=1e-4, logging_steps=1, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    return getattr(trl, f"{trainer.upper()}Trainer")(
        model=policy, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), **more
    )


def _distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(c[0]["content"]))) for c in completions]
