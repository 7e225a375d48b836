"""Calls that PyTorch allows and a kernel might not think of: the right number, or a sentence; never a wrong number."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_close

from dpo_kernels import (
    FusedLinearDPOLoss,
    dpo_loss,
    hidden_to_log_probs,
    logits_to_log_probs,
    plan,
    reference,
    token_stats,
)

LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("layout", ["column", "expanded"])
def test_a_bias_with_a_stride(target, layout):
    hidden, weight, labels = target.randn(5, 16, grad=True), target.randn(90, 16), target.labels(90, (5,))
    matrix = target.randn(90, 3)
    bias = matrix[:, 1] if layout == "column" else matrix[0, 0].expand(90)
    got = hidden_to_log_probs(hidden, weight, labels, bias)
    assert_close(got, reference.hidden_to_log_probs(hidden, weight, labels, bias.contiguous()), 1e-5)
    got.sum().backward()
    (same,) = torch.autograd.grad(hidden_to_log_probs(hidden, weight, labels, bias.clone()).sum(), hidden)
    assert torch.equal(hidden.grad, same)


def test_saved_vectors_that_a_hook_gives_strides(target):
    hidden, weight, labels = (
        target.randn(9, 16, grad=True),
        target.randn(90, 16, grad=True),
        target.labels(90, (9,), 0.3),
    )
    logits = target.randn(9, 90, grad=True)

    def strided(saved):
        return torch.stack([saved, saved], -1)[..., 0] if saved.ndim else saved

    def grads():
        total = hidden_to_log_probs(hidden, weight, labels).sum() + logits_to_log_probs(logits, labels).sum()
        return torch.autograd.grad(total, (hidden, weight, logits))

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        got = grads()
    for value, same in zip(got, grads(), strict=True):
        assert_close(value, same, 1e-6)


def test_a_label_whose_logit_is_the_lowest_number(target):
    logits = target.tensor([[50.0, 51.0, LOWEST]]).requires_grad_()
    log_probs = logits_to_log_probs(logits, target.tensor([2]))
    log_probs.sum().backward()
    assert_close(logits.grad, target.tensor([[-0.26894142, -0.73105858, 1.0]]), 1e-6)


def at_level(level, logits, labels):
    """Log-probs from logits, or from hidden states and an identity that make them; and the leaf, with its gradient."""
    leaf = logits.clone().requires_grad_()
    if level == "logits":
        got = logits_to_log_probs(leaf, labels)
    else:
        got = hidden_to_log_probs(leaf, torch.eye(logits.shape[-1], device=logits.device), labels)
    got.sum().backward()
    return got, leaf


@pytest.mark.parametrize("scale", [1e5, 7e5, 1e6, 3e7, 1e9, 1e20, 3e38])
@pytest.mark.parametrize("vocab", [3, 300])
def test_logits_over_the_whole_range_of_float32(target, scale, vocab):
    """Neighbours that differ by little: what the logits' own rounding leaves is right, in forward and in backward."""
    logits = torch.rand(4, vocab, dtype=torch.float32) * (1 if scale == 1e5 else scale / 3)
    logits = (logits + (scale if scale == 1e5 else 0)).to(target.device)
    labels = target.labels(vocab, (4,))
    exact = logits.double().requires_grad_()
    truth = reference.logits_to_log_probs(exact, labels)
    truth.sum().backward()
    for level in ("logits", "hidden"):
        got, leaf = at_level(level, logits, labels)
        finite = truth.abs() < 3e38
        assert_close((got / truth.clamp(max=-1))[finite], (truth / truth.clamp(max=-1))[finite], 1e-5, level)
        assert_close(leaf.grad, exact.grad, 1e-5, level)


@pytest.mark.parametrize("far", [5e5, 1e6, 1e8, 1e10, 1e20, 1e38, 3e38, -1e10, -3e38])
@pytest.mark.parametrize("label", [0, 2])
def test_one_logit_is_far_from_all_others(target, far, label):
    """Also where the label is another one, so that nothing near it is left of the sums."""
    logits, labels = target.tensor([[far, 0.3, -1.0, 0.1]]), target.tensor([label])
    exact = logits.double().requires_grad_()
    truth = reference.logits_to_log_probs(exact, labels)
    truth.sum().backward()
    for level in ("logits", "hidden"):
        got, leaf = at_level(level, logits, labels)
        assert_close(got / truth.clamp(max=-1), truth / truth.clamp(max=-1), 1e-5, level)
        assert_close(leaf.grad, exact.grad, 1e-5, level)


