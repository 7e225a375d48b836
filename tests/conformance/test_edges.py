"""Every row of the table of edge semantics, at the public functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_close, slow

from dpo_kernels import hidden_to_log_probs, logits_to_log_probs, reference, token_stats
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

INF, NAN = float("inf"), float("nan")
MODES = ["hidden", "hidden,weight,bias"]  # frozen head, and keep


def small(target, grads="hidden,weight,bias", dtype=None):
    head = target.head(6, 4, 9, dtype or target.widest, bias=True, ignored=0, grads=grads)
    return head.hidden, head.weight, head.labels, head.bias


@pytest.mark.parametrize("grads", MODES)
def test_ignored_label_is_exactly_zero(target, grads):
    hidden, weight, labels, bias = small(target, grads)
    labels[[1, 4]] = -100
    stats = token_stats(hidden, weight, labels, bias, outputs=OPTIONAL_OUTPUTS)
    for value in stats[:5]:
        assert value[[1, 4]].eq(0).all()
    stats.log_probs.sum().backward()
    assert hidden.grad[[1, 4]].eq(0).all()
    assert hidden.grad[0].ne(0).all()


def test_nan_in_an_ignored_row_touches_nothing(target):
    hidden, weight, labels, bias = small(target)
    with torch.no_grad():
        hidden[2] = NAN
    labels[2] = -100
    hidden_to_log_probs(hidden, weight, labels, bias).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (hidden, weight, bias))


@pytest.mark.parametrize("bad", [9, -1, 10**6, -101])
def test_a_label_out_of_range_is_an_error_where_it_is_asked_for(target, monkeypatch, bad):
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    hidden, weight, labels, bias = small(target)
    labels[3] = bad
    with pytest.raises(IndexError, match=rf"labels\[3\] is {bad}; expected a token in \[0, 9\)"):
        hidden_to_log_probs(hidden, weight, labels, bias)
    with pytest.raises(IndexError, match=rf"labels\[1, 1\] is {bad}"):
        logits_to_log_probs(target.randn(3, 2, 9), labels.view(3, 2))


@pytest.mark.parametrize("grads", MODES)
def test_label_out_of_range_without_the_check_is_nan_in_its_row(target, unchecked_labels, grads):
    """What a GPU does, where asking would stall it."""
    hidden, weight, labels, bias = small(target, grads)
    labels[3] = 9
    log_probs = hidden_to_log_probs(hidden, weight, labels, bias)
    assert log_probs.isnan().tolist() == [False, False, False, True, False, False]
    log_probs[[0, 1, 2, 4, 5]].sum().backward()
    assert torch.isfinite(hidden.grad[[0, 1, 2, 4, 5]]).all()
    level = logits_to_log_probs(target.randn(6, 9), labels)
    assert level.isnan().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens(target, shape):
    hidden = target.randn(*shape, 4, grad=True)
    weight, bias = target.randn(9, 4, grad=True), target.randn(9, grad=True)
    stats = token_stats(hidden, weight, target.labels(1, shape), bias, outputs=OPTIONAL_OUTPUTS)
    assert all(value.shape == shape for value in stats[:5])
    (stats.log_probs.sum() + stats.entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()
    logits = target.randn(*shape, 9, grad=True)
    logits_to_log_probs(logits, target.labels(1, shape)).sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("grads", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_labels_ignored(target, grads, dtype):
    hidden, weight, labels, bias = small(target, grads, dtype)
    log_probs = hidden_to_log_probs(hidden, weight, torch.full_like(labels, -100), bias)
    assert log_probs.eq(0).all()
    log_probs.sum().backward()
    assert all(t.grad.eq(0).all() for t in (hidden, weight, bias) if t.requires_grad)


def test_all_ignored_logits_in_place(target):
    logits = target.randn(4, 9, grad=True) * 1
    log_probs = logits_to_log_probs(logits, target.tensor([-100] * 4), inplace_backward=True)
    log_probs.sum().backward()
    assert logits.eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("grads", MODES)
def test_nan_or_inf_stays_in_its_row(target, value, grads):
    hidden, weight, labels, bias = small(target, grads)
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
def test_rows_of_the_most_negative_numbers_are_uniform(target, dtype):
    logits = torch.full((2, 9), torch.finfo(dtype).min, dtype=dtype, device=target.device)
    logits[1] = -1e35
    labels, exact = target.tensor([4, 0]), target.tensor([-math.log(9)] * 2)
    assert_close(logits_to_log_probs(logits, labels), exact, 1e-6)
    weight = torch.eye(9, dtype=dtype, device=target.device)
    assert_close(hidden_to_log_probs(logits, weight, labels), exact, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [
        (torch.uint8, 120), (torch.uint8, 256), (torch.uint8, 3000), (torch.int8, 120), (torch.int8, 256),
        (torch.int8, 3000), (torch.int16, 256), slow(torch.int16, "largest"), (torch.int32, 3000),
    ],
)  # fmt: skip
@pytest.mark.slow_on("triton-tiles")
def test_labels_of_narrow_dtypes(target, dtype, vocab):
    """Compared in a dtype that holds the vocabulary and ignore_index: 156 is not -100, 3 is below 70,000."""
    vocab = target.largest if vocab == "largest" else vocab
    logits = target.randn(3, vocab)
    label = min(vocab, torch.iinfo(dtype).max) - 1
    labels = target.tensor([3, label, 156 if dtype == torch.uint8 and vocab > 156 else 5]).to(dtype)
    exact = reference.logits_to_log_probs(logits, labels.long())
    assert_close(logits_to_log_probs(logits, labels), exact, 1e-5)
    assert_close(hidden_to_log_probs(logits[:, :4], target.randn(vocab, 4), labels), torch.zeros_like(exact), 100)
    if dtype != torch.uint8:
        labels[0] = -100
        assert logits_to_log_probs(logits, labels)[0] == 0


@pytest.mark.parametrize("column", [3, "label"])
def test_plus_inf_logit_is_nan_in_its_row(target, column):
    logits, labels = target.randn(5, 9), target.labels(9, (5,))
    logits[1, int(labels[1]) if column == "label" else (int(labels[1]) + 1) % 9] = INF
    assert logits_to_log_probs(logits, labels).isnan().tolist() == [False, True, False, False, False]


FIRST, LAST, EVERY_OTHER = (0.0, 0.55), (0.55, 1.0), None  # shares of the vocabulary


@pytest.mark.parametrize(
    ("banned", "offset", "outputs", "grads"),
    [
        pytest.param(FIRST, 0.0, (), MODES[0], id="first-tile-frozen"),
        pytest.param(FIRST, -300.0, (), MODES[1], id="first-tile-very-negative"),
        pytest.param(FIRST, 0.0, ("entropy",), MODES[1], id="first-tile-entropy"),
        pytest.param(FIRST, -300.0, ("entropy",), MODES[0], id="first-tile-very-negative-entropy"),
        pytest.param(LAST, 0.0, (), MODES[1], id="last-tiles"),
        pytest.param(LAST, -300.0, (), MODES[0], id="last-tiles-very-negative-frozen"),
        pytest.param(LAST, -300.0, ("entropy",), MODES[1], id="last-tiles-very-negative-entropy"),
        pytest.param(EVERY_OTHER, 0.0, (), MODES[1], id="every-other"),
        pytest.param(EVERY_OTHER, -300.0, ("entropy",), MODES[0], id="every-other-very-negative-entropy"),
    ],
)
def test_banned_tokens(target, banned, offset, outputs, grads):
    """A bias of -inf bans a token: p = 0; a first tile of nothing else, and very negative logits, are fine."""
    head = target.head(20, 8, target.wide, torch.float32, bias=True, ignored=0, grads=grads)
    ends = None if banned is None else [int(share * target.wide) for share in banned]
    banned = slice(1, None, 2) if ends is None else slice(*ends)
    with torch.no_grad():
        head.bias.add_(offset)[banned] = -INF
    allowed = torch.isfinite(head.bias).nonzero().squeeze(1)
    labels = allowed[target.labels(len(allowed), (20,))]
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


def test_banned_label_is_minus_inf_with_a_finite_gradient(target):
    hidden, weight, labels, bias = small(target, dtype=torch.float32)
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
def test_a_row_of_minus_inf_is_nan_alone(target, level):
    logits, labels = target.randn(4, 9), target.labels(9, (4,))
    logits[2] = -INF
    if level == "logits":
        log_probs = logits_to_log_probs(logits, labels)
    else:
        hidden = torch.cat([torch.eye(4).index_fill(0, torch.tensor(2), 0), torch.eye(4)[:, 2:3] * INF], 1)
        hidden = hidden.to(target.device)
        hidden = torch.where(hidden.isnan(), 0, hidden)
        weight = torch.cat([target.randn(9, 4), target.tensor([[-1.0]] * 9)], 1)
        log_probs = hidden_to_log_probs(hidden, weight, labels)
    assert log_probs.isnan().tolist() == [False, False, True, False]


def test_a_single_token_vocabulary_is_certain(target):
    hidden = target.randn(3, 4, grad=True)
    log_probs = hidden_to_log_probs(hidden, target.randn(1, 4), target.labels(1, (3,)))
    assert log_probs.eq(0).all()
    log_probs.sum().backward()
    assert hidden.grad.eq(0).all()


def test_first_maximum_wins_a_tie(target):
    logits = target.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 3.0], [0.0, 0.0, 2.0]])
    for labels, expected in (([1, 0, 2], [True, True, True]), ([2, 1, 1], [False, False, False])):
        stats = token_stats(logits, torch.eye(3, device=target.device), target.tensor(labels), outputs=("is_top1",))
        assert stats.is_top1.tolist() == expected


def test_padded_vocabulary_counts(target):
    """Columns beyond the tokenizer's are part of the softmax, as in every peer."""
    hidden, weight, labels, bias = small(target)
    padded = torch.cat([weight, torch.zeros_like(weight[:7])])
    padded_bias = torch.cat([bias, torch.zeros_like(bias[:7])])
    got = hidden_to_log_probs(hidden, padded, labels, padded_bias)
    exact = torch.log_softmax(hidden @ padded.T + padded_bias, -1).gather(1, labels[:, None]).squeeze(1)
    assert_close(got, exact, 1e-12 if target.widest == torch.float64 else 1e-5)
    assert (got < hidden_to_log_probs(hidden, weight, labels, bias)).all()


