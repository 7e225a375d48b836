"""The statistics of a row: the same fields in every language, and parts of the vocabulary merge into the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close

from dpo_kernels import reference
from dpo_kernels.backends.cpp import CppBackend
from dpo_kernels.kernels import softmax_state
from dpo_kernels.statistics import (
    OPTIONAL_OUTPUTS,
    SoftmaxState,
    empty_state,
    finish,
    finite,
    merge_into,
)

ROWS, VOCAB = 12, 90


def test_every_language_has_the_same_fields():
    assert CppBackend().cannot_run(torch.device("cpu")) is None
    names = list(SoftmaxState._fields)
    assert sorted(torch.ops.dpo_kernels_cpp.state_fields()) == sorted([*names, "base"])
    assert softmax_state.FIELDS.value == len(names)
    in_triton = {name: getattr(softmax_state, f"_{name.upper()}").value for name in names}
    assert in_triton == {name: i for i, name in enumerate(names)}


def part_of(z, labels, start, stop):
    """The state of some columns of logits, by its definition."""
    own = torch.arange(start, stop) == labels[:, None]
    part = z[:, start:stop]
    others = part.masked_fill(own, -torch.inf)
    maximum, argmax = others.max(1)
    base = finite(maximum)
    e = (others - base[:, None]).exp()
    shifted = torch.where(e > 0, e * (others - base[:, None]), 0)
    label_logit = torch.where(own.any(1), part.masked_fill(~own, -torch.inf).amax(1), torch.nan)
    return SoftmaxState(
        maximum, e.sum(1), label_logit, shifted.sum(1), e.square().sum(1), part.sum(1), argmax + start
    )  # fmt: skip


def merged(parts, dtype):
    state = empty_state(ROWS, OPTIONAL_OUTPUTS, dtype, torch.device("cpu"))
    for part in parts:
        merge_into(state, part, OPTIONAL_OUTPUTS)
    return state


def splits(count):
    ends = (torch.randperm(VOCAB - 1)[: count - 1] + 1).sort().values.tolist()
    return list(zip([0, *ends], [*ends, VOCAB], strict=True))


def assert_right(state, z, labels, tolerance):
    got = finish(state, labels, VOCAB, OPTIONAL_OUTPUTS).stats
    truth = reference.token_stats(
        z.double(), torch.eye(VOCAB, dtype=torch.float64), labels, outputs=OPTIONAL_OUTPUTS
    )  # fmt: skip
    for name in ("log_probs", *OPTIONAL_OUTPUTS):
        value, exact = getattr(got, name), getattr(truth, name)
        if name == "is_top1":
            assert torch.equal(value, exact)
        else:
            assert_close(value, exact, tolerance * max(1.0, exact.abs().max().item()), name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("order", ["as-they-come", "rising", "falling"])
def test_parts_merge_into_the_whole(dtype, tolerance, count, order):
    z, labels = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 5, torch.randint(VOCAB, (ROWS,))
    z = z if order == "as-they-come" else z.sort(1, descending=order == "falling").values
    z[0, :7] = z[0].max()  # a tie: the first wins
    labels[0] = 3
    z = z.to(dtype)
    assert_right(merged([part_of(z, labels, *ends) for ends in splits(count)], dtype), z, labels, tolerance)


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_parts_of_banned_entries_add_nothing(count, where):
    """Logits of -inf, a whole part of them too. The mean of the logits is -inf then, as it should be."""
    z, labels = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 5, torch.randint(60, 70, (ROWS,))
    banned = {"first": slice(0, 50), "middle": slice(20, 60), "last": slice(71, VOCAB)}[where]
    z[:, banned] = -torch.inf
    ends = sorted({0, banned.start, banned.stop or VOCAB, VOCAB, *(a for a, _ in splits(count))})
    parts = [part_of(z, labels, a, b) for a, b in itertools.pairwise(ends)]
    assert any(part.maximum.isneginf().all() for part in parts)
    got = finish(merged(parts, torch.float64), labels, VOCAB, OPTIONAL_OUTPUTS).stats
    p = z.softmax(1)
    assert_close(got.log_probs, z.log_softmax(1).gather(1, labels[:, None]).squeeze(1), 1e-12)
    assert_close(got.entropy, torch.special.entr(p).sum(1), 1e-12)
    assert_close(got.log_sum_sq_probs, p.square().sum(1).log(), 1e-12)
    assert got.mean_logits.isneginf().all()
    assert torch.equal(got.is_top1, z.argmax(1) == labels)


def test_the_order_of_merging_moves_no_more_than_rounding():
    """All but the place of a first maximum, which goes by the order of the vocabulary."""
    z, labels = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 5, torch.randint(VOCAB, (ROWS,))
    parts = [part_of(z, labels, *ends) for ends in splits(9)]
    for order in (parts, parts[::-1], [parts[i] for i in torch.randperm(9).tolist()]):
        assert_right(merged(order, torch.float64), z, labels, 1e-12)


def test_one_order_is_one_answer_to_the_last_bit():
    z, labels = torch.randn(ROWS, VOCAB), torch.randint(VOCAB, (ROWS,))
    parts = [part_of(z, labels, *ends) for ends in splits(9)]
    first, second = (merged(parts, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_wrong_merge_is_found():
    """A state that forgets to rescale what it had."""
    z, labels = torch.randn(ROWS, VOCAB, dtype=torch.float64) * 5, torch.randint(VOCAB, (ROWS,))
    parts = [part_of(z, labels, *ends) for ends in splits(9)]
    state = merged(parts, torch.float64)
    wrong = state._replace(total=sum(part.total for part in parts))
    with pytest.raises(AssertionError, match="log_probs"):
        assert_right(wrong, z, labels, 1e-12)
