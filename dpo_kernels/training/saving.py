"""A trainer that saves models and checkpoints whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from dpo_kernels.training import adapters, checkpoints, split_checkpoints
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.engines import is_split_at_load
from dpo_kernels.training.model import FusedHead
from dpo_kernels.training.partitioned import own_part
from dpo_kernels.training.randomness import Silenced
from dpo_kernels.training.reference import Reference

GATHER = "gather_sharded_state_dict_for_save"  # of transformers' models, by `save_pretrained`


class SavingTrainer(Trainer):
    """`transformers.Trainer`, whose files are staged beside their place and put into it when all of them are there."""

    args: DPOConfig
    model: nn.Module
    head: FusedHead
    reference: Reference
    has_own_card = False  # a report of the run writes it
    _silenced: Silenced
    _staged_in: str | None = None
    _facts: dict[str, Any] | None = None  # of the training that is running, for its checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Model and tokenizer to output_dir, each file whole or not at all; a README.md that is there is left."""
        if _internal_call and output_dir is not None:
            with self._silenced.as_they_were():
                return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or str(self.args.output_dir))
        staged = checkpoints.staging(target) / "model"
        with self._writing("the model", staged, target):
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)
            self._save_whole(str(staged))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.has_own_card or (target / "README.md").exists():
                    (staged / "README.md").unlink(missing_ok=True)  # PEFT writes one
                checkpoints.publish_files(staged, target)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _save_whole(self, folder: str) -> None:
        """The whole model, also where each process has a part of it and checkpoints are in parts."""
        if not self.is_fsdp_enabled:
            return self.save_model(folder, _internal_call=True)
        whole = self.accelerator.get_state_dict(self.model_wrapped)  # by all processes; the main one gets it
        with self._silenced.as_they_were():
            return self._save(folder, state_dict=whole)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with gathered_once(self.model):
            super()._save(output_dir, state_dict=state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not self.has_own_card:
            super().create_model_card(*args, **kwargs)

    def save_merged(self, folder: Path) -> None:
        """The model with its adapter in its weights, and the tokenizer; nothing can be trained after it."""
        staged = checkpoints.staging(folder) / "model"
        with self._writing("the merged model", staged, folder):
            if self.args.should_save:
                self.head.unfuse(self.model)
                with self._silenced.as_they_were():
                    adapters.save_merged(self.model, staged)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(staged)
                checkpoints.publish_files(staged, folder)
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self) -> Path:
        """Saves a checkpoint of the last finished step, now, unless there is one; returns its folder."""
        folder = Path(str(self.args.output_dir)) / f"{checkpoints.PREFIX}{self.state.global_step}"
        if not folder.exists():
            self._save_checkpoint(self.model, None)
        return folder

    def _get_output_dir(self, trial: Any) -> str:
        return self._staged_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        target, limit = Path(super()._get_output_dir(trial)), self.args.save_total_limit
        staged = checkpoints.staging(target)
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        self._staged_in, self.args.save_total_limit = str(staged), None
        with self._writing(f"the checkpoint of step {self.state.global_step}", staged / name, target):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged_in, self.args.save_total_limit = None, limit
            if self.state.best_model_checkpoint is not None:
                self.state.best_model_checkpoint = str(target / Path(self.state.best_model_checkpoint).name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / name / checkpoints.STATE_NAME))
                if self.args.sync_ref_model:
                    checkpoints.write_tensors(staged / name, self.reference.moving())
                checkpoints.write_facts(staged / name, self._facts or {})
                checkpoints.publish(staged / name, target / name)
        if self.args.should_save:
            checkpoints.rotate(target, limit, self.state.best_model_checkpoint, target / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target / name))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_split_at_load(self.model):
            split_checkpoints.save_optimizer(
                output_dir, self.model, self.optimizer, self.lr_scheduler, self.args.should_save
            )
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged_in is None:  # not of one that is not in its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _writing(self, what: str, staged: Path, target: Path) -> AbstractContextManager[None]:
        alone = self.accelerator.num_processes == 1
        return checkpoints.writing(what, staged if alone else None, target, Path(str(self.args.output_dir)))


@contextmanager
def gathered_once(model: nn.Module) -> Iterator[None]:
    """Within it a model of transformers' is saved with `once_each` of what it gathers, or is given, to be saved."""
    gather = getattr(model, GATHER, None)
    if gather is None:
        yield
        return
    setattr(model, GATHER, lambda *args, **kwargs: once_each(gather(*args, **kwargs), model))
    try:
        yield
    finally:
        delattr(model, GATHER)  # of the object; the class has its own


def once_each(weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights to be saved, by name, without those that are others of the model too.

    Where a model is gathered from parts each name has a copy, and transformers knows a tied weight by its memory.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = dict(model.named_parameters(remove_duplicate=False))
    again = {name for name, source in tied.items() if source in weights and {name, source} <= own.keys()}
    again = {name for name in again if own_part(own[name]).data_ptr() == own_part(own[tied[name]]).data_ptr()}
    return {name: tensor for name, tensor in weights.items() if name not in again}
