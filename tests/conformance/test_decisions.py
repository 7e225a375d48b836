"""Forward decides once: the host waits for the device at most once a call, and backward asks for nothing again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dpo_kernels import dispatch, driver, hidden_to_log_probs, logits_to_log_probs
from dpo_kernels.call import Tokens

pytestmark = pytest.mark.usefixtures("unchecked_labels")  # that check waits, and is made on CPUs alone
# What makes the host wait for a GPU: a size or a number that depends on the contents of a tensor.
WAITS = ("aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::masked_select")


def waits_in(profile) -> Counter[str]:
    return Counter(event.name for event in profile.events() if event.name in WAITS)


def waits_of(level, ignore_index, target, known=False):
    """Of forward and of backward. The profiler sees what a dispatch mode does not: calls inside our operators."""
    labels = target.labels(60, (20,), ignored=0.3 if ignore_index == -100 else 0.0)
    given = {"ignore_index": ignore_index, "tokens": int((labels != -100).sum()) if known else None}
    if level == "hidden":
        head = target.head(20, 16, 60, ignored=0)
        leaves, call = head[:2], lambda: hidden_to_log_probs(*head[:2], labels, **given)
    else:
        logits = target.randn(20, 60, grad=True)
        leaves, call = (logits,), lambda: logits_to_log_probs(logits, labels, **given)
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        log_probs = call()
    cotangent = torch.ones_like(log_probs)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        torch.autograd.grad(log_probs, leaves, cotangent)
    return waits_in(forward), waits_in(backward)


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_the_host_waits_once_for_the_labels_that_count(target, level):
    forward, backward = waits_of(level, -100, target)
    assert forward == out_of_reach(target) + Counter({"aten::nonzero": 1})
    assert backward == Counter()


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_the_host_never_waits_where_every_label_counts(target, level):
    forward, backward = waits_of(level, None, target)
    assert forward == out_of_reach(target)
    assert backward == Counter()


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_the_host_never_waits_where_it_is_told_how_many_count(target, monkeypatch, level):
    monkeypatch.setattr("dpo_kernels.checks.counted_labels", lambda *what: None)  # made on CPUs alone
    forward, backward = waits_of(level, -100, target, known=True)
    assert forward == out_of_reach(target)
    assert backward == Counter()


def out_of_reach(target) -> Counter[str]:
    """The C++ kernels look at the maximum afterwards; they run on the CPU, where nobody waits."""
    looks = {"aten::item": 1, "aten::_local_scalar_dense": 1, "aten::is_nonzero": 1}
    return Counter(looks) if target.impl == "cpp" else Counter()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_one_more_wait_would_be_counted(target, monkeypatch, level, where):
    before = waits_of(level, -100, target)
    name = where if level == "hidden" else f"logits_{where}"
    original = getattr(dispatch, name)

    def asks(*arguments):
        arguments[0].hidden.sum().item() if level == "hidden" else arguments[0].sum().item()
        return original(*arguments)

    monkeypatch.setattr(dispatch, name, asks)
    after = waits_of(level, -100, target)
    more = [a - b for a, b in zip(after, before, strict=True)]
    assert more[where == "backward"]["aten::_local_scalar_dense"] == 1
    assert more[where != "backward"] == Counter()


def test_one_plan_and_one_search_for_the_tokens_a_step(target, monkeypatch):
    head, counts = target.head(20, 16, 60), Counter()

    def counted(owner, name, wrap=lambda f: f):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, wrap(lambda *a, **k: counts.update([name]) or original(*a, **k)))

    for name in ("choose", "plan", "capabilities"):
        counted(dispatch, name)
    counted(Tokens, "of", staticmethod)
    counted(driver, "backward")
    hidden_to_log_probs(*head[:3]).sum().backward()
    assert counts == {"choose": 1, "plan": 1, "capabilities": 1, "of": 1, "backward": 1}
