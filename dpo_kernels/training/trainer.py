"""DPO on `transformers.Trainer`: frozen reference, fused head, exact gradient accumulation, whole checkpoints."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from dpo_kernels.losses import Sides, aggregate_log_probs, make_pairs, pair_losses
from dpo_kernels.training import aux_loss, checkpoints
from dpo_kernels.training.callbacks import Progress, RunLog, StopOnNonFinite, StopOnSigterm, anywhere
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.data import IGNORE_INDEX, DPODataset, PairCollator, attention_mask
from dpo_kernels.training.head_check import first_difference
from dpo_kernels.training.loading import check_positions, is_of_its_own_kind
from dpo_kernels.training.model import FusedHead, HeadError
from dpo_kernels.training.precompute import model_fingerprint, with_ref_log_probs
from dpo_kernels.training.randomness import Silenced, disable_dropout

PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip
UNCOUNTED = "uncounted"  # in a batch: its pair is there for a process that has nothing left to do


class DPOTrainer(Trainer):
    """Trains a causal language model on preference pairs.

    Each step: x = cat(x_chosen, x_rejected) through policy and reference, `dpo_loss` of their log-probs, plus the
    model's load-balancing loss where it has one. With several processes or gradient accumulation the loss is the mean
    over all pairs of the step, as if they had been one batch; negative log-likelihoods (sft, cpo, orpo) are the mean
    over all its chosen tokens. (What is no mean over pairs, the load-balancing loss, aot and aot_unpaired, is averaged
    over the parts.)

    Args:
        model: policy, an `AutoModelForCausalLM`.
        ref_model: the reference, frozen here; not needed if the datasets hold its log-probs already, or if the loss
            has none (`LossOptions.needs_reference`).
        args: `DPOConfig`.
        train_dataset, eval_dataset: `DPODataset`, or any dataset whose items have the same tensors.
        processing_class: the tokenizer, saved beside the model.
        callbacks: as in `transformers.Trainer`.

    Raises:
        HeadError: a fused head would compute a model's log-probs wrong; found by a check at start.
        ValueError: no reference is given, or an option is out of range.
    """

    args: DPOConfig
    model: nn.Module
    train_dataset: Any  # DPODataset or alike
    eval_dataset: Any
    _staged_in: str | None = None
    _reference_freed: bool = False  # since the datasets hold its log-probs
    _tokens_per_chosen: Tensor | None = None  # the mean length of the chosen answers of the step that is running
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
    ) -> None:
        if model is ref_model:
            raise ValueError("model and ref_model are one object; the reference must stay what it is: load it twice")
        self._silenced = disable_dropout(model) if args.disable_dropout else Silenced()
        for name, dataset in _named(train_dataset=train_dataset, eval_dataset=eval_dataset):
            _check_dataset(name, dataset, model)
        self.head = FusedHead(model, args.memory_budget_bytes, args.impl, with_log_sum_sq_probs=args.use_weighting)
        super().__init__(
            model=model, args=args, data_collator=PairCollator(), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
            compute_metrics=_mean_metrics,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # num_items_in_batch is used
        self._check_head(self.head, model, args.disable_dropout)
        self.aux_loss = self._from_main(lambda: aux_loss.decide(model, args.router_aux_loss_coef))
        self._starts_equal = args.disable_dropout and self._from_main(lambda: _same_weights(model, ref_model))
        if args.precompute_ref_log_probs and ref_model is not None:
            fingerprint = self._from_main(lambda: model_fingerprint(ref_model))  # before it is wrapped or sharded
        # What follows the last token that counts changes nothing before it, so no mask is needed, and one with zeros
        # keeps attention from its causal path. A load-balancing loss of transformers' is over real tokens; flash
        # attention leaves padding out by it. The reference goes the policy's way, so that both give the same numbers.
        balances = self.aux_loss.weight > 0 and not is_of_its_own_kind(model)
        self._gives_mask = balances or "flash" in str(_attention(model))
        self.ref_model = None if ref_model is None else self._freeze(ref_model)
        self.step_loss = torch.zeros((), device=args.device)  # of the step that is running
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Progress())
        self._sigterm = StopOnSigterm(self)
        for callback in (RunLog(), self._sigterm, StopOnNonFinite(self)):
            self.add_callback(callback)
        if args.precompute_ref_log_probs and self.ref_model is not None:
            self.train_dataset, self.eval_dataset = (
                _each(d, lambda one: with_ref_log_probs(one, self._reference_log_probs, fingerprint, self))
                for d in (self.train_dataset, self.eval_dataset)
            )
            self.ref_model, self._reference_freed = None, True
        for name, dataset in self._datasets():
            if self._needs_reference and self.ref_model is None and "ref_chosen" not in dataset[0]:
                raise ValueError(f"no ref_model, and {name} holds no log-probs of one; give a ref_model")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # An evaluation before training marks the model as prepared, and accelerate would then train it without DDP,
        # each process on its own (transformers 5.24, accelerate 1.15).
        if self.model is self.model_wrapped:
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        with self._sigterm.listening():
            return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self._sums:  # the first since the last log
            self._steps_began = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The DPO loss of a batch; with return_outputs also the loss and `PAIR_METRICS` of each pair, (B, 8)."""
        pairs = _count_pairs(inputs)
        mask = _both(inputs, "mask")
        has_reference = self.ref_model is not None or "ref_chosen" in inputs
        if self._needs_reference and not has_reference:
            raise ValueError(
                "a dataset that holds no log-probs of the reference, and the reference is not there"
                + (" any more: precompute_ref_log_probs freed it. Give the dataset as eval_dataset when the trainer is "
                   "made, by name in a dict if there are several" if self._reference_freed else "; give a ref_model")
            )  # fmt: skip
        output = self._forward(model, inputs, output_router_logits=self.aux_loss.weight > 0)
        policy = output["log_probs"]
        ref = self._reference_log_probs(inputs) if has_reference else None  # some losses can do without
        if self._starts_equal and model.training and "ref_chosen" not in inputs:
            self._check_equal_start(model, inputs, policy.detach(), ref)
        options = self.args.loss_options
        of_the_step = self._tokens_per_chosen if num_items_in_batch is not None else None
        made = make_pairs(ref, policy, mask, options, output.get("log_sum_sq_probs"), of_the_step)
        losses = pair_losses(made, options)
        if "aux_loss" in output:
            losses = losses + self.aux_loss.weight * output["aux_loss"]
        loss = losses.mean()
        metrics = self._pair_metrics(made.logratios, policy.detach(), mask)
        if model.training:
            self._count(inputs, metrics[:pairs], output.get("aux_loss"))
        if num_items_in_batch is not None:  # the pairs of the whole step, on all processes
            # Gradients are averaged over processes, so that each multiplies its share by their number.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        if model.training:
            self.step_loss += loss.detach()
        return (loss, torch.cat([losses.detach()[:, None], metrics], 1)) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        given = eval_dataset if not isinstance(eval_dataset, str) else None  # the name of one that was checked
        for name, dataset in _named(eval_dataset=given):
            _check_dataset(name, dataset, self.model)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), metrics, metrics.new_zeros(len(metrics))  # no labels, but Trainer wants some

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            totals = dict(zip(names, self._reduce(torch.stack([self._sums[n].float() for n in names])), strict=True))
            self._sums.clear()
            pairs, batches = totals.pop("pairs"), totals.pop("batches")
            logs["tokens_per_second"] = totals.pop("tokens") / (time.perf_counter() - self._steps_began)
            if "aux_loss" in totals:
                logs["aux_loss"] = totals.pop("aux_loss") / batches
            logs |= {name: totals[name] / pairs for name in PAIR_METRICS}
            logs["peak_memory_mib"] = _peak_memory_mib()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """6 flop a parameter and token, forward and backward (Kaplan et al. 2020, arXiv:2001.08361)."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(p.numel() for p in self.model.parameters())
        return 6 * self._parameters * 2 * inputs["x_chosen"].numel()

    @property
    def interrupted(self) -> bool:
        """Whether a SIGTERM ended training early; a checkpoint of the last step is then saved."""
        return self._sigterm.received

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Model and tokenizer to output_dir, each file whole or not at all."""
        if _internal_call:
            with self._silenced.as_they_were():
                return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or str(self.args.output_dir))
        staged = checkpoints.staging(target) / "model"
        self.save_model(str(staged), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish_files(staged, target)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

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
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staged_in, self.args.save_total_limit = None, limit
        if self.state.best_model_checkpoint is not None:
            self.state.best_model_checkpoint = str(target / Path(self.state.best_model_checkpoint).name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / name / "trainer_state.json"))
            checkpoints.publish(staged / name, target / name)
            checkpoints.rotate(target, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._leave_out_repeats(batch_samples[-1])
        # The pairs of the whole step, and its chosen tokens: a negative log-likelihood is a mean over those.
        pairs = sum(map(_count_pairs, batch_samples))
        tokens = sum(int(batch["mask_chosen"].count_nonzero()) for batch in batch_samples)
        of_the_step = self.accelerator.reduce(torch.tensor([pairs, tokens], device=device), reduction="sum")
        self._tokens_per_chosen = of_the_step[1] / of_the_step[0]
        return of_the_step[0]

    def _leave_out_repeats(self, batch: dict[str, Tensor]) -> None:
        """Takes out of an epoch's last batch, in place, the pairs that only fill it up.

        accelerate gives each process as many batches of one size, and fills the last ones with pairs from the start of
        the epoch, behind all others in the order of the processes. A process that is left with none keeps one for its
        forward and backward, which the others wait for; it counts nowhere.
        """
        accelerator, held = self.accelerator, len(batch["x_chosen"])
        processes = accelerator.num_processes
        if processes == 1 or not accelerator.gradient_state.end_of_dataloader or self.args.dataloader_drop_last:
            return
        size = self.args.train_batch_size // (processes if accelerator.split_batches else 1)
        left = len(self.train_dataset) % (size * processes)  # not accelerate's remainder: a resume loses that
        if left == 0:
            return
        own = max(0, min(left - accelerator.process_index * (held if accelerator.dispatch_batches else size), held))
        for name, tensor in batch.items():
            batch[name] = tensor[: max(own, 1)]
        if own == 0:
            for side in ("chosen", "rejected"):
                batch[f"mask_{side}"] = torch.zeros_like(batch[f"mask_{side}"])
                batch[f"y_{side}"] = torch.full_like(batch[f"y_{side}"], IGNORE_INDEX)
            batch[UNCOUNTED] = torch.ones(1)

    @property
    def _needs_reference(self) -> bool:
        return self.args.loss_options.needs_reference or self._reference_freed

    def _datasets(self) -> list[tuple[str, Any]]:
        return _named(train_dataset=self.train_dataset, eval_dataset=self.eval_dataset)

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        options = {name: value for name, value in options.items() if value}
        if self._gives_mask:
            options["attention_mask"] = attention_mask(_both(inputs, "mask"))
        return model(input_ids=_both(inputs, "x"), labels=_both(inputs, "y"), use_cache=False, **options)

    def _check_equal_start(
        self, model: nn.Module, inputs: dict[str, Tensor], policy: Tensor, ref: Tensor | None
    ) -> None:
        """At the first batch: policy and reference have the same weights, so they give the same numbers, to the bit.

        Raises:
            HeadError: they do not, though each gives the same numbers twice; names the first module that differs.
        """
        self._starts_equal = False
        if self.state.global_step > 0 or ref is None or self.ref_model is None or self.args.torch_compile:
            return
        if not anywhere(self, not torch.equal(policy, ref)):  # all processes look for it together, or none
            return
        with torch.no_grad(), self.accelerator.autocast():
            again = self._forward(model, inputs)["log_probs"]
            given = {"input_ids": _both(inputs, "x"), "labels": _both(inputs, "y")}
            if self._gives_mask:
                given["attention_mask"] = attention_mask(_both(inputs, "mask"))
            own = self.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
            name = "" if self.is_fsdp_enabled else first_difference(own, self.ref_model, given)
        difference = (policy - ref).abs().max().item()
        if anywhere(self, torch.equal(again, policy) or not difference <= 1e-2):
            raise HeadError(
                "policy and reference have the same weights, and their log-probs of the first batch differ by up "
                f"to {difference:.2e}; the first module whose outputs differ is {name or 'the head'!r}. Something in "
                "it is random, or keeps what no checkpoint holds; nothing was trained"
            )

    @torch.no_grad()
    def _reference_log_probs(self, inputs: dict[str, Tensor]) -> Tensor:
        if "ref_chosen" in inputs:
            return _both(inputs, "ref")
        assert self.ref_model is not None
        with self.accelerator.autocast():
            return self._forward(self.ref_model, inputs)["log_probs"]

    def _pair_metrics(self, logratios: Sides, policy: Tensor, mask: Tensor) -> Tensor:
        """(B, len(PAIR_METRICS)) from log ratios and the policy's log-probs: what the log shows the means of."""
        aggregate = self.args.dpo_aggregate
        chosen, rejected = (self.args.beta * h.detach() for h in logratios)
        logps_chosen, logps_rejected = aggregate_log_probs(policy, mask, aggregate).chunk(2)
        mean_chosen, mean_rejected = aggregate_log_probs(policy, mask, "mean").chunk(2)
        values = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected, "logps/chosen": logps_chosen, "logps/rejected": logps_rejected,
            "logps/accuracies": mean_chosen > mean_rejected,
        }  # fmt: skip
        return torch.stack([values[name].float() for name in PAIR_METRICS], 1)

    def _count(self, inputs: dict[str, Tensor], metrics: Tensor, aux_loss: Tensor | None) -> None:
        for name, total in zip(PAIR_METRICS, metrics.sum(0), strict=True):
            self._sums[name] += total
        self._sums["pairs"] += len(metrics)  # none of a batch that only keeps step with the other processes
        self._sums["batches"] += min(1, len(metrics))
        self._sums["tokens"] += attention_mask(_both(inputs, "mask")).sum()
        if aux_loss is not None:
            self._sums["aux_loss"] += aux_loss.detach() * min(1, len(metrics))

    def _reduce(self, totals: Tensor) -> list[float]:
        return self.accelerator.reduce(totals, reduction="sum").tolist()

    def _freeze(self, ref_model: nn.Module) -> nn.Module:
        ref_model.requires_grad_(False).eval()
        self.ref_head = FusedHead(ref_model, self.args.memory_budget_bytes, self.args.impl)
        self._check_head(self.ref_head, ref_model, deterministic=False)  # it never trains
        if not self.is_fsdp_enabled:
            return ref_model.to(self.args.device)
        if self.accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, ref_model)
        return self.accelerator.prepare_model(ref_model)

    def _check_head(self, head: FusedHead, model: nn.Module, deterministic: bool = True) -> None:
        """On the main process, which may be the only one that has loaded the weights; the others take its word."""

        def check() -> Any:
            head.check(model, deterministic)
            return head.transform

        head.transform = self._from_main(check)

    def _from_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on the main process, on all of them; a ValueError (a HeadError is one) too."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [compute()]
            except ValueError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        return outcome[0]


