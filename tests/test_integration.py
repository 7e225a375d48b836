"""Inside PyTorch: compile, opcheck, autocast, checkpointing, no_grad, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import assert_as_good, assert_close, detached, loss_of, make_head, run
from torch.utils.checkpoint import checkpoint

from dpo_kernels import (
    FusedLinearDPOLoss,
    available_impls,
    hidden_to_log_probs,
    logits_to_log_probs,
    ops,
    reference,
    token_stats,
)
from dpo_kernels.backends import cpp, pytorch
from dpo_kernels.call import Grads, Options, Transform

MIB = 2**20


@pytest.mark.parametrize("grads", ["hidden,weight,bias", "hidden", "weight", "none"])
@pytest.mark.parametrize("outputs", ["", "entropy,is_top1"])
def test_opcheck_hidden(grads, outputs):
    head = make_head(20, 8, 50, bias=True, grads=grads)
    options = Options(
        transform=Transform(0.9, 1.1, 20.0), outputs=tuple(filter(None, outputs.split(","))),
        grads=Grads.of(grads.split(",")),
    )  # fmt: skip
    torch.library.opcheck(
        ops.token_stats_op,
        (head.hidden, head.weight, head.bias, head.labels, *options.encode()),
    )


def test_opcheck_logits():
    logits, labels = torch.randn(5, 30, requires_grad=True), torch.randint(30, (5,))
    options = Options(transform=Transform(0.9, 1.1))
    torch.library.opcheck(ops.logits_log_probs_op, (logits, labels, *options.encode()))


def test_opcheck_backwards():
    head = make_head(6, 8, 30)
    options = Options(grads=Grads(True, True)).encode()
    inputs = (head.hidden.detach(), head.weight.detach(), None, head.labels)
    log_probs, entropy, _, _, _, *saved = ops.token_stats_op(*inputs, *options)
    torch.library.opcheck(
        ops.token_stats_backward_op,
        ([torch.randn(6), None], [log_probs, entropy, *saved], "weight", *inputs, *options),
    )
    logits = torch.randn(6, 30)
    made = ops.logits_log_probs_op(logits, head.labels, *Options().encode())
    arguments = (torch.randn(6), made, logits, head.labels, *Options().encode())
    torch.library.opcheck(ops.logits_log_probs_backward_op, arguments)
    torch.library.opcheck(ops.logits_log_probs_backward_inplace_op, arguments)


@pytest.mark.parametrize("vocab", [7, 2049])
@pytest.mark.parametrize("grads", ["hidden,weight", "hidden"])
def test_compile_fullgraph_hidden(vocab, grads):
    head = make_head((4, 5), 8, vocab, grads=grads)
    head.labels[0, 0] = 1
    loss_fn = FusedLinearDPOLoss(temperature=0.8)
    ref = torch.randn(4, 5)

    def step(hidden, weight, labels):
        stats = token_stats(hidden, weight, labels, outputs=("entropy", "mean_logits"))
        return (
            loss_fn(hidden, weight, labels, ref_log_probs=ref).loss + (stats.log_probs - stats.entropy).square().sum()
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        hidden, weight, labels, _ = detached(head)
        loss = function(hidden, weight, labels)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            assert_close(compiled, eager, 1e-5 * max(1.0, eager.abs().max().item() / 10))


def test_compile_fullgraph_follows_the_labels():
    """One compiled function, called with other labels: how many rows count is no constant of the graph."""
    head = make_head(30, 8, 60)
    compiled = torch.compile(hidden_to_log_probs, fullgraph=True)
    for ignored in (0, 10, 30):
        labels = torch.randint(60, (30,))
        labels[:ignored] = -100
        hidden, weight, _, _ = detached(head)
        got = compiled(hidden, weight, labels)
        got.sum().backward()
        exact = reference.hidden_to_log_probs(head.hidden, head.weight, labels)
        assert_close(got, exact, 1e-5)
        assert_close(hidden.grad, torch.autograd.grad(exact.sum(), head.hidden)[0], 1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph_logits(inplace):
    leaf, labels = torch.randn(5, 300, requires_grad=True), torch.randint(300, (5,))

    def step(leaf):
        return logits_to_log_probs(leaf * 2, labels, inplace_backward=inplace).sum()

    (eager,) = torch.autograd.grad(step(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf), leaf)
    assert_close(compiled, eager, 1e-6)


def test_compile_under_autocast():
    head = make_head(12, 8, 60)

    def step(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return hidden_to_log_probs(hidden, weight, head.labels).sum()

    eager, compiled = step(head.hidden, head.weight), torch.compile(step, fullgraph=True)(head.hidden, head.weight)
    assert_close(compiled, eager, 1e-4)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("grads", ["hidden,weight", "hidden"])
@pytest.mark.parametrize("budget", [None, 20 * MIB])
def test_autocast_computes_in_its_dtype_and_returns_the_inputs(dtypes, grads, budget):
    head = make_head(700, 64, 2500, torch.float64, grads=grads)
    hidden, weight = (t.detach().to(d).requires_grad_(t.requires_grad) for t, d in zip(head[:2], dtypes, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = hidden_to_log_probs(hidden, weight, head.labels, memory_budget=budget)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    # Exact: operands rounded to bfloat16, everything after that in float64.
    exact = [t.detach().to(torch.bfloat16).double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    truth = reference.hidden_to_log_probs(exact[0], exact[1], head.labels)
    truth.sum().backward()
    assert_close(log_probs, truth, 1e-4)
    for leaf, correct in zip((hidden, weight), exact, strict=True):
        if leaf.requires_grad:
            assert leaf.grad.dtype == leaf.dtype
            # Kept probabilities are bfloat16, sums float32, and float32 inputs get float32 gradients.
            assert_close(leaf.grad, correct.grad, 6e-3 * correct.grad.abs().max().item())


def test_autocast_does_not_round_statistics():
    """Its list of functions to cast holds bmm, which folds use: nothing of it may reach inside."""
    head = make_head(40, 64, 2500, torch.bfloat16, grads="none", ignored=0)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with torch.autocast("cpu", torch.bfloat16):
        got = token_stats(*head[:3], outputs=outputs)
        level = logits_to_log_probs(head.hidden, head.labels % 64)
    exact = reference.token_stats(*detached(head, torch.float64)[:3], outputs=outputs)
    for name, value, truth in zip(got._fields, got, exact, strict=True):
        assert_close(value, truth, 1e-4, name)
    assert_close(level, reference.logits_to_log_probs(head.hidden.double(), head.labels % 64), 1e-5)


def test_autocast_leaves_float64_alone():
    head = make_head(9, 8, 30, torch.float64, grads="none")
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden_to_log_probs(head.hidden, head.weight, head.labels)
        with pytest.raises(TypeError, match=r"weight is torch.float64, hidden torch.float32"):
            hidden_to_log_probs(head.hidden.float(), head.weight, head.labels)
    assert_close(got, reference.hidden_to_log_probs(head.hidden, head.weight, head.labels), 1e-12)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_no_grad_takes_one_gemm_and_saves_nothing(monkeypatch, impl):
    head = make_head(9, 8, 30)
    products = []
    tile_ops = {"cpp": cpp.CppTileOps, "torch": pytorch.PyTorchTileOps}[impl]
    original = tile_ops.accumulate

    def accumulate(self, state, tile, saved):
        products.append(len(tile.hidden) * len(tile.weight))
        original(self, state, tile, saved)

    monkeypatch.setattr(tile_ops, "accumulate", accumulate)
    for context in (torch.no_grad, torch.inference_mode):
        products.clear()
        with context():
            stats = token_stats(head.hidden, head.weight, head.labels, impl=impl)
        assert not stats.log_probs.requires_grad
        assert sum(products) == int((head.labels != -100).sum()) * 30
    made = ops.token_stats_op(head.hidden, head.weight, None, head.labels, *Options(impl=impl).encode())
    saved = dict(zip(ops.SAVED, made[ops.STATS :], strict=True))
    assert all(saved[name].numel() == 0 for name in ("exps", "maxima", "jacobian"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    head = make_head(40, 8, 300)
    _, straight = run(token_stats, detached(head), outputs=())
    again = detached(head)
    log_probs = checkpoint(
        lambda h: hidden_to_log_probs(h * 1, again.weight, again.labels), again.hidden, use_reentrant=use_reentrant
    )
    (log_probs * torch.randn(40, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert_close(again.hidden.grad, straight[0], 1e-6)
    assert_close(again.weight.grad, straight[1], 1e-6)


def test_backward_twice_with_retain_graph():
    for grads in ("hidden,weight", "hidden"):
        head = make_head(40, 8, 300, grads=grads)
        loss = loss_of(token_stats(head.hidden, head.weight, head.labels, outputs=()))
        first = torch.autograd.grad(loss, head.hidden, retain_graph=True)[0]
        assert_close(torch.autograd.grad(loss, head.hidden)[0], first, 0)


def test_bfloat16_is_as_exact_as_its_inputs_allow():
    """12 times better than plain bfloat16 PyTorch, whose logits are rounded."""
    head = make_head(64, 256, 4000, torch.bfloat16, ignored=0)
    exact = detached(head, torch.float64)
    truth, truth_grads = run(reference.token_stats, exact, outputs=())
    got, grads = run(token_stats, detached(head), outputs=())
    plain, plain_grads = run(reference.token_stats, detached(head), outputs=())
    errors = [(t.log_probs.double() - truth.log_probs).abs().max().item() for t in (got, plain)]
    assert 12 * errors[0] < errors[1]
    assert_as_good(grads[0], plain_grads[0], truth_grads[0], factor=0.5)


def test_implementations_explain_themselves():
    reasons = available_impls()
    assert set(reasons) == {"triton", "cpp", "torch"}
    assert reasons["torch"] is None
    assert reasons["triton"] is None or "TRITON_INTERPRET=1" in reasons["triton"]
    assert "no GPU" in (available_impls("cuda")["triton"] or "no GPU")
    assert "not on meta" in available_impls("meta")["triton"]


def test_importing_needs_torch_alone():
    blocked = ("transformers", "accelerate", "datasets", "triton", "numpy", "matplotlib")
    code = (
        "import sys, torch\n"
        f"before = set(sys.modules)\nimport dpo_kernels\nnew = set(sys.modules) - before\n"
        f"assert not new & {set(blocked)!r}, new\n"
        "roots = {name.split('.')[0] for name in new} - set(sys.stdlib_module_names)\n"
        "assert roots <= {'dpo_kernels', 'torch'}, roots\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
