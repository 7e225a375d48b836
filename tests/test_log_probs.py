"""Numbers: every implementation, mode, dtype and option against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_as_good,
    assert_close,
    check_against_reference,
    detached,
    loss_of,
    make_head,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpo_kernels
from dpo_kernels import hidden_to_log_probs, logits_to_log_probs, plan, reference, token_stats
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

MIB = 2**20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    pytest.param(1, 8, 5, id="one-token-tiny-vocabulary"),
    pytest.param(33, 96, 130, id="ragged"),
    pytest.param((3, 7), 40, 2049, id="one-past-the-last-vocabulary-tile"),
    pytest.param(513, 24, 700, id="one-past-the-last-token-tile"),
    pytest.param((2, 2, 5), 65, 4096, id="whole-tiles-odd-features"),
]
TRANSFORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": 1.3}, id="scaled"),
    pytest.param({"softcap": 6.0}, id="softcap"),
    pytest.param({"softcap": 9.0, "temperature": 1.5, "logit_scale": 0.25}, id="all"),
]
GRADS = ["hidden,weight,bias", "hidden,weight", "hidden", "weight", "bias", "hidden,bias", "none"]


@pytest.fixture(params=("cpp", "torch"), autouse=True)  # "triton" has sizes of its own, in test_triton.py
def impl(request, override) -> str:
    override(backends=(request.param,))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features", "vocab"), SHAPES)
def test_shapes_and_dtypes(tokens, features, vocab, dtype):
    check_against_reference(make_head(tokens, features, vocab, dtype), outputs=())


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("outputs", [(), ("entropy",), OPTIONAL_OUTPUTS], ids=["log_probs", "entropy", "all"])
def test_options_and_wanted_gradients(options, grads, outputs):
    check_against_reference(make_head(70, 48, 2100, bias=True, grads=grads), outputs=outputs, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
def test_options_in_half_precision(options, dtype):
    check_against_reference(make_head(70, 48, 2100, dtype, bias=True), outputs=OPTIONAL_OUTPUTS, **options)


def test_bfloat16_at_the_size_of_the_promise():
    """1e-4 in bfloat16 at D = 1,024: logits are float32 sums, never rounded to bfloat16."""
    check_against_reference(make_head(64, 1024, 4000, torch.bfloat16), 1e-4, outputs=())


BUDGETED = [  # outer loops, tokens that count, features, vocabulary, gradients; mode and budget in MiB
    pytest.param("", 420, 64, 3000, "none", {"torch": ("score", 64), "cpp": ("score", 19)}, id="score"),
    pytest.param("", 420, 64, 3000, "hidden", {"torch": ("frozen", 64), "cpp": ("frozen", 19)}, id="frozen"),
    pytest.param(
        "tokens", 1050, 512, 3000, "hidden", {"torch": ("recompute", 14), "cpp": ("recompute", 19.25)},
        id="frozen-head-that-does-not-fit",
    ),
    pytest.param("vocab", 910, 64, 3000, "hidden,weight", {"torch": ("keep", 64), "cpp": ("keep", 76)}, id="keep"),
    pytest.param("vocab", 910, 64, 3000, "hidden,weight", {"torch": ("mixed", 22), "cpp": ("mixed", 33)}, id="mixed"),
    pytest.param(
        "vocab", 910, 64, 3000, "hidden,weight", {"torch": ("recompute", 14), "cpp": ("recompute", 18.5)},
        id="recompute",
    ),
    pytest.param(
        "tokens,vocab", 1400, 256, 1900, "hidden,weight", {"torch": ("mixed", 13), "cpp": ("mixed", 22)},
        id="two-sweeps",
    ),
    pytest.param(
        "tokens", 2100, 32, 700, "hidden,weight", {"torch": ("recompute", 14), "cpp": ("mixed", 20)},
        id="tokens-outside",
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [TRANSFORMS[0], TRANSFORMS[3]])
@pytest.mark.parametrize(("outer", "tokens", "features", "vocab", "grads", "expected"), BUDGETED)
def test_modes(impl, outer, tokens, features, vocab, grads, expected, options, dtype):
    head = make_head(tokens + tokens // 3, features, vocab, dtype, grads=grads, ignored=0)
    head.labels[torch.randperm(len(head.labels))[tokens:]] = -100
    mode, budget = expected[impl][0], int(expected[impl][1] * MIB)
    made = plan(
        tokens, features, vocab, torch.bfloat16, grads=tuple(g for g in grads.split(",") if g != "none"),
        softcap=None, memory_budget=budget,
    )  # fmt: skip
    assert (made.mode, ",".join(sweep.outer for sweep in made.sweeps)) == (mode, outer)
    check_against_reference(head, outputs=(), memory_budget=budget, **options)


def test_the_answer_does_not_depend_on_the_budget():
    head = make_head(1300, 32, 3000, grads="hidden,weight")
    results = [run(token_stats, detached(head), outputs=(), memory_budget=b * MIB) for b in (20, 26, 200)]
    for stats, grads in results[1:]:
        assert_close(stats.log_probs, results[0][0].log_probs, 2e-6)
        for got, first in zip(grads[:2], results[0][1][:2], strict=True):
            assert_close(got, first, 2e-6 * first.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [None, 20 * MIB, 26 * MIB])
@pytest.mark.parametrize("options", [TRANSFORMS[0], TRANSFORMS[3]])
def test_every_mode_gives_the_same_log_probs_to_the_last_bit(options, budget, dtype):
    """A frozen reference (score) and a policy (any other mode) that start equal: the first loss is exactly log 2."""
    results, modes = [], set()
    for grads in ("none", "hidden", "weight", "hidden,weight"):
        torch.manual_seed(0)
        head = make_head(1300, 32, 5000, dtype, grads=grads)
        results.append(hidden_to_log_probs(head.hidden, head.weight, head.labels, memory_budget=budget, **options))
        wanted = tuple(name for name in grads.split(",") if name != "none")
        made = plan(int((head.labels != -100).sum()), 32, 5000, dtype, grads=wanted, memory_budget=budget)
        modes.add(made.mode)
        assert made.vocab_tiles > 1
    assert len(modes) > 2
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_answer_does_not_depend_on_the_batch_order():
    head = make_head(600, 32, 900)
    order = torch.randperm(600)
    straight = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    assert_close(hidden_to_log_probs(head.hidden[order], head.weight, head.labels[order]), straight[order], 2e-6)


def test_adding_a_constant_to_a_row_changes_nothing():
    logits, labels = torch.randn(9, 50, dtype=torch.float64), torch.randint(50, (9,))
    assert_close(logits_to_log_probs(logits + 1e4, labels), logits_to_log_probs(logits, labels), 1e-10)
    weight, bias = torch.eye(50, dtype=torch.float64), torch.full((50,), 1e4, dtype=torch.float64)
    for outputs in ((), ("entropy",)):
        shifted = token_stats(logits, weight, labels, bias, outputs=outputs)
        plain = token_stats(logits, weight, labels, outputs=outputs)
        assert_close(shifted[len(outputs)], plain[len(outputs)], 1e-9)


@pytest.mark.parametrize("options", TRANSFORMS[:2])
def test_rows_of_the_logits_gradient_sum_to_zero(options):
    logits = (torch.randn(9, 5000) * 5).requires_grad_()
    logits_to_log_probs(logits, torch.randint(5000, (9,)), **options).sum().backward()
    assert_close(logits.grad.sum(1), torch.zeros(9), 1e-5)


def test_a_sure_model_keeps_its_gradient():
    """1 - p is 0 in float32 where the model is sure; -expm1(log p) is not."""
    logits = torch.tensor([[20.0, 0.0, 1.0]], requires_grad=True)
    logits_to_log_probs(logits, torch.tensor([0])).sum().backward()
    exact = logits.detach().double().requires_grad_()
    reference.logits_to_log_probs(exact, torch.tensor([0])).sum().backward()
    assert 0 < exact.grad[0, 0] < 1e-8
    assert_close(logits.grad / exact.grad, torch.ones(1, 3), 1e-5)


@pytest.mark.parametrize("budget", [None, 20 * MIB])
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
@pytest.mark.parametrize("options", TRANSFORMS)
def test_gradcheck(options, outputs, budget):
    head = make_head((2, 3), 4, 7, torch.float64, bias=True, ignored=0)
    labels = head.labels.clone()
    labels[0, 1] = -100

    def function(hidden, weight, bias):
        stats = token_stats(hidden, weight, labels, bias, outputs=outputs, memory_budget=budget, **options)
        return tuple(t for t in stats if t is not None)

    assert torch.autograd.gradcheck(function, (head.hidden, head.weight, head.bias))
    assert torch.autograd.gradcheck(lambda h: function(h, head.weight.detach(), head.bias.detach()), (head.hidden,))


@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_level(dtype, options):
    logits = (torch.randn(5, 9, 1031, dtype=torch.float64) * 6).to(dtype).requires_grad_()
    labels = torch.randint(1031, (5, 9))
    labels[torch.rand(5, 9) < 0.3] = -100
    exact = logits.detach().double().requires_grad_()
    plain = logits.detach().clone().requires_grad_()
    weights = torch.randn(5, 9)
    for function, leaf in (
        (logits_to_log_probs, logits), (reference.logits_to_log_probs, exact), (reference.logits_to_log_probs, plain),
    ):  # fmt: skip
        result = function(leaf, labels, **options)
        (result * weights).sum().backward()
    assert_close(
        logits_to_log_probs(logits, labels, **options), reference.logits_to_log_probs(exact, labels, **options), 1e-5
    )
    assert_as_good(logits.grad, plain.grad, exact.grad)
    assert logits.grad[labels == -100].eq(0).all()


def test_logits_gradcheck():
    labels = torch.tensor([[1, -100, 3], [0, 4, 4]])
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: logits_to_log_probs(z, labels, softcap=3.0, temperature=0.5), logits)


def test_inplace_backward_writes_the_gradient_over_the_logits():
    leaf = torch.randn(6, 300, requires_grad=True)
    labels = torch.randint(300, (6,))
    labels[2] = -100
    logits_to_log_probs(leaf, labels).sum().backward()
    expected, leaf.grad = leaf.grad, None
    logits = leaf * 1
    address = logits.data_ptr()
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    log_probs = logits_to_log_probs(logits, labels, inplace_backward=True)
    log_probs.sum().backward(retain_graph=True)
    assert_close(leaf.grad, expected, 1e-7)
    assert seen == [address]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


@pytest.mark.parametrize(
    ("make", "in_place"),
    [
        (lambda z: z[:1].expand(6, 300), False),
        (lambda z: z.view(-1).unfold(0, 300, 100)[:6], False),
        (lambda z: z.T.contiguous().T, True),
        (lambda z: z[:, ::2], True),
    ],
    ids=["expanded", "overlapping", "transposed", "sliced"],
)
def test_inplace_backward_leaves_overlapping_logits_alone(make, in_place):
    base = torch.randn(6, 300, requires_grad=True)
    labels = torch.randint(150, (6,))
    exact = torch.autograd.grad(reference.logits_to_log_probs(make(base * 1), labels).sum(), base)[0]
    logits = make(base * 1)
    before = logits.detach().clone()
    (got,) = torch.autograd.grad(logits_to_log_probs(logits, labels, inplace_backward=True).sum(), base)
    assert_close(got, exact, 1e-6)
    assert torch.equal(before, logits.detach()) != in_place


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_any_stride(level):
    """Sliced, transposed and expanded inputs, and a gradient that autograd expanded."""
    labels = torch.randint(40, (3, 4))
    if level == "logits":
        base = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
        variants = [
            base[:, :-1],
            base.transpose(0, 1)[:-1].transpose(0, 1),
            base[:1, :4].expand(3, 4, 40),
            base[:, 1:].flip(2),
        ]
        pairs = [(logits_to_log_probs(v, labels), reference.logits_to_log_probs(v, labels)) for v in variants]
    else:
        base = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 40, dtype=torch.float64).t()
        variants = [
            base[:, :-1, ::2],
            base.transpose(0, 1)[:-1, :, :6].transpose(0, 1),
            base[:1, :4, :6].expand(3, 4, 6),
        ]
        pairs = [
            (hidden_to_log_probs(v, weight, labels), reference.hidden_to_log_probs(v, weight, labels)) for v in variants
        ]
    for got, exact in pairs:
        assert_close(got, exact, 1e-12)
        expanded = torch.ones((), dtype=torch.float64).expand(3, 4)
        grads = [torch.autograd.grad(t, base, expanded, retain_graph=True)[0] for t in (got, exact)]
        assert_close(grads[0], grads[1], 1e-12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 40),
    features=st.integers(1, 33),
    vocab=st.integers(1, 300),
    ignored=st.sampled_from([0, 0.5, 1]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    grads=st.sampled_from(GRADS),
    options=st.sampled_from(TRANSFORMS),
    entropy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_cases(tokens, features, vocab, ignored, dtype, bias, grads, options, entropy, seed):
    torch.manual_seed(seed)
    head = make_head(tokens, features, vocab, dtype, bias=bias, ignored=ignored, grads=grads)
    if tokens:
        check_against_reference(head, outputs=("entropy",) if entropy else (), **options.values[0])
    else:
        assert hidden_to_log_probs(head.hidden, head.weight, head.labels, head.bias).shape == (0,)


def test_only_the_gradient_that_is_asked_for():
    head = make_head(20, 16, 60, torch.float64)
    stats, grads = run(token_stats, detached(head), outputs=())
    log_probs = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    (only,) = torch.autograd.grad(loss_of(dpo_kernels.TokenStats(log_probs)), head.weight)
    assert_close(only, grads[1], 1e-12)
    assert_close(stats.log_probs, log_probs, 0)


def test_int32_labels_and_another_ignore_index():
    head = make_head(12, 8, 30, torch.float64, ignored=0)
    labels = head.labels.int()
    labels[3] = 0
    got = hidden_to_log_probs(head.hidden, head.weight, labels, ignore_index=0)
    assert got[3] == 0
    exact = reference.hidden_to_log_probs(head.hidden, head.weight, labels, ignore_index=0)
    assert_close(got, exact, 1e-12)
