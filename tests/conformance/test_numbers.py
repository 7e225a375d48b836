"""Numbers: log-probs, statistics and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALL,
    PLAIN,
    assert_as_good,
    assert_close,
    check_against_reference,
    detached,
    note_errors,
    run,
    step,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpo_kernels
from dpo_kernels import dispatch, hidden_to_log_probs, logits_to_log_probs, reference, token_stats
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

TRANSFORMS = [pytest.param(PLAIN, id="plain"), pytest.param(ALL, id="all")]
EACH_TRANSFORM = [
    *TRANSFORMS,
    pytest.param({"temperature": 0.7, "logit_scale": 1.3}, id="scaled"),
    pytest.param({"softcap": 6.0}, id="softcap"),
]
GRADS = ["hidden,weight,bias", "hidden,weight", "hidden", "weight", "bias", "hidden,bias", "none"]


@pytest.mark.slow_on("triton-tiles")
def test_shapes(target, shape, dtype):
    check_against_reference(target.head(*shape, dtype, bias=True), outputs=())


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("outputs", [(), OPTIONAL_OUTPUTS], ids=["log_probs", "all"])
@pytest.mark.slow_on("float16", "triton-tiles")
def test_wanted_gradients(target, options, grads, outputs):
    head = target.head(70, 48, target.wide // 2, bias=True, grads=grads)
    check_against_reference(head, outputs=outputs, **options)


@pytest.mark.parametrize("options", EACH_TRANSFORM)
@pytest.mark.parametrize("outputs", [("entropy",), OPTIONAL_OUTPUTS], ids=["entropy", "all"])
@pytest.mark.slow_on("triton-tiles")
def test_transforms(target, dtype, options, outputs):
    check_against_reference(target.head(70, 48, target.wide // 2, dtype, bias=True), outputs=outputs, **options)


@pytest.mark.parametrize("grads", ["none", "hidden", "hidden,weight"])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.slow_on("float16", "triton-tiles")
def test_without_a_bias(target, dtype, options, grads):
    check_against_reference(target.head(100, 48, target.wide // 2, dtype, grads=grads), outputs=(), **options)


def test_bfloat16_is_as_exact_as_its_inputs_allow(target):
    """12 times better than plain bfloat16 PyTorch, whose logits are rounded: here they are float32 sums."""
    head = target.head(64, 256, target.wide, torch.bfloat16, ignored=0)
    check_against_reference(head, 1e-4, outputs=())
    truth, truth_grads = run(reference.token_stats, detached(head, torch.float64), outputs=())
    got, grads = run(token_stats, detached(head), outputs=())
    plain, plain_grads = run(reference.token_stats, detached(head), outputs=())
    errors = [(t.log_probs.double() - truth.log_probs).abs().max().item() for t in (got, plain)]
    assert 12 * errors[0] < errors[1]
    assert_as_good(grads[0], plain_grads[0], truth_grads[0], factor=0.5)


def test_float32_is_exact_at_default_settings(target):
    """1e-5 with many features, with TF32 neither asked for nor forbidden."""
    vocab = 32_000 if target.device.type == "cuda" else target.wide
    head = target.head(40, 2048 if target.device.type == "cuda" else 256, vocab, grads="none")
    truth = reference.hidden_to_log_probs(head.hidden.double(), head.weight.double(), head.labels)
    assert_close(step(head, None).log_probs, truth, 1e-5)


def test_bfloat16_at_the_size_of_the_promise(target):
    """1e-4 in bfloat16 at 1,024 features."""
    check_against_reference(target.head(64, 1024, target.wide // 5, torch.bfloat16), 1e-4, outputs=())


@pytest.mark.parametrize(
    ("rows", "ignored", "options"),
    [
        pytest.param((5, 9), 0.3, PLAIN, id="plain"),
        pytest.param((5, 9), 0.3, ALL, id="all"),
        pytest.param((1,), 0.0, ALL, id="one-row"),
        pytest.param((70,), 0.0, PLAIN, id="many-rows"),
    ],
)
def test_logits_level(target, dtype, rows, ignored, options):
    vocab = 33 if rows == (70,) else 1031
    labels = target.labels(vocab, rows, ignored)
    logits = torch.randn(*rows, vocab, dtype=torch.float64).to(target.device) * 3
    logits.scatter_add_(-1, labels.clamp(min=0).unsqueeze(-1), torch.rand(*rows, 1).to(target.device).double() * 20)
    leaf = logits.to(dtype).requires_grad_()
    exact, plain = (leaf.detach().clone().to(t).requires_grad_() for t in (torch.float64, dtype))
    cotangent = torch.randn(rows).to(target.device)
    truth = reference.logits_to_log_probs(exact, labels, **options)
    truth.backward(cotangent.double())
    reference.logits_to_log_probs(plain, labels, **options).backward(cotangent)
    got = logits_to_log_probs(leaf, labels, **options)
    got.backward(cotangent)
    assert_close(got, truth, 1e-5)
    assert_as_good(leaf.grad, plain.grad, exact.grad)
    assert_close(leaf.grad, exact.grad, torch.finfo(dtype).eps * exact.grad.abs().max().item() + 2e-6)
    assert leaf.grad[labels == -100].eq(0).all()
    errors = ((g.double() - e).abs().max().item() for g, e in ((got, truth), (leaf.grad, exact.grad)))
    note_errors(f"{target.name}, from logits", dtype, **dict(zip(("log_probs", "gradients"), errors, strict=True)))


@pytest.mark.parametrize("options", TRANSFORMS)
def test_inplace_backward_writes_the_gradient_over_the_logits(target, dtype, options):
    leaf = target.randn(6, 300).to(dtype).requires_grad_()
    labels = target.labels(300, (6,))
    labels[2] = -100
    (expected,) = torch.autograd.grad(logits_to_log_probs(leaf, labels, **options).sum(), leaf)
    logits = leaf * 1
    address = logits.data_ptr()
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    log_probs = logits_to_log_probs(logits, labels, inplace_backward=True, **options)
    log_probs.sum().backward(retain_graph=True)
    assert_close(leaf.grad, expected, 1e-7)
    assert seen == [address]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


@pytest.mark.parametrize(
    ("make", "in_place"),
    [
        pytest.param(lambda z: z[:1].expand(6, 300), False, id="expanded"),
        pytest.param(lambda z: z.view(-1).unfold(0, 300, 100)[:6], False, id="overlapping"),
        pytest.param(lambda z: z.T.contiguous().T, True, id="transposed"),
        pytest.param(lambda z: z[:, ::2], True, id="sliced"),
    ],
)
def test_inplace_backward_leaves_overlapping_logits_alone(target, make, in_place):
    base = target.randn(6, 300, grad=True)
    labels = target.labels(150, (6,))
    exact = torch.autograd.grad(reference.logits_to_log_probs(make(base * 1), labels).sum(), base)[0]
    logits = make(base * 1)
    before = logits.detach().clone()
    (got,) = torch.autograd.grad(logits_to_log_probs(logits, labels, inplace_backward=True).sum(), base)
    assert_close(got, exact, 1e-6)
    assert torch.equal(before, logits.detach()) != in_place


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda b: b[:, :-1], id="sliced"),
        pytest.param(lambda b: b.transpose(0, 1)[:-1].transpose(0, 1), id="transposed"),
        pytest.param(lambda b: b[:1, :4].expand(3, 4, 80), id="expanded"),
        pytest.param(lambda b: b[:, 1:].flip(2), id="flipped"),
        pytest.param(lambda b: b[:, :-1].movedim(2, 0).contiguous().movedim(0, 2), id="no-row-is-contiguous"),
    ],
)
def test_any_stride(target, of):
    """Of logits, hidden states, weight and labels, and a gradient that autograd expanded."""
    base = target.randn(3, 5, 80).to(target.widest).requires_grad_()
    labels = target.labels(80, (3, 8))[:, ::2]
    wide = target.randn(80, 80).to(target.widest)
    bound = 1e-12 if target.widest == torch.float64 else 2e-5
    for name, x, head in (
        ("logits", of(base), ()),
        ("hidden", of(base)[..., ::2], (wide[:40].t(),)),
        ("hidden", of(base)[..., ::2], (wide[:, ::2],)),
    ):
        got, exact = (getattr(m, f"{name}_to_log_probs")(x, *head, labels) for m in (dpo_kernels, reference))
        assert_close(got, exact, bound)
        expanded = torch.ones((), dtype=got.dtype, device=target.device).expand(3, 4)
        grads = [torch.autograd.grad(t, base, expanded, retain_graph=True)[0] for t in (got, exact)]
        assert_close(grads[0], grads[1], bound)


@pytest.mark.parametrize(("in_place", "ignored"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda b: b[:, :-1], id="without-the-last"),
        pytest.param(lambda b: b[:, 1:, :64], id="without-the-padding-of-the-vocabulary"),
        pytest.param(lambda b: b[::2, 1::2], id="every-other"),
        pytest.param(lambda b: b.transpose(0, 1)[:-1], id="transposed"),
    ],
)
def test_rows_of_two_strides_are_left_to_the_kernels(target, of, in_place, ignored):
    """As everyone gives them who predicts the next token; rows between them are neither read nor written."""
    base = target.randn(4, 5, 80, grad=True)
    made = (base * 1).clone()
    logits = of(made)
    assert not any(backend.declines_logits(logits) for backend in dispatch.BACKENDS.values())
    labels = target.labels(logits.shape[-1], logits.shape[:-1])
    if ignored:
        labels[0, 1] = labels[1, 0] = -100
    rows = torch.full_like(made, torch.nan)
    of(rows).copy_(logits)
    with torch.no_grad():
        made.copy_(rows)  # what lies between is no number
    exact = reference.logits_to_log_probs(of(base.double()), labels)
    weights = target.randn(*labels.shape)
    (wanted,) = torch.autograd.grad((exact * weights).sum(), base)
    before = made.detach().clone()
    got = logits_to_log_probs(logits, labels, inplace_backward=in_place)
    assert_close(got.double(), exact, 1e-5)
    (gradient,) = torch.autograd.grad((got * weights).sum(), base)
    assert_close(gradient, wanted, 1e-5)
    after = made.detach()
    for tensor in (before, after):
        of(tensor).zero_()
    assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


@pytest.mark.parametrize("weight_of", ["every-other-column", "transposed"])
def test_gradients_follow_a_weight_of_any_stride(target, weight_of):
    head = target.head((4, 15), 32, 300, ignored=0)
    weight = head.weight.detach()
    strided = (
        torch.stack([weight, weight], -1)[..., 0] if weight_of == "every-other-column" else weight.T.contiguous().T
    ).requires_grad_()
    hidden = torch.stack([head.hidden.detach()] * 2, -1)[..., 0].requires_grad_()
    got = hidden_to_log_probs(hidden, strided, head.labels)
    got.backward(torch.ones((), device=target.device).expand(4, 15))
    again = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    assert_close(got, again, 1e-5)
    wanted = torch.autograd.grad(again.sum(), (head.hidden, head.weight))
    for value, same in zip((hidden.grad, strided.grad), wanted, strict=True):
        assert_close(value, same, 1e-5)


def test_adding_a_constant_to_a_row_changes_nothing(target):
    logits, labels = target.randn(9, 50).to(target.widest), target.labels(50, (9,))
    far, bound = (1e4, 1e-9) if target.widest == torch.float64 else (1e3, 2e-4)
    assert_close(logits_to_log_probs(logits + far, labels), logits_to_log_probs(logits, labels), bound)
    weight = torch.eye(50, dtype=target.widest, device=target.device)
    bias = torch.full_like(weight[0], far)
    for outputs in ((), ("entropy",)):
        shifted = token_stats(logits, weight, labels, bias, outputs=outputs)
        plain = token_stats(logits, weight, labels, outputs=outputs)
        assert_close(shifted[len(outputs)], plain[len(outputs)], bound)


@pytest.mark.parametrize("options", [PLAIN, {"temperature": 0.7, "logit_scale": 1.3}])
def test_rows_of_the_logits_gradient_sum_to_zero(target, options):
    logits = (target.randn(9, 5000) * 5).requires_grad_()
    logits_to_log_probs(logits, target.labels(5000, (9,)), **options).sum().backward()
    assert_close(logits.grad.sum(1), torch.zeros_like(logits[:, 0]), 1e-5)


def test_a_sure_model_keeps_its_digits(target):
    """log p = -69 exp(-20): 1 - p is 0 in float32 where the model is sure; -expm1(log p) is not."""
    weight, hidden = torch.zeros(70, 16), torch.zeros(2, 16)
    weight[3, 0], hidden[:, 0] = 20.0, 1.0
    weight, hidden, labels = weight.to(target.device), hidden.to(target.device).requires_grad_(), target.tensor([3, 3])
    got = hidden_to_log_probs(hidden, weight, labels)
    exact = reference.hidden_to_log_probs(hidden.double(), weight.double(), labels)
    assert ((got.double() - exact) / exact).abs().max() < 1e-5
    gradient, truth = (torch.autograd.grad(t.sum(), hidden)[0] for t in (got, exact))
    assert ((gradient - truth) / truth)[:, 0].abs().max() < 1e-4


def test_a_sure_model_keeps_the_gradient_of_its_logits(target):
    logits = target.tensor([[20.0, 0.0, 1.0]]).requires_grad_()
    logits_to_log_probs(logits, target.tensor([0])).sum().backward()
    exact = logits.detach().double().requires_grad_()
    reference.logits_to_log_probs(exact, target.tensor([0])).sum().backward()
    assert 0 < exact.grad[0, 0] < 1e-8
    assert_close(logits.grad / exact.grad, torch.ones_like(exact), 1e-5)


def test_rows_of_very_negative_logits_do_not_underflow(target):
    head = target.head(20, 16, 300, ignored=0)
    shifted = head._replace(bias=torch.full((300,), -9000.0, device=target.device))
    exact = run(reference.token_stats, detached(shifted, torch.float64), outputs=())[0]
    got = run(token_stats, detached(shifted), outputs=())[0]
    assert_close(got.log_probs, exact.log_probs, 4e-3)  # the logits themselves are 1e-3 apart in float32


def test_the_answer_does_not_depend_on_the_batch_order(target):
    head = target.head(target.size[0], 32, target.wide // 4)
    order = torch.randperm(len(head.labels), device=target.device)
    straight = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    assert_close(hidden_to_log_probs(head.hidden[order], head.weight, head.labels[order]), straight[order], 2e-6)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tokens=st.integers(0, 60), features=st.integers(1, 48), vocab=st.integers(1, 300))
def test_random_calls(target, data, tokens, features, vocab):
    grads, which = data.draw(st.sampled_from(GRADS)), data.draw(st.sampled_from(target.dtypes))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    ignored, bias = data.draw(st.sampled_from([0, 0.5, 1])), "bias" in grads or data.draw(st.booleans())
    options = data.draw(st.sampled_from([p.values[0] for p in EACH_TRANSFORM]))
    head = target.head(tokens, features, vocab, which, bias=bias, ignored=ignored, grads=grads)
    if tokens:
        outputs = data.draw(st.sampled_from([(), ("entropy",)]))
        check_against_reference(head, 3e-4 if target.impl == "triton" else None, 16.0, outputs=outputs, **options)
    else:
        assert hidden_to_log_probs(head.hidden, head.weight, head.labels, head.bias).shape == (0,)


def test_only_the_gradient_that_is_asked_for(target):
    head = target.head(20, 16, 60)
    log_probs = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    both = torch.autograd.grad(log_probs.sum(), head[:2], retain_graph=True)
    (only,) = torch.autograd.grad(log_probs.sum(), head.weight)
    assert_close(only, both[1], 1e-6)


def test_float64_is_computed_by_pytorch(target):
    """Whatever else was asked for."""
    head = target.head(9, 16, 40, torch.float64)
    got = hidden_to_log_probs(*head[:3], impl=target.impl)
    assert got.dtype == torch.float64
    assert torch.equal(got, hidden_to_log_probs(*head[:3], impl="torch"))


def test_int32_labels_and_another_ignore_index(target):
    head = target.head(12, 8, 30, ignored=0)
    labels = head.labels.int()
    labels[3] = 0
    got = hidden_to_log_probs(head.hidden, head.weight, labels, ignore_index=0)
    assert got[3] == 0
    assert_close(got, reference.hidden_to_log_probs(head.hidden, head.weight, labels, ignore_index=0), 1e-5)


def test_the_default_dtype_does_not_matter(target):
    head = target.head(10, 8, 30)
    expected = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    try:
        for default in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(default)
            assert torch.equal(hidden_to_log_probs(head.hidden, head.weight, head.labels), expected)
    finally:
        torch.set_default_dtype(torch.float32)
