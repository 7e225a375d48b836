"""The memory of a run by its plan beside what a process really holds, for runs of many kinds on the CPU.

python -m benchmarks.run_memory                  all of RUNS; exit status 1 where a plan is off by more than it may be
python -m benchmarks.run_memory --only llama     those whose name has it
python -m benchmarks.run_memory --json FILE      with the parts of each

A run is a process of its own: it makes its plan before it has a model, then trains two steps of pairs of one length,
and reports the most that was resident (VmHWM), from its first import to its end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ABOVE, BELOW = 0.10, 0.05  # what a plan may be off, of what is measured
LLAMA = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 32_768,
         "tie_word_embeddings": False}  # fmt: skip
QWEN3 = {"vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 40_960,
         "tie_word_embeddings": True}  # fmt: skip
GPT2 = {"vocab_size": 50_257, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 4096}
GEMMA2 = {"vocab_size": 64_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4,
          "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 1024,
          "max_position_embeddings": 8192}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA), "qwen3": ("Qwen3", QWEN3), "gpt2": ("GPT2", GPT2), "gemma2": ("Gemma2", GEMMA2),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """kind: of KINDS. pair: tokens of prompt and both answers. pairs: a batch. options: of `DPOConfig`. lora: rank."""

    name: str
    kind: str
    pair: tuple[int, int, int]
    pairs: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    lora: int = 0
    dtype: str = "float32"


RUNS = (
    Run("llama, short", "llama", (128, 128, 128), 4),
    Run("llama, padded", "llama", (128, 384, 256), 4, {"layout": "padded"}),
    Run("llama, long", "llama", (512, 1536, 1536)),
    Run("llama, long, checkpointed", "llama", (512, 3584, 3584), options={"gradient_checkpointing": True}),
    Run("llama, answer by answer", "llama", (256, 1792, 1792), options={"answers_at_once": 1}),
    Run("llama, answer by answer, checkpointed", "llama", (256, 3840, 3840),
        options={"answers_at_once": 1, "gradient_checkpointing": True}),
    Run("llama, tiles", "llama", (256, 3840, 3840), options={"mlp_tiles": "auto", "gradient_checkpointing": True}),
    Run("llama, all parts", "llama", (256, 3840, 3840), options={
        "mlp_tiles": "auto", "gradient_checkpointing": True, "answers_at_once": 1, "memory_budget": "128MiB"}),
    Run("llama, LoRA", "llama", (256, 768, 512), 2, lora=16),
    Run("llama, LoRA, checkpointed", "llama", (256, 768, 768), 2, {"gradient_checkpointing": True}, lora=16),
    Run("llama, bfloat16 weights", "llama", (256, 768, 768), 2, {"gradient_checkpointing": True}, dtype="bfloat16"),
    Run("llama, products in bfloat16", "llama", (256, 768, 768), 2, {"bf16": True}),
    Run("llama, accumulated", "llama", (256, 768, 768), 2, {"gradient_accumulation_steps": 2}),
    Run("llama, no reference", "llama", (256, 768, 768), 2, {"loss_type": ["simpo"]}),
    Run("qwen3, default budget", "qwen3", (128, 256, 384), 4),
    Run("qwen3, budget of 256 MiB", "qwen3", (128, 256, 384), 4, {"memory_budget": "256MiB"}),
    Run("qwen3, long prompt", "qwen3", (3072, 256, 256), 1, {"memory_budget": "256MiB"}),
    Run("qwen3, SGD, LoRA", "qwen3", (256, 768, 768), 1, {"optim": "sgd"}, lora=8),
    Run("gpt2", "gpt2", (128, 384, 384), 4),
    Run("gemma2", "gemma2", (256, 768, 768), 2, {"gradient_checkpointing": True}),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints a line a run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside is not None:
        print(json.dumps(_inside(RUNS[options.inside])))
        return 0
    found, wrong = [], 0
    for number, run in enumerate(RUNS):
        if options.only not in run.name:
            continue
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.run_memory", "--inside", str(number)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{run.name:<40} failed: {(done.stderr.strip().splitlines() or [''])[-1]}", flush=True)
            wrong += 1
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        off = row["planned"] / row["measured"] - 1
        is_wrong = not -BELOW <= off <= ABOVE
        wrong += is_wrong
        sizes = f"{row['planned'] / 2**20:>8,.0f} {row['measured'] / 2**20:>8,.0f} MiB {off:>+7.1%}"
        print(f"{run.name:<40} {sizes}{'  OFF' if is_wrong else ''}", flush=True)
        found.append({"name": run.name, **row})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong))


def _inside(run: Run) -> dict[str, Any]:
    import torch
    import transformers

    from dpo_kernels.training import DPOConfig, DPOTrainer
    from dpo_kernels.training.memory.device_memory import keep_compact
    from dpo_kernels.training.memory.pairs import made_pairs
    from dpo_kernels.training.memory.step_memory import StepOptions

    name, sizes = KINDS[run.kind]
    config = getattr(transformers, f"{name}Config")(**sizes)
    dtype = getattr(torch, run.dtype)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=run.pairs, max_steps=2, save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_steps=10, report_to=[], **run.options,
        )  # fmt: skip
        lora = _lora(run.lora)
        pairs = made_pairs(*run.pair, run.pairs)
        keep_compact()  # as train.py does where memory is short
        fake = fake_run(config, args, run.pair, dtype, lora)
        plan, layout, has_reference = fake.step(pairs, StepOptions.of(args)), fake.layout, fake.reference is not None
        del fake
        items = [{key: tensor[0] for key, tensor in pairs.items()}] * (
            2 * run.pairs * args.gradient_accumulation_steps)  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        second = None
        if has_reference:
            second = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            second.load_state_dict(model.state_dict())
        trainer = DPOTrainer(model, second, args, items, peft_config=lora)
        assert trainer.layout == layout, (trainer.layout, layout)
        trainer.train()
    return {"planned": plan.bytes, "measured": most_resident(), "parts": dict(plan.parts)}


def fake_run(config: Any, args: Any, pair: tuple[int, int, int], dtype: Any, lora: Any = None) -> Any:
    """The `FakeRun` of a run in this process on its CPU, whose pairs all have these lengths.

    Args:
        config: of transformers. args: `DPOConfig`. dtype: of the weights. lora: `LoraConfig`.
    """
    import torch

    from dpo_kernels.training.layout_check import expected
    from dpo_kernels.training.layouts import PairTokens
    from dpo_kernels.training.memory.device_memory import CPU_LIBRARIES, held
    from dpo_kernels.training.memory.fake_models import fake_mode, make_fake
    from dpo_kernels.training.memory.optimizers import name_of
    from dpo_kernels.training.memory.step_memory import FakeRun

    libraries = held(torch.device("cpu")) + CPU_LIBRARIES
    mode = fake_mode()
    policy = make_fake(mode, config, dtype, peft_config=lora, memory_budget=args.memory_budget_bytes)
    has_reference = args.loss_options.needs_reference and lora is None
    reference = make_fake(mode, config, dtype, memory_budget=args.memory_budget_bytes) if has_reference else None
    layout = expected(
        policy, args.layout, [PairTokens(*pair)], args.per_device_train_batch_size,
        answers_at_once=args.answers_at_once, is_checkpointed=bool(args.gradient_checkpointing), device=args.device,
    )  # fmt: skip
    return FakeRun(
        mode, policy, reference, layout, scores=args.loss_options.needs_reference,
        mixed_precision=torch.bfloat16 if args.bf16 else None, optimizer=name_of(args),
        accumulates=args.gradient_accumulation_steps > 1, libraries=libraries,
    )  # fmt: skip


def most_resident() -> int:
    """Bytes: the most that was ever resident of this process (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _lora(rank: int) -> Any:
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")


if __name__ == "__main__":
    sys.exit(main())
