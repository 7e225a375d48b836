"""A memory budget is checked for the longest batch of the data, before the first step."""

from __future__ import annotations

import re

import pytest
import torch
from training_helpers import Pairs, make_model, make_trainer

from dpo_kernels.functional import least_budget, plan
from dpo_kernels.training import DPOConfig, FusedHead, PairCollator, adapters
from dpo_kernels.training.budget import Longest, check_budget, head_call
from dpo_kernels.training.report.start import run_facts


def refused(tmp_path, **options):
    with pytest.raises(ValueError, match="memory_budget is") as caught:
        make_trainer(tmp_path, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"impl": "cpp", "layout": "shared"}, id="cpp"),
        pytest.param({"impl": "torch", "bf16": True, "layout": "bucketed", "use_weighting": True}, id="bf16"),
        pytest.param({"impl": "cpp", "tokens_per_batch": 60, "per_device_train_batch_size": 8}, id="tokens"),
        pytest.param({"impl": "cpp", "layout": "bucketed", "answers_at_once": 3}, id="parts"),
        pytest.param({"impl": "cpp", "layout": "bucketed", "answers_at_once": 1}, id="answers"),
    ],
)
def test_the_least_that_is_named_works_for_the_longest_batch(tmp_path, options):
    pairs = Pairs(200)
    options = {"pairs": pairs, "per_device_train_batch_size": 40} | options
    told = refused(tmp_path, memory_budget="1KiB", **options)
    least = int(re.search(r"give --memory_budget (\d+)", told)[1])
    assert "memory_budget is 1,024 bytes, and the longest batch that training can meet" in told
    trainer = make_trainer(tmp_path, memory_budget=str(least), **options)
    if trainer.token_batches is not None:
        batches = [*trainer.token_batches][:6]
    else:
        counted = [int(pairs[i]["mask_chosen"].sum() + pairs[i]["mask_rejected"].sum()) for i in range(len(pairs))]
        batches = [sorted(range(len(pairs)), key=lambda i: -counted[i])[:40]]
    for batch in batches:
        inputs = PairCollator()([pairs[i] for i in batch])
        with trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model.train(), inputs).backward()
    assert f"needs at least {least:,}" in refused(tmp_path, memory_budget=str(least - 1), **options)


def test_the_longest_batch_of_an_evaluation_counts_too(tmp_path):
    options = {"pairs": Pairs(4), "eval_pairs": Pairs(64, length=60), "per_device_eval_batch_size": 64}
    told = refused(tmp_path, memory_budget="1KiB", impl="torch", **options)
    assert "the longest batch that evaluation can meet (64 pairs" in told
    least = int(re.search(r"give --memory_budget (\d+)", told)[1])
    make_trainer(tmp_path, memory_budget=str(least), impl="torch", **options).evaluate()


def least_of(args, model, ref_model, train, held_out=None):
    with pytest.raises(ValueError, match="memory_budget is") as caught:
        check_budget(args, model, ref_model, train, held_out, torch.device("cpu"))
    return str(caught.value)


def test_the_references_pass_has_the_size_that_runs(tmp_path):
    """By default that of evaluation, over the pairs that are trained on; in no other pass is the reference asked."""
    given = {"output_dir": str(tmp_path), "use_cpu": True, "memory_budget": "1KiB", "impl": "torch",
             "per_device_train_batch_size": 1, "per_device_eval_batch_size": 32}  # fmt: skip
    pairs, model = Pairs(64, length=60), make_model("Llama")
    before = {"precompute_ref_log_probs": True} | given
    told = least_of(DPOConfig(**before), model, model, pairs)
    assert "that the reference's pass can meet (32 pairs" in told
    least = int(re.search(r"give --memory_budget (\d+)", told)[1])
    check_budget(DPOConfig(**before | {"memory_budget": str(least)}), model, model, pairs, None, torch.device("cpu"))
    assert "(48 pairs" in least_of(DPOConfig(**before, precompute_ref_batch_size=48), model, model, pairs)
    for args, ref_model in ((DPOConfig(**given), model), (DPOConfig(**before), None)):
        assert "that training can meet (1 pairs" in least_of(args, model, ref_model, pairs)
    peft = pytest.importorskip("peft")
    adapted = adapters.adapted(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4), False)
    assert "that the reference's pass can meet (32 pairs" in least_of(DPOConfig(**before), adapted, None, pairs)
    without = DPOConfig(**before, loss_type="simpo")
    assert "that training can meet (1 pairs" in least_of(without, adapted, None, pairs)


def test_the_heads_call_has_all_that_is_trained_in_it(tmp_path):
    peft = pytest.importorskip("peft")
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, use_weighting=True, bf16=True)
    batch, cpu = Longest("training", 2, 20, 40), torch.device("cpu")
    model = make_model("Phi")  # its head has a bias
    call = head_call(args, model, batch, True, cpu)
    assert call["grads"] == ["hidden", "weight", "bias"]
    assert (call["outputs"], call["compute_dtype"], call["rank"]) == (("log_sum_sq_probs",), torch.bfloat16, 0)
    assert head_call(args, model, batch, False, cpu)["grads"] == []
    adapted = adapters.adapted(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]), False)
    before = head_call(args, adapted, batch, True, cpu)
    assert (before["grads"], before["rank"]) == (["hidden", "low_rank"], 4)
    with FusedHead(adapted):
        assert head_call(args, adapted, batch, True, cpu) == before
    gemma = make_model("Gemma2", {"final_logit_softcapping": 30.0})
    assert head_call(args, gemma, batch, True, cpu)["softcap"] == 30.0


def test_the_start_tells_as_many_steps_as_are_taken(tmp_path):
    trainer = make_trainer(tmp_path, pairs=Pairs(6), max_steps=-1, num_train_epochs=1.1, logging_steps=10)
    rows = dict(run_facts(trainer, ["pairs"], "", None).rows)
    trainer.train()
    assert rows["steps"].startswith(f"{trainer.state.global_step} (1.1 epochs of 3)")
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("grads", [(), ("hidden",), ("hidden", "weight", "bias")])
def test_the_least_budget_is_the_least_there_is_a_plan_for(impl, grads):
    sizes, last = (64, 3000), 0
    for tokens in (1, 17, 128, 1000, 3001):
        least = least_budget(tokens, *sizes, torch.bfloat16, grads=grads, impl=impl)
        assert plan(tokens, *sizes, torch.bfloat16, grads=grads, impl=impl, memory_budget=least).bytes <= least
        with pytest.raises(ValueError, match=f"need at least {least:,} "):
            plan(tokens, *sizes, torch.bfloat16, grads=grads, impl=impl, memory_budget=least - 1)
        assert least >= last  # a shorter batch never needs more
        last = least


def test_sequences_are_padded_to_a_multiple():
    items = [Pairs(3)[i] for i in range(3)]
    plain, padded = PairCollator()(items), PairCollator(32)(items)
    assert plain["x_chosen"].shape[1] <= 14
    assert padded["x_chosen"].shape == (3, 32)
    width = plain["x_chosen"].shape[1]
    for name, tensor in padded.items():
        assert tensor[:, :width].equal(plain[name])
    assert (padded["y_chosen"][:, width:] == -100).all()
    assert not padded["mask_rejected"][:, width:].any()
    assert PairCollator(5)(items)["x_chosen"].shape[1] % 5 == 0