def test_a_cap_far_below_its_logits(target):
    """The label's logit is kept: from its log-prob it could not be made again to the digits that the cap needs."""
    logits = target.tensor([[-8.5, -36.8, 12.0]]).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    options = {"softcap": 0.01, "temperature": 100.0}
    logits_to_log_probs(logits, target.tensor([1]), **options).sum().backward()
    reference.logits_to_log_probs(exact, target.tensor([1]), **options).sum().backward()
    assert_close(logits.grad, exact.grad, 1e-8)


def test_the_result_may_be_changed_in_place(target):
    hidden, weight, labels = target.randn(4, 8, grad=True), target.randn(9, 8), target.labels(9, (4,))
    mask = target.tensor([1.0, 0.0, 1.0, 0.0])
    (wanted,) = torch.autograd.grad((hidden_to_log_probs(hidden, weight, labels) * mask).sum(), hidden)
    scaled = hidden_to_log_probs(hidden, weight, labels)
    scaled *= mask
    (got,) = torch.autograd.grad(scaled.sum(), hidden)
    assert torch.equal(got, wanted)
    stats = token_stats(hidden, weight, labels, outputs=("entropy",))
    stats.log_probs[mask == 0] = 0
    stats.entropy.zero_()
    (got,) = torch.autograd.grad(stats.log_probs.sum() + stats.entropy.sum(), hidden)
    assert_close(got, wanted, 1e-6)
    logits = target.randn(4, 9, grad=True)
    (wanted,) = torch.autograd.grad((logits_to_log_probs(logits, labels) * mask).sum(), logits)
    log_probs = logits_to_log_probs(logits, labels)
    log_probs *= mask
    (got,) = torch.autograd.grad(log_probs.sum(), logits)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives_are_refused(target, inplace):
    a, w = target.randn(3, 5, grad=True), target.randn(7, 5, grad=True)
    log_probs = logits_to_log_probs(a @ w.T, target.labels(7, (3,)), inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(log_probs.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.square().sum(), w)


def test_transforms_of_functions_are_refused(target):
    hidden, weight, labels = target.randn(3, 5), target.randn(7, 5), target.labels(7, (3,))
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda h: hidden_to_log_probs(h, weight, labels).sum())(hidden)
    with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
        torch.func.jvp(lambda h: hidden_to_log_probs(h, weight, labels), (hidden,), (hidden,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, hidden)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            hidden_to_log_probs(dual, weight, labels)
        assert_close(
            hidden_to_log_probs(hidden, weight, labels), reference.hidden_to_log_probs(hidden, weight, labels), 1e-5
        )


def test_one_graph_for_every_length_and_temperature(target):
    weight, labels = target.randn(40, 16), target.labels(40, (6,), 0.3)
    whole = torch.compile(
        lambda h, t: hidden_to_log_probs(h, weight, labels[: len(h)], temperature=t), fullgraph=True, dynamic=True
    )
    hidden = target.randn(6, 16)
    for length, temperature in ((6, 1.0), (5, 0.7), (4, 1.3)):
        wanted = reference.hidden_to_log_probs(hidden[:length], weight, labels[:length], temperature=temperature)
        assert_close(whole(hidden[:length], temperature), wanted, 1e-5)


def test_chunks_of_logits_are_not_written_to(target):
    base, labels = target.randn(8, 30, grad=True), target.labels(30, (4,))
    (wanted,) = torch.autograd.grad(sum(logits_to_log_probs(c, labels).sum() for c in (base * 1).split(4)), base)
    total = sum(logits_to_log_probs(c, labels, inplace_backward=True).sum() for c in (base * 1).split(4))
    (got,) = torch.autograd.grad(total, base)
    assert torch.equal(got, wanted)


def test_slices_that_are_both_written_to_are_an_error(target):
    """As with any operation that writes where another has saved: never a wrong number."""
    logits, labels = target.randn(8, 30, grad=True) * 1, target.labels(30, (4,))
    total = sum(logits_to_log_probs(c, labels, inplace_backward=True).sum() for c in (logits[:4], logits[4:]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_counted_operations_are_the_products(target):
    from torch.utils.flop_counter import FlopCounterMode

    head = target.head(60, 32, 300, grads="hidden,weight", ignored=0.3)
    product = 2 * int((head.labels != -100).sum()) * 32 * 300
    for grads, products in (("", 1), ("hidden", 2), ("hidden,weight", 3)):
        leaves = [t.detach().requires_grad_(n in grads) for n, t in (("hidden", head.hidden), ("weight", head.weight))]
        with FlopCounterMode(display=False) as counter:
            log_probs = hidden_to_log_probs(*leaves, head.labels)
            if grads:
                log_probs.sum().backward()
        assert counter.get_total_flops() == products * product


class TestSizes:
    def test_any_kind_of_integer_is_one(self):
        assert plan(np.int64(10), 8, torch.tensor(50)) == plan(10, 8, 50)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((10.0, 8, 50), {}, TypeError, "tokens is 10.0; expected a whole number"),
            ((True, 8, 50), {}, TypeError, "tokens is True; expected a whole number"),
            ((10, 8, 50, "bfloat16"), {}, TypeError, "dtype is 'bfloat16'; expected one of torch.float16"),
            ((10, 8, 50), {"labels": -1}, ValueError, "labels -1 must be >= 10"),
            ((10, 8, 50), {"memory_budget": 1e9}, TypeError, r"memory_budget is 1000000000.0; expected a whole number"),
        ],
    )
    def test_others_are_refused(self, arguments, options, error, message):
        with pytest.raises(error, match=message):
            plan(*arguments, **options)

    def test_a_plan_can_be_copied(self):
        made = plan(10, 8, 50)
        assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))

    def test_a_vocabulary_that_a_back_end_does_not_hold_is_planned_and_computed(self, monkeypatch):
        from dpo_kernels.backends.cpp import CppBackend

        monkeypatch.setattr(CppBackend, "largest_vocabulary", 40)
        hidden, weight = torch.randn(3, 8), torch.randn(41, 8)
        labels = torch.tensor([1, 40, 2])
        got = hidden_to_log_probs(hidden, weight, labels)
        assert torch.equal(got, hidden_to_log_probs(hidden, weight, labels, impl="torch"))
        assert plan(3, 8, 41) == plan(3, 8, 41, impl="torch")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 1e-40}, "temperature"),
        ({"softcap": 1e39}, "softcap"),
        ({"temperature": 3e38}, "logit_scale / temperature"),
        ({"softcap": 1e30, "temperature": 1e-20}, "softcap / temperature"),
    ],
)
def test_options_beyond_float32_are_refused(options, name):
    with pytest.raises(ValueError, match=f"{name} is .*; expected a number within float32's range"):
        logits_to_log_probs(torch.randn(2, 5), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_numbers_have_shapes(level, kind):
    from contextlib import nullcontext

    from torch._subclasses.fake_tensor import FakeTensorMode

    device = "meta" if kind == "meta" else "cpu"
    with FakeTensorMode() if kind == "fake" else nullcontext():
        labels = torch.empty(6, dtype=torch.long, device=device)
        if level == "hidden":
            leaves = [torch.empty(*shape, device=device, requires_grad=True) for shape in ((6, 8), (50, 8))]
            log_probs = hidden_to_log_probs(*leaves, labels)
        else:
            leaves = [torch.empty(6, 50, device=device, requires_grad=True)]
            log_probs = logits_to_log_probs(*leaves, labels)
        log_probs.sum().backward()
        assert log_probs.shape == (6,)
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_losses_compile_with_a_second_beta():
    args = (torch.randn(2, 3, 8), torch.randn(9, 8), torch.tensor([[1, 2, -100], [3, 4, 5]]))
    ref = torch.randn(2, 3)
    for beta in (0.1, 0.2, 0.3):
        module = FusedLinearDPOLoss(beta)
        compiled = torch.compile(module, fullgraph=True)(*args, ref_log_probs=ref).loss
        assert_close(compiled, module(*args, ref_log_probs=ref).loss, 1e-6)
    whole = torch.compile(lambda r, p, b: dpo_loss(r, p, torch.ones_like(p), b).loss, fullgraph=True, dynamic=True)
    for length, beta in ((3, 0.1), (5, 0.2), (7, 0.7)):
        ref, policy = torch.randn(4, length), torch.randn(4, length)
        assert_close(whole(ref, policy, beta), dpo_loss(ref, policy, torch.ones_like(policy), beta).loss, 1e-6)


def test_a_module_shows_its_options():
    shown = repr(FusedLinearDPOLoss(0.3, loss_type="ipo", softcap=30.0))
    assert shown == "FusedLinearDPOLoss(beta=0.3, loss_type='ipo', softcap=30.0)"
