"""Every loss and option through the trainer and through `train.py`: the one code path of `dpo_loss`."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from script_helpers import losses, run, small_run
from training_helpers import Pairs, logs, make_model, make_trainer, weights

from dpo_kernels import dpo_loss, reference
from dpo_kernels.training import DPOConfig, DPOTrainer, PairCollator
from dpo_kernels.training.model import FusedHead

OPTIONS = {
    "RPO": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "label_smoothing": 0.1},
    "WPO": {"use_weighting": True},
    "LD-DPO": {"loss_type": "ipo", "ld_alpha": 0.4},
    "f-DPO": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "SimPO": {"loss_type": "simpo", "simpo_gamma": 0.3},
    "CPO": {"loss_type": "cpo", "cpo_alpha": 0.5},
    "DiscoPOP": {"loss_type": "discopop", "discopop_tau": 0.1},
    "WPO-of-all": {"loss_type": ["hinge", "sft"], "use_weighting": True, "ld_alpha": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_that_of_dpo_loss(tmp_path, options):
    trainer = make_trainer(tmp_path, beta=0.3, max_steps=2, **options)
    trainer.train()
    batch = PairCollator()([trainer.train_dataset[i] for i in range(4)])
    x, y = (torch.cat([batch[f"{n}_chosen"], batch[f"{n}_rejected"]]) for n in "xy")
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        logits = trainer.model(input_ids=x).logits
        ref = reference.logits_to_log_probs(trainer.ref_model(input_ids=x).logits, y)
    policy = reference.logits_to_log_probs(logits, y)
    weighting = {}
    if options.get("use_weighting"):
        weighting = {"log_sum_sq_probs": torch.logsumexp(2 * logits.log_softmax(-1), -1)}
    assert_close(loss, dpo_loss(ref, policy, y != -100, 0.3, **options, **weighting).loss, 1e-5)


@pytest.mark.parametrize("count", [8, 7])  # 7: the last micro-batch holds one pair
@pytest.mark.parametrize("loss_type", [["sigmoid", "sft"], ["orpo"], ["cpo", "sigmoid_norm"]], ids="-".join)
def test_a_mean_over_tokens_is_one_over_all_tokens_of_the_step(tmp_path, count, loss_type):
    pairs, results = Pairs(count), []
    assert len({int(item["mask_chosen"].sum()) for item in pairs}) > 3  # lengths differ
    for name, size, steps in (("large", count, 1), ("small", 2, -(-count // 2))):
        trainer = make_trainer(
            tmp_path / name, pairs=pairs, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=2, max_grad_norm=0, optim="sgd", loss_type=loss_type,
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer), [entry["loss"] for entry in logs(tmp_path / name)]))
    (large, large_loss), (small, small_loss) = results
    assert small_loss == pytest.approx(large_loss, abs=1e-5)
    for name, weight in large.items():
        assert_close(small[name], weight, 1e-6, name)


def test_a_loss_without_a_reference_needs_no_reference_model(tmp_path):
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, loss_type="simpo", beta=2.0, max_steps=2, save_strategy="no"
    )
    trainer = DPOTrainer(make_model("Llama"), None, args, Pairs(), Pairs(2, seed=1))
    trainer.train()
    assert len(logs(tmp_path)) == 2
    assert trainer.evaluate()["eval_rewards/chosen"] < 0  # beta log pi alone


def test_a_string_and_a_list_are_the_same_loss_type(tmp_path):
    assert DPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="ipo").loss_type == ["ipo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "expected one weight each"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"f_divergence_type": "kl"}, "f_divergence_type is 'kl'"),
        ({"ld_alpha": -1.0}, "ld_alpha is -1.0"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting is True, but loss_type 'aot' sorts"),
    ],
)
def test_options_are_checked_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_the_fused_head_gives_log_sum_sq_probs_where_asked_for():
    model = make_model("Gemma2", {"final_logit_softcapping": 5.0})
    head = FusedHead(model, with_log_sum_sq_probs=True)
    head.check(model)
    x, y = torch.randint(3, 97, (2, 9)), torch.randint(3, 97, (2, 9))
    y[:, :3] = -100
    output = model(input_ids=x, labels=y)
    exact = torch.logsumexp(2 * model(input_ids=x).logits.log_softmax(-1), -1)
    assert not output["log_sum_sq_probs"].requires_grad
    assert_close(output["log_sum_sq_probs"], torch.where(y == -100, 0, exact), 1e-5)
    FusedHead(plain := make_model("Llama"))
    assert set(plain(input_ids=x, labels=y)) == {"log_probs"}


def test_train_py_has_the_options(tmp_path, model_dir, environment):
    arguments = small_run(model_dir, tmp_path / "out", max_steps=2, label_smoothing=0.1, ld_alpha=0.5,
                          f_divergence_type="js_divergence", use_weighting=True)  # fmt: skip
    done = run(environment, *arguments, "--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.2")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 2
    # The policy is the reference: log 2, a negative log-likelihood of log V and more, and a pair's weight of about 1.
    assert 0.6 < losses(tmp_path / "out")[1] < 5


def test_train_py_without_a_reference(tmp_path, model_dir, environment):
    done = run(environment, *small_run(model_dir, tmp_path / "out", max_steps=2, loss_type="orpo"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out")[1] > 5  # the negative log-likelihood of a model that knows nothing: log 500
