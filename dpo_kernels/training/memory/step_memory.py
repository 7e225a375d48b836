"""The memory of a step, by what it is for, from a step with fake tensors: nothing is loaded, computed or held.

A fake tensor has a shape, a dtype and no numbers (PyTorch's `FakeTensorMode`). A whole step of the very code that
trains goes over them, the reference's pass, forward with the head, and backward, and `LiveBytes` counts what lives.
What no operator shows is added: weights, what the optimizer keeps, what the head's plan says, what libraries hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from dpo_kernels import ops, plan
from dpo_kernels.call import INPUTS, Options
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.overrides import override
from dpo_kernels.training.attention import rows_are_sequences, use_branches
from dpo_kernels.training.batch import IGNORE_INDEX, PairBatch
from dpo_kernels.training.layouts import Layout
from dpo_kernels.training.memory import checkpointing, device_memory, optimizers
from dpo_kernels.training.memory.live_bytes import ATTENTION, GRADIENTS, HOST, LiveBytes
from dpo_kernels.training.mlp_tiles import check_tiles, tile_mlps
from dpo_kernels.training.output_head import below_adapters, find_head

# What a step holds, in the order in which it is told.
WEIGHTS, ADAPTERS, REFERENCE, OPTIMIZER = "weights", "adapters", "reference", "optimizer"
KEPT, CHECKPOINTED = "activations kept for backward", "checkpointed inputs"
RUNNING, HEAD, BATCH, LIBRARIES = "the layer that runs", "head", "batch", "libraries"
ALLOCATOR = "gaps in the allocator's heaps"
PARTS = (
    WEIGHTS, ADAPTERS, REFERENCE, GRADIENTS, OPTIMIZER, CHECKPOINTED, KEPT, RUNNING, ATTENTION, HEAD, BATCH,
    ALLOCATOR, LIBRARIES,
)  # fmt: skip

# Of the head's plan: buffers that stay resident for the next call (`dpo_kernels.empty_cache`).
WAITS = ("kept probabilities", "d log_prob / d hidden", "tile and operands")
# Operators that PyTorch's counts of operations do not know, and such as cost the same.
LIKE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        torch.ops.aten._scaled_dot_product_flash_attention_backward,
}  # fmt: skip
# Attention -> where its keys are among its arguments: the values are behind them, the queries before.
KEYS = {
    torch.ops.aten._scaled_dot_product_efficient_attention: 1,
    torch.ops.aten._scaled_dot_product_flash_attention: 1,
    torch.ops.aten._scaled_dot_product_cudnn_attention: 1,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: 2,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward: 2,
}
ARCH = ("cuda", 9)  # what a plan for a GPU takes it for where there is none


# Of bytes in blocks that malloc takes from its heaps: gaps between them that nothing fits into (measured; the benchmark
# is benchmarks/run_memory.py).
GAPS = 0.1
NARROW = 64 * 2**20  # bytes that oneDNN holds besides where weights of 16 bits are multiplied (measured)
BUCKETED = Layout("bucketed")


class PlanError(ValueError):
    """The memory of a run cannot be told beforehand; says why."""


@dataclass(frozen=True)
class StepOptions:
    """What lowers the memory of a step and leaves its numbers what they are; names are those of `DPOConfig`.

    memory_budget: of the head, in bytes; None: its default. bucketed: answers lie in rows of their own, whatever the
    layout is without.
    """

    gradient_checkpointing: bool = False
    answers_at_once: int | None = None
    mlp_tiles: str | None = None
    activation_offloading: bool = False
    memory_budget: int | None = None
    precompute_ref_log_probs: bool = False
    bucketed: bool = False

    @classmethod
    def of(cls, args: Any) -> StepOptions:
        return cls(
            bool(args.gradient_checkpointing), args.answers_at_once, args.mlp_tiles, args.activation_offloading,
            args.memory_budget_bytes, args.precompute_ref_log_probs,
        )  # fmt: skip


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step at its peak.

    parts: by `PARTS`. host: bytes beside them in the memory of the host, of a run on a GPU.
    flops: of a step, by PyTorch's counter. tokens: that the policy's forward runs, padding too.
    """

    parts: Mapping[str, int]
    host: int
    flops: int
    tokens: int

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


