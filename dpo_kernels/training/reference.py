"""The reference that a policy is compared with, in its forms: where its log-probs come from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_kernels.training import adapters
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.config import DPOConfig
from dpo_kernels.training.engines import is_split_at_load
from dpo_kernels.training.head_check import first_difference
from dpo_kernels.training.layout_check import of_reference
from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.mlp_tiles import tile_mlps
from dpo_kernels.training.model import FusedHead
from dpo_kernels.training.output_head import HeadError
from dpo_kernels.training.partitioned import any_partitioned, by_module, own_part, runs_together, shape_of, whole
from dpo_kernels.training.processes import anywhere, check_head, find_mlps, from_main, is_partitioned, on_models
from dpo_kernels.training.sequence_parallel import Split, over


class Reference:
    """Log-probs of the reference for a batch: those that its dataset holds, or else what the form computes.

    Forms: `Precomputed` computes nothing, `FrozenModel` asks a second model, `OwnStart` the policy with its adapter
    off, or as it began. Another form defines `score` and, if that can be done beforehand, `identity`; `reference_for`
    chooses among them.
    """

    model: nn.Module | None = None  # a second model, where the form has one
    starts_equal = False  # to the bit: policy and reference at the first step
    split: Split | None = None  # of rows over processes, the policy's
    runs_together = False  # whether `score` is for all processes at once: each has a part of the weights

    @torch.no_grad()
    def log_probs(self, batch: PairBatch, required: bool = True) -> Tensor | None:
        """(2B, S); None: there are none, and they are not required."""
        return self.score(batch, required) if batch.ref_log_probs is None else batch.ref_log_probs

    def score(self, batch: PairBatch, required: bool) -> Tensor | None:
        """`log_probs` of a batch that brings none; called without gradient."""
        raise NotImplementedError

    def identity(self) -> str | None:
        """Of everything that `score` computes from: the key under which its results are kept on disk. None: there is
        nothing to compute beforehand.

        Raises:
            ValueError: `score` cannot be asked for a share of a dataset; says why.
        """
        return None

    def check_dataset(self, name: str, dataset: Any, required: bool) -> None:
        """Before training: raises a ValueError for a dataset whose batches will have no log-probs."""

    def check_start(self, policy: nn.Module, batch: PairBatch, log_probs: Tensor, ref: Tensor, is_start: bool) -> None:
        """In training, for each batch that was scored: may refuse a policy that does not start as it should.

        Args:
            policy: what is trained, wrapped or not.
            log_probs: its log-probs of the batch, (2B, S), detached.
            ref: what `score` gave.
            is_start: whether no step has been taken.
        """

    def set_layout(self, layout: Layout) -> None:
        """Scores in another layout from now on, the policy's."""

    def moving(self) -> dict[str, Tensor]:
        """What `follow` changes, by name: the tensors themselves, which a checkpoint has to hold.

        Raises:
            ValueError: this form cannot follow the policy; says why.
        """
        raise ValueError(
            "sync_ref_model wants a reference that is computed in each step, a second model or an adapter's"
        )

    def check_follow(self, policy: nn.Module) -> None:
        """
        Raises:
            ValueError: `follow` could not move this reference towards that policy; says why.
        """
        now = dict(policy.named_parameters())
        for name, tensor in self.moving().items():
            if name not in now or now[name].shape != tensor.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"sync_ref_model moves the reference towards the policy, which has no parameter {name} like the "
                    f"reference's, {tuple(tensor.shape)} {tensor.dtype}; give a reference of the policy's kind, or "
                    "none where the policy has an adapter"
                )

    @torch.no_grad()
    def follow(self, policy: nn.Module, share: float) -> None:
        """Moves the reference so far towards the policy: theta_ref <- share theta + (1 - share) theta_ref (TR-DPO,
        Gorbatovski et al. 2024, arXiv:2404.09656)."""
        now = dict(policy.named_parameters())
        for name, tensor in self.moving().items():
            tensor.lerp_(now[name].to(tensor.dtype), share)


