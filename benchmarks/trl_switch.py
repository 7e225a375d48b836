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
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TRAINERS = ("dpo", "kto", "grpo", "rloo")
SIDES = ("TRL", "enabled")


def run(
    trainer: str,
    enabled: bool,
    model: str,
    data_path: str,
    steps: int,
    batch: int,
    length: int,
    memory_budget: int | None = None,
) -> dict[str, Any]:
    """Trains; the log's losses and gradient norms, seconds of each step, peak resident MiB."""
    from transformers import TrainerCallback

    from dpo_kernels.integrations.trl import enable

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    with (
        tempfile.TemporaryDirectory() as folder,
        enable(memory_budget=memory_budget) if enabled else contextlib.nullcontext(),
    ):
        made = make_trainer(trainer, folder, model, data_path, steps, batch, length)
        made.add_callback(Clock())
        made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in logs], "grad_norm": [entry["grad_norm"] for entry in logs],
        "seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def make_trainer(trainer: str, folder: str, model: str, data_path: str, steps: int, batch: int, length: int) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    common = {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 1e-4,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False, "seed": 0,
    }  # fmt: skip
    pairs = [json.loads(line) for line in Path(data_path).read_text(encoding="utf-8").splitlines()]
    pairs = [pair for pair in pairs if sum(len(m["content"]) for m in pair["chosen"]) < 4 * length][: 2 * steps * batch]
    answers = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
    prompts = [{"prompt": pair["chosen"][:-1]} for pair in pairs]
    sampled = {"num_generations": batch, "max_completion_length": 16, "beta": 0.04}
    choices: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "dpo": (pairs, {"max_length": length}),
        "kto": (
            [{"prompt": pair[side][:-1], "completion": pair[side][-1:], "label": side == "chosen"}
             for pair, side in answers],
            {"max_length": length},
        ),
        "grpo": (prompts, sampled),
        "rloo": (prompts, sampled),
    }  # fmt: skip
    rows, options = choices[trainer]
    more = {"reward_funcs": _distinct_letters} if rows is prompts else {"ref_model": reference}
    name = trainer.upper()
    return getattr(trl, f"{name}Trainer")(
        model=policy, args=getattr(trl, f"{name}Config")(**common, **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), **more,
    )  # fmt: skip


def _distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(c[0]["content"]))) for c in completions]


def child(trainer: str, side: str, steps: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "benchmarks.trl_switch", *sys.argv[1:], "--one", trainer, "--side", side, "--steps",
        str(steps),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{trainer}, {side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(trainer: str, rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Curves and peak of the first round; seconds of each round, without a run's first step."""
    trl, ours = (rounds[0][side] for side in SIDES)
    print(f"\n{trainer.upper()}Trainer\n\n| step | loss, TRL | loss, enabled | grad norm, TRL | grad norm, enabled |")
    print("|---|---|---|---|---|")
    columns = (trl["loss"], ours["loss"], trl["grad_norm"], ours["grad_norm"])
    for step, row in enumerate(zip(*columns, strict=True), 1):
        print(f"| {step} | " + " | ".join(f"{float(x):.6g}" for x in row) + " |")
    apart = max(abs(float(a) - float(b)) for a, b in zip(trl["loss"], ours["loss"], strict=True))
    print(f"\nlargest difference of the loss {apart:.1e}")
    for side in SIDES:
        print(f"{side}: peak {rounds[0][side]['peak_mib']:,.0f} MiB resident")
    for number, made in enumerate(rounds, 1):
        seconds = {side: made[side]["seconds"][1:] or made[side]["seconds"] for side in SIDES}
        medians = [statistics.median(seconds[side]) for side in SIDES]
        said = "; ".join(f"{side} {m:.2f} ({min(s):.2f} to {max(s):.2f})"
                         for (side, s), m in zip(seconds.items(), medians, strict=True))  # fmt: skip
        print(f"round {number}, seconds a step, median: {said}; enabled / TRL {medians[1] / medians[0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory_budget", type=int, help="of enable(), in bytes")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        random.seed(0)
        enabled = a.side == "enabled"
        print(json.dumps(run(a.one, enabled, a.model, a.data_path, a.steps, a.batch, a.length, a.memory_budget)))
        return
    for trainer in a.trainers:
        rounds = [(a.steps, SIDES), (min(a.steps, 6), SIDES[::-1])] if trainer == "dpo" else [(2, SIDES)]
        report(trainer, [{side: child(trainer, side, steps) for side in order} for steps, order in rounds])


if __name__ == "__main__":
    main()
