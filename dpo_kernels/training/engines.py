"""What shares a run out over devices (DDP, FSDP, DeepSpeed): what was asked for, and what accelerate makes of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, ParallelismConfig
from accelerate.utils.operations import recursively_apply

from dpo_kernels.training.output_head import below_adapters
from dpo_kernels.training.sequence_parallel import Split

ON_CPUS = (DistributedType.NO, DistributedType.MULTI_CPU)  # where accelerate knows DDP alone
# Sizes that accelerate launch hands over: NAME_SIZE of the environment, after this.
PREFIX = "PARALLELISM_CONFIG_"
SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")


class EngineError(ValueError):
    """A run was asked to be shared out in a way in which it would not be."""


def asked_for(args: Any) -> str:
    """What the options of a run, or what launched it, ask for: "FSDP", "DeepSpeed", "Megatron-LM", or "" for DDP.

    Args:
        args: `TrainingArguments`.
    """
    if getattr(args, "fsdp_plugin_args", None) is not None or _is_on("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if getattr(args, "deepspeed_plugin", None) is not None or _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return "Megatron-LM" if _is_on("ACCELERATE_USE_MEGATRON_LM") else ""


def sizes_asked_for(args: Any) -> dict[str, int]:
    """The sizes of a mesh of devices that are not 1, from `parallelism_config` or what launched the run."""
    config = getattr(args, "parallelism_config", None)
    if getattr(args, "tp_size", 1) > 1:
        return {"tp_size": args.tp_size}
    if config is None and not _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return {}
    found = {
        name: getattr(config, name) if config is not None else int(os.environ.get(PREFIX + name.upper(), "1"))
        for name in SIZES
    }
    return {name: size for name, size in found.items() if size not in (None, 1)}


def check_asked(args: Any) -> None:
    """Before anything is loaded: whether accelerate will do here what it is asked for.

    Raises:
        EngineError: it would run something else, and not say so.
    """
    asked, sizes = asked_for(args), sizes_asked_for(args)
    if asked == "Megatron-LM":
        raise EngineError("this run was launched for Megatron-LM, which is not supported; use FSDP2 or DeepSpeed")
    kind = args.distributed_state.distributed_type if getattr(args, "distributed_state", None) is not None else None
    if asked and getattr(args, "tp_size", 1) > 1:
        raise EngineError(
            f"tp_size is {args.tp_size}, and {asked} was asked for: with tp_size the model is loaded in parts, and "
            "sharded by FSDP2 where there are more processes; leave out the config of accelerate launch, --fsdp and "
            "--deepspeed, and start it with torchrun"
        )
    what = asked or "a mesh of devices (" + ", ".join(f"{name} {size}" for name, size in sizes.items()) + ")"
    if kind not in ON_CPUS or not (asked or sizes):
        return
    if kind == DistributedType.MULTI_CPU:
        raise EngineError(
            f"{what} was asked for, and this run is on CPUs, where accelerate runs DDP in its place: every process "
            "would hold the whole model. Leave out use_cpu where there are GPUs, or leave out what asks for it: the "
            "config of accelerate launch, --fsdp, --deepspeed, --parallelism_config. To try a recipe on CPUs: "
            "examples/scale/on_cpu.py"
        )
    raise EngineError(
        f"{what} was asked for, and this is a run of one process without a launcher, which accelerate would train "
        "without it; start it with torchrun --nproc_per_node N, or with accelerate launch, or leave it out"
    )


def check_runs_as(asked: str, accelerator: Accelerator) -> None:
    """
    Raises:
        EngineError: accelerate runs something else than was asked for.
    """
    kind = accelerator.distributed_type
    runs = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}.get(kind, "")
    if runs != asked:
        raise EngineError(
            f"{asked or 'DDP'} was asked for, and accelerate runs {runs or f'something else ({kind.value})'}; check "
            "the config of accelerate launch, and --fsdp, --deepspeed and use_cpu"
        )


def read_parallelism(given: Any) -> ParallelismConfig | None:
    """accelerate's `ParallelismConfig` from itself, a dict, JSON, or the name of a JSON file.

    Raises:
        ValueError: it is no JSON object, or holds what accelerate does not know.
    """
    if given is None or isinstance(given, ParallelismConfig):
        return given
    values = given
    if isinstance(given, str):
        try:
            values = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"parallelism_config is {given[:80]!r}, which is no JSON and no file of it ({error}); expected "
                f'\'{{"cp_size": 2, "dp_shard_size": 2}}\''
            ) from error
    known = {field.name for field in fields(ParallelismConfig)}
    if not isinstance(values, dict) or (unknown := values.keys() - known):
        wrong = type(values).__name__ if not isinstance(values, dict) else ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"parallelism_config holds {wrong}; expected an object with some of {', '.join(SIZES)}")
    try:
        return ParallelismConfig(**values)
    except TypeError as error:
        raise ValueError(f"parallelism_config is {values}: {error}") from error


@dataclass(frozen=True)
class Ranks:
    """How the processes of a run share the pairs of a step.

    processes: all. copies: so many neighbours read the same pairs (tensor and context parallel).
    """

    processes: int
    copies: int = 1

    @property
    def readers(self) -> int:
        """Processes, or groups of them, that read pairs of their own."""
        return self.processes // self.copies

    def reader(self, process: int) -> int:
        """Which of them a process belongs to."""
        return process // self.copies

    def one_of_each(self, gather: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A gather of tensors over all processes, as one that takes each group's rows once."""

        def once(given: Any) -> Any:
            return recursively_apply(
                lambda t: t.view(self.processes, -1, *t.shape[1:])[:: self.copies].flatten(0, 1), gather(given)
            )

        return gather if self.copies == 1 else once


