"""`dpo-kernels COMMAND ...`: finds the command, and runs it so that it ends orderly."""

from __future__ import annotations

import importlib
import os

from dpo_kernels.commands import endings


def run(command: str, argv: list[str], program: str | None = None) -> int:
    """Runs a command, the module of its name in this folder; returns the exit status.

    Args:
        argv: what stands behind the command.
        program: who speaks; default: dpo-kernels COMMAND.
    """
    program = program or f"dpo-kernels {command}"
    endings.listen(program, endings.GO_ON if command == "train" else "")
    # Before torch starts its threads: threads that spin while they wait stall one another when something else needs a
    # core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return endings.ended(program, lambda: importlib.import_module(f"dpo_kernels.commands.{command}").main(argv))
