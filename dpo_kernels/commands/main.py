"""`dpo-kernels COMMAND ...`: finds the command, and runs it so that it ends orderly. Imports nothing slow."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from typing import NoReturn

from dpo_kernels import __version__
from dpo_kernels.commands import endings

# Command -> what it does. Each is the module of its name in this folder, whose main(argv, program) gives the status.
COMMANDS = {
    "train": "align a model with preference pairs; without options a small example on the CPU",
    "plan": "what the head of a model, or of these sizes, will take: mode, tiles, products and bytes",
    "show": "pairs as a model sees them, the tokens that count in colour",
    "score": "log-probs, rewards and accuracy of a model on pairs, without training",
    "sample": "answers of a model",
    "compare": "answers of two models side by side, as before and after training",
    "env": "versions, devices, implementations and why one cannot run: what an issue report needs",
    "build": "build the C++ kernels ahead of time",
}
USAGE = f"""usage: dpo-kernels COMMAND [options]     (dpo_kernels {__version__})

{{commands}}

dpo-kernels COMMAND --help says what a command takes."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the command line names; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        return endings.ended("dpo-kernels", _print_commands)
    if argv[0] in ("-V", "--version"):
        print(f"dpo_kernels {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"dpo-kernels: {argv[0]}: no such command; {meant}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


def script() -> NoReturn:
    """`dpo-kernels` itself: `main`, and the end of the process."""
    endings.last_act(main)


def _print_commands() -> int:
    print(USAGE.format(commands="\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())), flush=True)
    return 0


def run(command: str, argv: list[str], program: str | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
        argv: what stands behind the command.
        program: who speaks; default: dpo-kernels COMMAND.
    """
    program = program or f"dpo-kernels {command}"
    endings.listen(program, endings.GO_ON if command == "train" else "")
    # Before torch starts its threads: threads that spin while they wait stall one another when something else needs a
    # core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = endings.as_sentence(program)
    module = f"dpo_kernels.commands.{command}"
    return endings.ended(program, lambda: importlib.import_module(module).main(argv, program))
