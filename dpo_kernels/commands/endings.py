"""How a command ends: by a signal, or with what a user can mend, in one sentence and without a traceback.

Nothing is imported here that takes time: signals are heard before the seconds that torch and transformers take.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

STARTED = os.getpid()
# Package that may be missing -> the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "pyarrow", "rich",
                     "tqdm", "matplotlib", "jinja2", "numpy", "yaml", "huggingface_hub"), "train"),
    "peft": "peft", "bitsandbytes": "quant", "ninja": "cpp",
}  # fmt: skip
GO_ON = "; go on with --resume_from_checkpoint"


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have."""


class Ending:
    """How this process ends: in Python's ordinary way, or at once behind the last function of `atexit`.

    An ordinary end takes modules apart while threads of libraries still run. Those of gloo, which hold a group for as
    long as any object of it is there, then may abort the process, whose work is done and whose status was 0 (torch
    2.13: "terminate called without an active exception"). At once means without destructors, Python's and C's: what a
    profiler writes at the very end is not written.
    """

    def __init__(self) -> None:
        self.status, self.at_once = 1, False  # 1: that of an error that nobody catches

    def skip_teardown(self) -> None:
        self.at_once = True

    def leave(self) -> None:
        if not self.at_once or os.getpid() != STARTED:
            return
        status = self.status
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # nobody reads it, it is closed, or there is none
                status = status or 120  # as Python itself has it
        os._exit(status)


ENDING = Ending()


def last_act(command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its status. To be called before anything slow is imported, which may
    register functions of `atexit`: they run from the last one to the first."""
    atexit.register(ENDING.leave)
    try:
        ENDING.status = command()
    except SystemExit as stop:  # by a signal
        ENDING.status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    sys.exit(ENDING.status)


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
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"{program}: needs the package {package}: pip install 'dpo-kernels[{EXTRAS[package]}]'", file=sys.stderr)
    except OptionError as error:
        print(f"{program}: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes at exit
    except (ValueError, OSError) as error:  # what we and transformers raise for what a user can mend
        print(f"{program}: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def as_sentence(program: str) -> Callable[..., str]:
    """For `warnings.formatwarning`: what the user is told, without the line of code that tells it."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *args, **kwargs)
        return f"{program}: warning: {message}\n"

    return formatted