@dataclass
class FakeRun:
    """The models of a run without their numbers, and what else decides what a step holds.

    policy, reference: fused models whose parameters are fake tensors of `mode`; reference None: there is no second one.
    scores: whether the reference's log-probs are computed in a step.
    optimizer: as `optimizers.name_of` has it.
    is_compact: whether the process is one after `device_memory.keep_compact`.
    can_tile, can_split, can_bucket, can_precompute: whether the policy's MLPs can run over slices, a step in parts, its
        answers each in a row, and the reference before training.
    quantised: bytes that the weights of linear layers take less than they seem to, and of the largest of them in full.
    """

    mode: FakeTensorMode
    policy: Any
    reference: Any
    layout: Layout
    scores: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mixed_precision: torch.dtype | None = None
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = False
    libraries: int = 0
    is_compact: bool = True
    can_tile: bool = True
    can_split: bool = True
    can_bucket: bool = True
    can_precompute: bool = True
    quantised: tuple[int, int] = (0, 0)

    def step(self, pairs: Mapping[str, Tensor], options: StepOptions) -> StepMemory:
        """The memory of a step of these pairs, real tensors as `PairCollator` makes them.

        Raises:
            PlanError: the model's forward depends on numbers, or fails without them; or what its optimizer keeps is not
                known.
            ValueError: the options do not go with the model or its layout.
        """
        layout = replace(BUCKETED if options.bucketed else self.layout, answers_at_once=options.answers_at_once)
        batch = PairBatch(pairs, layout)
        tokens, counted = batch.positions, _counted(batch)
        batch.mask.sum()  # made of numbers, so before there are none
        tracker = StepBytes(self, options, counted)
        with ExitStack() as stack:
            stack.enter_context(self._with(options))
            for entered in (self.mode, tracker):
                stack.enter_context(entered)
            handles = tracker.watch_gradients(self.policy)
            try:
                for _ in range(1 + self.accumulates):
                    self._run(batch, options, tracker)
            except ValueError:
                raise
            except Exception as error:  # a model's code may raise anything on tensors without numbers
                said = (str(error).splitlines() or [""])[0]
                raise PlanError(
                    f"the forward of {type(self.policy).__name__} cannot be gone through without numbers "
                    f"({type(error).__name__}: {said})"
                ) from error
            finally:
                for handle in handles:
                    handle.remove()
                for p in self.policy.parameters():
                    p.grad = None
        return StepMemory(self._parts(tracker, pairs, options), self._host(tracker), tracker.flops, tokens)

    def _run(self, batch: PairBatch, options: StepOptions, tracker: StepBytes) -> None:
        with self._autocast():
            if self.scores and not options.precompute_ref_log_probs:
                with torch.no_grad(), tracker.of_kind(RUNNING):
                    batch.run(self.policy if self.reference is None else self.reference)
            kept = CHECKPOINTED if options.gradient_checkpointing else KEPT
            with (
                tracker.of_kind(kept),
                to_host(tracker, self.policy) if options.activation_offloading else nullcontext(),
            ):
                log_probs = batch.run(self.policy)["log_probs"]
        with tracker.of_kind(RUNNING):
            (log_probs * batch.mask).sum().backward()

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.mixed_precision, enabled=self.mixed_precision is not None)

    @contextmanager
    def _with(self, options: StepOptions) -> Iterator[None]:
        """The models as a run with these options has them."""
        models = [m for m in (self.policy, self.reference) if m is not None]
        heads = [_fused(m) for m in models]
        budgets, tiled = [h.memory_budget for h in heads], []
        was = checkpointing.is_on(self.policy)
        try:
            for head in heads:
                head.memory_budget = options.memory_budget
            if options.mlp_tiles is not None:
                with self.mode:
                    tiled = [tile_mlps(m, check_tiles(options.mlp_tiles)) for m in models]
            if options.gradient_checkpointing and not was:
                checkpointing.switch(self.policy, True)
            self.policy.train()
            for model in models:  # where they can be, so that no mask is made which a real run does not make
                own = type(below_adapters(model))
                use_branches(model, getattr(own, "_can_set_attn_implementation", lambda: False)())
            with rows_are_sequences():
                yield
        finally:
            if options.gradient_checkpointing and not was:
                checkpointing.switch(self.policy, False)
            for one in tiled:
                one.undo()
            for head, budget in zip(heads, budgets, strict=True):
                head.memory_budget = budget

    def _parts(self, tracker: StepBytes, pairs: Mapping[str, Tensor], options: StepOptions) -> dict[str, int]:
        found = Counter({name: size for name, size in tracker.at_peak.items() if name in PARTS})
        others = tracker.peak - sum(found.values())
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        frozen = [t for t in (*self.policy.parameters(), *self.policy.buffers()) if not t.requires_grad]
        is_adapter = any(p.requires_grad for p in self.policy.parameters()) and _size(frozen) > _size(trained)
        found[ADAPTERS if is_adapter else WEIGHTS] += _size(trained)
        found[WEIGHTS] += _size(frozen) - self.quantised[0]
        if self.reference is not None and not options.precompute_ref_log_probs:
            found[REFERENCE] += _size([*self.reference.parameters(), *self.reference.buffers()]) - self.quantised[0]
        found[OPTIMIZER] += 0 if self._is_paged else self._optimizer_bytes()
        found[RUNNING] += self.quantised[1]
        found[BATCH] += sum(t.nbytes for t in pairs.values()) + others
        if self.device.type == "cpu":
            found[ALLOCATOR] += int(GAPS * tracker.small_at_peak)
            narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.policy.parameters())
            found[LIBRARIES] += NARROW * narrow
        found[LIBRARIES] += self.libraries
        return {name: found[name] for name in PARTS if found[name]}

    def _host(self, tracker: StepBytes) -> int:
        return tracker.most_on_host + (self._optimizer_bytes() if self._is_paged else 0)

    @property
    def _is_paged(self) -> bool:
        return optimizers.is_on_host(self.optimizer, self.device.type)

    def _optimizer_bytes(self) -> int:
        found = optimizers.kept_bytes(self.optimizer, self.policy)
        if found is None:
            known = ", ".join(sorted((*optimizers.KEPT, optimizers.FACTORED)))
            raise PlanError(f"what the optimizer {self.optimizer!r} keeps is not known here; known are {known}")
        return found


