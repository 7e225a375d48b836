"""Out of memory in the middle of a run: how it is known, and what a run does about it."""

from __future__ import annotations

import torch

# What PyTorch's allocator on the CPU, oneDNN and the kernels here say; a GPU's has a class of its own.
WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not allocate")


class OutOfMemoryError(RuntimeError):
    """The memory did not suffice for a step, not even lowered; the weights of the last good step are saved."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)
