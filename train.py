"""Aligns a Hugging Face causal language model with preference pairs (DPO).

    python train.py                                   a small example on the CPU, made on the spot
    python train.py --data_path dpo.jsonl --ref_weight MODEL --output_dir OUT
    torchrun --nproc_per_node 8 train.py ...          or accelerate launch train.py ...

Pairs are read as they were downloaded: JSON lines, JSON, CSV, Parquet, folders, saved datasets, names on the hub, in
the formats of TRL, LLaMA-Factory, ms-swift, axolotl, torchtune, NeMo-RL and HH-RLHF (docs/data.md). All options of
transformers.TrainingArguments work too; `python train.py --help` lists them.
"""

# ruff: noqa: E402  (signals are heard during the imports, and a variable is set before them)
from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

STARTED = os.getpid()


def stopped(number: int, frame: FrameType | None) -> None:
    """Outside of training, where there is no step to end."""
    if os.getpid() != STARTED:
        os._exit(128 + number)  # a worker, which has nothing to say
    os.write(2, f"train.py: {signal.Signals(number).name}: stopped; go on with --resume_from_checkpoint\n".encode())
    sys.exit(128 + number)  # as a shell reports a process that the signal ended


if __name__ == "__main__":  # before the seconds that imports take
    for heard in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(heard) != signal.SIG_IGN:  # as a shell has it for what a script starts in the background
            signal.signal(heard, stopped)

# Before torch starts its threads: threads that spin while they wait stall one another when something else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer, NonFiniteError, ReadOptions, checkpoints, resume
from dpo_kernels.training.adapters import AdapterOptions, base_of, is_adapted
from dpo_kernels.training.data_report import lengths
from dpo_kernels.training.loading import check_positions, load_config, load_model, load_tokenizer, max_positions
from dpo_kernels.training.ownership import owned
from dpo_kernels.training.report import save_lengths
from dpo_kernels.training.show import show_pairs
from dpo_kernels.training.small_model import make_small_model

EXAMPLE = Path(__file__).parent / "examples" / "dpo.jsonl"
# What the example sets where the command line does not: every one of them is an ordinary option.
EXAMPLE_DEFAULTS = {
    "--max_length": "192", "--eval_size": "0.15", "--per_device_train_batch_size": "16", "--num_train_epochs": "4",
    "--learning_rate": "3e-4", "--lr_scheduler_type": "cosine", "--warmup_steps": "5", "--eval_strategy": "epoch",
    "--save_strategy": "epoch", "--save_total_limit": "1", "--use_cpu": "True",
}  # fmt: skip
DEFAULT_MAX_LENGTH = 2048


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

    @property
    def start(self) -> str | None:
        """Where the policy starts; None: as the example's model."""
        return self.from_weight or self.ref_weight


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status. What a user can mend (ValueError, OSError, ...) is said in one sentence."""
    script, adapter, config = parse(sys.argv[1:] if argv is None else argv)
    output_dir = Path(str(config.output_dir))
    with owned(output_dir) if config.process_index == 0 else nullcontext():
        return train_in(output_dir, script, adapter, config)


def train_in(output_dir: Path, script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig) -> int:
    """`main` in a folder that no other run writes into."""
    resume_from = checkpoint_to_resume(config, output_dir)
    peft_config = adapter.peft_config()
    # Before the weights are loaded: what is wrong with the data or its tokenizer is known in seconds.
    example = make_small_model(EXAMPLE) if script.start is None else None
    tokenizer = prepare_tokenizer(script, example[1] if example else None, config.loss_options.needs_reference)
    max_length = choose_max_length(script, example[0].config if example else None)
    with config.main_process_first(desc="reading the pairs"):
        train, held_out = load_pairs(script, config, tokenizer, max_length)
    if resume_from is not None:
        say(config, f"going on from {resume_from}")
        if not config.allow_changed_data:
            resume.check_data(resume_from, train, allow_changed=False)
    if config.process_index == 0:
        tell(script, train, held_out, tokenizer, output_dir)
    policy, reference = load_models(script, adapter, config, example[0] if example else None)
    config.eval_on_start = bool(held_out) and resume_from is None
    trainer = DPOTrainer(policy, reference, config, train, held_out, tokenizer, peft_config=peft_config)
    del reference
    if adapter.merge_adapter and trainer.is_fsdp_enabled:
        raise ValueError(
            "merge_adapter does not work with FSDP; merge the saved adapter with PEFT's merge_and_unload()"
        )
    if trainer.aux_loss.told:
        say(config, trainer.aux_loss.told)
    if trainer.layout_told:
        say(config, trainer.layout_told)
    if trainer.token_batches is not None:
        say(config, trainer.token_batches.told)
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except NonFiniteError as error:
        say(config, f"error: {error}")
        return 1
    except KeyboardInterrupt:
        if not trainer.interrupted:  # the second one, which did not wait for the step to be saved
            newest = checkpoints.latest(output_dir)
            saved = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
            say(config, f"stopped at once, {saved}; go on with --resume_from_checkpoint")
            return 128 + signal.SIGINT
    if trainer.interrupted:
        say(config, f"stopped after step {trainer.state.global_step}; go on with --resume_from_checkpoint")
        return 128 + (trainer.stopped_by or signal.SIGTERM)
    trainer.save_model()
    if held_out:
        last = trainer.state.global_step
        names = list(held_out) if isinstance(held_out, dict) else [""]
        keys = {name: f"eval_{name}_logps/accuracies" if name else "eval_logps/accuracies" for name in names}
        if not any(e["step"] == last and keys[names[-1]] in e for e in trainer.state.log_history):
            trainer.evaluate()
        for name, key in keys.items():
            evaluated = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
            before = f"{evaluated[0]:.3f} before, " if 0 in evaluated else ""
            of = f" of {name}" if name else ""
            say(config, f"held-out preference accuracy{of}: {before}{evaluated[last]:.3f} after")
    what = "adapter" if is_adapted(trainer.model) else "model"
    if adapter.merge_adapter:
        trainer.save_merged(output_dir / "merged")
        what += " (merged: the whole model)"
    say(config, f"saved: {what}, tokenizer, log.jsonl, curves.png and lengths.png in {output_dir}")
    return 0


def parse(argv: list[str]) -> tuple[ScriptArguments, AdapterOptions, DPOConfig]:
    """Options from the command line or from one .json or .yaml file; the example's defaults where nothing is given."""
    types: Any = (ScriptArguments, AdapterOptions, DPOConfig)
    parser = HfArgumentParser(types, description=__doc__, allow_abbrev=False)
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