def _same_weights(model: nn.Module, other: nn.Module | None) -> bool:
    if other is None or type(model) is not type(other):
        return False
    pairs = zip(model.parameters(), other.parameters(), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)


def _attention(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _count_pairs(inputs: dict[str, Tensor]) -> int:
    return 0 if UNCOUNTED in inputs else len(inputs["x_chosen"])


def _each(dataset: Any, change: Callable[[Any], Any]) -> Any:
    """The change of a dataset, of each in a dict of them, or of none."""
    if isinstance(dataset, dict):
        return {name: change(one) for name, one in dataset.items()}
    return None if dataset is None else change(dataset)


def _named(**given: Any) -> list[tuple[str, Any]]:
    """Every dataset that is given, by a name for messages; those in a dict one by one."""
    found = []
    for name, dataset in given.items():
        if isinstance(dataset, dict):
            found += [(f"{name}[{key!r}]", one) for key, one in dataset.items()]
        elif dataset is not None:
            found.append((name, dataset))
    return found


def _check_dataset(name: str, dataset: Any, model: nn.Module) -> None:
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


def _both(inputs: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([inputs[f"{name}_chosen"], inputs[f"{name}_rejected"]])


def _mean_metrics(prediction: EvalPrediction) -> dict[str, float]:
    means = np.asarray(prediction.predictions).mean(0)
    # The loss too is averaged here: over the pairs, without those that were repeated to fill the last batch.
    return {name: float(value) for name, value in zip(("loss", *PAIR_METRICS), means, strict=True)}


def _peak_memory_mib() -> float:
    """On a GPU the most that PyTorch had allocated, on a CPU the most that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
