"""What a run is going to do, as rows of names and figures, before its first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_kernels import plan
from dpo_kernels.dispatch import choose
from dpo_kernels.planner import Plan
from dpo_kernels.training import adapters
from dpo_kernels.training.budget import COMPUTE, head_call, longest_batches
from dpo_kernels.training.data_report import column, lengths
from dpo_kernels.training.output_head import find_head
from dpo_kernels.training.partitioned import numbers_in, shape_of
from dpo_kernels.training.reference import FrozenModel, OwnStart
from dpo_kernels.training.trainer import DPOTrainer

SMALL = "the example's small model"


@dataclass(frozen=True)
class RunFacts:
    """What is told of a run at its start, in its report and in its model card.

    data, model, start: names as they were given; start is where the policy begins, where that is another model.
    rows: (name, what), in the order in which a person asks.
    """

    data: Sequence[str]
    model: str
    start: str | None
    rows: Sequence[tuple[str, str]]

    @property
    def base(self) -> str:
        """What the policy starts from; "" where it was made for an example."""
        return self.start or self.model

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy begins as its reference, as far as names say."""
        return not (self.start and self.model) or same_place(self.start, self.model)

    @property
    def title(self) -> str:
        return f"{short(self.base) or SMALL} aligned with {', '.join(map(short, self.data))}"


def run_facts(trainer: DPOTrainer, data: Sequence[str], model: str, start: str | None, held_out: str = "") -> RunFacts:
    """Of a trainer that is ready to train.

    Args:
        data: names of what is trained on.
        model: name of the reference, or of what both start from; "" of the example's.
        start: name of where the policy starts, if that is not `model`.
        held_out: where the held-out pairs come from, if not from data.
    """
    args, device = trainer.args, trainer.args.device
    rows = [
        ("data", ", ".join(data)), ("pairs", _pairs(trainer, held_out)), ("lengths", _lengths(trainer.train_dataset)),
        ("model", _model(trainer.model, start or model or SMALL)), ("trained", _trained(trainer.model)),
        ("reference", _reference(trainer, model or SMALL)), ("device", _device(device, args.world_size)),
        ("head", _head(trainer)), ("layout", trainer.layout.told), ("dtype", _dtype(trainer)),
        ("loss", _loss(args)), ("learning rate", _rate(args)), ("a step", _step(trainer)),
        ("steps", _steps(trainer)), ("output", str(args.output_dir)),
    ]  # fmt: skip
    return RunFacts(tuple(data), model, start, tuple((name, what) for name, what in rows if what))


def show_start(facts: RunFacts, console: Console | None = None) -> None:
    """A table on a terminal; in a log a line a row."""
    console = console or Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.print("\n".join(f"{name + ':':<15}{what}" for name, what in facts.rows), markup=False)
        return
    table = Table(title=Text(facts.title), title_justify="left", title_style="bold", show_header=False, box=None,
                  padding=(0, 2, 0, 0))  # fmt: skip
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, what in facts.rows:
        table.add_row(name, Text(what))
    console.print(table, soft_wrap=False)


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two names are of the same folder, or the same on the hub."""
    return one == other or (None not in (one, other) and Path(str(one)).resolve() == Path(str(other)).resolve())


def short(name: str) -> str:
    """The last two parts of a path or hub name."""
    return "/".join(name.replace("\\", "/").rstrip("/").split("/")[-2:])


def _pairs(trainer: DPOTrainer, held_out: str) -> str:
    sets = trainer.eval_dataset
    if not sets:
        return f"{len(trainer.train_dataset):,} trained on, none held out"
    if isinstance(sets, dict):
        kept = ", ".join(f"{len(one):,} of {name}" for name, one in sets.items())
    else:
        kept = f"{len(sets):,}{f' of {held_out}' if held_out else ''}"
    return f"{len(trainer.train_dataset):,} trained on; held out: {kept}"


def _lengths(dataset: Any) -> str:
    if not hasattr(dataset, "rows"):
        return ""
    tokens = lengths(dataset.rows)
    prompt, chosen, rejected = (int(n) for n in np.median(tokens, axis=0))
    share = float((tokens[:, 1] > tokens[:, 2]).mean())
    told = " (length alone ranks most pairs)" if max(share, 1 - share) > 0.8 else ""
    return (
        f"median {prompt:,} tokens of prompt, {chosen:,} chosen, {rejected:,} rejected; the chosen answer is the "
        f"longer one in {share:.0%}{told}"
    )


def _model(model: Any, name: str) -> str:
    inner = model.get_base_model() if adapters.is_adapted(model) else model
    return f"{name}: {type(inner).__name__}, {sum(map(_numbers, model.parameters())):,} parameters"


def _numbers(parameter: Any) -> int:
    """Of a parameter; bitsandbytes packs some in each number of its storage, and keeps their shape beside it."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else numbers_in(parameter)


