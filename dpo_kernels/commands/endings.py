"""How a command ends: by a signal, or with what a user can mend, in one sentence and without a traceback.

Nothing is imported here that takes time: signals are heard before the seconds that torch and transformers take.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

STARTED = os.getpid()
GO_ON = "; go on with --resume_from_checkpoint"


def listen(program: str, go_on: str = "") -> None:
    """From now on SIGTERM and SIGINT end this process with a sentence; what a shell has told it to ignore stays so.

    Args:
        program: who says it.
        go_on: what it says behind "stopped".
    """

    def stopped(number: int, frame: FrameType | None) -> None:
        if os.getpid() != STARTED:
            os._exit(128 + number)  # a worker, which has nothing to say
        os.write(2, f"{program}: {signal.Signals(number).name}: stopped{go_on}\n".encode())
        sys.exit(128 + number)  # as a shell reports a process that the signal ended

    for heard in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(heard) != signal.SIG_IGN:  # as a shell has it for what a script starts in the background
            signal.signal(heard, stopped)


def ended(program: str, command: Callable[[], int]) -> int:
    """Runs a command; returns its exit status, 1 with a sentence on stderr where a user can mend what is wrong."""
    try:
        return command()
    except ModuleNotFoundError as error:
        extra = "peft" if error.name == "peft" else "train"
        text = f"needs the package {error.name}: pip install 'dpo-kernels[{extra}]'"
        print(f"{program}: {text}", file=sys.stderr)
    except (ValueError, OSError) as error:  # what we and transformers raise for what a user can mend
        print(f"{program}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1