def is_split_at_load(model: Any) -> bool:
    """Whether transformers has split a model over processes as it loaded it (tp_size)."""
    return bool(getattr(below_adapters(model), "is_distributed_loading_by_transformers", False))


def check_split_as_asked(args: Any, *models: Any) -> None:
    """
    Raises:
        EngineError: tp_size is asked for, and a model was not loaded so.
    """
    wanted = sizes_asked_for(args).get("tp_size", 1)
    for model in models if wanted > 1 else ():
        found = 1 if model is None else getattr(below_adapters(model), "_tp_size", None) or 1
        if model is not None and found != wanted:
            raise EngineError(
                f"tp_size is {wanted}, and {type(model).__name__} was loaded for {found}; it would be trained whole in "
                "each process. Name a model by --ref_weight, or load it with "
                f"from_pretrained(distributed_config=DistributedConfig(tp_size={wanted}))"
            )


def is_sharded_at_load(model: Any) -> bool:
    """Whether it has sharded it by FSDP2 besides."""
    return is_split_at_load(model) and (getattr(below_adapters(model), "_fsdp_size", None) or 1) > 1


def split_at_load(tp_size: int) -> Any:
    """For `from_pretrained(distributed_config=...)`: tp_size neighbours share each layer, and where there are more
    processes FSDP2 shards over the others.

    Raises:
        EngineError: processes that are no multiple of tp_size; a transformers that cannot.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes % tp_size:
        raise EngineError(f"tp_size is {tp_size}, and there are {processes} processes; start a multiple of {tp_size}")
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=tp_size, fsdp_size=processes // tp_size)
    except (ImportError, TypeError) as error:
        raise EngineError(
            f"tp_size needs a transformers that splits models as it loads them, 5.24 does ({error})"
        ) from error


def ranks_of(accelerator: Accelerator, model: Any) -> Ranks:
    mesh = accelerator.parallelism_config
    tp = max(getattr(below_adapters(model), "_tp_size", None) or 1, 1 if mesh is None else mesh.tp_size)
    return Ranks(accelerator.num_processes, tp * (1 if mesh is None else mesh.cp_size))


def split_of(accelerator: Accelerator) -> Split | None:
    """How rows are split over processes; None: they are not.

    Raises:
        EngineError: sequences are asked to be split in a way that is not here.
    """
    mesh = accelerator.parallelism_config
    if mesh is None or (mesh.cp_size == 1 and mesh.sp_size == 1):
        return None
    if mesh.sp_size > 1:
        raise EngineError(
            f"sp_size is {mesh.sp_size}: DeepSpeed's way to split sequences (Ulysses) takes batches of one sequence "
            "alone, not of pairs; split them with FSDP2 and --parallelism_config '{\"cp_size\": N}'"
        )
    return Split(accelerator.torch_device_mesh["cp"].get_group())


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