def test_tied_embeddings_are_never_written(target):
    weight = torch.nn.Parameter(target.randn(30, 8))
    before, version = weight.detach().clone(), weight._version
    tokens = target.labels(30, (2, 7))
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


@pytest.mark.slow_on("triton-tiles")
def test_int64_addressing(target):
    """Rows that start beyond 2^31 elements; the pages before them are never touched."""
    rows, vocab = 66_000, 33_000
    assert (rows - 2) * vocab > 2**31
    if target.device.type == "cpu":
        logits = torch.from_numpy(np.zeros((rows, vocab), dtype=np.float16))
    else:
        logits = torch.zeros(rows, vocab, dtype=torch.float16, device=target.device)
    labels = torch.full((rows,), -100, device=target.device)
    labels[-2:] = target.tensor([5, vocab - 1])
    logits[-1, vocab - 1] = 20.0
    log_probs = logits_to_log_probs(logits, labels)
    assert log_probs[:-2].eq(0).all()
    exact = target.tensor([-math.log(vocab), -math.log1p((vocab - 1) * math.exp(-20))])
    assert_close(log_probs[-2:], exact, 1e-6)


def test_double_backward_is_a_clear_error(target):
    hidden, weight, labels, bias = small(target)
    for result, leaf in (
        (hidden_to_log_probs(hidden, weight, labels, bias), hidden),
        (logits_to_log_probs(hidden @ weight.T, labels), hidden),
    ):
        (grad,) = torch.autograd.grad((result**2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
