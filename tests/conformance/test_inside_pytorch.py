"""Inside PyTorch: opcheck, compile, autocast, checkpointing, hooks, no_grad, captured graphs, ignore_index=None."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL, assert_close, check_against_reference, detached, loss_of, planned, run
from torch.utils.checkpoint import checkpoint

from dpo_kernels import (
    FusedLinearDPOLoss,
    dispatch,
    driver,
    hidden_to_log_probs,
    logits_to_log_probs,
    ops,
    planner,
    reference,
    token_stats,
)
from dpo_kernels.call import Grads, Options, Tokens, Transform

WITHOUT_COMPILING = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("grads", ["hidden,weight,bias", "hidden", "weight", "none"])
@pytest.mark.parametrize("outputs", ["", "entropy,is_top1"])
@pytest.mark.slow_on("torch", "triton-tiles")
def test_opcheck_hidden(target, grads, outputs):
    head = target.head(20, 16, 50, bias=True, grads=grads)
    options = Options(
        transform=Transform(0.9, 1.1, 20.0), outputs=tuple(filter(None, outputs.split(","))),
        grads=Grads.of(grads.split(",")),
    )  # fmt: skip
    torch.library.opcheck(ops.token_stats_op, (*head[:2], head.bias, None, None, head.labels, *options.encode()))


@pytest.mark.slow_on("torch", "triton-tiles")
def test_opcheck_logits(target):
    logits, labels = target.randn(5, 30, grad=True), target.labels(30, (5,))
    torch.library.opcheck(ops.logits_log_probs_op, (logits, labels, *Options(transform=Transform(0.9, 1.1)).encode()))


@pytest.mark.slow_on("torch", "triton-tiles")
def test_opcheck_backwards(target):
    head = target.head(6, 16, 30, grads="none")
    options = Options(grads=Grads(True, True)).encode()
    inputs = (head.hidden, head.weight, None, None, None, head.labels)
    saved = list(ops.token_stats_op(*inputs, *options)[ops.STATS :])
    cotangent = target.randn(6)
    for wanted in ([False, True, False, False, False], [True, True, False, False, False]):
        arguments = ([cotangent, None], saved, wanted, *inputs, *options)
        torch.library.opcheck(ops.token_stats_backward_op, arguments, test_utils=WITHOUT_COMPILING)
    logits = target.randn(6, 30)
    made = list(ops.logits_log_probs_op(logits, head.labels, *Options().encode())[1:])
    arguments = (cotangent, made, logits, head.labels, *Options().encode())
    for op in (ops.logits_log_probs_backward_op, ops.logits_log_probs_backward_inplace_op):
        torch.library.opcheck(op, arguments, test_utils=WITHOUT_COMPILING)


@pytest.mark.parametrize("grads", ["hidden,weight", "hidden"])
@pytest.mark.slow_on("torch", "triton-tiles")
def test_compile_fullgraph_hidden(target, grads):
    head = target.head((4, 5), 16, 130, grads=grads)
    head.labels[0, 0] = 1
    loss_fn = FusedLinearDPOLoss(temperature=0.8)
    ref = target.randn(4, 5)

    def step(hidden, weight, labels):
        stats = token_stats(hidden, weight, labels, outputs=("entropy", "mean_logits"))
        of_pairs = loss_fn(hidden, weight, labels, ref_log_probs=ref).loss
        return of_pairs + (stats.log_probs - stats.entropy).square().sum()

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


@pytest.mark.slow_on("torch", "triton-tiles")
def test_compile_fullgraph_follows_the_labels(target):
    """One compiled function, called with other labels: how many tokens count is no constant of the graph."""
    head = target.head(30, 16, 60)
    compiled = torch.compile(hidden_to_log_probs, fullgraph=True)
    for ignored in (0, 10, 30):
        labels = target.labels(60, (30,))
        labels[:ignored] = -100
        hidden, weight, _, _ = detached(head)
        got = compiled(hidden, weight, labels)
        got.sum().backward()
        exact = reference.hidden_to_log_probs(head.hidden, head.weight, labels)
        assert_close(got, exact, 1e-5)
        assert_close(hidden.grad, torch.autograd.grad(exact.sum(), head.hidden)[0], 1e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.slow_on("torch", "triton-tiles")
def test_compile_fullgraph_logits(target, inplace):
    leaf, labels = target.randn(5, 300, grad=True), target.labels(300, (5,))

    def step(leaf):
        return logits_to_log_probs(leaf * 2, labels, inplace_backward=inplace).sum()

    eager, compiled = (torch.autograd.grad(f(leaf), leaf)[0] for f in (step, torch.compile(step, fullgraph=True)))
    assert_close(compiled, eager, 1e-6)


@pytest.mark.slow_on("torch", "triton-tiles")
def test_compile_under_autocast(target):
    head = target.head(12, 16, 60)

    def step(hidden, weight):
        with torch.autocast(target.device.type, torch.bfloat16):
            return hidden_to_log_probs(hidden, weight, head.labels).sum()

    eager, compiled = (f(head.hidden, head.weight) for f in (step, torch.compile(step, fullgraph=True)))
    assert_close(compiled, eager, 1e-4)


@pytest.mark.parametrize(
    ("dtypes", "grads", "mode"),
    [
        pytest.param((torch.float32, torch.float32), "hidden,weight", "keep", id="single"),
        pytest.param((torch.float32, torch.float32), "hidden,weight", "recompute", id="single-recompute"),
        pytest.param((torch.float32, torch.float32), "hidden", "frozen", id="single-frozen"),
        pytest.param((torch.bfloat16, torch.float32), "hidden,weight", "keep", id="half-hidden"),
        pytest.param((torch.bfloat16, torch.float32), "hidden", "frozen", id="half-hidden-frozen"),
        pytest.param((torch.float32, torch.float16), "hidden,weight", "recompute", id="half-weight"),
    ],
)
@pytest.mark.slow_on("triton-tiles")
def test_autocast_computes_in_its_dtype_and_returns_the_inputs(target, dtypes, grads, mode):
    head = target.head(*target.size, torch.float32, grads=grads)
    budget = planned(head, mode).bytes * 2
    hidden, weight = (t.detach().to(d).requires_grad_(t.requires_grad) for t, d in zip(head[:2], dtypes, strict=True))
    with torch.autocast(target.device.type, torch.bfloat16):
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


def test_autocast_does_not_round_statistics(target):
    """Its list of functions to cast holds bmm, which accumulating uses: nothing of it may reach inside."""
    head = target.head(40, 64, target.wide, torch.bfloat16, grads="none", ignored=0)
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with torch.autocast(target.device.type, torch.bfloat16):
        got = token_stats(*head[:3], outputs=outputs)
        level = logits_to_log_probs(head.hidden, head.labels % 64)
    exact = reference.token_stats(*detached(head, torch.float64)[:3], outputs=outputs)
    for name in ("log_probs", *outputs):
        assert_close(getattr(got, name), getattr(exact, name), 1e-4, name)
    assert_close(level, reference.logits_to_log_probs(head.hidden.double(), head.labels % 64), 1e-5)


def test_autocast_leaves_float64_alone(target):
    head = target.head(9, 8, 30, torch.float64, grads="none")
    with torch.autocast(target.device.type, torch.bfloat16):
        got = hidden_to_log_probs(head.hidden, head.weight, head.labels)
        with pytest.raises(TypeError, match=r"weight is torch.float64, hidden torch.float32"):
            hidden_to_log_probs(head.hidden.float(), head.weight, head.labels)
    assert_close(got, reference.hidden_to_log_probs(head.hidden, head.weight, head.labels), 1e-12)


def test_no_grad_takes_one_gemm_and_saves_nothing(target, monkeypatch):
    head = target.head(9, 16, 30)
    plans = []
    forward = driver.forward
    monkeypatch.setattr(driver, "forward", lambda call, made, *rest: plans.append(made) or forward(call, made, *rest))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = token_stats(head.hidden, head.weight, head.labels)
        assert not stats.log_probs.requires_grad
    assert [(made.mode, made.gemms, made.kept_tokens) for made in plans] == [("score", 1, 0)] * 2
    made = ops.token_stats_op(head.hidden, head.weight, None, None, None, head.labels, *Options().encode())
    saved = dict(zip(ops.SAVED, made[ops.STATS :], strict=True))
    assert all(saved[name].numel() == 0 for name in ("exps", "maxima", "jacobian"))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.slow_on("triton-tiles")
def test_gradient_checkpointing(target, use_reentrant):
    head = target.head(40, 16, 300)
    _, straight = run(token_stats, detached(head), outputs=())
    again = detached(head)
    log_probs = checkpoint(
        lambda h: hidden_to_log_probs(h * 1, again.weight, again.labels), again.hidden, use_reentrant=use_reentrant
    )
    weights = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(target.device)
    (log_probs * weights).sum().backward()
    for got, same in zip((again.hidden.grad, again.weight.grad), straight, strict=False):
        assert_close(got, same, 1e-6)


@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
@pytest.mark.parametrize("weight_in_rows", [True, False])
@pytest.mark.parametrize("unpack", ["moved", "transposed"])
@pytest.mark.slow_on("triton-tiles")
def test_hooks_may_lay_saved_tensors_out_anew(target, grads, weight_in_rows, unpack):
    """Hooks that offload them do: forward's choices must not be made again from what backward sees."""
    head = target.head(65, 32, 130, ignored=0, grads=grads)
    wanted = [t for t in head[:2] if t.requires_grad]
    expected = torch.autograd.grad(hidden_to_log_probs(*head[:3]).sum(), wanted)

    def moved(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)

    def transposed(t):
        return t.T.contiguous().T if t.dim() == 2 and t.is_contiguous() else t.contiguous()

    weight = head.weight.detach()
    weight = (weight if weight_in_rows else weight.T.contiguous().T).requires_grad_("weight" in grads)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved if unpack == "moved" else transposed):
        log_probs = hidden_to_log_probs(head.hidden, weight, head.labels)
    made = torch.autograd.grad(log_probs.sum(), [t for t in (head.hidden, weight) if t.requires_grad])
    for a, b in zip(made, expected, strict=True):
        assert_close(a, b, 1e-5)


