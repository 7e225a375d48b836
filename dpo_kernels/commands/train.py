"""Aligns a Hugging Face causal language model with preference pairs (DPO): `train.py`, `dpo-kernels train`."""

from __future__ import annotations

import copy
import signal
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from dpo_kernels.commands import endings, help
from dpo_kernels.commands.inputs import (
    EXAMPLE,
    check_sources,
    choose_max_length,
    find_models,
    has_second_model,
    load,
    load_pairs,
    prepare_tokenizer,
)
from dpo_kernels.commands.options import ScriptArguments, make_parser, names_output, parse
from dpo_kernels.commands.run_plan import rehearsed, show_plan, told_plan
from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer, NonFiniteError, checkpoints, resume
from dpo_kernels.training.adapters import AdapterOptions, is_adapted
from dpo_kernels.training.data_report import lengths
from dpo_kernels.training.lesson import taught_model
from dpo_kernels.training.memory.out_of_memory import OutOfMemoryError
from dpo_kernels.training.ownership import owned
from dpo_kernels.training.processes import together
from dpo_kernels.training.report import save_lengths
from dpo_kernels.training.report.ending import evaluate_last, show_end
from dpo_kernels.training.report.run import RunReport
from dpo_kernels.training.report.start import run_facts, show_start
from dpo_kernels.training.show import show_pairs
from dpo_kernels.training.small_model import make_small_model


def main(argv: list[str] | None = None, program: str = "train.py") -> int:
    """Trains; returns the exit status. What a user can mend is a ValueError or an OSError of one sentence."""
    transformers.utils.logging.set_verbosity_warning()
    argv = sys.argv[1:] if argv is None else argv
    if wanted := {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        print((help.short if wanted <= {"-h", "--help"} else help.full)(make_parser(), program))
        return 0
    with together(in_group=endings.ENDING.skip_teardown):
        script, adapter, config = parse(argv)
        output_dir = Path(str(config.output_dir))
        if script.plan:
            with tempfile.TemporaryDirectory() as scratch:
                return plan_in(output_dir if names_output(config) else Path(scratch), script, adapter, config)
        with owned(output_dir) if config.process_index == 0 else nullcontext():
            return train_in(output_dir, script, adapter, config)


def train_in(output_dir: Path, script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig) -> int:
    """`main` in a folder that no other run writes into."""
    resume_from = checkpoint_to_resume(config, output_dir)
    peft_config = adapter.peft_config()
    adapter.quantization(torch.float32)  # whether its package is there
    check_sources(script)
    find_models(script)
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
    of_example = example[0].config if example else None
    plan = told_plan(script, adapter, config, train, held_out, of_example)
    start = None
    if example:
        with config.main_process_first(desc="teaching the example's model"):
            start = taught_model(*example, train, output_dir, script.lesson_epochs)
    policy, reference = load_models(script, adapter, config, start)
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
    if trainer.tiled is not None:
        say(config, trainer.tiled.told)
    if trainer.token_batches is not None:
        say(config, trainer.token_batches.told)
    report = None
    if config.process_index == 0:
        data = script.data_path or ["examples/dpo.jsonl"]
        facts = run_facts(trainer, data, script.ref_weight or "", script.from_weight)
        show_start(facts)
    if script.rehearsal:
        say(config, rehearsed(trainer, plan, script, adapter, train, of_example))
    if config.process_index == 0:
        report = RunReport(trainer, facts, tokenizer, script.report)
        report.ask_before()
    go_on = f"go on with --resume_from_checkpoint --output_dir {output_dir}"
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except (NonFiniteError, OutOfMemoryError) as error:
        say(config, f"error: {error}")
        return 1
    except KeyboardInterrupt:
        if not trainer.interrupted:  # the second one, which did not wait for the step to be saved
            newest = checkpoints.latest(output_dir)
            saved = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
            say(config, f"stopped at once, {saved}; {go_on}")
            return 128 + signal.SIGINT
    if trainer.interrupted:
        say(config, f"stopped after step {trainer.state.global_step}; {go_on}")
        return 128 + (trainer.stopped_by or signal.SIGTERM)
    trainer.save_model()
    if held_out:
        evaluate_last(trainer)
    if report:
        report.ask_after()
    what = "adapter" if is_adapted(trainer.model) else "model"
    if adapter.merge_adapter:
        trainer.save_merged(output_dir / "merged")
        what += " (merged: the whole model)"
    if report:
        show_end(report, f"{what}, tokenizer", output_dir)
    return 0


def plan_in(folder: Path, script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig) -> int:
    """`--plan`: of the longest batch of the data, or of a pair of given lengths; no weights are loaded.

    Args:
        folder: for what bad lines leave behind, and for plan.json and plan.png where an output folder was named.
    """
    names, config.output_dir = names_output(config), str(folder)
    check_sources(script)
    find_models(script)
    train, example = None, make_small_model(EXAMPLE) if script.start is None else None
    if script.data_path is not None or example is not None:
        tokenizer = prepare_tokenizer(script, example[1] if example else None, config.loss_options.needs_reference)
        train, _ = load_pairs(
            script, config, tokenizer, choose_max_length(script, example[0].config if example else None)
        )
    return show_plan(script, adapter, config, train, names, example[0].config if example else None)


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


def load_models(script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, example: Any) -> tuple[Any, Any]:
    """Policy and reference; the example's small ones where no weights are named. The reference is None where the loss
    has none, and where the policy has an adapter and starts from it: then it is its own."""
    name, second = script.start, has_second_model(script, adapter, config)
    if name is None:
        return example, copy.deepcopy(example) if second else None
    tp = config.tp_size
    policy = load(script, adapter, name, config.device, is_trainable=True, tp_size=tp)
    return policy, load(script, adapter, script.ref_weight or name, config.device, tp_size=tp) if second else None


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
