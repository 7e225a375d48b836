"""Every row of the table of edge semantics, at the public functions."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import IMPLS, assert_close, make_head

from dpo_kernels import (
    available_impls,
    checks,
    dpo_loss,
    hidden_to_log_probs,
    logits_to_log_probs,
    reference,
    token_stats,
)
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

WIDEST = torch.float64
INF, NAN = float("inf"), float("nan")
MODES = ["hidden", "hidden,weight,bias"]  # frozen head, and keep


@pytest.fixture(params=IMPLS, autouse=True)
def impl(request, monkeypatch, override) -> str:
    """Each implementation, in the widest dtype that it computes."""
    override(backends=(request.param,))
    monkeypatch.setattr(sys.modules[__name__], "WIDEST", torch.float64 if request.param == "torch" else torch.float32)
    return request.param


def small(grads="hidden,weight,bias", dtype=None):
    head = make_head(6, 4, 9, dtype or WIDEST, bias=True, ignored=0, grads=grads)
    return head.hidden, head.weight, head.labels, head.bias


@pytest.mark.parametrize("grads", MODES)
def test_ignored_label_is_exactly_zero(grads):
    hidden, weight, labels, bias = small(grads)
    labels[[1, 4]] = -100
    stats = token_stats(hidden, weight, labels, bias, outputs=OPTIONAL_OUTPUTS)
    for value in stats:
        assert value[[1, 4]].eq(0).all()
    stats.log_probs.sum().backward()
    assert hidden.grad[[1, 4]].eq(0).all()
    assert hidden.grad[0].ne(0).all()


def test_nan_in_an_ignored_row_touches_nothing():
    hidden, weight, labels, bias = small()
    with torch.no_grad():
        hidden[2] = NAN
    labels[2] = -100
    hidden_to_log_probs(hidden, weight, labels, bias).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (hidden, weight, bias))


@pytest.mark.parametrize("bad", [9, -1, 10**6, -101])
def test_label_out_of_range_on_the_cpu(bad):
    hidden, weight, labels, bias = small()
    labels[3] = bad
    with pytest.raises(IndexError, match=rf"labels\[3\] is {bad}; expected a token in \[0, 9\)"):
        hidden_to_log_probs(hidden, weight, labels, bias)
    with pytest.raises(IndexError, match=rf"labels\[1, 1\] is {bad}"):
        logits_to_log_probs(torch.randn(3, 2, 9), labels.view(3, 2))


@pytest.mark.parametrize("grads", MODES)
def test_label_out_of_range_without_the_check_is_nan_in_its_row(monkeypatch, grads):
    """What a GPU does, where asking would stall it."""
    monkeypatch.setattr("dpo_kernels.checks.labels_in_range", lambda *_: None)
    hidden, weight, labels, bias = small(grads)
    labels[3] = 9
    log_probs = hidden_to_log_probs(hidden, weight, labels, bias)
    assert log_probs.isnan().tolist() == [False, False, False, True, False, False]
    log_probs[[0, 1, 2, 4, 5]].sum().backward()
    assert torch.isfinite(hidden.grad[[0, 1, 2, 4, 5]]).all()
    level = logits_to_log_probs(torch.randn(6, 9), labels)
    assert level.isnan().tolist() == [False, False, False, True, False, False]


def test_validation_can_be_asked_for_on_any_device(monkeypatch):
    labels = torch.tensor([[1, 2], [9, -100]])
    elsewhere = SimpleNamespace(
        device=torch.device("cuda"), dtype=labels.dtype, reshape=labels.reshape, shape=labels.shape
    )
    checks.labels_in_range(elsewhere, -100, 9)
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=r"labels\[1, 0\] is 9; expected a token in \[0, 9\) or ignore_index -100"):
        checks.labels_in_range(elsewhere, -100, 9)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens(shape):
    hidden = torch.randn(*shape, 4, requires_grad=True)
    weight, bias = torch.randn(9, 4, requires_grad=True), torch.randn(9, requires_grad=True)
    stats = token_stats(hidden, weight, torch.zeros(shape, dtype=torch.long), bias, outputs=OPTIONAL_OUTPUTS)
    assert all(value.shape == shape for value in stats)
    (stats.log_probs.sum() + stats.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()
    logits = torch.randn(*shape, 9, requires_grad=True)
    logits_to_log_probs(logits, torch.zeros(shape, dtype=torch.long)).sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_labels_ignored(grads, dtype):
    hidden, weight, labels, bias = small(grads, dtype)
    log_probs = hidden_to_log_probs(hidden, weight, torch.full_like(labels, -100), bias)
    assert log_probs.eq(0).all()
    log_probs.sum().backward()
    assert all(t.grad.eq(0).all() for t in (hidden, weight, bias) if t.requires_grad)


def test_all_ignored_logits_in_place():
    logits = torch.randn(4, 9, requires_grad=True) * 1
    log_probs = logits_to_log_probs(logits, torch.full((4,), -100), inplace_backward=True)
    log_probs.sum().backward()
    assert logits.eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("grads", MODES)
def test_nan_or_inf_stays_in_its_row(value, grads):
    hidden, weight, labels, bias = small(grads)
    clean = hidden_to_log_probs(hidden, weight, labels, bias)
    with torch.no_grad():
        hidden[2] = value
    stats = token_stats(hidden, weight, labels, bias, outputs=OPTIONAL_OUTPUTS[:3])
    others = [0, 1, 3, 4, 5]
    assert stats.log_probs[2].isnan()
    assert_close(stats.log_probs[others], clean[others], 1e-12)
    assert all(torch.isfinite(t[others]).all() for t in stats if t is not None)
    stats.log_probs.sum().backward()
    assert torch.isfinite(hidden.grad[others]).all()
    assert not weight.requires_grad or weight.grad.isnan().any()  # the row's own share


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_the_most_negative_numbers_are_uniform(dtype):
    logits = torch.full((2, 9), torch.finfo(dtype).min, dtype=dtype)
    logits[1] = -1e35
    assert_close(logits_to_log_probs(logits, torch.tensor([4, 0])), torch.full((2,), -math.log(9)), 1e-6)
    weight = torch.eye(9, dtype=dtype)
    assert_close(hidden_to_log_probs(logits, weight, torch.tensor([4, 0])), torch.full((2,), -math.log(9)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("vocab", [120, 256, 3000, 70_000])
def test_labels_of_narrow_dtypes(impl, dtype, vocab):
    """Compared in a dtype that holds the vocabulary and ignore_index: 156 is not -100, 3 is below 70,000."""
    if impl == "triton":
        vocab = min(vocab, 33_000)  # beyond int16 too, and half the interpreter's time
    logits = torch.randn(3, vocab)
    label = min(vocab, torch.iinfo(dtype).max) - 1
    labels = torch.tensor([3, label, 156 if dtype == torch.uint8 and vocab > 156 else 5]).to(dtype)
    exact = reference.logits_to_log_probs(logits, labels.long())
    assert_close(logits_to_log_probs(logits, labels), exact, 1e-5)
    assert_close(hidden_to_log_probs(logits[:, :4], torch.randn(vocab, 4), labels), torch.zeros(3), 100)
    if dtype != torch.uint8:
        labels[0] = -100
        assert logits_to_log_probs(logits, labels)[0] == 0


@pytest.mark.parametrize("column", [3, "label"])
def test_plus_inf_logit_is_nan_in_its_row(column):
    logits, labels = torch.randn(5, 9), torch.randint(9, (5,))
    logits[1, int(labels[1]) if column == "label" else (int(labels[1]) + 1) % 9] = INF
    assert logits_to_log_probs(logits, labels).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("outputs", [(), ("entropy",)])
@pytest.mark.parametrize("banned", [slice(0, 2500), slice(2500, 4500), slice(1, None, 2)])
@pytest.mark.parametrize("offset", [0.0, -300.0])
@pytest.mark.parametrize("grads", MODES)
def test_banned_tokens(banned, offset, outputs, grads):
    """A bias of -inf bans a token: p = 0; a first tile of nothing else, and very negative logits, are fine."""
    head = make_head(20, 8, 4500, torch.float32, bias=True, ignored=0, grads=grads)
    with torch.no_grad():
        head.bias.add_(offset)[banned] = -INF
    allowed = torch.isfinite(head.bias).nonzero().squeeze(1)
    labels = allowed[torch.randint(len(allowed), (20,))]
    stats = token_stats(head.hidden, head.weight, labels, head.bias, outputs=outputs)
    sum(value.sum() for value in stats if value is not None).backward()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (head.hidden, head.weight, head.bias)]
    truth = reference.token_stats(exact[0], exact[1], labels, exact[2], outputs=outputs)
    sum(value.sum() for value in truth if value is not None).backward()
    for value, correct in zip(stats, truth, strict=True):
        if value is not None:
            assert_close(value, correct, 2e-4 if offset else 1e-5)
    for leaf, correct in zip((head.hidden, head.weight, head.bias), exact, strict=True):
        if leaf.requires_grad:
            assert_close(leaf.grad, correct.grad, 2e-4 * correct.grad.abs().max().item())
    if head.weight.requires_grad:
        assert head.weight.grad[banned].eq(0).all()


def test_banned_label_is_minus_inf_with_a_finite_gradient():
    hidden, weight, labels, bias = small(dtype=torch.float32)
    with torch.no_grad():
        bias[labels[0]] = -INF
    keep = labels != labels[0]
    labels = torch.where(keep, labels, -100)
    labels[0] = (bias == -INF).nonzero()[0, 0]
    log_probs = hidden_to_log_probs(hidden, weight, labels, bias)
    assert log_probs[0] == -INF
    log_probs.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (hidden, weight, bias))


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_a_row_of_minus_inf_is_nan_alone(level):
    logits, labels = torch.randn(4, 9), torch.randint(9, (4,))
    logits[2] = -INF
    if level == "logits":
        log_probs = logits_to_log_probs(logits, labels)
    else:
        hidden = torch.cat([torch.eye(4).index_fill(0, torch.tensor(2), 0), torch.eye(4)[:, 2:3] * INF], 1)
        hidden = torch.where(hidden.isnan(), 0, hidden)
        weight = torch.cat([torch.randn(9, 4), -torch.ones(9, 1)], 1)
        log_probs = hidden_to_log_probs(hidden, weight, labels)
    assert log_probs.isnan().tolist() == [False, False, True, False]


def test_a_single_token_vocabulary_is_certain():
    hidden = torch.randn(3, 4, requires_grad=True)
    log_probs = hidden_to_log_probs(hidden, torch.randn(1, 4), torch.zeros(3, dtype=torch.long))
    assert log_probs.eq(0).all()
    log_probs.sum().backward()
    assert hidden.grad.eq(0).all()


def test_first_maximum_wins_a_tie():
    logits = torch.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 3.0], [0.0, 0.0, 2.0]])
    for labels, expected in (([1, 0, 2], [True, True, True]), ([2, 1, 1], [False, False, False])):
        stats = token_stats(logits, torch.eye(3), torch.tensor(labels), outputs=("is_top1",))
        assert stats.is_top1.tolist() == expected


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("softcap", 0.0, r"softcap is 0.0; expected None or a finite number > 0"),
        ("softcap", -3.0, r"softcap is -3.0"),
        ("temperature", 0.0, r"temperature is 0.0; expected a finite number > 0"),
        ("temperature", NAN, r"temperature is nan"),
        ("logit_scale", INF, r"logit_scale is inf"),
        ("impl", "fast", r"impl is 'fast'; expected None or one of \('triton', 'cpp', 'torch'\)"),
        ("memory_budget", 0, r"memory_budget is 0; expected None"),
        ("memory_budget", 1000, r"memory_budget is 1,000 bytes .* need at least [\d,]+"),
        ("outputs", ("entropi",), r"outputs has \['entropi'\]; expected names from"),
    ],
)
def test_bad_options(argument, value, message):
    hidden, weight, labels, bias = small()
    with pytest.raises(ValueError, match=message):
        token_stats(hidden, weight, labels, bias, **{argument: value})


def test_bad_kinds_of_options():
    hidden, weight, labels, _ = small(dtype=torch.float32)
    with pytest.raises(TypeError, match="softcap is '3'; expected a number"):
        hidden_to_log_probs(hidden, weight, labels, softcap="3")
    with pytest.raises(TypeError, match="outputs is the string 'entropy'"):
        token_stats(hidden, weight, labels, outputs="entropy")
    with pytest.raises(TypeError, match=r"memory_budget is 1000000\.0; expected None or a whole number of bytes"):
        hidden_to_log_probs(hidden, weight, labels, memory_budget=1e6)
    for impl in (name for name, reason in available_impls().items() if reason):
        with pytest.raises(RuntimeError, match=f"impl '{impl}' cannot run on cpu"):
            hidden_to_log_probs(hidden, weight, labels, impl=impl)


H, W, Y = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.long)
META = torch.device("meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((H, torch.randn(9, 5), Y), ValueError, r"hidden has 4 features, weight 5: \(6, 4\) x \(9, 5\)"),
        ((H, torch.randn(9), Y), ValueError, r"weight is \(9,\); expected \(V, D\)"),
        ((H, torch.randn(0, 4), Y), ValueError, r"weight is \(0, 4\); expected \(V, D\) with V >= 1"),
        ((torch.tensor(1.0), W, Y), ValueError, r"hidden is \(\); expected \(..., D\) with D >= 1"),
        ((torch.randn(6, 0), torch.randn(9, 0), Y), ValueError, r"hidden is \(6, 0\); expected"),
        ((H, W, Y[:5]), ValueError, r"labels are \(5,\), hidden \(6, 4\); expected labels of \(6,\)"),
        ((H, W, Y, torch.randn(8)), ValueError, r"bias is \(8,\), weight \(9, 4\); expected a bias of \(9,\)"),
        ((H, W.double(), Y), TypeError, "weight is torch.float64, hidden torch.float32"),
        ((H, W, Y, torch.randn(9).half()), TypeError, "bias is torch.float16, hidden torch.float32"),
        ((H.int(), W, Y), TypeError, "hidden is torch.int32; expected one of torch.float16"),
        ((H, W, Y.float()), TypeError, "labels are torch.float32; expected an integer dtype"),
        ((H, W, Y.bool()), TypeError, "labels are torch.bool"),
        ((H, [1.0], Y), TypeError, "weight is list; expected a torch.Tensor"),
        ((H, W.to(META), Y), ValueError, "weight is on meta, hidden on cpu"),
        ((H, W, Y.to(META)), ValueError, "labels is on meta, hidden on cpu"),
        ((H, W, Y, torch.randn(9, device=META)), ValueError, "bias is on meta, hidden on cpu"),
    ],
)
def test_mismatches_print_both_sides(arguments, error, message):
    with pytest.raises(error, match=message):
        hidden_to_log_probs(*arguments)


def test_logits_mismatches():
    with pytest.raises(ValueError, match=r"logits are \(6, 0\); expected \(..., V\) with V >= 1"):
        logits_to_log_probs(torch.randn(6, 0), Y)
    with pytest.raises(ValueError, match=r"labels are \(6,\), logits \(5, 9\)"):
        logits_to_log_probs(torch.randn(5, 9), Y)


def test_padded_vocabulary_counts():
    """Columns beyond the tokenizer's are part of the softmax, as in every peer."""
    hidden, weight, labels, bias = small()
    padded = torch.cat([weight, torch.zeros(7, 4, dtype=WIDEST)])
    padded_bias = torch.cat([bias, torch.zeros(7, dtype=WIDEST)])
    got = hidden_to_log_probs(hidden, padded, labels, padded_bias)
    exact = torch.log_softmax(hidden @ padded.T + padded_bias, -1).gather(1, labels[:, None]).squeeze(1)
    assert_close(got, exact, 1e-5 if torch.float32 == WIDEST else 1e-12)
    assert (got < hidden_to_log_probs(hidden, weight, labels, bias)).all()