def _trained(model: Any) -> str:
    total = sum(map(_numbers, model.parameters()))
    trained = sum(numbers_in(p) for p in model.parameters() if p.requires_grad)
    what = " (adapter)" if adapters.is_adapted(model) else ""
    return f"{trained:,} parameters, {trained / max(total, 1):.2%} of all{what}"


def _reference(trainer: DPOTrainer, model: str) -> str:
    if not trainer.args.loss_options.needs_reference:
        return "none: the loss has none"
    if isinstance(trainer.reference, FrozenModel):
        moves = ", moved towards the policy" if trainer.args.sync_ref_model else ", frozen"
        return f"{model}, a second model{moves}"
    if isinstance(trainer.reference, OwnStart):
        base = trainer.args.adapter_reference == "base"
        return f"the policy {'without its adapter' if base else 'as it starts'}; no second model"
    return "log-probs computed beforehand"


def _device(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = device.type
        if device.type == "cpu":
            gpu = "a GPU is there and not used" if torch.cuda.is_available() else "no GPU was found"
            name = f"CPU, {torch.get_num_threads()} threads ({gpu})"
    return f"{name}, {processes} processes" if processes > 1 else name


def head_plan(trainer: DPOTrainer) -> Plan | None:
    """What the head will do of the longest batch there can be; None where the dataset does not say how long its pairs
    are.

    Raises:
        ValueError: the memory budget is too small for it; names the least that works.
    """
    if not hasattr(trainer.train_dataset, "rows") or trainer.is_fsdp_enabled:
        return None
    longest = next(longest_batches(trainer.args, trainer.train_dataset, None))
    call = head_call(trainer.args, trainer.model, longest, True, trainer.args.device)
    return None if call is None else plan(**call, memory_budget=trainer.args.memory_budget_bytes)


def _head(trainer: DPOTrainer) -> str:
    weight: Any = find_head(trainer.model).weight
    backend = choose(trainer.args.impl, trainer.args.device, weight.dtype, shape_of(weight)[0]).name
    made = head_plan(trainer)
    if made is None:
        return f'impl "{backend}"'
    return (
        f'impl "{backend}", mode {made.mode}, at most {made.bytes / 2**20:,.1f} MiB for {made.tokens:,} counted tokens '
        f"x {made.vocab_size:,} vocabulary (budget {made.memory_budget / 2**20:,.0f} MiB)"
    )


def _dtype(trainer: DPOTrainer) -> str:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
    mixed = COMPUTE.get(str(trainer.accelerator.mixed_precision))
    products = "" if mixed is None else f"; products in {str(mixed).removeprefix('torch.')}"
    return f"{', '.join(kinds)} weights{products}; log-probs and loss in float32"


def _loss(args: Any) -> str:
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    pairs = zip(args.loss_type, weights, strict=True)
    terms = [name if weight == 1 else f"{weight:g} {name}" for name, weight in pairs]
    return f"{' + '.join(terms)}, beta {args.beta:g}"


def _rate(args: Any) -> str:
    warmup = args.warmup_steps or getattr(args, "warmup_ratio", 0)
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return f"{args.learning_rate:g}, {kind}" + (f", warm-up {warmup:g}" if warmup else "")


def _pairs_a_step(trainer: DPOTrainer) -> int:
    args = trainer.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def _step(trainer: DPOTrainer) -> str:
    dataset, args = trainer.train_dataset, trainer.args
    if args.tokens_per_batch is not None:
        tokens = args.tokens_per_batch * args.gradient_accumulation_steps * args.world_size
        return f"as many pairs as {tokens:,} tokens hold"
    pairs = min(_pairs_a_step(trainer), len(dataset))
    if not hasattr(dataset, "rows"):
        return f"{pairs:,} pairs"
    return f"{pairs:,} pairs, about {pairs * float(np.mean(column(dataset.rows, 'tokens'))):,.0f} tokens"


def _steps(trainer: DPOTrainer) -> str:
    args = trainer.args
    if args.max_steps > 0:
        return f"{args.max_steps:,}"
    if trainer.token_batches is not None:
        return f"those of {args.num_train_epochs:g} {_epochs(args)}"
    each = max(1, -(-len(trainer.train_dataset) // _pairs_a_step(trainer)))
    return f"{math.ceil(each * args.num_train_epochs):,} ({args.num_train_epochs:g} {_epochs(args)} of {each:,})"


def _epochs(args: Any) -> str:
    return "epoch" if args.num_train_epochs == 1 else "epochs"
