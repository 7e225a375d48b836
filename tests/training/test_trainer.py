"""The trainer: what it computes, what it logs, and that nothing is lost when it ends early."""

from __future__ import annotations

import copy
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import EXAMPLE, assert_close
from training_helpers import LOG2, SIZES, Pairs, Trees, logs, make_model, make_trainer, weights
from transformers import TrainerCallback

from dpo_kernels import reference
from dpo_kernels.training import (
    DPOConfig,
    DPODataset,
    DPOTrainer,
    HeadError,
    NonFiniteError,
    PairCollator,
    checkpoints,
)  # fmt: skip
from dpo_kernels.training.loading import max_positions
from dpo_kernels.training.small_model import make_small_model
from dpo_kernels.training.trainer import PAIR_METRICS
from dpo_kernels.units import parse_bytes

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.02}


def test_the_first_step_is_log_2_and_everything_is_logged(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    first, *later = logs(tmp_path)
    assert first["loss"] == LOG2
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    for name in (*PAIR_METRICS, "tokens_per_second", "peak_memory_mib", "learning_rate", "grad_norm", "step"):
        assert math.isfinite(first[name]), name
    assert len(later) == 2
    assert later[0]["rewards/margins"] != 0
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "aux_loss" not in first


def test_loss_and_rewards_are_the_references(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.3, dpo_aggregate="mean", max_steps=2)
    trainer.train()
    batch = PairCollator()([trainer.train_dataset[i] for i in range(4)])
    x, y = (torch.cat([batch[f"{n}_chosen"], batch[f"{n}_rejected"]]) for n in "xy")
    with torch.no_grad():
        policy, ref = (
            reference.logits_to_log_probs(m(input_ids=x).logits, y) for m in (trainer.model, trainer.ref_model)
        )
        loss, metrics = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    exact = reference.dpo_loss(ref, policy, y != -100, 0.3, "mean")
    got = dict(zip(("loss", *PAIR_METRICS), metrics.mean(0), strict=True))
    assert_close(got["loss"], loss, 1e-6)
    for value, truth in zip((loss, got["rewards/chosen"], got["rewards/rejected"]), exact, strict=True):
        assert_close(value, truth, 1e-5)
    mean = (torch.where(y == -100, 0, policy).sum(1) / (y != -100).sum(1)).chunk(2)
    assert_close(got["logps/chosen"], mean[0].mean(), 1e-4)
    assert_close(got["logps/accuracies"], (mean[0] > mean[1]).float().mean(), 0)


def test_the_reference_and_only_the_reference_is_frozen(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    trainer.train()
    assert not trainer.ref_model.training
    for name, parameter in trainer.ref_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("count", [8, 7])  # 7: the last micro-batch holds one pair
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path, count):
    pairs = Pairs(count)
    results = []
    for name, size, steps in (("large", count, 1), ("small", 2, -(-count // 2))):
        trainer = make_trainer(
            tmp_path / name, pairs=pairs, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=2, max_grad_norm=0, optim="sgd",
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer), [entry["loss"] for entry in logs(tmp_path / name)]))
    (large, large_loss), (small, small_loss) = results
    assert small_loss == pytest.approx(large_loss, abs=2e-6)
    for name, weight in large.items():
        assert_close(small[name], weight, 1e-6, name)


def test_the_load_balancing_loss_of_a_mixture_of_experts(tmp_path):
    trainer = make_trainer(tmp_path / "moe", "Qwen3Moe", MOE, max_steps=1)
    trainer.train()
    (entry,) = logs(tmp_path / "moe")
    assert entry["aux_loss"] > 0
    assert entry["loss"] == pytest.approx(LOG2 + 0.02 * entry["aux_loss"], abs=1e-6)
    trainer = make_trainer(tmp_path / "off", "Qwen3Moe", MOE, max_steps=1, router_aux_loss_coef=0.0)
    trainer.train()
    assert logs(tmp_path / "off")[0]["loss"] == LOG2


def test_evaluation_sees_every_pair_once(tmp_path):
    held_out = Pairs(5, seed=1)
    trainer = make_trainer(tmp_path, eval_pairs=held_out, per_device_eval_batch_size=2)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(LOG2, abs=1e-7)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.model.eval()
    batch = PairCollator()([held_out[i] for i in range(5)])
    with torch.no_grad():
        loss, values = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, value in zip(("loss", *PAIR_METRICS), values.mean(0), strict=True):
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-4), name


def test_under_bf16_the_first_step_is_log_2_too(tmp_path):
    trainer = make_trainer(tmp_path, "Gemma2", {"final_logit_softcapping": 5.0}, bf16=True, memory_budget="64MiB")
    trainer.train()
    assert logs(tmp_path)[0]["loss"] == LOG2
    assert logs(tmp_path)[-1]["rewards/margins"] != 0
    assert trainer.model.lm_head.weight.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for name, on in (("off", False), ("on", True)):
        trainer = make_trainer(tmp_path / name, gradient_checkpointing=on)
        trainer.train()
        results.append(weights(trainer))
    for name, weight in results[0].items():
        assert_close(results[1][name], weight, 1e-6, name)


def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    options |= {"pairs": Trees(SIZES * 2)}
    straight = make_trainer(tmp_path / "straight", **options)
    assert straight.layout.name == "shared"
    straight.train()
    stopped = make_trainer(tmp_path / "stopped", callbacks=[StopAfter(4)], **options)
    stopped.train()
    assert [p.name for p in checkpoints.all_of(tmp_path / "stopped")] == ["checkpoint-2", "checkpoint-4"]
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=str(checkpoints.latest(tmp_path / "stopped")))
    for name, weight in weights(straight).items():
        assert torch.equal(weights(resumed)[name], weight), name
    compared = [[(e["step"], e["loss"]) for e in logs(tmp_path / run)] for run in ("straight", "stopped")]
    assert compared[0] == compared[1]


