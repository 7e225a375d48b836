"""DeepSpeed's checkpoints, gone on from with another number of processes.

ZeRO saves a part of the optimizer for each process, and loads them for as many alone. DeepSpeed's own converter makes
its "universal" form of them, which fits any number; it is put beside the parts, once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dpo_kernels.training.checkpoints import CheckpointError
from dpo_kernels.warn import warn

LATEST = "latest_universal"  # DeepSpeed's name of the file that names the folder
UNIVERSAL = "_universal"
CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def parts_of(checkpoint: Path) -> int:
    """For how many processes a checkpoint of DeepSpeed's was saved; 0: it is none."""
    steps = [path for path in checkpoint.glob("global_step*") if not path.name.endswith(UNIVERSAL)]
    return sum(1 for path in steps for _ in path.glob("*zero_pp_rank_*_optim_states.pt"))


def is_for_others(checkpoint: str | os.PathLike[str], processes: int) -> bool:
    """Whether a checkpoint is in parts for another number of processes than now."""
    return parts_of(Path(checkpoint)) not in (0, processes)


def convert(checkpoint: str | os.PathLike[str]) -> None:
    """Puts the universal form beside the parts, unless it is there. Of the main process, while the others wait.

    Raises:
        CheckpointError: DeepSpeed's converter did not make it, as of an optimizer without Adam's moments.
    """
    folder = Path(checkpoint)
    if (folder / LATEST).is_file():
        return
    step = (folder / "latest").read_text(encoding="utf-8").strip()
    made = folder / "universal.part" / f"{step}{UNIVERSAL}"
    warn(f"{folder.name} is in {parts_of(folder)} parts: DeepSpeed's converter makes one of them for any number")
    shutil.rmtree(made.parent, ignore_errors=True)
    made.parent.mkdir()
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(folder / step), "--output_folder", str(made)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    done = subprocess.run([*command, *workers], capture_output=True, text=True, env=_alone())
    if done.returncode != 0 or not made.is_dir():
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise CheckpointError(
            f"{folder} is of {parts_of(folder)} processes, and DeepSpeed's converter for another number failed: {said};"
            " go on with as many processes as it was saved by (it knows optimizers of Adam's kind alone)"
        )
    shutil.rmtree(folder / made.name, ignore_errors=True)  # of a conversion that was killed
    made.replace(folder / made.name)
    shutil.rmtree(made.parent)
    (folder / LATEST).write_text(made.name, encoding="utf-8")  # last: with it the folder is there and whole


def load_universal(plugin: Any) -> None:
    """From now on the engine that is made from this `DeepSpeedPlugin` loads the universal form."""
    plugin.deepspeed_config["checkpoint"] = {**plugin.deepspeed_config.get("checkpoint", {}), "load_universal": True}


def give_back_groups(optimizer: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Gives an optimizer that ZeRO-3 has loaded the universal form into what it was saved with.

    DeepSpeed 0.19.8 gives each group of parameters the first one's settings, and all parameters one count of steps, a
    tensor that the optimizer then counts up once for each.

    Args:
        optimizer: accelerate's, or what it is around.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    folder = Path(checkpoint)
    file = folder / (folder / LATEST).read_text(encoding="utf-8").strip() / "zero" / "optimizer_state.pt"
    saved = torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"]["param_groups"]
    for group, own in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _alone() -> dict[str, str]:
    """An environment in which a process is none of a launcher's."""
    of_launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in of_launcher}