def checkpoint_to_resume(config: DPOConfig, output_dir: Path) -> str | None:
    """The checkpoint asked for; refuses to start afresh, or from another run's, over the results of a run.

    Raises:
        ValueError: the checkpoint does not exist or is damaged, or output_dir holds a run that this one would replace.
    """
    wanted = config.resume_from_checkpoint
    with config.main_process_first(local=False, desc="looking for checkpoints"):
        if config.process_index == 0:
            checkpoints.clean(output_dir)  # what a killed run left may be a checkpoint
        found = checkpoints.latest(output_dir)
        has_model = any(output_dir.glob("*.safetensors*")) or any(output_dir.glob("*.bin*"))
        if wanted in (None, "False", "false"):
            if found is not None or has_model:
                raise ValueError(
                    f"output_dir {output_dir} holds the results of a run already; go on with it with "
                    "--resume_from_checkpoint, or give another --output_dir"
                )
            return None
        if wanted in ("latest", "True", "true"):
            if found is None and has_model:
                raise ValueError(
                    f"output_dir {output_dir} holds a model, and no checkpoint to go on from: starting from the "
                    "beginning would replace it; give another --output_dir"
                )
            if found is None:
                say(config, f"no checkpoint in {output_dir} yet: starting from the beginning")
            newest = resume.newest_whole(output_dir)
            return None if newest is None else str(newest)
        resume.check_folder(wanted)
        if (found is not None or has_model) and Path(wanted).resolve().parent != output_dir.resolve():
            raise ValueError(
                f"output_dir {output_dir} holds the results of a run already, and {wanted} is a checkpoint of another; "
                "give another --output_dir"
            )
    return wanted


def prepare_tokenizer(script: ScriptArguments, example: Any, with_reference: bool) -> PreTrainedTokenizerBase:
    """The policy's tokenizer (see `loading.load_tokenizer`), or the example's, with what the command line changes."""
    tokenizer: Any = example
    if script.start is not None:
        reference = script.ref_weight if with_reference or script.from_weight else None
        tokenizer = load_tokenizer(script.start, reference, script.trust_remote_code)
    if script.chat_template is not None:
        tokenizer.chat_template = Path(script.chat_template).read_text(encoding="utf-8")
    if script.pad_token is not None:
        if tokenizer.convert_tokens_to_ids(script.pad_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"pad_token is {script.pad_token!r}, which the tokenizer does not know; name a token it has"
            )
        tokenizer.pad_token = script.pad_token
    return tokenizer


def choose_max_length(script: ScriptArguments, example: Any) -> int:
    """--max_length, or what the models have positions for, up to the default.

    Raises:
        ValueError: more than one of the models has positions for.
    """
    names = dict.fromkeys(filter(None, (script.from_weight, script.ref_weight)))
    configs = [example] if example is not None else [load_config(name, script.trust_remote_code) for name in names]
    if script.max_length is None:
        return min([DEFAULT_MAX_LENGTH, *filter(None, map(max_positions, configs))])
    for config in configs:
        check_positions(config, script.max_length)
    return script.max_length


def load_models(script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, example: Any) -> tuple[Any, Any]:
    """Policy and reference; the example's small ones where no weights are named. The reference is None where the loss
    has none, and where the policy has an adapter and starts from it: then it is its own."""
    name = script.start
    base = base_of(name) if name else None
    of_itself = adapter.use_peft or base is not None
    if base is not None and _same(script.ref_weight, base):
        config.adapter_reference = "base"
    elif script.ref_weight is not None and not _same(script.ref_weight, name):
        of_itself = False
    second = config.loss_options.needs_reference and not of_itself
    if name is None:
        return example, copy.deepcopy(example) if second else None
    policy = _load(script, adapter, name, is_trainable=True)
    return policy, _load(script, adapter, script.ref_weight or name) if second else None


