"""Command lines of the form DATA --model M [options], for what reads pairs as `train` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_kernels.commands.arguments import Arguments, as_given
from dpo_kernels.commands.endings import OptionError
from dpo_kernels.commands.help import row
from dpo_kernels.commands.options import ScriptArguments

# Options of `train` that mean nothing without training.
OF_TRAINING = {"data_path", "data_weights", "ref_weight", "from_weight", "eval_data_path", "eval_size", "show_pairs"}


def parse(argv: list[str], program: str, text: str, own: type) -> tuple[ScriptArguments, Any] | None:
    """How pairs are read, with --model as `start`, and the command's own options; None: the help was asked for.

    Args:
        text: what the command does.
        own: a dataclass, whose options come first in the help.

    Raises:
        OptionError: an option that does not exist, a value of another kind, DATA or --model missing.
    """
    parser = Arguments((own, ScriptArguments))
    known = ["model", *(name for name in parser.names if name not in OF_TRAINING)]
    if {"-h", "--help", "--help-all", "--help_all"} & set(argv):
        print(_help(parser, program, text, known))
        return None
    first = next((i for i, part in enumerate(argv) if part.startswith("--")), len(argv))
    given = as_given(argv[first:])
    for name in given:
        if name not in known:
            parser.check_name(name, among=known)
    if first == 0 or len(given.get("model", [])) != 1:
        raise OptionError(f"give DATA and --model, as in {program} pairs.jsonl --model MODEL")
    given["ref_weight"] = given.pop("model")
    options, script = parser.dataclasses({"data_path": argv[:first], **given})
    return script, options


def _help(parser: Arguments, program: str, text: str, known: Sequence[str]) -> str:
    lines = [f"usage: {program} DATA [DATA ...] --model MODEL [options]", "", text, ""]
    lines += row("DATA", "files, folders, org/name:split on the hub, in any format that train reads")
    lines += row("--model", "a model folder or hub name, an adapter's too")
    for name in known[1:]:
        lines += row(f"--{name}", parser.said(name))
    return "\n".join(lines)
