"""The options of a run: `transformers.TrainingArguments` and what DPO adds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from dpo_kernels import checks
from dpo_kernels.losses import LossOptions, check_options
from dpo_kernels.training.engines import check_asked, read_parallelism
from dpo_kernels.training.mlp_tiles import Tiles, check_tiles
from dpo_kernels.units import parse_bytes
from dpo_kernels.warn import warn

# Options of TrainingArguments that would be ignored or misunderstood: the values that they may have, and why.
RESTRICTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), "it smooths labels over a vocabulary; the share of flipped preferences is "
                               "--label_smoothing"),
    "batch_eval_metrics": ((False,), "the figures of an evaluation are means over all its pairs"),
    "train_sampling_strategy": (("random", "sequential"), "pairs have no one length to group by; --tokens_per_batch "
                                "fills batches by tokens"),
    "use_liger_kernel": ((False,), "the head is fused here already"),
    "remove_unused_columns": ((False,), "the columns are the pairs"),
    "neftune_noise_alpha": ((None,), "noise in the policy alone would change what it is compared with"),
}  # fmt: skip
# What a step in parts (answers_at_once) cannot go with, and why.
WITH_ANSWERS_AT_ONCE = {
    "torch_compile": "a compiled model would be compiled again for the lengths of each part",
    "ddp_static_graph": "each part is a graph of its own",
}
# What tokens_per_batch takes the place of, or cannot go with, and the values that are no wish.
WITH_TOKENS_PER_BATCH: dict[str, tuple[Any, ...]] = {
    "per_device_train_batch_size": (8,), "dataloader_drop_last": (False,), "auto_find_batch_size": (False,),
    "split_batches": (False,), "dispatch_batches": (None, False),
}  # fmt: skip


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
    allow_changed_data: bool = field(
        default=False, metadata={"help": "Resume with other pairs than those that the checkpoint was trained on."}
    )
    beta: float = field(default=0.1, metadata={"help": "How strongly the policy is held to the reference, >= 0."})
    dpo_aggregate: Literal["sum", "mean"] = field(default="sum", metadata={"help": "Over the tokens of an answer."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Names from dpo_kernels.losses.LOSSES; of several the weighted sum."},
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
    gradient_filter: float | None = field(
        default=None,
        metadata={
            "help": "A probability, such as 0.000244: what is below may be left out of gradients; exact without."
        },
    )
    memory_budget: str | None = field(
        default=None, metadata={"help": "What the head may hold, such as 512MiB; default: 1GiB or more (see plan)."}
    )
    run_memory_budget: str | None = field(
        default=None, metadata={"help": "What the whole run may hold, such as 20GiB; default: what there is."}
    )
    impl: str | None = field(
        default=None, metadata={"help": "triton, cpp or torch; default: the fastest that can run."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "One pass of the reference before training, cached on disk; then it is freed."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs at once in that pass; default: per_device_eval_batch_size."}
    )
    adapter_reference: Literal["start", "base"] = field(
        default="start",
        metadata={"help": "An adapter's reference, where none is given: what it starts as, or the model without it."},
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "TR-DPO: the reference moves towards the policy now and then."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "How far: the policy's share in the new reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "After so many steps each time."})
    layout: Literal["auto", "padded", "bucketed", "packed", "shared"] = field(
        default="auto",
        metadata={"help": "How pairs lie in rows: auto takes the fewest tokens that the model passes a check with."},
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Rows of so many tokens or a multiple; rows are padded then."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Instead of per_device_train_batch_size: as many pairs as fill so many tokens, padding too."},
    )
    answers_at_once: int | None = field(
        default=None,
        metadata={
            "help": "A batch goes in parts of so many answers: the same gradients, less memory, one forward more."
        },
    )
    mlp_tiles: str | None = field(
        default=None,
        metadata={
            "help": "MLPs over so many slices of the tokens, each computed again in backward; auto: by its width."
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "What backward needs of the policy's forward waits in host memory."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "In the policy; the reference never has any."})
    tp_size: int = field(
        default=1,
        metadata={"help": "Tensor parallel: so many processes share each layer; more shard it by FSDP2 besides."},
    )
    parallelism_config: dict | str | None = field(  # made accelerate's own
        default=None,
        metadata={"help": 'accelerate\'s sizes of a mesh, as JSON: \'{"cp_size": 2, "dp_shard_size": 2}\'.'},
    )

    def __post_init__(self) -> None:
        parallelism: Any = read_parallelism(self.parallelism_config)
        self.parallelism_config = parallelism
        super().__post_init__()
        check_asked(self)
        self.memory_budget_bytes = parse_bytes(self.memory_budget)
        parse_bytes(self.run_memory_budget, "run_memory_budget")
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        names = {f.name: "dpo_aggregate" if f.name == "aggregate" else f.name for f in fields(LossOptions)}
        self.loss_options = check_options(LossOptions(**{to: getattr(self, own) for to, own in names.items()}))
        for name, (allowed, reason) in RESTRICTED.items():
            if (value := getattr(self, name, allowed[0])) not in allowed:
                known = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} is {value!r}; with DPO it can be {known} only: {reason}")
        if self.tp_size < 1:
            raise ValueError(f"tp_size is {self.tp_size}; expected at least 1")
        checks.gradient_filter(self.gradient_filter, (), False)
        if self.gradient_filter and self.tp_size > 1:
            raise ValueError("gradient_filter does not go with tp_size, which splits the vocabulary; leave one out")
        self._check_sync()
        self._check_padding()
        if self.tokens_per_batch is not None:
            self._check_tokens_per_batch()
        if self.answers_at_once is not None:
            self._check_answers_at_once(self.answers_at_once)
        self._check_tiles()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        if self.n_gpu > 1:
            warn(
                f"{self.n_gpu} GPUs are visible and one is used: to use them all, run "
                f"torchrun --nproc_per_node {self.n_gpu} train.py ..."
            )
            self._n_gpu = 1  # nn.DataParallel would share one head among its threads

    @property
    def tiles(self) -> Tiles | None:
        """`mlp_tiles` as a number or "auto"; None: MLPs run whole."""
        return None if self.mlp_tiles is None else check_tiles(self.mlp_tiles)

    def set_memory(self, **options: Any) -> None:
        """Sets options that lower a step's memory, by their names.

        Raises:
            ValueError: they do not go with the others.
        """
        for name, value in options.items():
            setattr(self, name, value)
            if name == "gradient_checkpointing" and hasattr(self, "activation_checkpointing"):
                self.activation_checkpointing = value  # its name since transformers 5.24, which the trainer goes by
        self.memory_budget_bytes = parse_bytes(self.memory_budget)
        self._check_tiles()
        self._check_sync()
        self._check_padding()
        if self.answers_at_once is not None:
            self._check_answers_at_once(self.answers_at_once)

    def _check_tiles(self) -> None:
        if self.tiles is not None and self.torch_compile:
            raise ValueError(
                "mlp_tiles does not go with torch_compile, which would compile anew for each size of slice"
            )

    def _check_padding(self) -> None:
        for name in ("pad_to_multiple_of", "precompute_ref_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise ValueError("precompute_ref_batch_size does nothing without precompute_ref_log_probs")
        if self.pad_to_multiple_of is not None:
            if self.layout not in ("auto", "padded") or self.tokens_per_batch is not None:
                raise ValueError(
                    f"pad_to_multiple_of is {self.pad_to_multiple_of}, which is of padded rows, and layout is "
                    f"{self.layout!r}; leave out layout and tokens_per_batch, or pad_to_multiple_of"
                )
            self.layout = "padded"

    def _check_sync(self) -> None:
        if not self.sync_ref_model:
            for name, usual in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512)):
                if (value := getattr(self, name)) != usual:
                    raise ValueError(f"{name} is {value}, which does nothing without sync_ref_model")
            return
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha}; expected a share in (0, 1]")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps is {self.ref_model_sync_steps}; expected at least 1")
        if self.precompute_ref_log_probs or not self.loss_options.needs_reference:
            raise ValueError(
                "sync_ref_model moves a reference that is computed in each step; leave out precompute_ref_log_probs, "
                "and give a loss that has a reference"
            )

    def _check_tokens_per_batch(self) -> None:
        if (tokens := self.tokens_per_batch or 0) < 1:
            raise ValueError(f"tokens_per_batch is {tokens}; expected a positive number of tokens, as in 8192")
        for name, allowed in WITH_TOKENS_PER_BATCH.items():
            value = getattr(self if hasattr(self, name) else self.accelerator_config, name)
            if value not in allowed:
                raise ValueError(
                    f"tokens_per_batch does not go with {name}={value!r}: a batch has as many pairs as fill so many "
                    "tokens, each pair is in one of them, and each process reads its own"
                )

    def _check_answers_at_once(self, answers: int) -> None:
        if answers < 1:
            raise ValueError(f"answers_at_once is {answers}; expected at least 1")
        if answers == 1 and self.layout in ("packed", "shared"):
            raise ValueError(
                f"answers_at_once is 1, and layout {self.layout!r} keeps both answers of a pair together; give at "
                "least 2, or layout 'bucketed', which goes answer by answer"
            )
        for name, reason in WITH_ANSWERS_AT_ONCE.items():
            if getattr(self, name, None):
                raise ValueError(f"answers_at_once does not go with {name}: {reason}")
