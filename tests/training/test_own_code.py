"""Models that bring their own code: loaded as their constructor makes them, checked, trained to their own numbers."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import EXAMPLE, ROOT
from own_code_model import MineForCausalLM, save
from safetensors.torch import load_file, save_file
from training_helpers import LOG2, Pairs, Trees, logs

from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer, FusedHead, HeadError, LoadError, PairCollator
from dpo_kernels.training.aux_loss import decide
from dpo_kernels.training.loading import load_model
from dpo_kernels.training.small_model import make_small_model


def load(folder):
    """Among memory that held other numbers before."""
    rubbish = [torch.full((128, 8), 0.3) for _ in range(200)]
    del rubbish
    gc.collect()
    return load_model(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_no_checkpoint_holds_is_what_the_constructor_makes(tmp_path, dtype):
    config = save(tmp_path, experts=3)
    loaded = load(tmp_path).to(dtype)
    made = MineForCausalLM(config).to(dtype)
    assert torch.equal(loaded.cos, made.cos)
    assert torch.equal(loaded.sin, made.sin)
    assert loaded.scale == 1
    made.load_state_dict(loaded.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.eval()(ids).logits, made.eval()(ids).logits)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_code_runs_only_where_it_may(tmp_path):
    save(tmp_path)
    with pytest.raises(LoadError, match=r"brings code of its own, which runs on this machine.*--trust_remote_code"):
        load_model(str(tmp_path))


def test_a_constructor_that_makes_something_else_is_refused(tmp_path):
    save(tmp_path)
    code = tmp_path / "own_code_model.py"
    raises = (
        "self.post_init()\n        if getattr(type(self), 'made', 0):\n            raise RuntimeError('once only')\n"
    )
    code.write_text(code.read_text().replace("self.post_init()", raises + "        type(self).made = 1"))
    with pytest.raises(LoadError, match=r"keeps \['cos', 'scale', 'sin'\] outside its checkpoint.*once only"):
        load(tmp_path)


def test_ties_spelled_the_old_way(tmp_path):
    save(tmp_path, habits=["old-ties"])
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.embed.weight
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) & {"lm_head.weight", "embed.weight"}
    again = load(tmp_path / "again")
    assert torch.equal(again.embed.weight, loaded.embed.weight)
    assert again.lm_head.weight is again.embed.weight


def test_a_checkpoint_with_the_heads_weight_alone(tmp_path):
    save(tmp_path, habits=["old-ties"])
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if key in ("embed.weight", "lm_head.weight"))
    weights["lm_head.weight"] = kept = weights.pop(key)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path)
    assert torch.equal(loaded.embed.weight, kept)
    assert loaded.lm_head.weight is loaded.embed.weight


def test_embeddings_without_a_name_and_buffers_without_a_value(tmp_path):
    save(tmp_path, tie_word_embeddings=False)
    code = tmp_path / "own_code_model.py"
    text = code.read_text().replace("return self.embed\n", "raise NotImplementedError\n")
    code.write_text(
        text.replace("self.scale =", "self.register_buffer('late', None, persistent=False)\n        self.scale =")
    )
    model = load(tmp_path)
    FusedHead(model).check(model)
    assert decide(model, None).weight == 0


def test_weights_that_are_missing_are_never_random(tmp_path):
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blocks.0.qkv.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks 1 weights of MineForCausalLM, \['blocks.0.qkv.weight'\]"):
        load(tmp_path)


@pytest.mark.parametrize("habits", [[], ["tuples"], ["nameless-head"]], ids=str)
def test_the_check_passes_on_what_is_right(tmp_path, habits):
    save(tmp_path, habits=habits)
    model = load(tmp_path)
    FusedHead(model).check(model)
    ids = torch.randint(3, 97, (2, 9))
    labels = ids.roll(-1, 1)
    log_probs = model(input_ids=ids, labels=labels, attention_mask=None, use_cache=False)["log_probs"]
    logits = model(ids)
    logits = logits[0] if habits == ["tuples"] else logits.logits
    assert torch.allclose(log_probs, logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("sees-ahead", "MineForCausalLM is not causal: another last token moves earlier log-probs by"),
        ("random", "MineForCausalLM computes something else in training than in evaluation"),
        ("norm-head", "the output head NormHead of MineForCausalLM does something to its"),
    ],
)
def test_the_check_refuses_what_would_be_trained_wrong(tmp_path, habit, message):
    save(tmp_path, habits=[habit], tie_word_embeddings=False)
    model = load(tmp_path)
    if habit == "norm-head":  # its values are a plain product's at the start
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    with pytest.raises(HeadError, match=message):
        FusedHead(model).check(model)


def test_what_is_added_for_load_balancing_is_decided_and_told(tmp_path):
    for name, habits, coef in (("weighted", [], 0.01), ("unweighted", ["unweighted"], 0.02)):
        save(tmp_path / name, experts=4, aux_coef=coef, habits=habits)
    weighted, unweighted = decide(load(tmp_path / "weighted"), None), decide(load(tmp_path / "unweighted"), None)
    assert weighted.weight == 1.0
    assert "aux_loss of MineForCausalLM as it comes; for another weight give --router_aux_loss_coef" in weighted.told
    assert unweighted.weight == pytest.approx(0.02, rel=1e-2)
    assert "as in its own loss" in unweighted.told
    asked = decide(load(tmp_path / "weighted"), 0.5)
    assert (asked.weight, asked.told) == (
        0.5,
        "added to the loss: 0.5 times the aux_loss of MineForCausalLM, as asked for",
    )
    save(tmp_path / "dense")
    assert decide(load(tmp_path / "dense"), None).told == ""
    assert decide(load(tmp_path / "dense"), None).weight == 0


def test_a_dense_model_runs_in_groups_of_like_length(tmp_path):
    """Though it gives an aux_loss, as a mixture of the same code does: 0, which is over no rows."""
    save(tmp_path / "model")
    found = []
    for layout in ("auto", "padded"):
        args = DPOConfig(
            output_dir=str(tmp_path / layout), use_cpu=True, disable_tqdm=True, max_steps=2, layout=layout,
            per_device_train_batch_size=4, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        sizes = ((2, 0, 3, 110), (2, 0, 100, 4), (5, 0, 105, 3), (3, 0, 2, 4))
        trainer = DPOTrainer(load(tmp_path / "model"), load(tmp_path / "model"), args, Trees(sizes, width=120))
        assert trainer.layout.name == {"auto": "bucketed"}.get(layout, layout)
        trainer.train()
        found.append([entry["loss"] for entry in logs(tmp_path / layout)])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("experts", [0, 4])
def test_three_steps_are_those_of_a_plain_loop(tmp_path, experts):
    """log_softmax, gather, AdamW, and the model's own aux_loss added."""
    save(tmp_path / "model", experts=experts)
    policy, ref, plain, plain_ref = (load(tmp_path / "model") for _ in range(4))
    pairs = Pairs(6)
    args = DPOConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=3,
        per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0,
        weight_decay=0.0, train_sampling_strategy="sequential", adam_epsilon=1e-5,
    )  # fmt: skip
    DPOTrainer(policy, ref, args, pairs).train()
    # Its usual epsilon, 1e-8, makes whole steps of gradients that are rounding alone.
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.0, eps=1e-5)
    plain.train()
    losses, aux = [], torch.zeros(())
    for i in range(3):
        batch = PairCollator()([pairs[2 * i], pairs[2 * i + 1]])
        x, y = (torch.cat([batch[f"{n}_chosen"], batch[f"{n}_rejected"]]) for n in "xy")
        sums = []
        for model in (plain, plain_ref):
            output = model(x)
            log_probs = output.logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
            sums.append(torch.where(y == -100, 0, log_probs).sum(1))
            aux = output.aux_loss if model is plain else aux
        chosen, rejected = (sums[0] - sums[1].detach()).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() + aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = [entry["loss"] for entry in logs(tmp_path / "out")]
    assert found == pytest.approx(losses, abs=1e-5)
    first = logs(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(LOG2 + first.get("aux_loss", 0.0), abs=1e-6)
    for (name, mine), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), name


