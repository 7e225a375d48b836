"""Aligns a Hugging Face causal language model with preference pairs (DPO).

    python train.py                                   a small example on the CPU, made on the spot
    python train.py --data_path dpo.jsonl --ref_weight MODEL --output_dir OUT
    torchrun --nproc_per_node 8 train.py ...          or accelerate launch train.py ...

The JSONL has one pair a line: {"chosen": [messages], "rejected": [messages]}. All options of
transformers.TrainingArguments work too; `python train.py --help` lists them.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

# Before torch starts its threads: threads that spin while they wait stall one another when something else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer, NonFiniteError, checkpoints
from dpo_kernels.training.small_model import make_small_model

EXAMPLE = Path(__file__).parent / "examples" / "dpo.jsonl"
# What the example sets where the command line does not: every one of them is an ordinary option.
EXAMPLE_DEFAULTS = {
    "--max_length": "192", "--eval_size": "0.15", "--per_device_train_batch_size": "16", "--num_train_epochs": "4",
    "--learning_rate": "3e-4", "--lr_scheduler_type": "cosine", "--warmup_steps": "5", "--eval_strategy": "epoch",
    "--save_strategy": "epoch", "--save_total_limit": "1", "--use_cpu": "True",
}  # fmt: skip
INTERRUPTED = 128 + 15  # what a shell reports of a process that a SIGTERM ended


@dataclass
class ScriptArguments:
    """What to train on."""

    data_path: str | None = field(default=None, metadata={"help": "JSONL of pairs; default: the example's."})
    ref_weight: str | None = field(default=None, metadata={"help": "Reference: a model folder or hub name."})
    from_weight: str | None = field(default=None, metadata={"help": "Where the policy starts; default: --ref_weight."})
    max_length: int = field(default=2048, metadata={"help": "Of a conversation, in tokens; the rest is cut off."})
    assistant_turns: Literal["all", "last"] = field(default="all", metadata={"help": "Which replies count."})
    on_bad_line: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "skip: leave bad lines out and write them to output_dir/skipped.jsonl."}
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "JSONL of held-out pairs."})
    eval_size: float = field(
        default=0.0, metadata={"help": "Or hold out a share (< 1) or number of data_path's pairs."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of both models' weights; with --bf16 the products are bfloat16 anyway."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, ..."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template to use instead."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "For tokenizers that have none."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status. What a user can mend (ValueError, OSError, ...) is told in one sentence."""
    script, config = parse(sys.argv[1:] if argv is None else argv)
    output_dir = Path(str(config.output_dir))
    resume_from = checkpoint_to_resume(config, output_dir)
    tokenizer, policy, reference = load_models(script, config.loss_options.needs_reference)
    with config.main_process_first(desc="reading the pairs"):
        train, held_out = load_pairs(script, config, tokenizer)
    say(config, f"training: {train.report}" + (f"; {len(held_out):,} held out" if held_out else ""))
    config.eval_on_start = held_out is not None and resume_from is None
    trainer = DPOTrainer(policy, reference, config, train, held_out, tokenizer)
    del reference
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except NonFiniteError as error:
        say(config, f"error: {error}")
        return 1
    if trainer.interrupted:
        say(config, f"stopped after step {trainer.state.global_step}; go on with --resume_from_checkpoint")
        return INTERRUPTED
    trainer.save_model()
    if held_out:
        evaluated = {e["step"]: e["eval_logps/accuracies"] for e in trainer.state.log_history if "eval_loss" in e}
        last = trainer.state.global_step
        after = evaluated[last] if last in evaluated else trainer.evaluate()["eval_logps/accuracies"]
        before = f"{evaluated[0]:.3f} before, " if 0 in evaluated else ""
        say(config, f"held-out preference accuracy: {before}{after:.3f} after")
    say(config, f"saved: model, tokenizer, log.jsonl and curves.png in {output_dir}")
    return 0


