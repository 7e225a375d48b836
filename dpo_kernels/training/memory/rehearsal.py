"""One step of the longest batch before training, forward and backward without an update: what it really holds."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dpo_kernels.training.head_check import random_numbers_kept
from dpo_kernels.training.memory import checkpointing, optimizers
from dpo_kernels.training.memory.device_memory import held, peak_within
from dpo_kernels.training.memory.out_of_memory import is_out_of_memory
from dpo_kernels.training.memory.pairs import longest_pairs


@dataclass(frozen=True)
class Rehearsal:
    """bytes: the most that the process held, with what the optimizer will keep; None: the memory did not suffice.
    seconds: that the step took. why: what the system said where it did not suffice. unknown: whether the optimizer will
    keep more, nobody here knows how much."""

    bytes: int | None
    seconds: float
    why: str = ""
    unknown: bool = False


def rehearse(trainer: Any) -> Rehearsal | None:
    """Runs the longest batch of the training data through a trainer that is ready to train.

    Weights, gradients, random numbers and what the trainer counts are as before afterwards. None: it cannot be told
    here, where weights are shared among processes (FSDP, DeepSpeed), the model is compiled for each length anew, or the
    data cannot be looked through.

    Args:
        trainer: a `DPOTrainer`, before `train`.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or args.torch_compile or not hasattr(dataset, "__len__"):
        return None
    batch = longest_pairs(
        dataset, trainer.layout, args.per_device_train_batch_size, args.pad_to_multiple_of, trainer.token_batches
    )
    inputs = trainer._prepare_inputs(batch)
    model, device = trainer.model, args.device
    training = {module: module.training for module in model.modules()}
    state = trainer.reference.starts_equal
    found: Rehearsal
    start = time.perf_counter()
    try:
        with random_numbers_kept(), peak_within(device) as most:
            _step(trainer, model, inputs)
        del inputs
        known = held(device) if device.type == "cuda" else 0
        name = optimizers.name_of(args)
        kept = 0 if optimizers.is_on_host(name, device.type) else optimizers.kept_bytes(name, model)
        found = Rehearsal(max(most[0], known) + (kept or 0), time.perf_counter() - start, unknown=kept is None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = Rehearsal(None, time.perf_counter() - start, str(error).splitlines()[0])
    finally:
        for p in model.parameters():
            p.grad = None
        for module, mode in training.items():
            module.training = mode
        trainer.reference.starts_equal = state
        trainer.set_counts()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _step(trainer: Any, model: Any, inputs: Any) -> None:
    if trainer.args.gradient_checkpointing and not checkpointing.is_on(model):
        checkpointing.switch(model, True)
    model.train()
    for _ in range(1 + (trainer.args.gradient_accumulation_steps > 1)):
        with trainer.accelerator.autocast() if trainer.accelerator.native_amp else nullcontext():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        del loss
