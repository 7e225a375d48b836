"""The tables of docs/memory.md: what runs of known sizes hold on a GPU, by their plans. Nothing is measured here.

python -m benchmarks.memory_tables            models by tokens, a row as it comes; a quarter of an hour on one core
python -m benchmarks.memory_tables --limit    one pair of 2 x 32k on 80 GiB: each option, and the longest pair that fits
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, Qwen3Config

from dpo_kernels.training.layouts import Layout, PairTokens
from dpo_kernels.training.memory.device_memory import GPU_LIBRARIES
from dpo_kernels.training.memory.fake_models import fake_mode, make_fake, quantised_bytes
from dpo_kernels.training.memory.pairs import made_pairs
from dpo_kernels.training.memory.run_plan import longest_pair
from dpo_kernels.training.memory.step_memory import FakeRun, StepOptions

LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 2**20}
MODELS: dict[str, Any] = {
    "Qwen3 0.6B": Qwen3Config(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                              num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
                              max_position_embeddings=2**20),
    "Llama 3 8B": LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                              num_attention_heads=32, **LLAMA_3),
    "Llama 3 70B": LlamaConfig(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
                               num_attention_heads=64, **LLAMA_3),
}  # fmt: skip
WAYS = ("full", "LoRA", "QLoRA")
TOKENS = (4096, 32_768, 131_072)
PROMPT = 1024
LONG, LIMIT = 32_768, 80 * 2**30  # tokens of a sequence, and bytes of the device
BUDGET = 512 * 2**20
USUAL = StepOptions(gradient_checkpointing=True, memory_budget=BUDGET)
LOWEST = dataclasses.replace(USUAL, answers_at_once=1, activation_offloading=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", action="store_true")
    (limited if parser.parse_args(argv).limit else by_model)()


def by_model() -> None:
    """Models of three sizes, trained in three ways, at three lengths."""
    print("| model | trained | tokens of an answer with its prompt | weights and optimizer | checkpointed | "
          "answer by answer, offloaded | of it on the host |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, config in MODELS.items():
        for way in WAYS:
            run = make_run(config, way)
            for tokens in TOKENS:
                pairs = made_pairs(PROMPT, tokens - PROMPT, tokens - PROMPT)
                usual, lowest = run.step(pairs, USUAL), run.step(pairs, LOWEST)
                fixed = sum(usual.parts.get(part, 0) for part in ("weights", "reference", "adapters", "optimizer"))
                cells = [name, way, f"{tokens:,}", *(f"{size / 2**30:,.1f}" for size in (
                    fixed, usual.bytes, lowest.bytes, lowest.host))]  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


def limited() -> None:
    """Llama 3 8B with LoRA: what a step of one pair of 2 x 32k tokens holds, and the longest pair that fits."""
    config, shared = MODELS["Llama 3 8B"], Layout("shared", "branches")
    usual, narrow = make_run(config, "LoRA"), make_run(config, "LoRA", narrow=True)
    second = make_run(config, "LoRA", second=True)
    tiles = dataclasses.replace(USUAL, mlp_tiles="auto")
    of_prompt = dataclasses.replace(narrow, layout=shared)
    short, long = PairTokens(PROMPT, LONG - PROMPT, LONG - PROMPT), PairTokens(9 * LONG // 10, LONG // 10, LONG // 10)
    offloaded = dataclasses.replace(tiles, activation_offloading=True)
    rows = (
        ("without gradient checkpointing", usual, short, dataclasses.replace(USUAL, gradient_checkpointing=False)),
        ("a second model as reference", second, short, USUAL),
        ("the adapter as its own reference", usual, short, USUAL),
        ("`--answers_at_once 1`", usual, short, dataclasses.replace(USUAL, answers_at_once=1)),
        ("in their place, adapters in bfloat16", narrow, short, USUAL),
        ("and `shared`, 90% of the tokens a prompt", of_prompt, long, USUAL),
        ("and `--mlp_tiles auto`", of_prompt, long, tiles),
        ("and `--activation_offloading`", of_prompt, long, offloaded),
    )
    print("| | a step, GiB | on the host | longest pair that fits, tokens of a sequence |\n|---|---:|---:|---:|")
    for name, run, shape, options in rows:
        memory = run.step(made_pairs(*shape), options)
        longest = longest_pair(run, shape, options, LIMIT, None)
        most = "none" if longest is None else f"{max(longest.sequences):,}"
        print(f"| {name} | {memory.bytes / 2**30:,.1f} | {memory.host / 2**30:,.1f} | {most} |", flush=True)


def make_run(config: Any, way: str, second: bool = False, narrow: bool = False) -> FakeRun:
    """A run of a model on a GPU: float32 weights with products in bfloat16 and a second model; or a LoRA of rank 16 on
    all linear layers, over bfloat16 weights or such of 4 bits.

    Args:
        second: whether an adapter's reference is a model of its own. narrow: whether it is of bfloat16 too.
    """
    mode = fake_mode()
    lora = None if way == "full" else LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    dtype = torch.float32 if way == "full" else torch.bfloat16
    policy = make_fake(mode, config, dtype, peft_config=lora, memory_budget=BUDGET)
    if narrow:
        _narrow(mode, policy)
    reference = make_fake(mode, config, dtype, memory_budget=BUDGET) if way == "full" or second else None
    run = FakeRun(
        mode, policy, reference, Layout("bucketed"), device=torch.device("cuda"), libraries=GPU_LIBRARIES,
        mixed_precision=torch.bfloat16 if way == "full" else None,
    )  # fmt: skip
    if way == "QLoRA":
        run.quantised = quantised_bytes(policy, "load_in_4bit", False, 2)
    return run


def _narrow(mode: Any, policy: Any) -> None:
    with mode:
        for module in policy.modules():
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=torch.bfloat16))


if __name__ == "__main__":
    main()
