"""Sizes that 32 bits do not hold, many tokens, and what a call holds in memory."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_helpers import assert_relative, exact, planned, step
from helpers import MODES, assert_close, head_on

from dpo_kernels import logits_to_log_probs, reference

pytestmark = pytest.mark.gpu

LARGE = [
    pytest.param(20_000, 128_256, id="kept-beyond-2^31"),
    pytest.param(131_072, 17_000, id="131072-tokens"),
]


@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "recompute"])
@pytest.mark.parametrize(("tokens", "vocab"), LARGE)
def test_large(room, strategy, tokens, vocab, mode):
    assert tokens * vocab > 2**31
    head = head_on(room, tokens, 64, vocab, torch.bfloat16, grads=MODES[mode], ignored=0)
    cotangent = torch.randn(tokens).to(room)
    got = step(head, cotangent, planned(head, mode).bytes)
    truth = exact(head, cotangent)
    assert_close(got.log_probs, truth.log_probs, 1e-4)
    for name, value, of_truth in zip(("hidden", "weight"), got.grads, truth.grads, strict=False):
        assert_relative(value, of_truth, 8e-3, name)
        assert_relative(value[-200:], of_truth[-200:], 8e-3, f"the last rows of {name}")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_large_logits(room, inplace, ignored):
    rows, vocab = 16_600, 131_072
    assert rows * vocab > 2**31
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=room).mul_(4).requires_grad_()
    labels = torch.randint(vocab, (rows,), device=room)
    labels[torch.rand(rows, device=room) < ignored] = -100
    cotangent = torch.randn(rows, device=room)
    ends = torch.cat([torch.arange(64), torch.arange(rows - 64, rows)]).to(room)
    part = logits.detach()[ends].double().requires_grad_()
    truth = reference.logits_to_log_probs(part, labels[ends])
    truth.backward(cotangent[ends].double())
    held = logits.detach() if inplace else logits
    got = logits_to_log_probs(held.requires_grad_(), labels, inplace_backward=inplace, impl="triton")
    (grad,) = torch.autograd.grad(got, held, cotangent)
    assert (grad.data_ptr() == held.data_ptr()) == inplace
    assert_close(got[ends].detach(), truth.detach(), 1e-5)
    assert_relative(grad[ends], part.grad, 4e-3)
    assert grad[labels == -100].eq(0).all()


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_call_holds_no_more_than_planned(cuda, strategy, dtype, mode, ignored, record_property):
    """The library's workspace, which a process' first product takes, is part of what the plan promises."""
    head = head_on(cuda, 4096, 1024, 50_000, dtype, grads=MODES[mode], ignored=ignored)
    cotangent = torch.randn(4096).to(cuda)
    made = planned(head, mode)
    step(head, cotangent, made.bytes)  # compiles
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = step(head, cotangent, made.bytes)
    torch.cuda.synchronize()
    returned = got.log_probs.nbytes + sum(g.nbytes for g in got.grads)
    held = torch.cuda.max_memory_allocated() - before - returned
    record_property("held", held)
    record_property("planned", made.bytes)
    assert held <= made.bytes, f"held {held:,} bytes of {made.bytes:,}\n{made}"
    assert held >= made.memory["kept probabilities"]