class StepBytes(LiveBytes):
    """`LiveBytes` that knows what the head holds, from its plan.

    Args:
        counted: labels of a call of the head -> how many of them count, at most.
    """

    def __init__(self, run: FakeRun, options: StepOptions, counted: Mapping[int, int]) -> None:
        super().__init__(device_memory.COMPACT if run.is_compact else device_memory.USUAL)
        self.run, self.options, self.counted = run, options, counted
        self.most_on_host = self.flops = 0
        self.held: list[int] = []  # bytes of calls whose backward is to come
        self.waiting: dict[str, int] = {}  # bytes that stay resident for the next call, one buffer of each name

    def after(self, func: Any, args: tuple[Any, ...], kwargs: Any, results: Any) -> tuple[Any, dict[str, int]]:
        """Results that count, and what the head holds beside them while it runs."""
        self.most_on_host = max(self.most_on_host, self.live[HOST])
        if func is torch.ops.dpo_kernels.token_stats.default:
            options = Options.decode(*args[ops.HEAD_TENSORS :])
            made = self._plan(args, options)
            if options.grads:
                self.held.append(made.bytes)
                if self.run.device.type == "cpu":
                    for name in WAITS:
                        self.waiting[name] = max(self.waiting.get(name, 0), made.memory.get(name, 0))
                self.live[HEAD] = max(self.waits, sum(self.held))
                return results[: ops.STATS], {}
            return results[: ops.STATS], {HEAD: made.bytes}  # takes none of what waits
        if func is torch.ops.dpo_kernels.token_stats_backward.default and self.held:
            self.look()
            self.held.pop()
            self.live[HEAD] = max(self.waits, sum(self.held))
            return results, {}
        if func.namespace != "dpo_kernels":
            self.flops += _flops(func._overloadpacket, args, kwargs, results)
        return results, {}

    @property
    def waits(self) -> int:
        return sum(self.waiting.values())

    def _plan(self, args: tuple[Any, ...], options: Options) -> Any:
        hidden, weight, _, low_rank = args[:4]
        labels = args[ops.HEAD_TENSORS - 1].numel()
        counted = self.counted.get(labels, labels)
        grads = [name for name, on in zip(INPUTS, options.grads.as_list(), strict=True) if on]
        with _arch(self.run.device):
            made = plan(
                counted, hidden.shape[-1], weight.shape[0], hidden.dtype, grads=grads, outputs=options.outputs,
                softcap=options.transform.softcap, compute_dtype=options.compute_dtype,
                memory_budget=options.memory_budget, device=self.run.device, impl=options.impl, labels=labels,
                rank=0 if low_rank is None else low_rank.shape[0], gradient_filter=options.gradient_filter,
            )  # fmt: skip
        self.flops += int(2 * made.gemms * counted * hidden.shape[-1] * weight.shape[0])
        return made


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Any, results: Any) -> int:
    """Of one operation, by PyTorch's formulas; 0 where it has none.

    Keys and values are counted once for each query's head: torch 2.10 refuses to count fewer.
    """
    packet = LIKE.get(packet, packet)
    count = flop_registry.get(packet)
    if count is None:
        return 0
    if (at := KEYS.get(packet)) is not None:
        batch, heads, *_ = args[at - 1].shape
        shared = [torch.Size((batch, heads, *given.shape[2:])) for given in args[at : at + 2]]
        args = (*args[:at], *shared, *args[at + 2 :])
    return int(count(*args, **kwargs, out_val=results))


def _counted(batch: PairBatch) -> dict[int, int]:
    """Labels of each call of the head -> how many of them count, at most."""
    found: dict[int, int] = {}
    for given in batch.model_inputs():
        labels = given["labels"]
        found[labels.numel()] = max(found.get(labels.numel(), 0), int((labels != IGNORE_INDEX).sum()))
    return found


@contextmanager
def to_host(tracker: LiveBytes, model: nn.Module) -> Iterator[None]:
    """What autograd saves within the block counts for the host until backward asks for it."""

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in own:
            return tensor
        with tracker.of_kind(HOST):
            return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.clone()):
        yield


def _fused(model: Any) -> Any:
    head: Any = find_head(model)
    return head.fused


@contextmanager
def _arch(device: torch.device) -> Iterator[None]:
    """A GPU is taken for an H100 where there is none."""
    if device.type == "cpu" or torch.cuda.is_available():
        yield
        return
    with override(arch=Arch(*ARCH)):
        yield


def _size(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
