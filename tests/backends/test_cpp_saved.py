"""What the C++ kernels save is right wherever logits, gradients and operands lie; labels are not rounded."""

from __future__ import annotations

import pytest
import torch
from helpers import make_head

from dpo_kernels import hidden_to_log_probs, token_stats
from dpo_kernels.backends import cpp
from dpo_kernels.dispatch import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
VOCAB = 400


@pytest.fixture(autouse=True)
def only_cpp(override) -> None:
    assert BACKENDS["cpp"].cannot_run(torch.device("cpu")) is None
    override(backends=("cpp",))


def rows_of_all_kinds(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, VOCAB), a kind a row in turn, and labels."""
    torch.manual_seed(0)
    rows = torch.randn(tokens, VOCAB).mul(8).round().div(8)
    labels = torch.randint(VOCAB - 1, (tokens,))
    for t in range(tokens):
        kind, row = t % 10, rows[t]
        if kind == 1:
            row[:200] -= 120  # far below the others
            labels[t] = 3
        elif kind == 2:
            row += 60
        elif kind == 3:
            row[300:] += 60  # above what the row began with
        elif kind == 4:
            row -= 60
        elif kind == 5:
            row[torch.arange(VOCAB) != labels[t]] = -30000  # the label, and next to nothing
        elif kind == 6:
            row += 30  # the edges of what has 0 for its reference
        elif kind == 7:
            row -= 20
        elif kind == 8:
            row += 30
            row[labels[t]] = 90
        elif kind == 9:
            row += 30
            row[-1] = 90  # far above what the row began with, and not the label
    return rows, labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
@pytest.mark.parametrize("softcap", [None, 500.0])
def test_each_gradient_of_a_logit(scale, softcap, dtype):
    """With the identity for hidden states, dW is the gradient of the logits, number by number; db is its sum."""
    if dtype == torch.float16 and scale not in (0.0, 1.0):
        scale = 0.125 if scale < 1 else 2.0  # float16 holds no more
    tokens = 131
    rows, labels = rows_of_all_kinds(tokens)
    hidden = torch.eye(tokens, dtype=dtype)
    weight, bias = rows.T.contiguous().to(dtype).requires_grad_(), torch.zeros(VOCAB, dtype=dtype, requires_grad=True)
    grad = torch.rand(tokens).add(0.5) * scale
    options = {"softcap": softcap}
    log_probs = hidden_to_log_probs(hidden, weight, labels, bias, **options)
    got, of_bias = torch.autograd.grad((log_probs * grad).sum(), (weight, bias))
    exact = weight.detach().double().requires_grad_()
    truth = hidden_to_log_probs(hidden.double(), exact, labels, impl="torch", **options)
    assert ((log_probs.double() - truth).abs() <= 3e-6 * truth.abs() + 1e-37).all()
    right = torch.autograd.grad((truth * grad.double()).sum(), exact)[0]
    # What is below 2^-94 of a row's largest is 0, and what float32 or float16 cannot hold.
    least = 6e-8 if dtype == torch.float16 else 1e-37
    tolerance = max(TOLERANCE[dtype], 1e-5 * (softcap is not None))  # the cap's derivative is 1 - tanh^2
    allowed = tolerance * right.abs() + 1e-27 * scale + least
    assert ((got.double() - right).abs() <= allowed).all()
    assert ((of_bias.double() - right.sum(1)).abs() <= allowed.sum(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learns", ["hidden", "hidden,weight"])
def test_each_row_of_hidden_states(learns, dtype):
    """Also with a frozen head, and beside rows of NaN."""
    tokens = 131
    rows, labels = rows_of_all_kinds(tokens)
    hidden = torch.eye(tokens, dtype=dtype)
    hidden[20, 20] = torch.nan
    hidden.requires_grad_()
    weight = rows.T.contiguous().to(dtype).requires_grad_("weight" in learns)
    grad = torch.rand(tokens).add(0.5)
    got = torch.autograd.grad((hidden_to_log_probs(hidden, weight, labels) * grad).sum(), hidden)[0]
    exact = hidden.detach().double().nan_to_num(0).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    log_probs = hidden_to_log_probs(exact, wide, labels, impl="torch") * grad.double()
    others = torch.arange(tokens) != 20
    right, of_logits = torch.autograd.grad(log_probs[others].sum(), (exact, wide))
    assert got[20].isnan().all()
    size = of_logits.T.abs() @ wide.detach().abs() + (1e-3 if dtype == torch.float16 else 1e-34)
    assert ((got.double() - right).abs() <= TOLERANCE[dtype] * size)[others].all()


def test_tiles_whose_gradients_are_far_apart(override):
    """Sums over several tiles, each with a power of two of its own, and labels in one of them."""
    override(capabilities={"tiles": ((64, 128),), "wide_tiles": ()})
    head = make_head(192, 40, VOCAB, torch.float32, grads="hidden,weight", ignored=0)
    grad = torch.tensor([1e-20, 1e20, 1.0]).repeat_interleave(64)
    got = torch.autograd.grad((hidden_to_log_probs(*head[:3]) * grad).sum(), head[:2])
    exact = [t.detach().double().requires_grad_() for t in head[:2]]
    log_probs = hidden_to_log_probs(*exact, head.labels, impl="torch")
    right = torch.autograd.grad((log_probs * grad.double()).sum(), exact)
    for a, b in zip(got, right, strict=True):
        assert ((a.double() - b).abs() <= 1e-5 * b.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("small", [1e-12, 1e12])
def test_operands_of_any_size(small):
    """Tiny hidden states beside a large weight, and the other way round, with tiny gradients too."""
    head = make_head(131, 48, VOCAB, torch.float32, grads="hidden,weight", ignored=0)
    hidden, weight = (head.hidden.detach() * small).requires_grad_(), (head.weight.detach() / small).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    for scale in (1.0, 1e-20):
        got = torch.autograd.grad((hidden_to_log_probs(hidden, weight, head.labels) * scale).sum(), (hidden, weight))
        log_probs = hidden_to_log_probs(*exact, head.labels, impl="torch")
        right = torch.autograd.grad((log_probs * scale).sum(), exact)
        for a, b in zip(got, right, strict=True):
            largest = b.abs().amax(1, keepdim=True)
            assert ((a.double() - b).abs() <= 1e-5 * largest + 1e-37).all()


@pytest.mark.parametrize("in_bfloat16", [False, *([True] if cpp._has_dot_products() else [])])
def test_the_label_is_not_rounded_for_products(in_bfloat16, monkeypatch):
    """Its term joins them in float32: a gradient has the error of its last rounding, where labels make most of it."""
    monkeypatch.setattr(cpp, "_multiplies_bfloat16", lambda: in_bfloat16)
    head = make_head(130, 64, 5000, torch.bfloat16, grads="hidden,weight", ignored=0)
    got = torch.autograd.grad(hidden_to_log_probs(*head[:3]).sum(), head[:2])
    exact = [t.detach().double().requires_grad_() for t in head[:2]]
    truth = torch.autograd.grad(hidden_to_log_probs(*exact, head[2], impl="torch").sum(), exact)
    for a, b in zip(got, truth, strict=True):
        rounding = (b.bfloat16().double() - b).norm()
        assert (a.double() - b).norm() < 1.2 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_of_a_row_is_the_same_bits_whatever_is_asked_of_it(dtype):
    """Statistics and modes change no log-prob: policy and reference are the same where their weights are."""
    rows, labels = rows_of_all_kinds(131)
    hidden, weight = torch.eye(131, dtype=dtype), rows.T.contiguous().to(dtype)
    plain = hidden_to_log_probs(hidden, weight, labels)
    assert torch.equal(plain, token_stats(hidden, weight, labels, outputs=("entropy", "is_top1")).log_probs)
    assert torch.equal(plain, hidden_to_log_probs(hidden.requires_grad_(), weight.requires_grad_(), labels).detach())
