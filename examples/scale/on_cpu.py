"""Runs train.py with CPUs in the place of GPUs: to try a recipe of this folder on a small model, where there is none.

    torchrun --nproc_per_node 2 examples/scale/on_cpu.py OPTIONS        as train.py OPTIONS
    accelerate launch --config_file examples/scale/fsdp2.yaml examples/scale/on_cpu.py OPTIONS

accelerate knows FSDP, DeepSpeed and meshes for GPUs alone, and makes DDP of them on CPUs. Here it is told that a
process with CPUs is one with a GPU, whose messages go by gloo. The numbers are those of GPUs in float32; the speed says
nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # read by accelerate where it chooses a device
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")


def take_cpus_for_gpus() -> None:
    """Before anything of accelerate is made: from now on its processes have CPUs for devices."""
    from accelerate.state import DistributedType, PartialState

    def backend(self: PartialState, *args: object, **options: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend


def main(argv: list[str]) -> int:
    take_cpus_for_gpus()
    from dpo_kernels.commands.main import run

    return run("train", argv, program="on_cpu.py")


if __name__ == "__main__":
    from dpo_kernels.commands import endings

    endings.last_act(lambda: main(sys.argv[1:]))
