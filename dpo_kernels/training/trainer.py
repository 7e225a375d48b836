"""DPO on `transformers.Trainer`: frozen reference, fused head, exact gradient accumulation, whole checkpoints."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from dpo_kernels.losses import Sides, aggregate_log_probs, make_pairs, pair_losses
from dpo_kernels.training import (
    adapters,
    aux_loss,
    checkpoints,
    gradient_cache,
    layout_check,
    resume,
    split_checkpoints,
    zero_checkpoints,
)
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch, PairCollator, Surrounding, keep_pairs
from dpo_kernels.training.budget import check_budget, reference_batch_size
from dpo_kernels.training.callbacks import Progress, RunLog, StopOnNonFinite, StopOnSignal, SyncReference
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import DPODataset
from dpo_kernels.training.engines import (
    asked_for,
    check_runs_as,
    check_split_as_asked,
    is_sharded_at_load,
    is_split_at_load,
    ranks_of,
    split_of,
)
from dpo_kernels.training.given_datasets import check_dataset, each, named
from dpo_kernels.training.layout_check import check_split
from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.loading import is_of_its_own_kind
from dpo_kernels.training.memory.device_memory import held
from dpo_kernels.training.memory.out_of_memory import OutOfMemoryError, is_out_of_memory
from dpo_kernels.training.memory.rescue import Rescue
from dpo_kernels.training.mlp_tiles import Tiled, tile_mlps
from dpo_kernels.training.model import FusedHead
from dpo_kernels.training.offloading import Offloading, check_offloading
from dpo_kernels.training.ownership import owned
from dpo_kernels.training.pair_metrics import PAIR_METRICS, mean_metrics
from dpo_kernels.training.partitioned import any_partitioned, numbers_in
from dpo_kernels.training.precompute import with_ref_log_probs
from dpo_kernels.training.processes import (
    check_head,
    find_mlps,
    from_main,
    is_partitioned,
    on_models,
    save_whole_models,
)
from dpo_kernels.training.randomness import Silenced, disable_dropout
from dpo_kernels.training.reference import Precomputed, reference_for
from dpo_kernels.training.report.metrics import peak_memory_mib
from dpo_kernels.training.saving import SavingTrainer
from dpo_kernels.training.sequence_parallel import over
from dpo_kernels.training.token_batches import TokenBatches, loader, token_batches


class DPOTrainer(SavingTrainer):
    """Trains a causal language model on preference pairs.

    Each step: x = cat(x_chosen, x_rejected) through policy and reference, `dpo_loss` of their log-probs, plus the
    model's load-balancing loss where it has one. With several processes or gradient accumulation the loss is the mean
    over all pairs of the step, as if they had been one batch; negative log-likelihoods (sft, cpo, orpo) are the mean
    over all its chosen tokens. (What is no mean over pairs, the load-balancing loss, aot and aot_unpaired, is averaged
    over the parts.)

    Args:
        model: policy, an `AutoModelForCausalLM`, or one with an adapter (`PeftModel`).
        ref_model: the reference, frozen here; not needed if the datasets hold its log-probs already, or if the loss
            has none (`LossOptions.needs_reference`). Of a policy with an adapter None is the policy as it starts: with
            its adapter off where that is the same (`DPOConfig.adapter_reference`).
        args: `DPOConfig`.
        train_dataset, eval_dataset: `DPODataset`, or any dataset whose items have the same tensors.
        processing_class: the tokenizer, saved beside the model.
        callbacks: as in `transformers.Trainer`.
        peft_config: the policy gets a new adapter of this kind, and is frozen besides.

    Raises:
        HeadError: a fused head would compute a model's log-probs wrong; found by a check at start.
        TilingError: args.mlp_tiles, and a model has no MLP that can be run in slices.
        EngineError: accelerate would run something else than the FSDP or DeepSpeed that was asked for.
        ValueError: no reference is given, or an option is out of range or does nothing here.
    """

    args: DPOConfig
    model: nn.Module
    train_dataset: Any  # DPODataset or alike
    eval_dataset: Any
    _tokens_per_chosen: Tensor | None = None  # the mean length of the chosen answers of the step that is running
    _tokens_per_evaluated: Tensor | None = None  # likewise, of the batch that is evaluated
    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        args: DPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ) -> None:
        if peft_config is not None:
            set_seed(args.seed)  # an adapter starts with random numbers
            model = adapters.adapted(model, peft_config, bool(args.gradient_checkpointing))
        adapters.check_apart(model, ref_model)
        adapters.prepare(model, bool(args.gradient_checkpointing))
        self._silenced = disable_dropout(model) if args.disable_dropout else Silenced()
        for name, dataset in named(train_dataset=train_dataset, eval_dataset=eval_dataset):
            check_dataset(name, dataset, model)
        check_budget(args, model, ref_model, train_dataset, eval_dataset, args.device)
        self.head = FusedHead(model, args.memory_budget_bytes, args.impl, args.use_weighting, args.gradient_filter)
        with split_checkpoints.unrefused(args, is_split_at_load(model)):
            super().__init__(
                model=model, args=args, data_collator=PairCollator(args.pad_to_multiple_of),
                train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class,
                callbacks=callbacks, compute_metrics=mean_metrics,
            )  # fmt: skip
        check_runs_as(asked_for(args), self.accelerator)
        check_split_as_asked(args, model, ref_model)
        save_whole_models(self.accelerator)
        self.ranks, self.split = ranks_of(self.accelerator, model), split_of(self.accelerator)
        self.accelerator.gather = self.ranks.one_of_each(self.accelerator.gather)
        if args.precompute_ref_log_probs and self.ranks.copies > 1:
            raise ValueError(
                "precompute_ref_log_probs does not work where processes read the same pairs (tp_size, cp_size); leave "
                "it out"
            )
        self.model_accepts_loss_kwargs = True  # num_items_in_batch is used
        if args.activation_offloading:
            check_offloading(args.device, self.is_fsdp_enabled or is_partitioned(self.accelerator))
        self.offloading = Offloading(model) if args.activation_offloading else None
        check_head(self.accelerator, self.head, model, args.disable_dropout)
        self.tiled: Tiled | None = None
        if args.tiles is not None:
            self.tiled = tile_mlps(model, args.tiles, find_mlps(self.accelerator, model))
        self.aux_loss = on_models(self.accelerator, lambda: aux_loss.decide(model, args.router_aux_loss_coef), model)
        # What follows the last token that counts changes nothing before it, so no mask is needed, and one with zeros
        # keeps attention from its causal path. A load-balancing loss of transformers' is over real tokens; flash
        # attention leaves padding out by it. The reference goes the policy's way, so that both give the same numbers.
        balances = self.aux_loss.weight > 0
        why = gradient_cache.refusal(balances, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        if args.answers_at_once is not None and why:
            raise ValueError(f"answers_at_once is {args.answers_at_once}: {why}")
        gives_mask = (balances and not is_of_its_own_kind(model)) or "flash" in str(_attention(model))
        gives_mask = gives_mask and self.split is None  # which has an attention of its own
        pairs = train_dataset if train_dataset is not None else eval_dataset
        # A compiled model would be compiled again for the lengths of each step.
        layout = "padded" if args.layout == "auto" and (args.torch_compile or self.split) else args.layout
        in_parts, is_sharded = any_partitioned(model), self.is_fsdp_enabled or is_sharded_at_load(model)
        with self.head.exact():
            choice = on_models(self.accelerator, lambda: layout_check.choose(
            model, layout, pairs, args.per_device_train_batch_size, tokens_per_batch=args.tokens_per_batch,
            balances=balances, gives_mask=gives_mask, is_sharded=is_sharded, in_parts=in_parts,
            is_checkpointed=bool(args.gradient_checkpointing), answers_at_once=args.answers_at_once, device=args.device,
        ), model)  # fmt: skip
        self.layout, self.layout_told = choice.layout, choice.told
        if self.split is not None:
            check_split(self.split, model, self.layout, balances)
        if args.tokens_per_batch is not None and self.ranks.copies > 1:
            raise ValueError("tokens_per_batch does not work where processes read the same pairs (tp_size, cp_size)")
        self.token_batches: TokenBatches | None = None
        if args.tokens_per_batch is not None and train_dataset is not None:
            self.token_batches = token_batches(train_dataset, self.layout, args)
        use_branches(model, self.layout.attention == "branches" or self.split is not None)
        self._reference_name = getattr(getattr(ref_model, "config", None), "_name_or_path", None)
        self.reference = reference_for(
            ref_model, model, self.accelerator, args, self.layout, is_sharded, lambda: self.model_wrapped
        )
        self.reference.split = self.split
        if self.ref_model is not None and self.split is not None:
            use_branches(self.ref_model, True)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self._rescue = Rescue(self)
        self._universal = False  # whether ZeRO-3 loads what another number of processes saved
        self._signal = StopOnSignal(self.accelerator)
        self._non_finite = StopOnNonFinite(self.accelerator, self.save_checkpoint)
        for callback in (RunLog(), self._signal, self._non_finite):
            self.add_callback(callback)
        if args.sync_ref_model:
            self.reference.check_follow(model)
            share, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self.add_callback(SyncReference(self.reference.follow, share, steps))
        if args.precompute_ref_log_probs and self.reference.identity() is not None:
            self._precompute()
        for name, dataset in named(train_dataset=self.train_dataset, eval_dataset=self.eval_dataset):
            self.reference.check_dataset(name, dataset, args.loss_options.needs_reference)
            if args.sync_ref_model and "ref_chosen" in dataset[0]:
                raise ValueError(f"sync_ref_model moves the reference, and {name} holds log-probs of one that stays")

    @property
    def ref_model(self) -> nn.Module | None:
        """The frozen reference, as long as there is one."""
        return self.reference.model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer`'s; True resumes from the newest checkpoint that is whole.

        Raises:
            CheckpointError: the checkpoint is damaged, or was trained on other pairs (`DPOConfig.allow_changed_data`).
            FolderInUseError: another run writes into output_dir.
            SaveError: a checkpoint could not be written.
            KeyboardInterrupt: after a SIGINT, with the last step saved (`interrupted`); at once after a second one.
        """
        # An evaluation before training marks the model as prepared, and accelerate would then train it without DDP,
        # each process on its own (transformers 5.24, accelerate 1.15).
        if self.model is self.model_wrapped:
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        with self._owning():
            self._facts = resume.facts(self.args, self.train_dataset, self._reference_name)
            self._facts["options"]["layout"] = self.layout.name
            checkpoint = from_main(self.accelerator, lambda: self._checked(resume_from_checkpoint))
            if checkpoint is not None and self.is_deepspeed_enabled:
                self._fit_to_processes(checkpoint)
            with self._signal.listening():
                result = super().train(checkpoint, *args, **kwargs)
        if self.interrupted and self._signal.number == signal.SIGINT:
            raise KeyboardInterrupt
        return result

    @contextmanager
    def _owning(self) -> Iterator[None]:
        if self.args.process_index == 0:
            with owned(str(self.args.output_dir)):
                yield
        else:
            yield

    def _checked(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to go on from, if any; warns of what is other than it was. Of the main process."""
        output_dir = Path(str(self.args.output_dir))
        checkpoints.clean(output_dir)
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            if (newest := resume.newest_whole(output_dir)) is None:
                raise checkpoints.CheckpointError(f"there is no checkpoint in {output_dir} to go on from")
            wanted = str(newest)
        else:
            resume.check_folder(wanted)
        resume.check_data(wanted, self.train_dataset, self.args.allow_changed_data)
        resume.warn_of_changes(Path(wanted), self._facts or {})
        return wanted

    def _fit_to_processes(self, checkpoint: str) -> None:
        """Makes a checkpoint of DeepSpeed's fit for as many processes as there are."""
        if from_main(self.accelerator, lambda: zero_checkpoints.is_for_others(checkpoint, self.args.world_size)):
            from_main(self.accelerator, lambda: zero_checkpoints.convert(checkpoint))
            zero_checkpoints.load_universal(self.accelerator.state.deepspeed_plugin)
            self._universal = is_partitioned(self.accelerator)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoints.reading(resume_from_checkpoint):
            if is_split_at_load(self.model) and not adapters.is_adapted(self.model):
                split_checkpoints.load_weights(resume_from_checkpoint, self.model)
            elif not adapters.load(self.model, resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.args.sync_ref_model:
                checkpoints.read_tensors(Path(resume_from_checkpoint), self.reference.moving())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(str(checkpoint)):
            is_split = checkpoint is not None and split_checkpoints.is_split(checkpoint)
            if checkpoint is not None and (is_split or is_split_at_load(self.model)):
                split_checkpoints.load_optimizer(checkpoint, self.model, self.optimizer, self.lr_scheduler)
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self._universal:
                zero_checkpoints.give_back_groups(self.optimizer, checkpoint)
        if checkpoint is not None and self.args.process_index == 0:  # the model has come before it
            resume.set_aside_newer(Path(checkpoint), Path(str(self.args.output_dir)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def get_train_dataloader(self) -> Any:
        if self.token_batches is None:
            return super().get_train_dataloader()
        return loader(self.train_dataset, self.token_batches, self.args, self.accelerator)

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        # transformers 5.24 takes one step more where a checkpoint of the last step lies within an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.token_batches is not None:  # accelerate tells those that it knows
            self.token_batches.set_epoch(epoch)
        try:
            super()._run_epoch(model, epoch, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error) or self.args.world_size > 1:
                raise
            raise self._rescue.between_steps(error) from error

    def counts(self) -> tuple[dict[str, Tensor], Any]:
        """What the log will say of the batches since its last entry, and the loss of the step so far."""
        return {name: total.clone() for name, total in self._sums.items()}, self._non_finite.step_loss

    def set_counts(self, counts: tuple[dict[str, Tensor], Any] = ({}, 0.0)) -> None:
        """Puts them back; by default to where there was no batch."""
        self._sums.clear()
        self._sums.update({name: total.clone() for name, total in counts[0].items()})
        self._non_finite.step_loss = counts[1]

    def note(self, entry: dict[str, Any]) -> None:
        """An entry of the log that is no entry of steps."""
        super().log(entry)

    def set_layout(self, layout: Layout) -> None:
        """Goes on in another layout, the reference too."""
        self.layout = layout
        use_branches(self.model, layout.attention == "branches")
        self.reference.set_layout(layout)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not self._sums:  # the first since the last log
            self._steps_began = time.perf_counter()
        return self._rescue.run(super().training_step, model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The DPO loss of a batch; with return_outputs also the loss and `PAIR_METRICS` of each pair, (B, 8)."""
        batch, options = PairBatch(inputs, self.layout), self.args.loss_options
        more: dict[str, Any] = {"output_router_logits": True} if self.aux_loss.weight > 0 else {}
        ref = self.reference.log_probs(batch, options.needs_reference)  # first: it may be missing
        around: Surrounding = self.offloading if self.offloading is not None and model.training else nullcontext
        output = batch.run(over(model, self.split), around, **more)
        policy = output["log_probs"]
        if model.training and batch.ref_log_probs is None and ref is not None:
            self.reference.check_start(model, batch, policy.detach(), ref, is_start=self.state.global_step == 0)
        of_the_step = self._tokens_per_chosen if num_items_in_batch is not None else self._tokens_per_evaluated
        made = make_pairs(ref, policy, batch.mask, options, output.get("log_sum_sq_probs"), of_the_step)
        losses = pair_losses(made, options)
        if "aux_loss" in output:
            losses = losses + self.aux_loss.weight * output["aux_loss"]
        loss = losses.mean()
        metrics = self._pair_metrics(made.logratios, policy.detach(), batch)
        if model.training:
            self._count(batch, metrics[: batch.pairs], output)
        if num_items_in_batch is not None:  # the pairs of the whole step, on all processes
            # Gradients are averaged over those that read pairs, so that each multiplies its share by their number.
            loss = loss * (batch.pairs * self.ranks.readers / num_items_in_batch)
        if model.training:
            self._non_finite.add(loss.detach())
        return (loss, torch.cat([losses.detach()[:, None], metrics], 1)) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        given = eval_dataset if not isinstance(eval_dataset, str) else None  # the name of one that was checked
        for name, dataset in named(eval_dataset=given):
            check_dataset(name, dataset, self.model)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        # Of the whole batch, also where it goes in halves.
        self._tokens_per_evaluated = inputs["mask_chosen"].sum(1).double().mean()
        try:
            return self._rescue.evaluate(partial(self._evaluated, model), inputs)
        finally:
            self._tokens_per_evaluated = None

    @torch.no_grad()
    def _evaluated(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        longer = inputs["mask_chosen"].sum(1) - inputs["mask_rejected"].sum(1)  # by so many tokens is the chosen answer
        metrics = torch.cat([metrics, longer.to(metrics)[:, None]], 1)
        return loss.detach(), metrics, metrics.new_zeros(len(metrics))  # no labels, but Trainer wants some

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            totals = dict(zip(names, self._reduce(torch.stack([self._sums[n].float() for n in names])), strict=True))
            self._sums.clear()
            pairs, batches = totals.pop("pairs"), totals.pop("batches")
            tokens = totals.pop("tokens") / self.ranks.copies
            logs["tokens_per_second"] = tokens / (time.perf_counter() - self._steps_began)
            if "aux_loss" in totals:
                logs["aux_loss"] = totals.pop("aux_loss") / batches
            if "dropped_mass" in totals:
                logs["dropped_mass"] = totals.pop("dropped_mass") / totals.pop("counted")
            logs |= {name: totals[name] / pairs for name in PAIR_METRICS}
            logs["peak_memory_mib"] = peak_memory_mib()
            logs["memory_mib"] = held(self.args.device) / 2**20
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """6 flop a parameter and token, forward and backward (Kaplan et al. 2020, arXiv:2001.08361)."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(map(numbers_in, self.model.parameters()))
        return 6 * self._parameters * PairBatch(inputs, self.layout).positions

    @property
    def interrupted(self) -> bool:
        """Whether a SIGTERM or SIGINT ended training early, with a checkpoint of the last step."""
        return self._signal.saved and self.state.global_step < self.state.max_steps

    @property
    def stopped_by(self) -> int | None:
        """The number of the signal that came to this process."""
        return self._signal.number

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """transformers' splits inputs of one sequence a row; here `sequence_parallel.over` does it."""
        return nullcontext, inputs

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._leave_out_repeats(batch_samples[-1])
        # The pairs of the whole step, and its chosen tokens: a negative log-likelihood is a mean over those.
        batches = [PairBatch(inputs) for inputs in batch_samples]
        pairs = sum(batch.pairs for batch in batches)
        tokens = sum(batch.chosen_tokens for batch in batches)
        of_the_step = self.accelerator.reduce(torch.tensor([pairs, tokens], device=device), reduction="sum")
        self._tokens_per_chosen = of_the_step[1] / of_the_step[0]
        return of_the_step[0] / self.ranks.copies

    def _leave_out_repeats(self, inputs: dict[str, Tensor]) -> None:
        """Takes out of an epoch's last batch, in place, the pairs that only fill it up.

        accelerate gives each process as many batches of one size, and fills the last ones with pairs from the start of
        the epoch, behind all others in the order of the processes. A process that is left with none keeps one for its
        forward and backward, which the others wait for; it counts nowhere.
        """
        accelerator, held = self.accelerator, PairBatch(inputs).pairs
        processes = self.ranks.readers
        if processes == 1 or not accelerator.gradient_state.end_of_dataloader or self.args.dataloader_drop_last:
            return
        if self.token_batches is not None:
            if accelerator.process_index >= processes - self.token_batches.repeated:
                keep_pairs(inputs, 0)
            return
        size = self.args.train_batch_size // (processes if accelerator.split_batches else 1)
        left = len(self.train_dataset) % (size * processes)  # not accelerate's remainder: a resume loses that
        if left == 0:
            return
        before = self.ranks.reader(accelerator.process_index) * (held if accelerator.dispatch_batches else size)
        own = max(0, min(left - before, held))
        keep_pairs(inputs, own)

    def _precompute(self) -> None:
        """Puts the reference's log-probs into the datasets and frees it."""

        def scored(dataset: DPODataset) -> DPODataset:
            return with_ref_log_probs(dataset, self.reference, self.accelerator, reference_batch_size(self.args))

        if self.is_deepspeed_enabled and not any_partitioned(self.model):  # its engine would do it, later
            self.model.to(self.args.device)
        self.train_dataset = each(self.train_dataset, scored)
        self.eval_dataset = each(self.eval_dataset, scored)
        self.reference = Precomputed(freed=True)

    def _pair_metrics(self, logratios: Sides, policy: Tensor, batch: PairBatch) -> Tensor:
        """(B, len(PAIR_METRICS)) from log ratios and the policy's log-probs: what the log shows the means of."""
        chosen, rejected = (self.args.beta * h.detach() for h in logratios)
        logps = batch.sides(aggregate_log_probs(policy, batch.mask, self.args.dpo_aggregate))
        means = batch.sides(aggregate_log_probs(policy, batch.mask, "mean"))
        values = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected, "logps/chosen": logps.chosen, "logps/rejected": logps.rejected,
            "logps/accuracies": means.chosen > means.rejected,
        }  # fmt: skip
        return torch.stack([values[name].float() for name in PAIR_METRICS], 1)

    def _count(self, batch: PairBatch, metrics: Tensor, output: dict[str, Tensor]) -> None:
        for name, total in zip(PAIR_METRICS, metrics.sum(0), strict=True):
            self._sums[name] += total
        self._sums["pairs"] += len(metrics)  # none of a batch that only keeps step with the other processes
        self._sums["batches"] += min(1, len(metrics))
        self._sums["tokens"] += batch.attention_mask.sum()
        if "aux_loss" in output:
            self._sums["aux_loss"] += output["aux_loss"].detach() * min(1, len(metrics))
        if "dropped_mass" in output and self.layout.answers_at_once is None:  # parts leave out nothing the first time
            self._sums["dropped_mass"] += output["dropped_mass"].sum() * min(1, len(metrics))
            self._sums["counted"] += batch.mask.sum() * min(1, len(metrics))

    def _reduce(self, totals: Tensor) -> list[float]:
        return self.accelerator.reduce(totals, reduction="sum").tolist()


def _attention(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)
