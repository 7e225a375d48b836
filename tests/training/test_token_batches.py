"""Batches by tokens: each pair once an epoch, in an order that a resumed run finds again."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from training_helpers import SIZES, Pairs, Trees, make_trainer, weights

from dpo_kernels.training import DPOConfig, PairCollator
from dpo_kernels.training.batch import PairBatch, pair_tokens
from dpo_kernels.training.layouts import Layout, PairTokens, most_tokens
from dpo_kernels.training.token_batches import EPOCHS, TokenBatches

LAYOUTS = [
    Layout(), Layout("bucketed"), Layout("packed", "branches"), Layout("packed", "mask"), Layout("shared", "branches"),
    Layout("shared", "mask"), Layout(answers_at_once=3), Layout("bucketed", answers_at_once=3),
    Layout("packed", "mask", answers_at_once=4), Layout("shared", "branches", answers_at_once=2),
]  # fmt: skip
ids = "{0.name}-{0.attention}-{0.answers_at_once}".format


def sizes(count, longest=300, seed=0):
    draw = random.Random(seed)
    return [PairTokens(*(draw.randint(1, longest) for _ in range(3))) for _ in range(count)]


def epoch_of(batches, epoch):
    batches.set_epoch(epoch)
    return list(batches)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_tokens_are_those_that_the_model_is_given(layout):
    draw = random.Random(1)
    for _ in range(10):
        trees = Trees([(draw.choice([0, 5, 30]), draw.choice([0, 3]), draw.randint(0, 20), draw.randint(0, 20))
                       for _ in range(draw.randint(1, 6))])  # fmt: skip
        told = most_tokens(layout, [pair_tokens(item) for item in trees.items])
        given = PairBatch(PairCollator()(trees.items), layout).positions
        assert given == told or (layout.name == "bucketed" and given < told)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_an_epoch_has_each_pair_once_in_batches_of_at_most_so_many_tokens(layout):
    pairs = sizes(150)
    batches = TokenBatches(pairs, layout, 4096, seed=3)
    epochs = [epoch_of(batches, epoch) for epoch in range(EPOCHS + 4)]
    for found in epochs:
        assert sorted(itertools.chain(*found)) == list(range(150))
        assert max(most_tokens(layout, [pairs[i] for i in batch]) for batch in found) <= 4096
        assert len(found) == len(batches)
    assert all(a != b for a, b in itertools.pairwise(epochs))
    assert epochs[2] == epoch_of(TokenBatches(pairs, layout, 4096, seed=3), 2)
    assert epochs[2] != epoch_of(TokenBatches(pairs, layout, 4096, seed=4), 2)


def test_batches_are_full():
    pairs = sizes(3000)
    batches = TokenBatches(pairs, Layout("shared", "branches"), 8192)
    assert len(batches) <= 1.03 * sum(map(sum, pairs)) / 8192


def test_epochs_have_equally_many_batches_where_lengths_pack_differently(monkeypatch):
    """Windows of 8 pairs, two of which fit together or not, as the shuffle has it."""
    monkeypatch.setattr("dpo_kernels.training.token_batches.WINDOW", 8)
    pairs = [PairTokens(0, 0, n) for n in (3, 5, 6, 7, 4, 9) * 20]
    batches = TokenBatches(pairs, Layout("packed", "branches"), 11)
    needed = {len(batches._filled(epoch)) for epoch in range(40)}
    assert len(needed) > 1
    assert max(needed) > len(batches)  # and one that needs more than the first ones
    for epoch in range(40):
        found = epoch_of(batches, epoch)
        assert len(found) == len(batches)
        assert sorted(itertools.chain(*found)) == list(range(120))


def test_without_shuffling_batches_come_in_order():
    batches = TokenBatches([PairTokens(0, 5, 5)] * 7, Layout("packed", "branches"), 20, shuffled=False)
    assert list(batches) == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize(("count", "processes"), [(7, 2), (8, 3), (3, 2), (1, 4), (5, 5)])
def test_processes_have_equally_many_batches(count, processes):
    """And where pairs are fewer, the last batches repeat one, which counts nowhere."""
    batches = TokenBatches(sizes(count, 9), Layout("shared", "branches"), 30, processes=processes)
    found = epoch_of(batches, 1)
    assert len(found) % processes == 0
    real = found[: len(found) - batches.repeated]
    assert batches.repeated < processes
    assert sorted(itertools.chain(*real)) == list(range(count))
    assert all(len(batch) == 1 for batch in found[len(real) :])


def test_a_pair_that_is_too_long_is_named():
    told = (
        r"tokens_per_batch is 50, and pair 3 alone has 58 in shared rows \(prompt 40, answers 7 and 11\); "
        "give at least that many, or a smaller max_length"
    )
    with pytest.raises(ValueError, match=told):
        TokenBatches([PairTokens(1, 1, 1)] * 3 + [PairTokens(40, 7, 11)], Layout("shared", "branches"), 50)


def test_a_dataset_that_cannot_be_looked_through_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Pairs())

    with pytest.raises(TypeError, match="needs to know all lengths, and a Stream cannot be looked through"):
        make_trainer(tmp_path, pairs=Stream(), tokens_per_batch=64, per_device_train_batch_size=8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, options, name):
    with pytest.raises(ValueError, match=f"tokens_per_batch does not go with {name}"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, tokens_per_batch=64, **options)
    with pytest.raises(ValueError, match="tokens_per_batch is 0; expected a positive number"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, tokens_per_batch=0)


def token_trainer(tmp_path, **options):
    options = {"tokens_per_batch": 130, "per_device_train_batch_size": 8, "max_steps": -1} | options
    return make_trainer(tmp_path, pairs=Trees((*SIZES, (3, 0, 2, 4)) * 3), **options)


def test_the_loss_is_the_mean_over_the_pairs_of_a_step(tmp_path):
    """All batches of an epoch accumulated into one step are one batch of all pairs."""
    options = {"num_train_epochs": 1, "optim": "sgd"}
    one = token_trainer(tmp_path / "one", tokens_per_batch=10_000, **options)
    several = token_trainer(tmp_path / "several", gradient_accumulation_steps=100, **options)
    assert (len(one.token_batches), len(several.token_batches)) == (1, 5)
    for trainer in (one, several):
        trainer.train()
        assert trainer.state.global_step == 1
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(several)[name], weight, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_in_a_later_epoch_gives_the_same_weights(tmp_path):
    options = {"num_train_epochs": 3, "layout": "shared", "gradient_accumulation_steps": 2}
    straight = token_trainer(tmp_path / "straight", **options)
    straight.train()
    a_epoch = -(-len(straight.token_batches) // 2)
    assert straight.state.global_step == 3 * a_epoch
    stopped = {"save_strategy": "steps", "save_steps": a_epoch + 2}
    token_trainer(tmp_path / "stopped", **options, **stopped).train()
    resumed = token_trainer(tmp_path / "stopped", **options, **stopped)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{a_epoch + 2}"))
    for name, weight in weights(straight).items():
        assert torch.equal(weights(resumed)[name], weight), name
