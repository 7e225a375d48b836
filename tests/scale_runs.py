"""The recipes of examples/scale on CPUs with small models, held to one process: `make scale` writes the table.

Usage: python tests/scale_runs.py [--models Llama Qwen3] [--ways ddp fsdp2 ...]

Each way trains 10 steps and saves at the fifth; then another number of processes goes on from there. Compared with one
process: the first loss with log 2, the losses of all steps, and the weights at the end, of both runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from dpo_kernels.training.small_model import make_small_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "scale"
EXAMPLE = ROOT / "examples" / "dpo.jsonl"
PAIRS = 4  # of a step, whoever reads them
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@dataclass(frozen=True)
class Way:
    """A recipe as it is run: by so many processes, of which `readers` read pairs of their own; then by others."""

    script: str
    processes: int = 2
    readers: int = 2
    then: tuple[int, int] = (4, 4)  # processes and readers that go on
    then_script: str = ""  # another recipe; "": the same
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def can_run(self) -> bool:
        return self.script != "zero.sh" or HAS_DEEPSPEED


LORA = ("--use_peft", "true", "--layout", "shared", "--lora_r", "4")
WAYS = {
    "ddp": Way("ddp.sh", then=(1, 1)),
    "fsdp2, sharded": Way("fsdp2.sh"),
    "fsdp2, full": Way("fsdp2.sh", environment={"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "fsdp2, LoRA, shared rows": Way("fsdp2.sh", options=LORA),
    "fsdp2, precomputed": Way("fsdp2.sh", options=("--precompute_ref_log_probs", "true")),
    "context": Way("context.sh", readers=1, then=(4, 2)),
    "tensor": Way("tensor.sh", readers=1, then=(4, 2), then_script="two_dimensions.sh"),
    "ddp, then tensor": Way("ddp.sh", then=(2, 1), then_script="tensor.sh"),
    "2 x 2": Way("two_dimensions.sh", 4, 2, then=(2, 1)),
    "zero 2": Way("zero.sh", environment={"STAGE": "2"}),
    "zero 3": Way("zero.sh", environment={"STAGE": "3"}),
    "slurm": Way("slurm.sh", environment={"SRUN": "", "PORT": "0"}, then=(1, 1)),
}


def save_model(folder: Path, kind: str) -> Path:
    """A small model of a class of transformers, with the example's tokenizer."""
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, vocab_size=len(tokenizer), tie_word_embeddings=kind == "Qwen3", eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path, output: Path, readers: int, steps: int = 10, **more: object) -> list[str]:
    found = {
        "data_path": EXAMPLE, "ref_weight": model, "output_dir": output, "max_length": 96,
        "per_device_train_batch_size": PAIRS // readers, "max_steps": steps, "save_steps": steps // 2,
        "learning_rate": 1e-4, "adam_epsilon": 1e-6, "max_grad_norm": 0, "disable_tqdm": True, "report": False,
        "rehearsal": False,
    } | more  # fmt: skip
    return [part for name, value in found.items() for part in (f"--{name}", str(value))]


def recipe(script: str, processes: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A recipe, run on CPUs to its end."""
    own = {"CPU": "1", "PROCESSES": str(processes), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
           "CUDA_VISIBLE_DEVICES": "", **environment}  # fmt: skip
    return subprocess.run(
        ["bash", str(RECIPES / script), *arguments], env=os.environ | own, capture_output=True, text=True, timeout=600
    )


def alone(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """One process."""
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments, "--use_cpu", "true"], env=os.environ | own,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def losses(output: Path) -> dict[int, float]:
    """The loss of each step, by its number; of a step that was made twice the last."""
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next(output.glob("*model.safetensors")))


def difference(output: Path, one: Path) -> tuple[float, float]:
    """The largest of losses, and of weights."""
    own, others = losses(output), losses(one)
    assert own, "no step is in the log"
    assert own.keys() <= others.keys(), f"steps {sorted(own)}, and {sorted(others)} of one process"
    a, b = weights(output), weights(one)
    assert a.keys() == b.keys()
    of_losses = max(abs(own[step] - others[step]) for step in own)
    return of_losses, max((a[name] - b[name]).abs().max().item() for name in a)


@dataclass(frozen=True)
class Measured:
    first: float  # loss, less log 2
    losses: float
    weights: float
    then_losses: float
    then_weights: float

    @property
    def largest(self) -> float:
        return max(abs(self.first), self.losses, self.weights, self.then_losses, self.then_weights)


def measure(way: Way, model: Path, one: Path, folder: Path, steps: int = 10) -> Measured:
    """Runs a way, and goes on from the middle with other processes.

    Args:
        one: what one process has made with the same options.

    Raises:
        AssertionError: a run did not end well; says what it said.
    """
    first, second = folder / "first", folder / "second"
    made = options(model, first, way.readers, steps)
    _ended(recipe(way.script, way.processes, [*made, *way.options], **way.environment))
    second.mkdir()
    name = f"checkpoint-{steps // 2}"
    shutil.copytree(first / name, second / name)
    processes, readers = way.then
    made = [*options(model, second, readers, steps), *way.options, "--resume_from_checkpoint", "latest"]
    later = alone(made) if processes == 1 else recipe(
        way.then_script or way.script, processes, made, **way.environment
    )  # fmt: skip
    _ended(later)
    assert f"going on from {second / name}" in later.stdout, later.stdout
    return Measured(losses(first)[1] - math.log(2), *difference(first, one), *difference(second, one))


def _ended(done: subprocess.CompletedProcess[str]) -> None:
    said = f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, said
    assert "saved: " in done.stdout, said


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["Llama", "Qwen3"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS])
    given = parser.parse_args()
    print("| model | way | processes | first loss - log 2 | losses | weights | then | losses | weights |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|")
    failed = 0
    for kind in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"
            model, ones = save_model(Path(scratch, "model"), kind), {}
            for name in given.ways:
                way = WAYS[name]
                if not way.can_run:
                    print(f"| {kind} | {name} | not run: DeepSpeed is not installed | | | | | | |", flush=True)
                    continue
                if way.options not in ones:
                    ones[way.options] = Path(scratch, f"one{len(ones)}")
                    _ended(alone([*options(model, ones[way.options], 1), *way.options]))
                folder = Path(scratch, name.replace(" ", ""))
                folder.mkdir()
                try:
                    m = measure(way, model, ones[way.options], folder)
                except AssertionError as error:
                    failed += 1
                    print(f"| {kind} | {name} | {way.processes} | failed | | | | | |\n{error}", flush=True)
                    continue
                failed += m.largest > 1e-5
                print(f"| {kind} | {name} | {way.processes} | {m.first:.1e} | {m.losses:.1e} | {m.weights:.1e} | "
                      f"{way.then[0]} | {m.then_losses:.1e} | {m.then_weights:.1e} |", flush=True)  # fmt: skip
    print(f"{failed} beyond 1e-5" if failed else "all within 1e-5", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