def test_the_script_trains_and_saves_it_with_its_code(tmp_path):
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    save(tmp_path / "model", vocab_size=500, experts=2)
    tokenizer.save_pretrained(tmp_path / "model")
    command = [
        sys.executable, str(ROOT / "train.py"), "--data_path", str(EXAMPLE), "--ref_weight", str(tmp_path / "model"),
        "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--disable_tqdm", "True",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 300, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, check=False, **run)
    assert done.returncode == 1
    assert "brings code of its own" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([*command, "--trust_remote_code"], check=False, **run)
    assert done.returncode == 0, done.stderr
    assert "added to the loss: the aux_loss of MineForCausalLM as it comes" in done.stdout
    assert "training: " in done.stdout
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(LOG2 + first["aux_loss"], abs=1e-6)
    model = load(tmp_path / "out")
    assert model.config.experts == 2
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_reference_that_starts_otherwise_is_named(tmp_path):
    """The policy keeps something outside its weights that the reference does not have."""
    save(tmp_path / "model")
    policy, ref = load(tmp_path / "model"), load(tmp_path / "model")
    policy.cos.mul_(0.9)
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no")
    with pytest.raises(
        HeadError, match=r"same weights, and their log-probs .* first module .* is 'blocks.0.out'.*nothing was"
    ):
        DPOTrainer(policy, ref, args, Pairs(4)).train()


def test_long_pairs_are_refused_by_its_positions(tmp_path):
    _, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    save(tmp_path / "model", vocab_size=500)
    dataset = DPODataset(EXAMPLE, tokenizer, 200, cache_dir=tmp_path / "cache")
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=r"max_length is 200, and the model has 128 positions"):
        DPOTrainer(load(tmp_path / "model"), load(tmp_path / "model"), args, dataset)
