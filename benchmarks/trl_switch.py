"""TRL's trainers as they are, and with `dpo_kernels.integrations.trl.enable()`, on one model and one file of pairs.

    python -m benchmarks.trl_switch --model MODEL --data_path dpo.jsonl        a table on the screen

Each run is a process of its own, from the same seed: 20 steps of DPOTrainer with loss curve, seconds a step and peak
memory; two steps each of KTOTrainer, GRPOTrainer and RLOOTrainer, from equal policy and reference. DPOTrainer has a
second round, shorter and in the other order, for the seconds alone. The others' are one step's, and not for quoting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import markdown_table
from benchmarks.training import options_of

TRAINERS = ("dpo", "kto", "grpo", "rloo")
SIDES = ("TRL", "enabled")


def run(
    trainer: str, enabled: bool, model: str, data_path: str, steps: int, batch: int, length: int
) -> dict[str, list[float]]:
    """Trains; the log's losses and gradient norms, seconds of each step, peak resident MiB."""
    from transformers import TrainerCallback

    from dpo_kernels.integrations.trl import enable

    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock[-1] += time.perf_counter()

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # the trainer's log is not the table
        enable() if enabled else contextlib.nullcontext(),
    ):
        made = make_trainer(trainer, folder, model, data_path, steps, batch, length)
        made.add_callback(Clock())
        made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    told = {name: [float(entry[name]) for entry in logs] for name in ("loss", "grad_norm")}
    return told | {"seconds": clock, "peak_mib": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]}


def make_trainer(trainer: str, folder: str, model: str, data_path: str, steps: int, batch: int, length: int) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    pairs = [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines()]
    pairs = [pair for pair in pairs if sum(len(m["content"]) for m in pair["chosen"]) < 4 * length][: 2 * steps * batch]
    options: dict[str, Any] = {"max_length": length}
    more: dict[str, Any] = {"ref_model": reference}
    if trainer == "dpo":
        rows = pairs
    elif trainer == "kto":
        rows = [
            {"prompt": pair[side][:-1], "completion": pair[side][-1:], "label": side == "chosen"}
            for pair in pairs for side in ("chosen", "rejected")
        ]  # fmt: skip
    else:
        rows = [{"prompt": pair["chosen"][:-1]} for pair in pairs]
        options = {"num_generations": batch, "max_completion_length": 16, "beta": 0.04}
        more = {"reward_funcs": _distinct_letters}
    config = getattr(trl, f"{trainer.upper()}Config")(
        **options_of(torch.device("cpu"), folder), **options, max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=1e-4, logging_steps=1, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    return getattr(trl, f"{trainer.upper()}Trainer")(
        model=policy, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), **more
    )


def _distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(c[0]["content"]))) for c in completions]


def report(trainer: str, rounds: list[dict[str, dict[str, list[float]]]]) -> None:
    """Curves and peak of the first round; seconds of each round, without a run's first step."""
    names = ("step", "loss, TRL", "loss, enabled", "grad norm, TRL", "grad norm, enabled")
    trl, ours, *norms = (rounds[0][side][what] for what in ("loss", "grad_norm") for side in SIDES)
    curves = zip(trl, ours, *norms, strict=True)
    rows = ([str(step), *(f"{value:.6g}" for value in values)] for step, values in enumerate(curves, 1))
    print(f"\n{trainer.upper()}Trainer\n\n{markdown_table(names, rows)}")
    apart = max(abs(a - b) for a, b in zip(trl, ours, strict=True))
    print(f"\nlargest difference of the loss {apart:.1e}")
    for side in SIDES:
        print(f"{side}: peak {rounds[0][side]['peak_mib'][0]:,.0f} MiB resident")
    for number, made in enumerate(rounds, 1):
        seconds = {side: made[side]["seconds"][1:] or made[side]["seconds"] for side in SIDES}
        medians = {side: statistics.median(s) for side, s in seconds.items()}
        said = "; ".join(f"{side} {medians[side]:.2f} ({min(s):.2f} to {max(s):.2f})" for side, s in seconds.items())
        quotient = medians["enabled"] / medians["TRL"]
        print(f"round {number}, seconds a step, median: {said}; enabled / TRL {quotient:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data_path"):
        parser.add_argument(name, required=True)
    for name, default in (("--steps", 20), ("--batch", 2), ("--length", 256)):
        parser.add_argument(name, type=int, default=default)
    a = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for trainer in TRAINERS:
        rounds: list[dict[str, dict[str, list[float]]]] = []
        for steps, order in [(a.steps, SIDES), (min(a.steps, 6), SIDES[::-1])] if trainer == "dpo" else [(2, SIDES)]:
            rounds.append({})
            for side in order:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    job = pool.submit(run, trainer, side == "enabled", a.model, a.data_path, steps, a.batch, a.length)
                    rounds[-1][side] = job.result()
        report(trainer, rounds)


if __name__ == "__main__":
    main()
