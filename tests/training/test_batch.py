"""A batch of pairs: how answers lie in it, whose tokens are whose, and pairs that only fill it up."""

from __future__ import annotations

import pytest
import torch
from training_helpers import Pairs

from dpo_kernels.training import PairCollator
from dpo_kernels.training.batch import PairBatch, keep_pairs
from dpo_kernels.training.layouts import Layout


def batch_of(chosen, rejected, **more):
    """A batch from two masks, (B, S) of 0 and 1; the ids count up, and the labels are the ids plus 100."""
    inputs = {}
    for side, mask, first in (("chosen", chosen, 0), ("rejected", rejected, 50)):
        mask = torch.tensor(mask).bool()
        ids = first + torch.arange(mask.numel()).view(mask.shape)
        inputs |= {f"x_{side}": ids, f"y_{side}": torch.where(mask, ids + 100, -100), f"mask_{side}": mask}
    return inputs | more


def test_the_chosen_answers_come_first():
    batch = PairBatch(batch_of([[0, 1, 1], [1, 0, 0]], [[0, 0, 1], [1, 1, 1]]))
    [given] = batch.model_inputs()
    assert set(given) == {"input_ids", "labels"}
    assert given["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [50, 51, 52], [53, 54, 55]]
    assert given["labels"][0].tolist() == [-100, 101, 102]
    assert batch.mask.int().tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert (batch.pairs, batch.positions, batch.chosen_tokens) == (2, 12, 3)
    chosen, rejected = batch.sides(torch.arange(4))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 1], [2, 3])
    assert batch.ref_log_probs is None


def test_segments_reach_the_last_token_that_counts():
    batch = PairBatch(batch_of([[0, 1, 0, 1, 0]], [[1, 0, 0, 0, 0]]))
    assert batch.segments.tolist() == [[0, 0, 0, 0, -1], [1, -1, -1, -1, -1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.attention_mask.dtype == torch.int64
    [given] = batch.lying(Layout(gives_mask=True)).model_inputs()
    assert torch.equal(given["attention_mask"], batch.attention_mask)


def test_an_answer_without_a_token_has_no_segment():
    batch = PairBatch(batch_of([[0, 0, 0]], [[0, 1, 0]]))
    assert batch.segments.tolist() == [[-1, -1, -1], [1, 1, -1]]
    assert batch.chosen_tokens == 0


def test_log_probs_that_a_dataset_holds_lie_like_the_answers():
    ref = {"ref_chosen": torch.full((1, 3), -1.0), "ref_rejected": torch.full((1, 3), -2.0)}
    assert PairBatch(batch_of([[0, 1, 1]], [[0, 0, 1]], **ref)).ref_log_probs.tolist() == [[-1.0] * 3, [-2.0] * 3]


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_pairs_that_fill_a_batch_are_taken_out_in_place(count):
    pairs = Pairs(3)
    inputs = PairCollator()([pairs[i] for i in range(3)])
    whole = dict(inputs)
    keep_pairs(inputs, count)
    batch = PairBatch(inputs)
    assert batch.pairs == min(count, 3)
    assert len(batch.mask) == 2 * max(1, batch.pairs)
    if count:
        assert all(torch.equal(tensor, whole[name][:count]) for name, tensor in inputs.items())
    else:  # it is computed, and nothing of it counts
        assert torch.equal(inputs["x_chosen"], whole["x_chosen"][:1])
        assert not batch.mask.any()
        assert batch.model_inputs()[0]["labels"].eq(-100).all()
        assert batch.chosen_tokens == 0


def test_a_batch_in_which_nothing_counts_keeps_one_position():
    pairs = Pairs(2)
    items = [{name: torch.zeros_like(t) if "mask" in name else t for name, t in pairs[i].items()} for i in range(2)]
    batch = PairBatch(PairCollator()(items))
    assert batch.mask.shape == (4, 1)
    assert batch.segments.eq(-1).all()