def test_tied_embeddings_are_never_written():
    weight = torch.nn.Parameter(torch.randn(30, 8))
    before, version = weight.detach().clone(), weight._version
    tokens = torch.randint(30, (2, 7))
    hidden = torch.nn.functional.embedding(tokens, weight)
    log_probs = hidden_to_log_probs(hidden, weight, tokens.roll(-1, 1))
    log_probs.sum().backward()
    assert torch.equal(weight.detach(), before)
    assert weight._version == version
    exact = before.double().requires_grad_()
    reference.hidden_to_log_probs(
        torch.nn.functional.embedding(tokens, exact), exact, tokens.roll(-1, 1)
    ).sum().backward()
    assert_close(weight.grad, exact.grad, 1e-4)


def test_int64_addressing():
    """Rows that start beyond 2^31 elements; the pages before them are never touched."""
    rows, vocab = 66_000, 33_000
    assert (rows - 2) * vocab > 2**31
    logits = torch.from_numpy(np.zeros((rows, vocab), dtype=np.float16))
    labels = torch.full((rows,), -100)
    labels[-2:] = torch.tensor([5, vocab - 1])
    logits[-1, vocab - 1] = 20.0
    log_probs = logits_to_log_probs(logits, labels)
    assert log_probs[:-2].eq(0).all()
    exact = torch.tensor([-math.log(vocab), -math.log1p((vocab - 1) * math.exp(-20))])
    assert_close(log_probs[-2:], exact, 1e-6)


def test_double_backward_is_a_clear_error():
    hidden, weight, labels, bias = small()
    for result, leaf in (
        (hidden_to_log_probs(hidden, weight, labels, bias), hidden),
        (logits_to_log_probs(hidden @ weight.T, labels), hidden),
    ):
        (grad,) = torch.autograd.grad((result**2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_masked_positions_may_hold_anything():
    log_probs = torch.randn(4, 6, requires_grad=True)
    noisy = log_probs.detach().clone()
    mask = torch.rand(4, 6) < 0.5
    noisy[~mask] = NAN
    noisy.requires_grad_()
    losses = [dpo_loss(torch.zeros(4, 6), p, mask, aggregate="mean") for p in (log_probs, noisy)]
    for loss in losses:
        loss.loss.backward()
    assert_close(losses[1].loss, losses[0].loss, 0)
    assert_close(noisy.grad, log_probs.grad, 0)