class TestCapture:
    """While a CUDA graph is captured nothing may depend on how many labels count; the device's part is in tests/gpu."""

    @pytest.fixture(autouse=True)
    def capturing(self, monkeypatch):
        self.now = False
        of = Tokens.of

        def found(labels, ignore_index, count):
            return Tokens.all_masked(labels, ignore_index) if self.now else of(labels, ignore_index, count)

        monkeypatch.setattr(Tokens, "of", staticmethod(found))

    @pytest.mark.parametrize("grads", ["hidden", "hidden,weight,bias"])
    @pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")], ids=["log_probs", "entropy"])
    def test_hidden(self, target, grads, outputs):
        head = target.head((2, 20), 16, 90, bias=True, grads=grads)
        with torch.no_grad():
            head.hidden[head.labels == -100] = torch.nan
        eager, eager_grads = run(token_stats, detached(head), outputs=outputs)
        self.now = True
        got, grads_ = run(token_stats, detached(head), outputs=outputs)
        for value, same in zip((*got, *grads_), (*eager, *eager_grads), strict=True):
            assert (value is None) == (same is None)
            if value is not None:
                assert_close(value, same, 1e-5)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits(self, target, inplace):
        logits, labels = target.randn(12, 70), target.labels(70, (12,))
        labels[[2, 5]] = -100
        logits[2] = torch.nan
        results = []
        for self.now in (False, True):
            leaf = logits.clone().requires_grad_()
            log_probs = logits_to_log_probs(leaf * 1, labels, inplace_backward=inplace)
            log_probs.sum().backward()
            results.append((log_probs.detach(), leaf.grad))
        for value, same in zip(*results, strict=True):
            assert_close(value, same, 1e-6)

    def test_backward_takes_the_tokens_that_forward_took(self, target):
        """Whether or not backward is captured with forward."""
        results = []
        for forward, backward in ((False, False), (False, True), (True, True), (True, False)):
            torch.manual_seed(0)
            head, self.now = target.head(20, 16, 90), forward
            stats = token_stats(head.hidden, head.weight, head.labels)
            self.now = backward
            loss_of(stats).backward()
            results.append(head.hidden.grad)
        for other in results[1:]:
            assert_close(other, results[0], 1e-6)

    def test_the_copy_counts_in_the_budget(self, target):
        head = target.head(20, 16, 90)
        self.now = True
        copy = 20 * 16 * 4
        with pytest.raises(ValueError, match=f"memory_budget is {copy:,} bytes") as error:
            token_stats(head.hidden, head.weight, head.labels, memory_budget=copy)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        token_stats(head.hidden, head.weight, head.labels, memory_budget=least)
        with pytest.raises(ValueError, match="need at least"):
            token_stats(head.hidden, head.weight, head.labels, memory_budget=least - copy)

    def test_the_copy_counts_in_the_default_budget(self, target, monkeypatch):
        asked = []
        monkeypatch.setattr(dispatch, "plan", lambda *arguments: asked.append(arguments) or planner.plan(*arguments))
        head = target.head(20, 16, 90)
        for self.now in (False, True):
            token_stats(head.hidden, head.weight, head.labels)
        assert [held for *_, held in asked] == [0, 20 * 16 * 4]