def _same(one: str | None, other: str | None) -> bool:
    """Whether two names are of the same folder, or the same on the hub."""
    return one == other or (None not in (one, other) and Path(str(one)).resolve() == Path(str(other)).resolve())


def load_pairs(
    script: ScriptArguments, config: DPOConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[DPODataset, DPODataset | dict[str, DPODataset] | None]:
    """Pairs to train on, and held-out ones if asked for: one dataset, or several by their names."""
    tools = Path(script.tools).read_text(encoding="utf-8") if script.tools else None
    read = ReadOptions(
        _columns(script.columns or []), script.string_format, script.pairs, _json("tools", tools, list) or [],
        _json("chat_template_kwargs", script.chat_template_kwargs, dict) or {},
    )  # fmt: skip

    def load(path: str | Path, skipped: str) -> DPODataset:
        return DPODataset(
            path, tokenizer, max_length, assistant_turns=script.assistant_turns, truncation_mode=script.truncation_mode,
            read=read, on_bad_line=script.on_bad_line, skipped_path=Path(str(config.output_dir)) / f"{skipped}.jsonl",
            num_proc=script.dataset_num_proc,
        )  # fmt: skip

    def number(i: int) -> str:
        return f".{i}" if i else ""

    parts = [load(path, f"skipped{number(i)}") for i, path in enumerate(script.data_path or [str(EXAMPLE)])]
    held_out: Any = None
    if script.eval_data_path:
        loaded = [load(path, f"skipped.eval{number(i)}") for i, path in enumerate(script.eval_data_path)]
        held_out = loaded[0] if len(loaded) == 1 else dict(zip(_names(script.eval_data_path), loaded, strict=True))
    elif script.eval_size:  # before pairs are drawn more than once: none is on both sides
        shares = DPODataset.split_all(parts, script.eval_size, config.seed)
        parts, held_out = [train for train, _ in shares], DPODataset.mix([kept for _, kept in shares])
    return DPODataset.mix(parts, script.data_weights, config.seed), held_out


def _json(option: str, text: str | None, kind: type) -> Any:
    """What an option holds as JSON, None where it is not given.

    Raises:
        ValueError: it is no JSON, or of another kind.
    """
    if text is None:
        return None
    expected = "a list, as in [{...}]" if kind is list else 'an object, as in {"enable_thinking": false}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} is {text[:80]!r}, which is no JSON ({error}); expected {expected}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{option} is {text[:80]!r}; expected {expected}")
    return value


def _columns(parts: list[str]) -> dict[str, str]:
    """name=column, one or several; or one JSON object, as a file of options gives it."""
    if len(parts) == 1 and parts[0].startswith("{"):
        split = [(name, "=", column) for name, column in _json("columns", parts[0], dict).items()]
    else:
        split = [part.partition("=") for part in parts]
    if wrong := [found for found in split if not all(isinstance(x, str) and x for x in found)]:
        raise ValueError(f"columns holds {wrong}; expected name=column, as in prompt=question")
    return {name: column for name, _, column in split}


def _names(paths: list[str]) -> list[str]:
    """Short names for several evaluation sets, each another."""
    names: list[str] = []
    for path in paths:
        short = re.sub(r"(\.(jsonl|ndjson|json|csv|tsv|parquet))?(\.(gz|zst|bz2))?$", "", Path(path).name)
        short = short.replace(":", "_")
        numbered = (f"{short}_{i}" for i in itertools.count(2))
        name = next(name for name in itertools.chain([short], numbered) if name not in names)
        names.append(name)
    return names


def tell(
    script: ScriptArguments, train: DPODataset, held_out: Any, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """What will be trained on: figures, a picture, and pairs as the model sees them."""
    print(f"training: {train.report}", flush=True)
    for name, part in (held_out if isinstance(held_out, dict) else {"": held_out} if held_out else {}).items():
        print(f"held out{' as ' + name if name else ''}: {part.report}", flush=True)
    save_lengths(lengths(train.rows), train.max_length, output_dir)
    count = int(sys.stdout.isatty()) if script.show_pairs is None else script.show_pairs
    if count:
        show_pairs(train, tokenizer, count)


def say(config: DPOConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, flush=True)


def _load(script: ScriptArguments, adapter: AdapterOptions, path: str, is_trainable: bool = False) -> Any:
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    options: dict[str, Any] = adapter.quantization(dtype)
    if script.attn_implementation:
        options["attn_implementation"] = script.attn_implementation
    return load_model(
        path, trust_remote_code=script.trust_remote_code, dtype=dtype, is_trainable=is_trainable, **options
    )


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


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_warning()
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:  # what we and transformers raise for what a user can mend
        sys.exit(f"train.py: {type(error).__name__}: {error}")