class StopAfter(TrainerCallback):
    """Stops as a SIGTERM during that step would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Poison(TrainerCallback):
    """Writes a NaN into a weight, as a bad kernel or a bad sector would, or into a gradient."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and self.where == "loss":
            self.clean = model.lm_head.weight.detach().clone()
            model.lm_head.weight.data[3] = math.nan

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and self.where == "gradient":
            model.lm_head.weight.grad[3, 0] = math.inf
        if state.global_step == self.step and self.where == "loss":
            model.lm_head.weight.data.copy_(self.clean)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_is_never_taken(tmp_path, where):
    trainer = make_trainer(tmp_path / "bad", max_steps=5, callbacks=[Poison(2, where)], lr_scheduler_type="constant")
    good = make_trainer(tmp_path / "good", max_steps=2, lr_scheduler_type="constant")
    good.train()
    with pytest.raises(NonFiniteError, match=rf"step 3: .*{where}.* not finite .*checkpoint-2.*resume_from_checkpoint"):
        trainer.train()
    folder = checkpoints.latest(tmp_path / "bad")
    assert folder.name == "checkpoint-2"
    saved = type(trainer.model).from_pretrained(folder)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, weights(good)[name]), name
    assert [entry["step"] for entry in logs(tmp_path / "bad")] == [1, 2]


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    seen = []

    def dies(*args):
        seen.append(sorted(p.name for p in tmp_path.glob("checkpoint-*")))
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt  # in the middle of writing
        return original(*args)

    original = trainer._save_rng_state
    monkeypatch.setattr(trainer, "_save_rng_state", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert seen[2:] == [["checkpoint-1", "checkpoint-2"], ["checkpoint-2", "checkpoint-3"]]
    for folder in checkpoints.all_of(tmp_path):
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= {
            p.name for p in folder.iterdir()
        }
    assert checkpoints.latest(tmp_path).name == "checkpoint-3"
    assert checkpoints.staging(tmp_path).exists()
    make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoints.latest(tmp_path)))
    assert not checkpoints.staging(tmp_path).exists()


def test_the_best_checkpoint_is_kept_and_found(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_pairs=Pairs(2, seed=1), max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert (best / "model.safetensors").exists()


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path):
    staging = checkpoints.staging(tmp_path)
    (staging / "checkpoint-5.replaced").mkdir(parents=True)
    (staging / "checkpoint-4.doomed").mkdir()
    (staging / "checkpoint-6").mkdir()
    checkpoints.clean(tmp_path)
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-5"]
    assert not staging.exists()


def test_sigterm_is_heard_during_training_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[Terminate(2)])
    trainer.train()
    assert trainer.interrupted
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    trainer.train()  # the signal was for the last training
    assert not trainer.interrupted
    assert trainer.state.global_step == 5
    with pytest.raises(NonFiniteError):
        make_trainer(tmp_path / "bad", callbacks=[Poison(1, "loss")]).train()
    assert signal.getsignal(signal.SIGTERM) == before


