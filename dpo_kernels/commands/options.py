"""The options of a run: read from a command line or a file, and checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from dpo_kernels import available_impls
from dpo_kernels.commands import trl_options
from dpo_kernels.commands.arguments import Arguments, Given, as_given, from_values, read_options
from dpo_kernels.commands.endings import OptionError
from dpo_kernels.training import DPOConfig
from dpo_kernels.training.adapters import AdapterOptions, base_of
from dpo_kernels.training.lesson import EPOCHS
from dpo_kernels.training.offloading import check_offloading

OUTPUT = Path("output")  # where a run's folder is that has no name
# What the example sets where the command line does not: every one of them is an ordinary option.
EXAMPLE_DEFAULTS = {
    "max_length": "192", "eval_size": "0.15", "per_device_train_batch_size": "16", "num_train_epochs": "3",
    "learning_rate": "2e-4", "beta": "0.5", "lr_scheduler_type": "cosine", "warmup_steps": "5",
    "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": "1", "use_cpu": "True",
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "Of both models' weights; default: bfloat16 below an adapter on a GPU that has it, else "
            "float32, which small updates need; with --bf16 the products are bfloat16 anyway."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the models on the hub."}
    )
    model_init_kwargs: str | None = field(
        default=None, metadata={"help": "JSON of options for from_pretrained, of both models."}
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

    plan: bool = field(
        default=False, metadata={"help": "Only say what a step would hold, by part; no weights are loaded."}
    )
    plan_pair: list[int] | None = field(
        default=None,
        metadata={"help": "Of a plan without data: tokens of prompt, chosen and rejected answer; default: 512 each."},
    )
    plan_device: Literal["cpu", "cuda"] | None = field(
        default=None, metadata={"help": "Of a plan: another device than this machine's."}
    )
    fit: bool = field(
        default=False, metadata={"help": "Choose what lowers memory until the longest batch fits, at the same numbers."}
    )
    rehearsal: bool = field(
        default=True, metadata={"help": "Run the longest batch once before training, to see what it holds."}
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
    """Options from the command line or from a .json or .yaml file, ours or TRL's; the example's defaults where no
    weights are given.

    Raises:
        OptionError: an option that does not exist, a value of another kind.
        FileNotFoundError: there is no such file of options.
        ValueError: a value out of range, or options that do not go together.
    """
    parser = make_parser()
    given = _given(argv)
    weights = given.keys() & {"ref_weight", "from_weight"}
    for name in given:
        parser.check_name(name)
    plans = "plan" in given and [value.lower() for value in given["plan"]] not in (["false"], ["0"], ["no"])
    if ("data_path" in given) != bool(weights) and not (plans and weights):
        raise ValueError(
            "give --data_path and --ref_weight together, or neither for the example; found "
            f"{', '.join(f'--{name}' for name in sorted(given.keys() & {'data_path', *weights}))}"
        )
    if not weights:
        taken = given.keys() | ({"per_device_train_batch_size"} if "tokens_per_batch" in given else set())
        given = {name: [value] for name, value in EXAMPLE_DEFAULTS.items() if name not in taken} | given
    if "output_dir" not in given:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("give --output_dir: with several processes they have to agree on one")
        given["output_dir"] = [str(OUTPUT / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")]
    if plans and given.get("plan_device") == ["cuda"] and not torch.cuda.is_available():
        given = {"use_cpu": ["True"], **given}  # transformers checks bf16 against this machine otherwise
    script, adapter, config = parser.dataclasses(given)
    _check_together(script, adapter, config, set(given))
    return script, adapter, config


def names_output(config: DPOConfig) -> bool:
    """Whether an output folder was asked for by its name."""
    folder = Path(str(config.output_dir))
    return folder.parent != OUTPUT or not folder.name.endswith(f"-{os.getpid()}")


def make_parser() -> Arguments:
    """Of all options of `train`."""
    return Arguments((ScriptArguments, AdapterOptions, DPOConfig))


def _given(argv: list[str]) -> Given:
    """What the command line says, over what the file says that it names."""
    file: Given = {}
    datasets = None
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = ["--config", *argv]
    line = as_given(argv)
    if "config" in line:
        names = line.pop("config")
        if len(names) != 1:
            raise OptionError(f"--config is {' '.join(names)!r}; expected one .yaml or .json file")
        values = read_options(Path(names[0]))
        trl_options.set_environment(values.pop("env", None) or {})
        datasets = values.pop("datasets", None)
        file = from_values(values)
    return trl_options.translated({**file, **line}, datasets)


def _check_together(script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, given: set[str]) -> None:
    """
    Raises:
        ValueError: options that do not go together.
    """
    if script.data_weights and len(script.data_weights) != len(script.data_path or []):
        raise ValueError(
            f"data_weights has {len(script.data_weights)} numbers for {len(script.data_path or [])} data_path"
        )
    if script.eval_size and script.eval_data_path:
        raise ValueError("give held-out pairs either by --eval_size or by --eval_data_path")
    if config.eval_strategy != "no" and not (script.eval_size or script.eval_data_path):
        when = getattr(config.eval_strategy, "value", config.eval_strategy)
        raise ValueError(
            f"--eval_strategy is {when!r}, and there are no held-out pairs to evaluate; give --eval_size 0.1, or "
            "--eval_data_path FILE"
        )
    if script.plan_device in (None, config.device.type):
        check_impl(config.impl, config.device)
    for name in ("plan_pair", "plan_device"):
        if getattr(script, name) is not None and not script.plan:
            raise ValueError(f"{name} does nothing without --plan")
    if script.plan_pair is not None and (script.data_path is not None or script.start is None):
        raise ValueError("plan_pair is of a plan without data; leave out --data_path, and name a model by --ref_weight")
    if script.plan_pair is not None and (len(script.plan_pair) != 3 or min(script.plan_pair) < 1):
        raise ValueError(f"plan_pair is {script.plan_pair}; expected three numbers: tokens of prompt and both answers")
    if config.activation_offloading and not script.plan:
        check_offloading(config.device, is_sharded=False)
    base = base_of(script.from_weight) if script.from_weight else None
    if script.from_weight and not script.ref_weight and base is None:
        raise ValueError(f"give --ref_weight too: {script.from_weight} is no adapter, which would be its own reference")
    if adapter.merge_adapter and (adapter.load_in_4bit or adapter.load_in_8bit):
        raise ValueError("merge_adapter does not go with quantised weights, which would round the adapter away")
    if adapter.merge_adapter and not (adapter.use_peft or base_of(script.start or "")):
        raise ValueError("merge_adapter: there is no adapter; give --use_peft, or an adapter as --from_weight")
    if (adapter.load_in_4bit or adapter.load_in_8bit) and script.start is None:
        raise ValueError(
            "the example's model is made on the spot, and not quantised; give --data_path and --ref_weight"
        )
    if {"tokens_per_batch", "per_device_train_batch_size"} <= given and script.start is not None:
        raise ValueError("give one of --tokens_per_batch and --per_device_train_batch_size")
    if adapter.use_peft and base is not None:
        raise ValueError(f"use_peft puts a new adapter into a model, and {script.from_weight} is one; leave one out")


def choose_dtype(asked: str | None, has_adapter: bool, device: torch.device, has_bfloat16: bool) -> str:
    """The dtype of a run's weights, by name: what is asked for; else bfloat16 for weights that stay as they are below
    an adapter, on a GPU that has it, and float32 elsewhere. A weight that is trained in bfloat16 loses every update
    below 2^-9 of it, as those of DPO at a learning rate of 1e-6 are.

    Args:
        asked: --dtype; None: nothing.
        has_adapter: whether an adapter is trained in place of the weights; its own are float32 (PEFT casts them).
        has_bfloat16: whether the device computes in it.
    """
    if asked is not None:
        return asked
    return "bfloat16" if has_adapter and device.type == "cuda" and has_bfloat16 else "float32"


def check_device(name: str | None) -> torch.device:
    """The device of this name; without one a GPU where there is one.

    Raises:
        OptionError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "meta":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = "cpu" + (f" and cuda:0 to cuda:{gpus - 1}" if gpus else "; no GPU was found")
        raise OptionError(f"--device is {name!r}, which cannot be used here; there is {there}") from error
    return device


def check_impl(impl: str | None, device: torch.device) -> None:
    """
    Raises:
        OptionError: there is no such implementation.
        ValueError: it cannot run on the device; says why.
    """
    if impl is None:
        return
    reasons = available_impls(device)
    if impl not in reasons:
        raise OptionError(f"--impl is {impl!r}; expected one of {', '.join(reasons)}")
    if reason := reasons[impl]:
        raise ValueError(f"--impl {impl} cannot run on {device}: {reason}; leave it out for the fastest that can")
