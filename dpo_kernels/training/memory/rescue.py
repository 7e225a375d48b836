"""A step that the memory did not suffice for, run again with less: exact, and told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpo_kernels
from dpo_kernels.training import adapters, gradient_cache
from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.memory import checkpointing
from dpo_kernels.training.memory.out_of_memory import OutOfMemoryError, is_out_of_memory
from dpo_kernels.training.mlp_tiles import TilingError, tile_mlps
from dpo_kernels.training.resume import newest_whole
from dpo_kernels.warn import warn

Step = Callable[[Any, dict[str, Any], Any], Tensor]
Evaluation = Callable[[dict[str, Any]], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Begun:
    """A step from its first batch on: what has to come back for it to be run again."""

    number: int
    random: tuple[Tensor, list[Tensor]]
    counts: Any
    parts: list[tuple[dict[str, Any], Any]]


class Rescue:
    """Runs the batches of a step, and all of them again with one thing less in memory where that did not suffice.

    Loss and gradients are those of the step in full. What was lowered stays so. Where nothing is left to lower, or that
    did not suffice either, the last finished step is saved. With several processes nothing is run again: the others
    would wait.

    Args:
        trainer: a `DPOTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._begun: Begun | None = None
        self._evaluated_at_once: int | None = None  # pairs, where a whole batch did not fit

    def run(self, step: Step, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """`Trainer.training_step`, given as `step`.

        Raises:
            OutOfMemoryError: the memory does not suffice; says where the last good step is saved, and what to turn.
        """
        trainer = self.trainer
        if self._begun is None or self._begun.number != trainer.state.global_step or not _has_gradients(trainer.model):
            self._begun = Begun(trainer.state.global_step, _random_state(), trainer.counts(), [])
        begun = self._begun
        begun.parts.append((dict(inputs), num_items))
        try:
            return step(model, inputs, num_items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or trainer.args.world_size > 1:
                raise
            said = _said(error)
        # Out of the block above nothing holds the tensors of the step any more.
        self._forget()
        told = next(lower(trainer), None)
        if told is not None:
            number = trainer.state.global_step + 1
            warn(f"step {number}: memory did not suffice ({said}); it is run again with {told}, as are all after it")
            try:
                loss = self._again(begun, step, model)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = _said(error)
            else:
                trainer.note({"lowered": told})
                return loss
        self._forget()
        trainer.set_counts(begun.counts)
        _set_random_state(begun.random)  # as after the last good step
        folder = trainer.save_checkpoint()
        tried = f", nor with {told}" if told is not None else ""
        number = trainer.state.global_step + 1
        raise OutOfMemoryError(
            f"step {number}: memory did not suffice{tried} ({said}). The last good step is saved in {folder}; "
            "go on with --resume_from_checkpoint and --fit, which chooses what lowers memory until the longest batch "
            "fits, or with a smaller --max_length"
        )

    def evaluate(self, step: Evaluation, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, metrics and labels of a batch of held-out pairs; of its halves where the memory does not suffice.

        Pairs know nothing of each other, so that the numbers are the same. What is said holds for the next batches too.

        Raises:
            OutOfMemoryError: it does not suffice for a pair; says where the last step is saved, and what to turn.
        """
        trainer, pairs = self.trainer, len(inputs["x_chosen"])
        at_once = self._evaluated_at_once or pairs
        while True:
            try:
                parts = [step(_of_pairs(inputs, i, i + at_once)) for i in range(0, pairs, at_once)]
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or trainer.args.world_size > 1:
                    raise
                said = _said(error)
            self._forget(gradients=False)
            if at_once == 1 or trainer.aux_loss.weight > 0:  # that is of a batch
                what = "one pair" if at_once == 1 else f"{at_once} pairs"
                saved = f" The last step is saved in {trainer.save_checkpoint()}." if trainer.is_in_train else ""
                raise OutOfMemoryError(
                    f"memory did not suffice for the evaluation of {what} ({said}).{saved} Give a smaller "
                    "--per_device_eval_batch_size, --memory_budget or --max_length, or leave the evaluation out "
                    "(--eval_strategy no)"
                )
            at_once = self._evaluated_at_once = (at_once + 1) // 2
            warn(f"memory did not suffice for the evaluation of a batch ({said}); it goes on with {at_once} at once")
        sizes = torch.tensor([len(metrics) for _, metrics, _ in parts])
        losses, metrics, labels = zip(*parts, strict=True)
        mean = (torch.stack(losses) * sizes.to(losses[0])).sum() / pairs
        return mean, torch.cat(metrics), torch.cat(labels)

    def between_steps(self, error: BaseException) -> OutOfMemoryError:
        """What is said where the memory did not suffice after a step's backward and before the next forward."""
        state, folder = self.trainer.state, newest_whole(Path(str(self.trainer.args.output_dir)))
        last = "no checkpoint was saved yet" if folder is None else f"the last checkpoint is {folder}"
        return OutOfMemoryError(
            f"after step {state.global_step}: memory did not suffice for the optimizer, for saving or for the data "
            f"({_said(error)}). Some of the weights may have changed, so that they are not saved; {last}. An optimizer "
            "keeps less with --optim adamw_bnb_8bit or --use_peft"
        )

    def _again(self, begun: Begun, step: Step, model: Any) -> Tensor:
        self.trainer.set_counts(begun.counts)
        _set_random_state(begun.random)
        losses = [step(model, dict(inputs), num_items) for inputs, num_items in begun.parts]
        return losses[-1]

    def _forget(self, gradients: bool = True) -> None:
        for p in self.trainer.model.parameters() if gradients else ():
            p.grad = None
        gc.collect()
        dpo_kernels.empty_cache()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def lower(trainer: Any) -> Iterator[str]:
    """Lowers the memory of a trainer's steps by one thing, and says what; the cheapest first."""
    model, args = trainer.model, trainer.args
    if not args.gradient_checkpointing and checkpointing.is_possible(model):
        checkpointing.switch(model, True)
        args.set_memory(gradient_checkpointing=True)
        adapters.prepare(model, True)
        if trainer.layout.attention == "cache":  # layers that are run again keep none
            trainer.set_layout(replace(trainer.layout, name="bucketed", attention=None))
            yield "--gradient_checkpointing true --layout bucketed"
        else:
            yield "--gradient_checkpointing true"
    if not args.disable_dropout:  # whose random numbers are others in parts
        return
    if args.mlp_tiles is None and not args.torch_compile:
        try:
            trainer.tiled = tile_mlps(model, "auto")
            args.set_memory(mlp_tiles="auto")
            yield "--mlp_tiles auto"
        except TilingError:
            pass
    while (layout := _in_smaller_parts(trainer)) is not None:
        trainer.set_layout(layout)
        args.answers_at_once = layout.answers_at_once
        yield f"--answers_at_once {layout.answers_at_once} --layout {layout.name}"


def _in_smaller_parts(trainer: Any) -> Layout | None:
    layout: Layout = trainer.layout
    pairs = trainer.args.per_device_train_batch_size
    now = layout.answers_at_once or 2 * pairs
    if gradient_cache.refusal(trainer.aux_loss.weight > 0, trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled):
        return None
    if trainer.args.torch_compile or now <= 1:
        return None
    if now > 2:
        return replace(layout, answers_at_once=2)
    return replace(layout, name="padded" if layout.name == "padded" else "bucketed", attention=None, answers_at_once=1)


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _of_pairs(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    return {name: tensor[begin:end] for name, tensor in inputs.items()}


def _has_gradients(model: Any) -> bool:
    return any(p.grad is not None for p in model.parameters())


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
