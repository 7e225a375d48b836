"""The options of a run: read from a command line or a file, and checked before anything is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from dpo_kernels.training import DPOConfig
from dpo_kernels.training.adapters import AdapterOptions, base_of
from dpo_kernels.training.lesson import EPOCHS

DESCRIPTION = """Aligns a Hugging Face causal language model with preference pairs (DPO)."""
# What the example sets where the command line does not: every one of them is an ordinary option.
EXAMPLE_DEFAULTS = {
    "--max_length": "192", "--eval_size": "0.15", "--per_device_train_batch_size": "16", "--num_train_epochs": "2",
    "--learning_rate": "2e-4", "--beta": "0.3", "--lr_scheduler_type": "cosine", "--warmup_steps": "5",
    "--eval_strategy": "epoch", "--save_strategy": "epoch", "--save_total_limit": "1", "--use_cpu": "True",
}  # fmt: skip


@dataclass
class ScriptArguments:
    """What to train on."""

    data_path: list[str] | None = field(
        default=None,
        metadata={"help": "Pairs: files, folders, hub names as in org/name:split; default: the example."},
    )
    data_weights: list[float] | None = field(
        default=None, metadata={"help": "How often pairs of each data_path are drawn, relative to the others."}
    )
    ref_weight: str | None = field(default=None, metadata={"help": "Reference: a model folder or hub name."})
    from_weight: str | None = field(default=None, metadata={"help": "Where the policy starts; default: --ref_weight."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Of prompt and answer, in tokens; default: 2048, or what the model has."},
    )
    truncation_mode: Literal["keep_answer", "keep_start", "drop"] = field(
        default="keep_answer",
        metadata={"help": "Of longer pairs: cut the prompt's start, cut the end (TRL's), or leave the pair out."},
    )
    assistant_turns: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which replies count; last: the answer alone, as in TRL."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of other names: prompt=question chosen=best rejected=worst ..."}
    )
    string_format: Literal["plain", "chat"] | None = field(
        default=None, metadata={"help": "Strings as they are, or as messages for the chat template; default: plain, "
                                "but chat beside a system, tools or chat_template_kwargs column."}
    )  # fmt: skip
    pairs: Literal["best", "all"] = field(
        default="best",
        metadata={"help": "Of ranked completions: best against worst, or each against each worse."},
    )
    tools: str | None = field(default=None, metadata={"help": "JSON file of tools for the chat template."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "JSON of options for the chat template: '{\"enable_thinking\": false}'."}
    )
    on_bad_line: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "skip: leave bad lines out and write them to output_dir/skipped.jsonl."}
    )
    eval_data_path: list[str] | None = field(
        default=None, metadata={"help": "Held-out pairs; several are evaluated one by one."}
    )
    eval_size: float = field(
        default=0.0, metadata={"help": "Or hold out a share (< 1) or number of data_path's pairs."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of both models' weights; with --bf16 the products are bfloat16 anyway."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let code run that a model or tokenizer brings; read it first."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template to use instead."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "For tokenizers that have none."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    show_pairs: int | None = field(
        default=None, metadata={"help": "Print so many pairs as the model sees them; default: 1 on a terminal, else 0."}
    )

    report: bool = field(
        default=True, metadata={"help": "Ask the policy before and after training, for report.html; a few seconds."}
    )
    lesson_epochs: int = field(
        default=EPOCHS,
        metadata={"help": "Of the example: how often its model is taught both kinds of answers before it is aligned."},
    )

    @property
    def start(self) -> str | None:
        """Where the policy starts; None: as the example's model."""
        return self.from_weight or self.ref_weight


def parse(argv: list[str]) -> tuple[ScriptArguments, AdapterOptions, DPOConfig]:
    """Options from the command line or from one .json or .yaml file; the example's defaults where nothing is given."""
    types: Any = (ScriptArguments, AdapterOptions, DPOConfig)
    parser = HfArgumentParser(types, description=DESCRIPTION, allow_abbrev=False)
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = _from_file(Path(argv[0]))
    given = {part.split("=")[0].replace("-", "_").replace("__", "--", 1) for part in argv if part.startswith("--")}
    weights = given & {"--ref_weight", "--from_weight"}
    if ("--data_path" in given) != bool(weights):
        raise ValueError(
            f"give --data_path and --ref_weight together, or neither for the example; found {sorted(given)}"
        )
    if not weights:
        if "--tokens_per_batch" in given:
            given.add("--per_device_train_batch_size")  # which it takes the place of
        argv = [part for pair in EXAMPLE_DEFAULTS.items() if pair[0] not in given for part in pair] + argv
    if "--output_dir" not in given:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("give --output_dir: with several processes they have to agree on one")
        argv = ["--output_dir", f"output/{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}", *argv]
    script, adapter, config = parser.parse_args_into_dataclasses(args=argv)
    if script.data_weights and len(script.data_weights) != len(script.data_path or []):
        raise ValueError(
            f"data_weights has {len(script.data_weights)} numbers for {len(script.data_path or [])} data_path"
        )
    if script.eval_size and script.eval_data_path:
        raise ValueError("give held-out pairs either by --eval_size or by --eval_data_path")
    base = base_of(script.from_weight) if script.from_weight else None
    if weights == {"--from_weight"} and base is None:
        raise ValueError(f"give --ref_weight too: {script.from_weight} is no adapter, which would be its own reference")
    if adapter.merge_adapter and (adapter.load_in_4bit or adapter.load_in_8bit):
        raise ValueError("merge_adapter does not go with quantised weights, which would round the adapter away")
    if adapter.merge_adapter and not (adapter.use_peft or base_of(script.start or "")):
        raise ValueError("merge_adapter: there is no adapter; give --use_peft, or an adapter as --from_weight")
    if (adapter.load_in_4bit or adapter.load_in_8bit) and script.start is None:
        raise ValueError(
            "the example's model is made on the spot, and not quantised; give --data_path and --ref_weight"
        )
    if {"--tokens_per_batch", "--per_device_train_batch_size"} <= given and script.start is not None:
        raise ValueError("give one of --tokens_per_batch and --per_device_train_batch_size")
    if adapter.use_peft and base is not None:
        raise ValueError(f"use_peft puts a new adapter into a model, and {script.from_weight} is one; leave one out")
    return script, adapter, config


def _from_file(path: Path) -> list[str]:
    """The options of a .json or .yaml file as a command line; null leaves an option at its default."""
    if path.suffix == ".json":
        values = json.loads(path.read_text(encoding="utf-8"))
    else:
        import yaml

        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected options as names and values")
    argv: list[str] = []
    for name, value in values.items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(json.dumps(part) if isinstance(part, dict) else str(part) for part in parts)]
    return argv