def parse(argv: list[str]) -> tuple[ScriptArguments, DPOConfig]:
    """Options from the command line or from one .json or .yaml file; the example's defaults where nothing is given."""
    types: Any = (ScriptArguments, DPOConfig)
    parser = HfArgumentParser(types, description=__doc__, allow_abbrev=False)
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = _from_file(Path(argv[0]))
    given = {part.split("=")[0].replace("-", "_").replace("__", "--", 1) for part in argv if part.startswith("--")}
    weights = given & {"--ref_weight", "--from_weight"}
    if ("--data_path" in given) != bool(weights) or weights == {"--from_weight"}:
        raise ValueError(
            f"give --data_path and --ref_weight together, or neither for the example; found {sorted(given)}"
        )
    if not weights:
        argv = [part for pair in EXAMPLE_DEFAULTS.items() if pair[0] not in given for part in pair] + argv
    if "--output_dir" not in given:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("give --output_dir: with several processes they have to agree on one")
        argv = ["--output_dir", f"output/{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}", *argv]
    script, config = parser.parse_args_into_dataclasses(args=argv)
    if script.eval_size and script.eval_data_path:
        raise ValueError("give held-out pairs either by --eval_size or by --eval_data_path")
    return script, config


def checkpoint_to_resume(config: DPOConfig, output_dir: Path) -> str | None:
    """The checkpoint asked for; refuses to start afresh over the results of another run.

    Raises:
        ValueError: the checkpoint does not exist, or output_dir holds a run and no resume was asked for.
    """
    found = checkpoints.latest(output_dir)
    wanted = config.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        if found is not None or any(output_dir.glob("*.safetensors*")) or any(output_dir.glob("*.bin*")):
            raise ValueError(
                f"output_dir {output_dir} holds the results of a run already; go on with it with "
                "--resume_from_checkpoint, or give another --output_dir"
            )
        return None
    if wanted in ("latest", "True", "true"):
        if found is None:
            say(config, f"no checkpoint in {output_dir} yet: starting from the beginning")
        return None if found is None else str(found)
    if not Path(wanted, "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint is {wanted!r}, which is no checkpoint (it has no trainer_state.json)")
    return wanted


def load_models(script: ScriptArguments, with_reference: bool) -> tuple[PreTrainedTokenizerBase, Any, Any]:
    """Tokenizer, policy and reference (or None); the example's small ones where no weights are named."""
    tokenizer: Any
    if script.ref_weight is None:
        policy, tokenizer = make_small_model(EXAMPLE)
        reference = copy.deepcopy(policy) if with_reference else None
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.ref_weight)
        policy = _load(script, script.from_weight or script.ref_weight)
        reference = _load(script, script.ref_weight) if with_reference else None
    if script.chat_template is not None:
        tokenizer.chat_template = Path(script.chat_template).read_text(encoding="utf-8")
    if script.pad_token is not None:
        if tokenizer.convert_tokens_to_ids(script.pad_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"pad_token is {script.pad_token!r}, which the tokenizer does not know; name a token it has"
            )
        tokenizer.pad_token = script.pad_token
    return tokenizer, policy, reference


def load_pairs(
    script: ScriptArguments, config: DPOConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[DPODataset, DPODataset | None]:
    """Pairs to train on, and held-out ones if asked for."""

    def load(path: str | Path, skipped: str) -> DPODataset:
        return DPODataset(
            path, tokenizer, script.max_length, assistant_turns=script.assistant_turns, on_bad_line=script.on_bad_line,
            skipped_path=Path(str(config.output_dir)) / skipped, num_proc=script.dataset_num_proc,
        )  # fmt: skip

    pairs = load(script.data_path or EXAMPLE, "skipped.jsonl")
    if script.eval_data_path:
        return pairs, load(script.eval_data_path, "skipped.eval.jsonl")
    return pairs.split(script.eval_size, config.seed) if script.eval_size else (pairs, None)


def say(config: DPOConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, flush=True)


def _load(script: ScriptArguments, path: str) -> Any:
    options = {"attn_implementation": script.attn_implementation} if script.attn_implementation else {}
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


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
