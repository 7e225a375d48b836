"""What a step over ranks sends and holds, measured beside what the plan says and beside PyTorch's loss_parallel.

Run by tests/vocab_parallel.py on each rank; writes what it found.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import loss_parallel
from vocab_ranks import counted, mesh_of_all, shard_weight

from dpo_kernels import VocabShard, hidden_to_log_probs, plan
from dpo_kernels.functional import least_budget
from dpo_kernels.vocab_shard import chunk

SHAPE = (1024, 256, 50_000)
# Of a mode: gradients, and whether the budget is the least.
HELD = {
    "frozen": (("hidden",), False),
    "keep": (("hidden", "weight"), False),
    "recompute": (("hidden", "weight"), True),
}


def parts(hidden_dim: int | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Any]:
    """This rank's hidden states and weight, the labels and the shard."""
    tokens, features, vocab = SHAPE
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, tokens, features).to(dtype), torch.randint(vocab, (1, tokens))
    part = chunk(vocab, ranks, rank)
    torch.manual_seed(rank)
    weight = torch.randn(part.stop - part.start, features).mul_(0.05).to(dtype)
    if hidden_dim is not None:
        hidden = hidden[:, chunk(tokens, ranks, rank)].clone()
    return hidden, weight, labels, VocabShard(None, part.start, vocab, hidden_dim)


def sent(function: Callable[[], object]) -> dict[str, Any]:
    """Payloads by kind, and bytes on this machine's loopback, if it is ours alone (a network namespace)."""
    function()  # connections are made at the first
    sizes: dict[str, int] = {}
    dist.barrier()
    before = _on_the_wire()
    dist.barrier()  # whose own bytes are part of both numbers' noise
    with counted(sizes):
        function()
    dist.barrier()
    return {"sizes": sizes, "wire": _on_the_wire() - before}


def traffic(to: str) -> None:
    found = {}
    for name, hidden_dim in (("whole", None), ("split", 1)):
        hidden, weight, labels, shard = parts(hidden_dim)
        hidden.requires_grad_()
        weight.requires_grad_()

        def step(h: Tensor = hidden, w: Tensor = weight, y: Tensor = labels, s: VocabShard = shard) -> None:
            hidden_to_log_probs(h, w, y, shard=s).sum().backward()

        found[name] = sent(step)
        tokens, features, vocab = SHAPE
        made = plan(tokens, features, vocab, ranks=dist.get_world_size(), hidden_split=hidden_dim is not None)
        found[name]["planned"] = dict(made.exchanges)
    for dtype in ("bfloat16", "float32"):
        found[f"loss_parallel {dtype}"] = sent(_loss_parallel(getattr(torch, dtype)))
    Path(to, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def _loss_parallel(dtype: torch.dtype) -> Callable[[], None]:
    torch.use_deterministic_algorithms(False)
    tokens, features, vocab = SHAPE
    torch.manual_seed(0)
    given, labels = torch.randn(tokens, features).to(dtype).requires_grad_(), torch.randint(vocab, (tokens,))
    weight = shard_weight(torch.randn(vocab, features).mul_(0.05).to(dtype)).requires_grad_()

    def step() -> None:
        hidden = DTensor.from_local(given, mesh_of_all(), [Replicate()], run_check=False)
        with loss_parallel():
            F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum").backward()

    return step


def held(to: str, impl: str, mode: str, hidden_dim: int | None) -> None:
    """The high-water mark of a process of its own over what it held before, and what the plan says, in bytes."""
    tokens, features, vocab = SHAPE
    ranks, (grads, least) = dist.get_world_size(), HELD[mode]
    hidden, weight, labels, shard = parts(hidden_dim)
    leaves = [hidden.requires_grad_(), weight.requires_grad_("weight" in grads)]
    options: dict[str, Any] = {"grads": grads, "ranks": ranks, "hidden_split": hidden_dim is not None, "impl": impl}
    budget = least_budget(tokens, features, vocab, torch.bfloat16, **options) if least else None
    made = plan(tokens, features, vocab, memory_budget=budget, **options)
    assert made.mode == mode, f"{impl} {mode}: the plan's mode is {made.mode}"

    def step(h: Tensor, w: Tensor, y: Tensor, s: VocabShard, budget: int | None) -> None:
        hidden_to_log_probs(h, w, y, shard=s, impl=impl, memory_budget=budget).sum().backward()

    # The first call loads libraries and makes connections.
    few = 64 * ranks if hidden_dim is None else 64
    small = [t.detach().clone().requires_grad_(t.requires_grad) for t in (hidden[:, :few], weight[:64])]
    step(*small, labels[:, : 64 * ranks] % 64, VocabShard(None, 64 * dist.get_rank(), 64 * ranks, hidden_dim), None)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    step(*leaves, labels, shard, budget)
    returned = sum(t.grad.nbytes for t in leaves if t.grad is not None) + 4 * tokens
    found = {"held": _status("VmHWM") - before - returned, "planned": made.bytes}
    Path(to, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _on_the_wire() -> int:
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])