class TestEveryLabelCounts:
    """ignore_index=None: as an ignore_index that no label has."""

    @pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")], ids=["log_probs", "entropy"])
    def test_hidden(self, target, outputs):
        head = target.head((3, 20), 16, 90, bias=True, ignored=0)
        results = [run(token_stats, detached(head), outputs=outputs, ignore_index=i, **ALL) for i in (None, -1)]
        for got, same in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
            assert (got is None) == (same is None)
            assert got is None or torch.equal(got, same)
        check_against_reference(head, outputs=outputs, ignore_index=None)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits(self, target, inplace):
        leaf, labels = target.randn(2, 9, 70, grad=True), target.labels(70, (2, 9))
        made = [logits_to_log_probs(leaf * 1, labels, inplace_backward=inplace, ignore_index=i) for i in (None, -1)]
        assert torch.equal(*made)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), leaf)[0] for t in made))

    def test_under_compile(self, target):
        head, logits = target.head(20, 16, 70, ignored=0), target.randn(6, 40, grad=True)
        leaves = (head.hidden, head.weight, logits)

        def step(hidden, weight, logits, ignore_index):
            from_hidden = hidden_to_log_probs(hidden, weight, head.labels, ignore_index=ignore_index).sum()
            return from_hidden + logits_to_log_probs(logits, head.labels[:6] % 40, ignore_index=ignore_index).sum()

        compiled, eager = torch.compile(step, fullgraph=True)(*leaves, None), step(*leaves, -1)
        assert_close(compiled, eager, 1e-5)
        for got, same in zip(*(torch.autograd.grad(t, leaves) for t in (compiled, eager)), strict=True):
            assert_close(got, same, 1e-6)
