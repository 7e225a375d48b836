"""`dpo-kernels score DATA --model M [--ref R]`: the log-probs that training would begin with, and their rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from dpo_kernels.commands import on_pairs
from dpo_kernels.commands.inputs import (
    check_sources,
    choose_max_length,
    find_models,
    load,
    prepare_tokenizer,
    quiet,
    read_pairs,
)
from dpo_kernels.commands.options import ScriptArguments, check_device, check_impl
from dpo_kernels.training import DPODataset
from dpo_kernels.training.adapters import AdapterOptions
from dpo_kernels.training.data import write_whole
from dpo_kernels.training.data_report import column
from dpo_kernels.training.scoring import Scores, score_dataset, with_rewards
from dpo_kernels.units import parse_bytes

TEXT = """Log-probs of both answers of each pair, and with --ref their rewards beta (log pi - log pi_ref); no gradients.
The numbers are those of training: the same reading of pairs, layouts and head."""


@dataclass
class ScoreOptions:
    """What to score with."""

    ref: str | None = field(default=None, metadata={"help": "The reference: a model folder or hub name."})
    output: str | None = field(default=None, metadata={"help": "A .jsonl file to write, one line a pair."})
    beta: float = field(default=0.1, metadata={"help": "Of the rewards."})
    batch_size: int = field(default=8, metadata={"help": "Pairs at once."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision, as --bf16 of train."})
    memory_budget: str | None = field(default=None, metadata={"help": "What the head may hold, such as 512MiB."})
    impl: Literal["triton", "cpp", "torch"] | None = field(
        default=None, metadata={"help": "Default: the fastest that can run."}
    )
    layout: Literal["auto", "padded", "bucketed", "packed", "shared"] = field(
        default="auto", metadata={"help": "How pairs lie in rows."}
    )
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})


def main(argv: list[str], program: str) -> int:
    """Prints the means and the accuracy; writes a line a pair where an output is named."""
    quiet()
    if (parsed := on_pairs.parse(argv, program, TEXT, ScoreOptions)) is None:
        return 0
    script, options = parsed
    device = check_device(options.device)
    check_impl(options.impl, device)
    _check_output(options)
    script.from_weight, script.ref_weight = script.ref_weight, options.ref  # their tokenizers and lengths are compared
    check_sources(script)
    find_models(script)
    tokenizer = prepare_tokenizer(script, None, with_reference=True)
    max_length = choose_max_length(script, None)
    parts = [read_pairs(script, path, tokenizer, max_length) for path in script.data_path or ()]
    dataset = DPODataset.mix(parts)
    found = _scores(script, options, str(script.from_weight), dataset, device)
    if script.ref_weight is not None:
        found = with_rewards(found, _scores(script, options, script.ref_weight, dataset, device), options.beta)
    if options.output is not None:
        write_whole(Path(options.output), "".join(lines(found, column(dataset.rows, "where"))))
        print(f"scores of {len(dataset):,} pairs: {options.output}")
    print(summary(found))
    return 0


def lines(scores: Scores, places: list[str]) -> Iterator[str]:
    """A line of JSON a pair: its number, where it stands, and its figures."""
    for i, (place, *values) in enumerate(zip(places, *scores.values(), strict=True)):
        yield json.dumps({"pair": i, "where": place, **dict(zip(scores, values, strict=True))}) + "\n"


def summary(scores: Scores) -> str:
    """The mean of each figure, a line each; accuracy last."""
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    names = sorted(means, key=lambda name: "accuracies" in name)
    return "\n".join(f"{name:<20} {means[name]:>12,.4f}" for name in names)


def _scores(
    script: ScriptArguments, options: ScoreOptions, name: str, dataset: DPODataset, device: torch.device
) -> Scores:
    model = load(script, AdapterOptions(), name, device).to(device)
    return score_dataset(
        model, dataset, batch_size=options.batch_size, layout=options.layout, impl=options.impl, bf16=options.bf16,
        memory_budget=parse_bytes(options.memory_budget),
    )  # fmt: skip


def _check_output(options: ScoreOptions) -> None:
    """
    Raises:
        ValueError: a number that is out of range.
        OSError: the output cannot be written, which is better known before the models are run.
    """
    parse_bytes(options.memory_budget)
    if options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}; expected at least 1")
    if options.output is not None:
        write_whole(Path(f"{options.output}.trial"), "")
        Path(f"{options.output}.trial").unlink()
