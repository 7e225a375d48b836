"""A command line as names and values, and as dataclasses: every mistake is one sentence that names the option."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dpo_kernels.commands.endings import OptionError
from dpo_kernels.commands.simple import EXPECTED, sentence
from dpo_kernels.losses import LOSSES
from dpo_kernels.training.config import RESTRICTED

# What people call options that have other names.
MEANT = {
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "lr": "learning_rate", "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "model": "ref_weight", "ref_model": "ref_weight", "data": "data_path",
    "dataset": "data_path", "output": "output_dir", "out": "output_dir", "resume": "resume_from_checkpoint",
    "loss": "loss_type", "lora": "use_peft", "seq_length": "max_length", "max_seq_length": "max_length",
    "gradient_accumulation": "gradient_accumulation_steps",
}  # fmt: skip
Given = dict[str, list[str]]  # an option's name, without dashes -> what stands behind it


class Arguments(HfArgumentParser):
    """`HfArgumentParser` that raises one sentence, and knows what a misspelled option was meant to be."""

    def __init__(self, types: Sequence[Any]) -> None:
        super().__init__(types, add_help=False, allow_abbrev=False)

    def dataclasses(self, given: Given) -> tuple[Any, ...]:
        """
        Raises:
            OptionError: an option that does not exist, a value of another kind.
            ValueError: a value out of range.
        """
        for name in given:
            self.check_name(name)
        *made, rest = self.parse_args_into_dataclasses(
            args=as_argv(given), look_for_args_file=False, return_remaining_strings=True
        )
        if rest:
            raise OptionError(
                f"{rest[0]}: not expected here; an option takes one value, and a file of options stands alone"
            )
        return tuple(made)

    @property
    def names(self) -> list[str]:
        """Of all options, those that are refused left out."""
        found = (action.option_strings[0].removeprefix("--") for action in self._actions)
        return [name for name in found if not name.startswith("no_") and name not in RESTRICTED]

    def action(self, name: str) -> argparse.Action:
        """Of an option; `help` has its text, `default` its default."""
        return self._option_string_actions[f"--{name}"]

    def said(self, name: str) -> str:
        """The help of an option: what it does, its choices and its default."""
        action = self.action(name)
        text = " ".join((action.help or "").split())
        if action.choices is not None:
            text += f" One of {', '.join(map(str, action.choices))}."
        if name == "loss_type":
            text += f" They are {', '.join(LOSSES)}."
        if action.default not in (None, "", False) and "default" not in text.lower():
            text += f" Default: {action.default}."
        return text

    def check_name(self, name: str, among: Sequence[str] | None = None) -> None:
        """
        Args:
            among: the names that there are; None: all of the parser.

        Raises:
            OptionError: there is no such option; names the nearest.
        """
        known = self.names if among is None else among
        if name not in known if among is not None else f"--{name}" not in self._option_string_actions:
            raise OptionError(f"--{name}: no such option{did_you_mean(name, known)}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            expected = EXPECTED.get(getattr(action.type, "__name__", ""), "another kind of value")
            raise OptionError(f"{action.option_strings[0]} is {arg_string!r}; expected {expected}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = ", ".join(map(str, action.choices))
            raise OptionError(f"{action.option_strings[0]} is {value!r}; expected one of {names}")

    def error(self, message: str) -> NoReturn:
        raise OptionError(sentence(message))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names as a question; nothing where none is near."""
    if (meant := MEANT.get(name)) in known:
        return f"; did you mean --{meant}?"
    if not name:
        return "; see --help"
    begin = sorted((other for other in known if other.startswith(name)), key=len)
    near = begin or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [other for other in known if len(name) > 3 and name in other]
    return f"; did you mean --{near[0]}?" if near else "; see --help"


def as_given(argv: Sequence[str]) -> Given:
    """Names and values of a command line; a name's second mention counts.

    Raises:
        OptionError: a value stands before all names.
    """
    given: Given = {}
    name = ""
    for part in argv:
        if part.startswith("--"):
            name, equals, value = part[2:].partition("=")
            name = name.replace("-", "_")
            given.pop(name, None)  # it stands where it was named last
            given[name] = [value] if equals else []
        elif name:
            given[name].append(part)
        else:
            raise OptionError(f"{part}: a value without an option; options begin with --, as in --data_path {part}")
    return given


def as_argv(given: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line that `as_given` reads."""
    argv: list[str] = []
    for name, values in given.items():
        is_dashed = len(values) == 1 and values[0].startswith("-")
        argv += [f"--{name}={values[0]}"] if is_dashed else [f"--{name}", *values]
    return argv


def read_options(path: Path) -> dict[str, Any]:
    """The options of a .json or .yaml file.

    Raises:
        FileNotFoundError: there is none.
        OptionError: it holds something else.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:  # yaml's own, of which it has several
        raise OptionError(f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise OptionError(f"{path} holds {type(values).__name__}; expected options as names and values")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def from_values(values: Mapping[str, Any]) -> Given:
    """Options of a file as a command line gives them; null leaves an option at its default."""
    given: Given = {}
    for name, value in values.items():
        if value is not None:
            parts = value if isinstance(value, list) else [value]
            given[name] = [json.dumps(part) if isinstance(part, dict) else str(part) for part in parts]
    return given
