"""A caller who knows how many labels count: the same numbers, and nothing waits; a wrong number is NaN everywhere."""

from __future__ import annotations

import pytest
import torch
from helpers import MODES, detached, planned, run, step

from dpo_kernels import FusedLinearDPOLoss, hidden_to_log_probs, logits_to_log_probs, ops, token_stats
from dpo_kernels.call import Grads, Options


@pytest.fixture
def seen_from_a_device(monkeypatch, unchecked_labels):
    """As where labels are not looked at by the host."""
    monkeypatch.setattr("dpo_kernels.checks.counted_labels", lambda *what: None)


def counted(labels):
    return int((labels != -100).sum())


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0], ids=["all-count", "some-count", "none-counts"])
@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")], ids=["log_probs", "entropy"])
def test_the_same_numbers_to_the_bit(target, outputs, ignored):
    head = target.head((2, 10), 16, 90, bias=True, ignored=ignored)
    results = [
        run(token_stats, detached(head), outputs=outputs, tokens=n) for n in (None, counted(head.labels))
    ]  # fmt: skip
    for got, same in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
        assert (got is None) == (same is None)
        assert got is None or torch.equal(got, same)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_same_numbers_from_logits(target, inplace):
    leaf, labels = target.randn(2, 9, 70, grad=True), target.labels(70, (2, 9), 0.3)
    made = [
        logits_to_log_probs(leaf * 1, labels, inplace_backward=inplace, tokens=n) for n in (None, counted(labels))
    ]  # fmt: skip
    assert torch.equal(*made)
    assert torch.equal(*(torch.autograd.grad(t.square().sum(), leaf)[0] for t in made))


def test_the_same_loss(target):
    head = target.head((4, 6), 16, 90)
    head.labels[1, :3] = -100
    loss = FusedLinearDPOLoss()
    reference = {"ref_hidden": target.randn(4, 6, 16), "ref_weight": target.randn(90, 16)}
    results = [loss(*head[:3], **reference, tokens=n).loss for n in (None, counted(head.labels))]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(each, head.hidden)[0] for each in results))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", [-1, 1], ids=["one-less", "one-more"])
@pytest.mark.slow_on("torch", "triton-tiles")
def test_a_wrong_number_makes_all_of_it_nan(target, seen_from_a_device, mode, by):
    """Whatever the caller does with the log-probs, no gradient is a number."""
    tokens, features, vocab = target.size
    head = target.head(tokens, features, vocab, torch.bfloat16, grads=MODES[mode], ignored=0)
    head.labels[3:9] = -100
    said = counted(head.labels) + by
    got = step(head, torch.ones(tokens, device=target.device), planned(head, mode).bytes + 2**16, tokens=said)
    found = min(said, counted(head.labels))  # a label that is not there is looked for where the first one is
    assert got.log_probs.isnan().all()
    for gradient, rows in zip(got.grads, (found, vocab), strict=False):
        assert gradient.isnan().all(-1).sum() == rows


def test_a_wrong_number_at_the_logits_level(target, seen_from_a_device):
    leaf, labels = target.randn(9, 70, grad=True), target.labels(70, (9,))
    labels[4:6] = -100
    log_probs = logits_to_log_probs(leaf, labels, tokens=6)
    assert log_probs.isnan().all()
    assert torch.autograd.grad(log_probs.sum(), leaf)[0].isnan().all(-1).sum() == 6


def test_none_is_no_number_that_could_be_wrong(target, seen_from_a_device):
    """No row could show that it is: it is counted then."""
    head = target.head(20, 16, 90)
    results = [hidden_to_log_probs(*head[:3], tokens=n) for n in (0, None)]
    assert torch.equal(*results)


def test_an_ignored_token_of_the_vocabulary(target, seen_from_a_device):
    """ignore_index 0, and no label that counts is missing: its logit must not be taken for a label's."""
    hidden, weight = target.randn(6, 16, grad=True), target.randn(90, 16)
    labels = torch.tensor([1, 0, 2, 3, 0, 4], device=hidden.device)
    same = hidden_to_log_probs(hidden, weight, labels, ignore_index=0)
    assert torch.equal(hidden_to_log_probs(hidden, weight, labels, ignore_index=0, tokens=4), same)
    assert hidden_to_log_probs(hidden, weight, labels, ignore_index=0, tokens=6).isnan().all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tokens": 13}, ValueError, "tokens is 13, but 14 of 20 labels count"),
        ({"tokens": 0}, ValueError, "tokens is 0, but 14 of 20 labels count"),
        ({"tokens": 21}, ValueError, "tokens is 21, but there are 20 labels; give how many"),
        ({"tokens": 14, "ignore_index": None}, ValueError, "every one counts"),
        ({"tokens": -1}, ValueError, "tokens -1 must be >= 0"),
        ({"tokens": 14.0}, TypeError, "tokens is 14.0; expected a whole number"),
        ({"tokens": True}, TypeError, "tokens is True; expected a whole number"),
    ],
)
def test_a_wrong_number_is_a_sentence_where_the_host_can_look(target, given, error, message):
    head = target.head(20, 16, 90)
    head.labels[:] = torch.arange(20)
    if given.get("ignore_index", -100) is not None:
        head.labels[3:9] = -100
    with pytest.raises(error, match=message):
        hidden_to_log_probs(*head[:3], **given)
    with pytest.raises(error, match=message):
        logits_to_log_probs(target.randn(20, 90), head.labels, **given)


def test_any_kind_of_integer_is_a_number_of_tokens(target):
    logits, labels = target.randn(9, 70), target.labels(70, (9,))
    assert torch.equal(logits_to_log_probs(logits, labels, tokens=torch.tensor(9)), logits_to_log_probs(logits, labels))


@pytest.mark.slow_on("torch", "triton-tiles")
def test_one_graph_for_every_number(target):
    from torch._dynamo.testing import CompileCounter

    head, frames = target.head(20, 16, 90), CompileCounter()

    def step(hidden, labels, tokens):
        return hidden_to_log_probs(hidden, head.weight, labels, tokens=tokens)

    compiled = torch.compile(step, backend=frames, fullgraph=True)
    for number in (7, 8, 12, 5, 9):
        labels = target.labels(90, (20,))
        labels[number:] = -100
        assert torch.equal(compiled(head.hidden, labels, number), step(head.hidden, labels, None))
    assert frames.frame_count <= 2  # of the first number, and of any


def test_shapes_are_known_where_the_number_is():
    """No size depends on data: a graph of fakes has no symbols for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()):
        labels, hidden, weight = torch.zeros(20, dtype=torch.int64), torch.zeros(20, 16), torch.zeros(90, 16)
        encoded = {n: Options(tokens=n, grads=Grads()).encode() for n in (20, 14)}
        sizes = {
            n: [tuple(t.shape) for t in torch.ops.dpo_kernels.token_stats(hidden, weight, None, None, None, labels, *e)]
            for n, e in encoded.items()
        }
    saved = [dict(zip(ops.SAVED, shapes[ops.STATS :], strict=True)) for shapes in sizes.values()]
    assert [(s["index"], s["log_probs"]) for s in saved] == [((0,), (20,)), ((14,), (14,))]
