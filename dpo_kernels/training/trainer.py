"""DPO on `transformers.Trainer`: frozen reference, fused head, exact gradient accumulation, whole checkpoints."""

from __future__ import annotations

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dpo_kernels import checks
from dpo_kernels.losses import aggregate_log_probs, make_pairs
from dpo_kernels.preference_losses import LossOptions, Sides, pair_losses
from dpo_kernels.training import checkpoints
from dpo_kernels.training.callbacks import Progress, RunLog, StopOnNonFinite, StopOnSigterm
from dpo_kernels.training.data import PairCollator, attention_mask
from dpo_kernels.training.model import FusedHead, HeadError, disable_dropout, router_aux_loss_coef
from dpo_kernels.training.precompute import model_fingerprint, with_ref_log_probs

PAIR_METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip


# Options of TrainingArguments that would be ignored or misunderstood, and the values that they may have.
RESTRICTED: dict[str, tuple[Any, ...]] = {
    "label_smoothing_factor": (0.0,),
    "batch_eval_metrics": (False,),
    "train_sampling_strategy": ("random", "sequential"),
    "use_liger_kernel": (False,),
    "remove_unused_columns": (False,),
    "neftune_noise_alpha": (None,),
}


@dataclass
class DPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what DPO adds. Names and defaults follow TRL's where it has the option."""

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave it off: a non-finite loss is an error."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it off: the columns are the pairs."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"nargs": "?", "const": "latest", "help": "A checkpoint folder; alone: the latest of output_dir."},
    )
    beta: float = field(default=0.1, metadata={"help": "How strongly the policy is held to the reference, >= 0."})
    dpo_aggregate: Literal["sum", "mean"] = field(default="sum", metadata={"help": "Over the tokens of an answer."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Names from dpo_kernels.preference_losses.LOSSES; of several the weighted sum."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One number per loss_type; default: 1 each."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "The share of preferences that may be flipped, in [0, 1)."}
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": "reverse_kl, forward_kl, js_divergence or alpha_divergence."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "alpha of alpha_divergence."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "LD-DPO: weight of the tokens beyond the shorter answer's length, in [0, 1]."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "WPO: a pair weighs as much as it is likely under the policy."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop, > 0."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of simpo, >= 0."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of cpo's negative log-likelihood, >= 0."})
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the load-balancing loss of a mixture of experts; default: the model's."},
    )
    memory_budget: str | None = field(
        default=None, metadata={"help": "What the head may hold, such as 512MiB; default: 1GiB or more (see plan)."}
    )
    impl: str | None = field(
        default=None, metadata={"help": "triton, cpp or torch; default: the fastest that can run."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "One pass of the reference before training, cached on disk; then it is freed."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "In the policy; the reference never has any."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory_budget_bytes = parse_bytes(self.memory_budget)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        names = {f.name: "dpo_aggregate" if f.name == "aggregate" else f.name for f in fields(LossOptions)}
        self.loss_options = checks.loss_options(LossOptions(**{to: getattr(self, own) for to, own in names.items()}))
        for name, allowed in RESTRICTED.items():
            if (value := getattr(self, name, allowed[0])) not in allowed:
                raise ValueError(f"{name} is {value!r}; with DPO it can be {' or '.join(map(repr, allowed))} only")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        if self.n_gpu > 1:
            warnings.warn(
                f"{self.n_gpu} GPUs are visible and one is used: to use them all, run "
                f"torchrun --nproc_per_node {self.n_gpu} train.py ...",
                stacklevel=2,
            )
            self._n_gpu = 1  # nn.DataParallel would share one head among its threads


def parse_bytes(text: str | int | None) -> int | None:
    """512MiB, 1.5 GiB, 64MB or a plain number of bytes; None stays None.

    Raises:
        ValueError: not a size.
    """
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory_budget is {text!r}; expected a size such as 512MiB, 2GiB or 500000000")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


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
        if args.disable_dropout:
            disable_dropout(model)
        self.head = FusedHead(model, args.memory_budget_bytes, args.impl, with_log_sum_sq_probs=args.use_weighting)
        super().__init__(
            model=model, args=args, data_collator=PairCollator(), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks,
            compute_metrics=_mean_metrics,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # num_items_in_batch is used
        coef = args.router_aux_loss_coef
        self.router_aux_loss_coef = router_aux_loss_coef(model) or 0.0 if coef is None else coef
        if args.router_aux_loss_coef and router_aux_loss_coef(model) is None:
            raise ValueError(
                f"router_aux_loss_coef is {args.router_aux_loss_coef}, but {type(model).__name__} has no experts"
            )
        self._check_head(self.head, model)
        if args.precompute_ref_log_probs and ref_model is not None:
            fingerprint = self._from_main(lambda: model_fingerprint(ref_model))  # before it is wrapped or sharded
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
                None if d is None else with_ref_log_probs(d, self._reference_log_probs, fingerprint, self)
                for d in (self.train_dataset, self.eval_dataset)
            )
            self.ref_model = None
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if not args.loss_options.needs_reference or self.ref_model is not None or dataset is None:
                continue
            if "ref_chosen" not in dataset[0]:
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
        pairs = len(inputs["x_chosen"])
        mask = _both(inputs, "mask")
        output = self._forward(model, inputs, output_router_logits=self.router_aux_loss_coef > 0)
        policy, has_reference = output["log_probs"], self.ref_model is not None or "ref_chosen" in inputs
        ref = self._reference_log_probs(inputs) if has_reference else None  # some losses can do without
        options = self.args.loss_options
        of_the_step = self._tokens_per_chosen if num_items_in_batch is not None else None
        made = make_pairs(ref, policy, mask, options, output.get("log_sum_sq_probs"), of_the_step)
        losses = pair_losses(made, options)
        if "aux_loss" in output:
            losses = losses + self.router_aux_loss_coef * output["aux_loss"]
        loss = losses.mean()
        metrics = self._pair_metrics(made.logratios, policy.detach(), mask)
        if model.training:
            self._count(inputs, metrics, output.get("aux_loss"))
        if num_items_in_batch is not None:  # the pairs of the whole step, on all processes
            # Gradients are averaged over processes, so that each multiplies its share by their number.
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        if model.training:
            self.step_loss += loss.detach()
        return (loss, torch.cat([losses.detach()[:, None], metrics], 1)) if return_outputs else loss

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
            return super().save_model(output_dir, _internal_call=True)
        target = Path(output_dir or str(self.args.output_dir))
        staged = checkpoints.staging(target) / "model"
        super().save_model(str(staged), _internal_call=True)
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
        # The pairs of the whole step, and its chosen tokens: a negative log-likelihood is a mean over those.
        pairs = sum(len(batch["x_chosen"]) for batch in batch_samples)
        tokens = sum(int(batch["mask_chosen"].count_nonzero()) for batch in batch_samples)
        of_the_step = self.accelerator.reduce(torch.tensor([pairs, tokens], device=device), reduction="sum")
        self._tokens_per_chosen = of_the_step[1] / of_the_step[0]
        return of_the_step[0]

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        options = {name: value for name, value in options.items() if value}
        return model(
            input_ids=_both(inputs, "x"), attention_mask=attention_mask(_both(inputs, "mask")),
            labels=_both(inputs, "y"), **options,
        )  # fmt: skip

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
        self._sums["pairs"] += len(metrics)
        self._sums["batches"] += 1
        self._sums["tokens"] += attention_mask(_both(inputs, "mask")).sum()
        if aux_loss is not None:
            self._sums["aux_loss"] += aux_loss.detach()

    def _reduce(self, totals: Tensor) -> list[float]:
        return self.accelerator.reduce(totals, reduction="sum").tolist()

    def _freeze(self, ref_model: nn.Module) -> nn.Module:
        ref_model.requires_grad_(False).eval()
        self.ref_head = FusedHead(ref_model, self.args.memory_budget_bytes, self.args.impl)
        self._check_head(self.ref_head, ref_model)
        if not self.is_fsdp_enabled:
            return ref_model.to(self.args.device)
        if self.accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, ref_model)
        return self.accelerator.prepare_model(ref_model)

    def _check_head(self, head: FusedHead, model: nn.Module) -> None:
        """On the main process, which may be the only one that has loaded the weights; the others take its word."""

        def check() -> Any:
            head.check(model)
            return head.transform

        head.transform = self._from_main(check)

    def _from_main(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on the main process, on all of them; a HeadError too."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [compute()]
            except HeadError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], HeadError):
            raise outcome[0]
        return outcome[0]


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