class Precomputed(Reference):
    """What the datasets hold, and nothing more.

    Args:
        freed: there was a model, until its log-probs were in the datasets: then a dataset without them is a mistake,
            for whatever loss.
    """

    def __init__(self, freed: bool = False) -> None:
        self.freed = freed

    def score(self, batch: PairBatch, required: bool) -> Tensor | None:
        if required or self.freed:
            raise ValueError(
                "a dataset that holds no log-probs of the reference, and the reference is not there"
                + (" any more: precompute_ref_log_probs freed it. Give the dataset as eval_dataset when the trainer is "
                   "made, by name in a dict if there are several" if self.freed else "; give a ref_model")
            )  # fmt: skip
        return None

    def check_dataset(self, name: str, dataset: Any, required: bool) -> None:
        if (required or self.freed) and "ref_chosen" not in dataset[0]:
            raise ValueError(f"no ref_model, and {name} holds no log-probs of one; give a ref_model")


class FrozenModel(Reference):
    """A second model; it is frozen, and its head is fused and checked.

    Args:
        model: an `AutoModelForCausalLM`.
        policy: what is trained, before it is wrapped.
        layout: the policy's; the reference goes its way, so that equal weights give equal numbers.
        is_sharded: whether the run uses FSDP.

    Raises:
        HeadError: the model's log-probs would be computed wrong.
        TilingError: args.mlp_tiles, and no MLP of the model can be run in slices.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: nn.Module,
        accelerator: Accelerator,
        args: DPOConfig,
        layout: Layout,
        is_sharded: bool,
    ) -> None:
        self.in_parts = any_partitioned(model)
        self.accelerator, self.is_sharded = accelerator, is_sharded or self.in_parts
        self.runs_together = self.is_sharded or runs_together(model)
        is_exact = args.disable_dropout and not args.torch_compile  # else equal weights may give other numbers
        self.starts_equal = is_exact and self._starts_as(policy, model)
        self._fingerprint = ""  # is only needed to precompute; of the model before it is wrapped or sharded
        if args.precompute_ref_log_probs:
            self._fingerprint = on_models(accelerator, lambda: model_fingerprint(model), model)
        model.requires_grad_(False).eval()
        self.head = FusedHead(model, args.memory_budget_bytes, args.impl)
        check_head(accelerator, self.head, model, deterministic=False)  # it never trains
        if args.tiles is not None:
            tile_mlps(model, args.tiles, find_mlps(accelerator, model))
        self.layout = on_models(accelerator, lambda: of_reference(model, policy, layout), model)
        use_branches(model, self.layout.attention == "branches")
        self.model: nn.Module = self._prepared(model)

    def _starts_as(self, policy: nn.Module, model: nn.Module) -> bool:
        if runs_together(policy, model):
            return not anywhere(self.accelerator, not _same_weights(policy, model))
        return bool(from_main(self.accelerator, lambda: _same_weights(policy, model)))

    def _prepared(self, model: nn.Module) -> nn.Module:
        if self.in_parts:
            return _with_engine(model, self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if is_split_at_load(model):
            return model
        if not self.is_sharded:
            return model.to(self.accelerator.device)
        if self.accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, model)
        return self.accelerator.prepare_model(model)

    def score(self, batch: PairBatch, required: bool = True) -> Tensor:
        return self._run(self.model, batch)

    def set_layout(self, layout: Layout) -> None:
        self.layout = layout
        use_branches(self.model, layout.attention == "branches")

    def identity(self) -> str:
        if not self._fingerprint:
            raise ValueError("this reference was made without precompute_ref_log_probs, so its weights have no key")
        return f"{self._fingerprint} {self.accelerator.mixed_precision} {self.head.transform}{_of_layout(self.layout)}"

    def moving(self) -> dict[str, Tensor]:
        if self.is_sharded:
            raise ValueError(
                "sync_ref_model does not work with a second model under FSDP; train an adapter, or use DDP"
            )
        return {name: p.data for name, p in self.model.named_parameters()}

    def check_start(self, policy: nn.Module, batch: PairBatch, log_probs: Tensor, ref: Tensor, is_start: bool) -> None:
        """At the first batch: policy and reference have the same weights, so they give the same numbers, to the bit.

        Raises:
            HeadError: they do not, though each gives the same numbers twice; names the first module that differs.
        """
        looks, self.starts_equal = self.starts_equal and is_start, False
        # All processes look for the module together, or none.
        if not looks or not anywhere(self.accelerator, not torch.equal(log_probs, ref)):
            return
        with torch.no_grad(), self.accelerator.autocast():
            again = self._run(policy, batch)
            own = self.accelerator.unwrap_model(policy, keep_fp32_wrapper=True)
            found = (first_difference(own, self.model, given) for given in batch.lying(self.layout).model_inputs())
            name = "" if self.is_sharded else next(filter(None, found), "")
        difference = (log_probs - ref).abs().max().item()
        if anywhere(self.accelerator, torch.equal(again, log_probs) or not difference <= 1e-2):
            raise HeadError(
                "policy and reference have the same weights, and their log-probs of the first batch differ by up "
                f"to {difference:.2e}; the first module whose outputs differ is {name or 'the head'!r}. Something in "
                "it is random, or keeps what no checkpoint holds; nothing was trained"
            )

    def _run(self, model: nn.Module, batch: PairBatch) -> Tensor:
        with self.accelerator.autocast():
            return batch.lying(self.layout).run(over(model, self.split))["log_probs"]


class OwnStart(Reference):
    """The policy itself: with its adapter off, or, where it goes on with a trained adapter, with the adapter's values
    at the start, which are kept beside it. There is no second model.

    Args:
        policy: has an adapter; before it is wrapped.
        wrapped: gives the policy as it is wrapped at the time, for what is sharded.
        is_base: the reference is the model without adapter, whatever the adapter holds.

    Raises:
        ValueError: FSDP1 or ZeRO-3, which take parameters apart, with values to keep; FSDP with sync_ref_model.
    """

    def __init__(
        self,
        policy: nn.Module,
        accelerator: Accelerator,
        args: DPOConfig,
        layout: Layout,
        is_sharded: bool,
        wrapped: Callable[[], nn.Module],
        is_base: bool,
    ) -> None:
        self.policy, self.accelerator, self.layout = policy, accelerator, layout
        self.is_sharded, self.wrapped = is_sharded, wrapped
        self.runs_together = runs_together(policy)
        is_off = is_base or on_models(accelerator, lambda: adapters.changes_nothing(policy), policy)
        is_exact = args.disable_dropout and not args.torch_compile and not adapters.is_quantised(policy)
        self.starts_equal = is_exact and not is_base
        self._values: dict[str, Tensor] | None = None  # None: the adapter is off
        if not is_off or args.sync_ref_model:
            if is_base:
                raise ValueError("sync_ref_model moves a reference that starts as the policy does; here it is the base")
            if (is_sharded and not accelerator.is_fsdp2) or is_partitioned(accelerator):
                raise ValueError(
                    "the adapter's first values are kept beside it for a reference, which does not work where "
                    "parameters are taken apart (FSDP1, ZeRO-3); use FSDP2 (fsdp_version 2), or give the reference as "
                    "a second model (ref_model)"
                )
            if is_sharded and args.sync_ref_model:
                raise ValueError("sync_ref_model does not work with FSDP; use DDP")
            self._values = {name: p.detach().clone() for name, p in adapters.trained_parameters(policy).items()}
        self._fingerprint = ""
        if args.precompute_ref_log_probs:
            self._fingerprint = on_models(accelerator, self._hash, policy)

    def score(self, batch: PairBatch, required: bool = True) -> Tensor:
        modes = [module for module in self.policy.modules() if module.training]
        try:
            self.policy.eval()
            with self._as_it_was(), self.accelerator.autocast():
                model = self.wrapped() if self.is_sharded or is_partitioned(self.accelerator) else self.policy
                # Before training there is no engine that makes weights whole.
                with by_module(model) if model is self.policy else nullcontext():
                    return batch.lying(self.layout).run(over(model, self.split))["log_probs"]
        finally:
            for module in modes:
                module.training = True

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        if self._values is None:
            with adapters.switched_off(self.policy):
                yield
            return
        own = list(adapters.trained_parameters(self.policy).values())
        first = self._values.values() if self.is_sharded else self.moving().values()
        now = [p.detach().clone() for p in own]
        self._take(first, own)
        try:
            yield
        finally:
            self._take(now, own)

    def _take(self, values: Iterable[Tensor], own: Iterable[Tensor]) -> None:
        _copy(values, own)
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):  # what it has gathered is of the values before
                module.reshard()

    def set_layout(self, layout: Layout) -> None:
        self.layout = layout

    def moving(self) -> dict[str, Tensor]:
        if self._values is None:
            return super().moving()
        for name, p in adapters.trained_parameters(self.policy).items():
            self._values[name] = self._values[name].to(p.device)
        return self._values

    def check_start(self, policy: nn.Module, batch: PairBatch, log_probs: Tensor, ref: Tensor, is_start: bool) -> None:
        """
        Raises:
            HeadError: the policy does not start as its own reference.
        """
        looks, self.starts_equal = self.starts_equal and is_start, False
        if not looks or not anywhere(self.accelerator, not torch.equal(log_probs, ref)):
            return
        with torch.no_grad(), self.accelerator.autocast():
            again = batch.lying(self.layout).run(over(policy, self.split))["log_probs"]
        difference = (log_probs - ref).abs().max().item()
        if anywhere(self.accelerator, torch.equal(again, log_probs) or not difference <= 1e-2):
            raise HeadError(
                "the policy starts from its own reference, and their log-probs of the first batch differ by up to "
                f"{difference:.2e}: something in the adapter is random, or computes otherwise where it is off; nothing "
                "was trained"
            )

    def identity(self) -> str:
        if self.is_sharded:
            raise ValueError(
                "precompute_ref_log_probs: the reference is the policy with its adapter off, which FSDP shards when "
                "training begins; leave it off, or give the reference as a second model (ref_model)"
            )
        return f"{self._fingerprint} {self.accelerator.mixed_precision}{_of_layout(self.layout)}"

    def _hash(self) -> str:
        trained = adapters.trained_parameters(self.policy)
        frozen: list[tuple[str, Any]] = [(name, p) for name, p in self.policy.named_parameters() if name not in trained]
        state = ((name, p.quant_state.absmax) for name, p in frozen if hasattr(p, "quant_state"))
        policy: Any = self.policy
        kinds = {name: str(config) for name, config in policy.peft_config.items()} if self._values else {}
        return model_fingerprint(self.policy, [*frozen, *state, *(self._values or {}).items()]) + json.dumps(kinds)


def reference_for(
    ref_model: nn.Module | None,
    policy: nn.Module,
    accelerator: Accelerator,
    args: DPOConfig,
    layout: Layout,
    is_sharded: bool,
    wrapped: Callable[[], nn.Module],
) -> Reference:
    """The form that a run asks for; arguments as in `FrozenModel` and `OwnStart`."""
    if args.adapter_reference == "base" and (ref_model is not None or not adapters.is_adapted(policy)):
        raise ValueError("adapter_reference is 'base', and there is another reference, or no adapter; leave it out")
    if ref_model is not None:
        return FrozenModel(ref_model, policy, accelerator, args, layout, is_sharded)
    if args.loss_options.needs_reference and adapters.is_adapted(policy):
        is_base = args.adapter_reference == "base"
        return OwnStart(policy, accelerator, args, layout, is_sharded, wrapped, is_base)
    return Precomputed()


def _of_layout(layout: Layout) -> str:
    """Of what rounding depends on, in the key of log-probs."""
    parts = "" if layout.answers_at_once is None else f" {layout.answers_at_once} at once"
    way = f" {layout.attention}" if layout.attention in ("mask", "cache") else ""
    return ("" if layout.name == "padded" else f" {layout.name}{way}") + parts


def _copy(values: Iterable[Tensor], to: Iterable[Tensor]) -> None:
    """values: whole ones, also where the parameters are shards."""
    for value, p in zip(values, to, strict=True):
        if isinstance(p, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
        p.detach().copy_(value)


def model_fingerprint(model: nn.Module, parameters: Iterable[tuple[str, Tensor]] | None = None) -> str:
    """Of everything that a model computes from: class, config, parameters (all, or these) and buffers."""
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    facts = [type(model).__name__, None if config is None else config.to_json_string(use_diff=False), attention]
    digest = hashlib.sha256(json.dumps(facts).encode())
    parameters = model.named_parameters() if parameters is None else parameters
    for name, tensor in (*parameters, *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {shape_of(tensor)}".encode())
        with whole([tensor]):
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _same_weights(model: nn.Module, other: nn.Module) -> bool:
    if type(model) is not type(other):
        return False
    pairs = zip(model.parameters(), other.parameters(), strict=False)
    return all(shape_of(a) == shape_of(b) and torch.equal(own_part(a), own_part(b).to(a.device)) for a, b in pairs)


def _with_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """A model in parts, that DeepSpeed makes whole as it runs; it is not trained."""
    import deepspeed

    zero = {name: value for name, value in config["zero_optimization"].items() if name != "offload_optimizer"}
    zero = {name: value for name, value in zero.items() if value != "auto"}
    kinds: dict[str, Any] = {name: config[name] for name in ("bf16", "fp16", "wall_clock_breakdown") if name in config}
    own: dict[str, Any] = {"zero_optimization": copy.deepcopy(zero), "train_micro_batch_size_per_gpu": 1, **kinds}
    engine: nn.Module = deepspeed.initialize(model=model, config=own)[0]
    engine.eval()
    return engine
