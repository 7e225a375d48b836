"""The reference's log-probs computed ahead: the same training, without the reference in memory, cached on disk."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from helpers import EXAMPLE
from training_helpers import Pairs, make_model

from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer
from dpo_kernels.training.precompute import with_ref_log_probs
from dpo_kernels.training.reference import FrozenModel, OwnStart, Precomputed, model_fingerprint
from dpo_kernels.training.small_model import make_small_model


@pytest.fixture(scope="module")
def small():
    return make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)


@pytest.fixture
def setup(tmp_path, small):
    """(trainer, dataset) with a policy that differs from the reference, so that rewards are not 0."""

    def make(name, precompute, seed=1, **config):
        _, tokenizer = small
        policy, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1, seed=5)
        ref, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1, seed=seed)
        dataset = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache").select(range(11))
        args = DPOConfig(
            output_dir=str(tmp_path / name), use_cpu=True, disable_tqdm=True, max_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=4, per_device_eval_batch_size=3, save_strategy="no",
            precompute_ref_log_probs=precompute, **config,
        )  # fmt: skip
        return DPOTrainer(policy, ref, args, dataset, dataset.select(range(2)))

    return make


def losses(trainer):
    trainer.train()
    path = Path(trainer.args.output_dir) / "log.jsonl"
    return [entry["loss"] for entry in map(json.loads, path.read_text().splitlines()) if "loss" in entry]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_training_is_the_same(setup, layout):
    live, ahead = setup("live", False, layout="padded"), setup("ahead", True, layout=layout)
    assert ahead.layout.name == layout
    assert losses(ahead) == pytest.approx(losses(live), abs=1e-4)
    assert ahead.ref_model is None
    assert live.evaluate()["eval_loss"] == pytest.approx(ahead.evaluate()["eval_loss"], abs=1e-4)


def test_the_reference_leaves_memory(tmp_path, small):
    _, tokenizer = small
    ref, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    gone = weakref.ref(ref.model.layers[0])
    dataset = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache").select(range(5))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, precompute_ref_log_probs=True)
    trainer = DPOTrainer(
        make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)[0], ref, args, dataset
    )  # fmt: skip
    del ref
    gc.collect()
    assert gone() is None
    assert "ref_chosen" in trainer.train_dataset[0]


def test_the_cache_is_used_and_follows_model_and_data(setup, tmp_path, monkeypatch):
    passes = []
    original = FrozenModel.score
    monkeypatch.setattr(FrozenModel, "score", lambda *args: passes.append(1) or original(*args))
    setup("first", True)
    first = len(passes)
    assert first == 4 + 1  # 11 training pairs and 2 held out, in batches of 3
    setup("again", True)
    assert len(passes) == first
    setup("other weights", True, seed=2)
    assert len(passes) == 2 * first
    setup("other precision", True, bf16=True)
    assert len(passes) == 3 * first
    assert len(list((tmp_path / "cache").glob("ref-*.arrow"))) == 6


def test_the_fingerprint_is_of_everything_that_computes():
    prints = set()
    for options in ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rms_norm_eps": 1e-3}):
        prints.add(model_fingerprint(make_model("Llama", options)))
    model = make_model("Llama")
    assert model_fingerprint(model) in prints
    model.register_buffer("scale", torch.tensor(2.0))  # without dimensions
    prints.add(model_fingerprint(model))
    model.scale += 1
    prints.add(model_fingerprint(model))
    model.config._attn_implementation = "eager"
    prints.add(model_fingerprint(model))
    assert len(prints) == 6


def test_other_datasets_and_sharded_adapters_are_refused(tmp_path, setup, monkeypatch):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, precompute_ref_log_probs=True)
    with pytest.raises(TypeError, match="precompute_ref_log_probs needs a DPODataset, not Pairs"):
        DPOTrainer(make_model("Llama"), make_model("Llama"), args, Pairs())
    trainer = setup("sharded", False)
    adapter = OwnStart.__new__(OwnStart)
    adapter.is_sharded = True
    with pytest.raises(ValueError, match="which FSDP shards when training begins"):
        with_ref_log_probs(trainer.train_dataset, adapter, trainer.accelerator, 2)
    with pytest.raises(ValueError, match="a Precomputed reference computes no log-probs"):
        with_ref_log_probs(trainer.train_dataset, Precomputed(), trainer.accelerator, 2)


def test_log_probs_stand_beside_their_tokens(setup):
    trainer = setup("beside", True)
    item = trainer.train_dataset[3]
    ref, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1, seed=1)
    for side in ("chosen", "rejected"):
        assert item[f"ref_{side}"].shape == item[f"y_{side}"].shape
        logits = ref(input_ids=item[f"x_{side}"][None]).logits[0].log_softmax(-1)
        mask = item[f"mask_{side}"]
        exact = logits.gather(1, item[f"y_{side}"].clamp(min=0)[:, None]).squeeze(1)
        assert torch.allclose(item[f"ref_{side}"][mask], exact[mask], atol=1e-4)
        assert item[f"ref_{side}"][~mask].eq(0).all()


def test_a_dataset_can_bring_its_own(tmp_path, small):
    _, tokenizer = small
    dataset = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache").select(range(4))
    columns = {f"ref_{s}": [[-1.0] * (len(x) - 1) for x in dataset.rows[f"{s}_ids"]] for s in ("chosen", "rejected")}
    dataset = dataset.with_reference(datasets.Dataset.from_dict(columns))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no")
    trainer = DPOTrainer(make_model("Llama", {"vocab_size": 500, "max_position_embeddings": 256}), None, args, dataset)
    assert losses(trainer)[0] > 0


def test_a_dataset_without_log_probs_is_an_error_once_the_reference_is_gone(setup):
    trainer = setup("freed", True)
    held = trainer.eval_dataset
    assert trainer.evaluate(held)["eval_loss"] > 0
    bare = DPODataset(EXAMPLE, small_tokenizer(), 200, cache_dir=held.cache_dir).select(range(2))
    with pytest.raises(
        ValueError, match=r"no log-probs of the reference, and .* any more: precompute_ref_log_probs freed it"
    ):
        trainer.evaluate(bare)


def test_a_loss_that_can_do_without_a_reference_is_no_exception(tmp_path, small):
    _, tokenizer = small
    policy, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1, seed=5)
    ref, _ = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    dataset = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache").select(range(5))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, precompute_ref_log_probs=True,
                     loss_type="simpo", max_steps=1, save_strategy="no")  # fmt: skip
    trainer = DPOTrainer(policy, ref, args, dataset)
    with pytest.raises(ValueError, match="no log-probs of the reference"):
        trainer.evaluate(dataset)


def test_several_evaluation_sets_all_get_their_log_probs(setup, tmp_path, small):
    _, tokenizer = small
    whole = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache")
    held = {"a": whole.select(range(3)), "b": whole.select(range(3, 8))}
    models = [make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1, seed=s)[0] for s in (5, 1, 5, 1)]
    results = []
    for precompute in (False, True):
        args = DPOConfig(
            output_dir=str(tmp_path / str(precompute)), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2,
            precompute_ref_log_probs=precompute, save_strategy="no",
        )  # fmt: skip
        trainer = DPOTrainer(models.pop(0), models.pop(0), args, whole.select(range(4)), held)
        results.append(trainer.evaluate())
    for name in held:
        assert results[0][f"eval_{name}_loss"] == pytest.approx(results[1][f"eval_{name}_loss"], abs=1e-5)


def small_tokenizer():
    return make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)[1]
