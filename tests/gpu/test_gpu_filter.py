"""Gradients that leave out what the softmax hardly holds: every number against the entries that were kept."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from gpu_helpers import assert_relative
from torch import Tensor

from dpo_kernels import gathering, plan, token_stats

pytestmark = pytest.mark.gpu

SHAPES = {"cuda": (1500, 1024, 32_000), "cpu": (150, 32, 700)}
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
FILTERS = {"few": 2**-6, "some": 2**-9, "most": 1.5}  # the last over the vocabulary's size


def peaked(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and labels of a vocabulary with Zipf's frequencies, in their order."""
    n, d, v = SHAPES[device.type]
    made = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, v + 1)
    labels = torch.multinomial(frequency, n, replacement=True, generator=made)
    labels[:: n // 10] = v - 1
    weight = torch.randn(v, d, generator=made) / d**0.5
    hidden = 2 * torch.randn(n, d, generator=made) + 8 * weight[labels]
    weight[:, 0], hidden[:, 0] = frequency.log(), 1.0
    labels[::7] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


@pytest.mark.parametrize("room", ["none", "some", "all"])
@pytest.mark.parametrize("kept", FILTERS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_are_those_of_what_is_kept(device, dtype, kept, room):
    """With room for the exponentials of all tokens, of some, of none: marked and multiplied otherwise."""
    hidden, weight, labels = peaked(device, dtype)
    n, v = int((labels >= 0).sum()), len(weight)
    options = {"gradient_filter": 2**-6, "labels": len(labels), "device": device, "impl": "triton"}
    whole = plan(n, weight.shape[1], v, dtype, **options)
    saved = whole.memory["kept probabilities"]
    budget = whole.bytes - {"none": saved, "some": saved // 2, "all": 0}[room]
    share = FILTERS[kept] / v if kept == "most" else FILTERS[kept]
    hidden.requires_grad_()
    weight.requires_grad_()
    without = token_stats(hidden, weight, labels, outputs=(), impl="triton").log_probs
    seen = []
    with mock.patch.object(gathering, "Gathered", wraps=lambda *given: seen.append(Gathered(*given)) or seen[-1]):
        stats = token_stats(hidden, weight, labels, outputs=("dropped_mass",), gradient_filter=share, impl="triton",
                            memory_budget=budget)  # fmt: skip
        upstream = torch.linspace(0.5, -1.5, len(labels), device=device)
        stats.log_probs.backward(upstream)
    assert torch.equal(stats.log_probs, without)
    counts = labels >= 0
    made = seen[0].plan
    assert (made.kept_tokens > 0, made.kept_tokens == n) == (room != "none", room == "all")
    flags = seen[0].flags.bool().repeat_interleave(made.group, 0)[: made.tokens, :v]
    h, w = hidden.detach().double()[counts], weight.detach().double()
    p = (h @ w.T).softmax(1)
    one = torch.nn.functional.one_hot(labels[counts], v).bool()
    assert flags[one].all()
    assert p[~flags].max() < share
    dropped = torch.where(flags, 0.0, p).sum(1)
    rounded = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(stats.dropped_mass[counts].double(), dropped, rtol=rounded, atol=1e-6)
    dz = upstream.double()[counts, None] * torch.where(flags, one.double() - p, 0.0)
    given_back = (-dropped * upstream.double()[counts])[:, None] * w.mean(0)
    assert_relative(hidden.grad[counts], dz @ w + given_back, TOLERANCES[dtype], "hidden")
    assert_relative(weight.grad, dz.T @ h, TOLERANCES[dtype], "weight")
    if kept == "most":
        assert flags.double().mean() > gathering.DENSEST
    else:
        assert 0 < flags.double().mean() < 1


Gathered = gathering.Gathered


def test_it_holds_what_its_plan_says(cuda):
    hidden, weight, labels = peaked(cuda, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    options = {"gradient_filter": 2**-12, "impl": "triton"}
    made = plan(
        int((labels >= 0).sum()), *weight.shape[::-1], torch.bfloat16, labels=len(labels), device=cuda, **options
    )
    assert made.mode == "gather"
    for _ in range(2):  # the first loads code
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_stats(hidden, weight, labels, outputs=(), **options).log_probs.sum().backward()
    grads = sum(t.numel() * t.element_size() for t in (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before - grads <= made.bytes
