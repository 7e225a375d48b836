"""One forward and backward in a process of its own; prints what it held beyond inputs and gradients, as JSON.

Usage: python memory_probe.py IMPL TOKENS FEATURES VOCAB DTYPE BUDGET_BYTES GRADS [COUNTED [RANK [FILTER]]]

GRADS such as hidden,weight or none; COUNTED of the tokens count, default all; RANK of a low-rank adapter, default none;
FILTER a gradient_filter.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from dpo_kernels import LowRank, hidden_to_log_probs, plan


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def step(tensors: list[torch.Tensor], labels: torch.Tensor, budget: int | None, impl: str, share: float) -> None:
    hidden, weight, *matrices = tensors
    low_rank = LowRank(*matrices) if matrices else None
    log_probs = hidden_to_log_probs(
        hidden, weight, labels, low_rank=low_rank, memory_budget=budget, impl=impl, gradient_filter=share
    )
    if log_probs.requires_grad:
        log_probs.sum().backward()


def main() -> None:
    impl, *numbers, dtype_name, budget_text, wants = sys.argv[1:8]
    tokens, features, vocab = map(int, numbers)
    dtype, budget, grads = getattr(torch, dtype_name), int(budget_text), wants.split(",")
    hidden = torch.randn(tokens, features, dtype=dtype).requires_grad_("hidden" in grads)
    weight = torch.randn(vocab, features, dtype=dtype).mul_(0.05).requires_grad_("weight" in grads)
    labels = torch.randint(vocab, (tokens,))
    counted = int(sys.argv[8]) if len(sys.argv) > 8 else tokens
    rank = int(sys.argv[9]) if len(sys.argv) > 9 else 0
    share = float(sys.argv[10]) if len(sys.argv) > 10 else 0.0
    tensors = [hidden, weight]
    if rank:
        tensors += [
            torch.randn(s).mul_(0.05).requires_grad_("low_rank" in grads) for s in ((rank, features), (vocab, rank))
        ]
    labels[counted:] = -100
    # The first call loads libraries; a small one before the measurement keeps them out of it.
    small = [t.detach()[:64].clone().requires_grad_(t.requires_grad) for t in tensors]
    step(small, labels[:64] % 64, None, impl, share)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    start = time.perf_counter()
    step(tensors, labels, budget, impl, share)
    seconds = time.perf_counter() - start
    # Autograd hands backward a gradient of each log-prob; outputs and gradients are the caller's.
    returned = sum(t.grad.nbytes for t in tensors if t.grad is not None) + 4 * tokens
    wanted = tuple(name for name in grads if name != "none")
    planned = plan(
        counted,
        features,
        vocab,
        dtype,
        grads=wanted,
        memory_budget=budget,
        impl=impl,
        labels=tokens,
        rank=rank,
        gradient_filter=share,
    )
    print(json.dumps({
        "mode": planned.mode, "gemms": planned.gemms, "budget": budget, "planned": planned.bytes,
        "held": status("VmHWM") - before - returned, "seconds": seconds,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
