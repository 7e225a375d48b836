"""Aligns a Hugging Face causal language model with preference pairs (DPO); the same as `dpo-kernels train`.

    python train.py                                   a small example on the CPU, made on the spot
    python train.py --data_path dpo.jsonl --ref_weight MODEL --output_dir OUT
    torchrun --nproc_per_node 8 train.py ...          or accelerate launch train.py ...

Pairs are read as they were downloaded: JSON lines, JSON, CSV, Parquet, folders, saved datasets, names on the hub, in
the formats of TRL, LLaMA-Factory, ms-swift, axolotl, torchtune, NeMo-RL and HH-RLHF (docs/data.md). All options of
transformers.TrainingArguments work too; `python train.py --help` lists them.
"""

from __future__ import annotations

import sys

from dpo_kernels.commands import endings
from dpo_kernels.commands.main import run


def main(argv: list[str] | None = None) -> int:
    """Trains, and returns the exit status; errors are raised. See `dpo_kernels.commands.train.main`."""
    from dpo_kernels.commands.train import main as train

    return train(argv)


if __name__ == "__main__":
    endings.last_act(lambda: run("train", sys.argv[1:], program="train.py"))
