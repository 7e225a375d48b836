"""A `trl dpo` command line or YAML file as ours: what each option of TRL 1.16 is here, and why some are nothing.

What is in no table has TRL's name and meaning here too. docs/coming-from.md has a row for each option, made of TRL's
own fields and these tables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_kernels.commands.arguments import Given
from dpo_kernels.commands.endings import OptionError
from dpo_kernels.training import sources
from dpo_kernels.training.config import RESTRICTED

# TRL's name -> what it is here, in words; `translated` does it.
RENAMED = {
    "model_name_or_path": "`--ref_weight`: policy and reference start from it",
    "dataset_name": "`--data_path NAME:SPLIT`",
    "dataset_config": "`--data_path NAME/CONFIG:SPLIT`",
    "dataset_train_split": "`--data_path NAME:SPLIT`",
    "dataset_test_split": "`--eval_data_path NAME:SPLIT`, where `--eval_strategy` evaluates",
    "padding_free": "`--layout packed`",
    "datasets": "`--data_path`, one source each; path, name, data_files and split are taken",
    "test_split_size": "`--eval_size`",
}
# TRL's name -> values that ask for nothing, and the reason why others are refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "dataset_streaming": ((False,), "a streamed dataset has no length, and its pairs no order to resume by"),
    "streaming": ((False,), "a streamed dataset has no length, and its pairs no order to resume by"),
    "ignore_bias_buffers": ((False,), "DDP's options do it: --ddp_broadcast_buffers false"),
    "lora_task_type": (("CAUSAL_LM",), "DPO trains causal language models alone"),
    "bnb_4bit_quant_storage": ((), "it is for FSDP with 4 bits, which has not been tried here"),
    "accelerate_config": ((), "start with accelerate launch --config_file FILE train.py ..."),
}  # fmt: skip
# Of one dataset in a file's `datasets`.
REFUSED_OF_DATASETS = {
    "data_dir": "give the folder as path",
    "columns": "columns that no format reads are left alone; --columns gives others their names",
    "fraction": "--data_weights draws from sources by weights, which is another rule",
}
NAMES = ("model_name_or_path", "dataset_name", "datasets")  # by which a command line is TRL's
# What TRL takes where nothing is said, and we do not: a TRL command line means it.
DEFAULTS: dict[str, str] = {
    "max_length": "1024", "truncation_mode": "keep_start", "assistant_turns": "last", "logging_steps": "10",
    "gradient_checkpointing": "true", "bf16": "true", "dtype": "float32",
}  # fmt: skip


def is_trl(given: Mapping[str, Any]) -> bool:
    """Whether a command line is TRL's."""
    return any(name in given for name in NAMES)


def check(given: Given) -> None:
    """
    Raises:
        OptionError: an option of TRL's that is nothing here; says why.
    """
    for name, (allowed, reason) in REFUSED.items():
        values = given.get(name, [])
        if name in given and [value.lower() for value in values or ["true"]] not in [[str(a).lower()] for a in allowed]:
            raise OptionError(f"--{name} {' '.join(values)} is refused: {reason}".replace("  ", " "))