class Terminate(TrainerCallback):
    """Sends this process a SIGTERM, once, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.step = None
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_non_finite_loss_stops_fp16_too(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[Poison(1, "loss")])
    trainer.args.fp16 = True  # what the check looks at; the CPU has no fp16 training
    with pytest.raises(NonFiniteError, match="step 2: loss not finite"):
        trainer.train()


def test_publishing_over_a_checkpoint_replaces_it(tmp_path):
    for text in ("old", "new"):
        staged = checkpoints.staging(tmp_path) / "checkpoint-1"
        staged.mkdir(parents=True)
        (staged / "file").write_text(text)
        checkpoints.publish(staged, tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "new"
    assert not checkpoints.staging(tmp_path).exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 10, 1, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    checkpoints.rotate(tmp_path, 2, "elsewhere/checkpoint-1")
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-1", "checkpoint-30"]
    checkpoints.rotate(tmp_path, None, None)
    checkpoints.rotate(tmp_path, 1, None)
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-30"]
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_the_saved_model_loads_and_drops_no_earlier_file(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = type(trainer.model).from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights(trainer)[name])
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert not (checkpoints.staging(tmp_path) / "model").exists()


def test_a_wrong_head_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_kernels.training.head_check.measure_transform", lambda fused, *_: fused.transform)
    with pytest.raises(HeadError, match="would train CohereForCausalLM wrong"):
        make_trainer(tmp_path, "Cohere", {"logit_scale": 0.25})


def test_references_that_are_missing_or_shared(tmp_path):
    model = make_model("Llama")
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="no ref_model, and train_dataset holds no log-probs of one"):
        DPOTrainer(model, None, args, Pairs())
    with pytest.raises(ValueError, match="model and ref_model are one object"):
        DPOTrainer(model, model, args, Pairs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta is -1"),
        ({"dpo_aggregate": "max"}, "aggregate is 'max'; expected one of"),
        ({"loss_type": "dpo"}, "loss_type is 'dpo'"),
        ({"label_smoothing_factor": 0.4}, r"label_smoothing_factor is 0.4; .* 0.0 only"),
        ({"train_sampling_strategy": "group_by_length"}, r"it can be 'random' or 'sequential' only"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics is True"),
    ],
)
def test_options_are_checked_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_an_aux_loss_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.5, but LlamaForCausalLM has no experts"):
        make_trainer(tmp_path, router_aux_loss_coef=0.5)


def test_several_visible_gpus_need_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 2)))
    monkeypatch.setattr(DPOConfig, "_setup_devices", property(lambda self: torch.device("cpu")))
    with pytest.warns(UserWarning, match=r"2 GPUs are visible and one is used.*torchrun --nproc_per_node 2 train.py"):
        config = DPOConfig(output_dir=str(tmp_path))
    assert config.n_gpu == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("64MB", 64_000_000), ("2k", 2000), ("123", 123), (7, 7), (None, None)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["a lot", "512 MiBs", "-3MiB", "0"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r"memory_budget is .*; expected a size such as 512MiB"):
        parse_bytes(text)


def test_sequences_beyond_the_models_positions_are_refused_before_training(tmp_path):
    small = make_model("Llama", {"max_position_embeddings": 100, "vocab_size": 500})
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    dataset = DPODataset(EXAMPLE, tokenizer, 102, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"max_length is 102, and the model has 100 positions .* --max_length 100"):
        DPOTrainer(small, copy.deepcopy(small), args, dataset)
    dataset = DPODataset(EXAMPLE, tokenizer, 101, cache_dir=tmp_path / "cache")
    DPOTrainer(small, copy.deepcopy(small), args, dataset)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"n_positions": 64}, 64),
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        (
            {"max_position_embeddings": 256, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64}},
            256,
        ),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"rope_parameters": {"full": {"factor": 2.0, "original_max_position_embeddings": 64}}}, 128),
        ({}, None),
    ],
)
def test_positions_of_a_model(config, limit):
    class Config(SimpleNamespace):
        def __getattr__(self, name):
            if name == "max_position_embeddings" and "n_positions" in vars(self):
                return vars(self)["n_positions"]  # as attribute_map does
            raise AttributeError(name)

    assert max_positions(Config(**config)) == limit


def test_datasets_that_are_no_tensors_yet_are_told_what_to_do(tmp_path):
    raw = datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    for given, name in (((raw, None), "train_dataset"), ((Pairs(), {"held": raw}), r"eval_dataset\['held'\]"),
                        ((raw.to_iterable_dataset(), None), "train_dataset")):  # fmt: skip
        with pytest.raises(
            TypeError, match=rf"{name} is a datasets.\w+ with the columns \['chosen', 'rejected'\].*from_dataset"
        ):
            DPOTrainer(make_model("Llama"), make_model("Llama"), args, *given)


def test_several_evaluation_sets_are_evaluated_one_by_one(tmp_path):
    held = {"a": Pairs(5, seed=1), "b": Pairs(3, seed=2)}
    trainer = make_trainer(
        tmp_path, eval_pairs=held, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_b_loss",
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    for name, pairs in held.items():
        alone = trainer.evaluate(pairs)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], abs=1e-6)
    assert logs(tmp_path, "eval_a_loss")
    assert logs(tmp_path, "eval_b_logps/accuracies")


def test_a_dataset_given_to_evaluate_is_checked_too(tmp_path):
    trainer = make_trainer(tmp_path)
    raw = datasets.Dataset.from_list([{"chosen": "a", "rejected": "b"}])
    for given, name in ((raw, "eval_dataset"), ({"a": raw}, r"eval_dataset\['a'\]")):
        with pytest.raises(TypeError, match=rf"{name} is a datasets.Dataset with the columns"):
            trainer.evaluate(given)
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=97 + 200, hidden_size=64, layers=1)
    long = DPODataset(EXAMPLE, tokenizer, 300, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"max_length is 300, and the model has 64 positions"):
        trainer.evaluate({"long": long})
