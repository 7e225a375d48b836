"""CUDA graphs, streams, and devices that are not the current one."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import planned, step
from helpers import MODES, assert_close, head_on, inputs_of

from dpo_kernels import logits_to_log_probs

pytestmark = pytest.mark.gpu

SHAPE = (512, 256, 9000)


def change(head, cotangent) -> None:
    """New contents in the same memory."""
    other = head_on(head.hidden.device, *SHAPE, head.hidden.dtype, ignored=0.4)
    with torch.no_grad():
        head.hidden.copy_(other.hidden)
        head.weight.copy_(other.weight)
    head.labels.copy_(other.labels)
    cotangent.copy_(torch.randn_like(cotangent))


def captured(run):
    """A graph of run() and what it returned, after warming up on another stream, as PyTorch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("warm", ["every-label-counts", "some-labels-are-ignored"])
@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "recompute"])
def test_a_captured_graph_follows_its_inputs(cuda, strategy, mode, warm):
    head = head_on(cuda, *SHAPE, torch.bfloat16, grads=MODES[mode], ignored=0.0)
    budget = planned(head, mode).bytes + 2**24
    if warm != "every-label-counts":
        head.labels[torch.rand(SHAPE[0]).to(cuda) < 0.3] = -100
    cotangent = torch.randn(SHAPE[0]).to(cuda)
    graph, out = captured(lambda: step(head, cotangent, budget))
    for _ in range(2):
        change(head, cotangent)
        graph.replay()
        torch.cuda.synchronize()
        eager = step(head, cotangent, budget)
        assert out.log_probs[head.labels == -100].eq(0).all()
        assert_close(out.log_probs, eager.log_probs, 1e-5)
        for name, got, expected in zip(("hidden", "weight"), out.grads, eager.grads, strict=False):
            eps = torch.finfo(expected.dtype).eps
            assert_close(got, expected, 2 * eps * expected.abs().max().item(), name)
            if name == "hidden":
                assert got[head.labels == -100].eq(0).all()


@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "recompute"])
def test_a_captured_graph_of_as_many_tokens_as_are_told(cuda, strategy, mode):
    """It follows which labels count, computes those alone, and is NaN where they are more or fewer."""
    head = head_on(cuda, *SHAPE, torch.bfloat16, grads=MODES[mode], ignored=0.0)
    tokens = 3 * SHAPE[0] // 4
    head.labels[tokens:] = -100
    budget, cotangent = planned(head, mode).bytes + 2**24, torch.randn(SHAPE[0]).to(cuda)
    graph, out = captured(lambda: step(head, cotangent, budget, tokens=tokens))
    for count in (tokens, tokens - 1, tokens + 1):
        head.labels.copy_(torch.randint(SHAPE[2], (SHAPE[0],)))
        head.labels[torch.randperm(SHAPE[0])[count:].to(cuda)] = -100
        graph.replay()
        torch.cuda.synchronize()
        if count == tokens:
            eager = step(head, cotangent, budget)
            for got, expected in zip(out.grads, eager.grads, strict=True):
                eps = torch.finfo(expected.dtype).eps
                assert_close(got, expected, 2 * eps * expected.abs().max().item())
            assert_close(out.log_probs, eager.log_probs, 1e-5)
        else:
            assert out.log_probs.isnan().all()
            assert all(gradient.isnan().any() for gradient in out.grads)


def test_a_captured_graph_at_the_logits_level(cuda):
    rows, vocab = 256, 9000
    logits = torch.randn(rows, vocab, device=cuda, requires_grad=True)
    labels = torch.randint(vocab, (rows,), device=cuda)
    cotangent = torch.randn(rows, device=cuda)

    def run():
        log_probs = logits_to_log_probs(logits, labels, impl="triton")
        return log_probs.detach(), torch.autograd.grad(log_probs, logits, cotangent)[0]

    graph, out = captured(run)
    with torch.no_grad():
        logits.normal_()
    labels.copy_(torch.where(torch.rand(rows, device=cuda) < 0.3, -100, labels.flip(0)))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(out, run(), strict=True):
        assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "recompute"])
def test_two_streams_at_once(cuda, strategy, mode):
    heads = [head_on(cuda, *SHAPE, torch.bfloat16, grads=MODES[mode]) for _ in range(2)]
    cotangents = [torch.randn(SHAPE[0]).to(cuda) for _ in heads]
    budget = planned(heads[0], mode).bytes + 2**26
    alone = []
    for head, cotangent in zip(heads, cotangents, strict=True):
        alone.append(step(head, cotangent, budget))
        torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in heads]
    for _ in range(10):
        together = []
        for stream, head, cotangent in zip(streams, heads, cotangents, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                together.append(step(head, cotangent, budget))
        torch.cuda.synchronize()
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got.log_probs, expected.log_probs)
            assert all(torch.equal(g, e) for g, e in zip(got.grads, expected.grads, strict=True))


@pytest.mark.parametrize("mode", ["score", "frozen", "keep", "recompute"])
def test_a_device_that_is_not_the_current_one(cuda, strategy, mode):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone: torch.cuda.device_count() is 1")
    here = head_on(torch.device("cuda", 0), *SHAPE, torch.bfloat16, grads=MODES[mode])
    there = here._replace(**{
        name: t.detach().to("cuda:1").requires_grad_(t.requires_grad)
        for name, t in here._asdict().items() if t is not None
    })  # fmt: skip
    cotangent = torch.randn(SHAPE[0])
    budget = planned(here, mode).bytes
    with torch.cuda.device(0):
        got, expected = (step(head, cotangent.to(head.hidden.device), budget) for head in (there, here))
        assert torch.cuda.current_device() == 0
    assert [g.device for g in got.grads] == [torch.device("cuda", 1)] * len(inputs_of(there))
    assert_close(got.log_probs.cpu(), expected.log_probs.cpu(), 1e-5)
    for g, e in zip(got.grads, expected.grads, strict=True):
        assert_close(g.cpu(), e.cpu(), 2 * torch.finfo(e.dtype).eps * e.abs().max().item())