def translated(given: Given, datasets: Any = None) -> Given:
    """Our options for TRL's; the others as they are, TRL's defaults where it has others than we.

    Args:
        datasets: the list of a file's `datasets`.

    Raises:
        OptionError: an option that is nothing here, or a dataset that names what is not taken.
    """
    check(given)
    is_theirs = is_trl(given) or bool(datasets)
    given = {name: values for name, values in given.items() if name not in REFUSED}
    own = {name: values for name, values in given.items() if name not in RENAMED}
    if "model_name_or_path" in given:
        _free(own, "ref_weight", "model_name_or_path")
        own["ref_weight"] = given["model_name_or_path"]
    evaluates = (given.get("eval_strategy") or ["no"])[0] != "no"
    if datasets:
        _free(own, "data_path", "datasets")
        own["data_path"] = [path for one in datasets for path in _of_mixture(one)]
        if "test_split_size" in given:
            own["eval_size"] = given["test_split_size"]
    elif "dataset_name" in given:
        _free(own, "data_path", "dataset_name")
        name, config = given["dataset_name"][0], (given.get("dataset_config") or [""])[0]
        splits = [(given.get(f"dataset_{part}_split") or [part])[0] for part in ("train", "test")]
        own["data_path"] = [_source(name, config, splits[0])]
        if evaluates and not own.keys() & {"eval_data_path", "eval_size"}:
            own["eval_data_path"] = [_source(name, config, splits[1])]
    if _is_on(given, "padding_free"):
        own["layout"] = ["packed"]
    if own.get("truncation_mode") == ["keep_end"]:
        raise OptionError(
            "--truncation_mode keep_end is refused: it cuts the beginning of prompt and answer together; keep_answer "
            "cuts the prompt's beginning alone, keep_start the answer's end"
        )
    if own.get("pad_to_multiple_of") == ["auto"]:
        del own["pad_to_multiple_of"]  # of a kind of device that nothing here has run on
    if is_theirs:
        defaults = DEFAULTS | {"bf16": "false"} if _is_on(own, "fp16") else DEFAULTS
        own = {name: [value] for name, value in defaults.items() if name not in own} | own
    return own


def table(fields: Mapping[str, Any], ours: Sequence[str]) -> str:
    """A row of Markdown for each option of TRL's: what it is here.

    Args:
        fields: TRL's dataclass fields by their names.
        ours: names of the options that there are here.
    """
    rows = ["| option of TRL 1.16 | here |", "|---|---|"]
    for name in fields:
        if name in RESTRICTED:
            allowed, reason = RESTRICTED[name]
            what = f"refused but for {' and '.join(f'`{value}`' for value in allowed)}: {reason}"
        elif name in REFUSED:
            allowed, reason = REFUSED[name]
            what = f"refused{' but for ' if allowed else ''}{' and '.join(f'`{value}`' for value in allowed)}: {reason}"
        elif name in RENAMED:
            what = RENAMED[name]
        elif name in ours:
            what = f"the same; with TRL's default, {DEFAULTS[name]}" if name in DEFAULTS else "the same"
        else:
            raise KeyError(f"{name} is an option of TRL's that no table has")
        rows.append(f"| `{name}` | {what} |")
    return "\n".join(rows)


def set_environment(values: Any) -> None:
    """The variables of a file's `env`.

    Raises:
        OptionError: it is no mapping.
    """
    if not isinstance(values, dict):
        raise OptionError(f"env is {values!r}; expected names and values")
    os.environ.update({str(name): str(value) for name, value in values.items()})


def _is_on(given: Given, name: str) -> bool:
    """Whether a switch is on; a bare one is."""
    return name in given and (given[name] or ["true"])[0].lower() in ("true", "1", "yes")


def _free(own: Given, ours: str, theirs: str) -> None:
    if ours in own:
        raise OptionError(f"give one of --{ours} and --{theirs}, which mean the same")


def _of_mixture(one: Any) -> list[str]:
    if not isinstance(one, dict) or "path" not in one:
        raise OptionError(f"datasets holds {one!r}; expected path: NAME, and split where it is not train")
    for name, reason in REFUSED_OF_DATASETS.items():
        if one.get(name) is not None:
            raise OptionError(f"datasets: {name} of {one['path']} is refused: {reason}")
    if unknown := sorted(one.keys() - {"path", "name", "data_files", "split", *REFUSED_OF_DATASETS}):
        raise OptionError(f"datasets: {one['path']} has {', '.join(unknown)}, which mean nothing")
    files = one.get("data_files")
    if isinstance(files, dict):
        files = files.get(one.get("split") or "train")
    if files is not None:
        return [files] if isinstance(files, str) else list(files)
    return [_source(str(one["path"]), str(one.get("name") or ""), str(one.get("split") or "train"))]


def _source(name: str, config: str, split: str) -> str:
    """As --data_path names it: a folder whose files tell no splits apart is all of it the split train, as in TRL."""
    path = Path(name)
    if path.is_file() or (path.is_dir() and split == "train" and split not in sources.splits_of(path)):
        return name
    return f"{name}/{config}:{split}" if config else f"{name}:{split}"
