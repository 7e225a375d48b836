"""What a run says at its end, from logs that are made up."""

from __future__ import annotations

import math

import pytest
from log_cases import FALLING, GOOD, evaluated, trained

from dpo_kernels.training.report.metrics import LOG_2, figure, held_out, loss_without_learning, points, shown, smoothed
from dpo_kernels.training.report.sentences import Options, findings

KINDS = {
    "good": (GOOD, Options(), ["good"], "ranking accuracy went from 0.50 to 0.95"),
    "a rate that is too small": (
        [*trained([LOG_2 - 1e-6] * 40), evaluated(40, LOG_2, 0.5, chosen=1e-6, rejected=0.0)],
        Options(learning_rate=4e-8), ["bad"], "learning rate of 4e-08 was too small",
    ),
    "the same, an adapter": (
        trained([LOG_2] * 40, [1e-4] * 40), Options(learning_rate=1e-6, is_adapted=True), ["bad", "note"],
        "DPO of adapters is usually run at 5e-06 to 5e-05; try --learning_rate 5e-06",
    ),
    "a usual rate, and still nothing": (
        trained([LOG_2] * 4, [0.0] * 4), Options(learning_rate=1e-6), ["bad", "note"], "Try --learning_rate 3e-06",
    ),
    "one step": (trained([LOG_2], [0.0]), Options(), ["bad", "note"], "took one step, whose margin is 0"),
    "overfitted": (
        [evaluated(0, LOG_2), *trained(FALLING), evaluated(10, 0.5), evaluated(20, 0.6), evaluated(30, 0.8)],
        Options(), ["bad"], "lowest at step 10 (0.500) and rose to 0.800 at step 30",
    ),
    "overfitted from the start": (
        [evaluated(0, LOG_2), *trained(FALLING), evaluated(30, 0.9)], Options(learning_rate=3e-5), ["bad"],
        "was lowest before the first step (0.693) and rose to 0.900 at step 30, while the training loss fell: nothing "
        "that was learned here helps on other pairs. Look whether the held-out pairs are of the same kind, and try "
        "--learning_rate 1e-05",
    ),
    "overfitted in one of two sets": (
        [evaluated(10, 0.5, name="a_"), evaluated(10, 0.5, name="b_"), *trained(FALLING),
         evaluated(30, 0.4, name="a_"), evaluated(30, 0.9, name="b_")],
        Options(), ["bad"], "--metric_for_best_model eval_b_loss",
    ),
    "held-out loss within noise": (
        [evaluated(10, 0.5), *trained(FALLING), evaluated(30, 0.51)], Options(), ["good"], "0.90",
    ),
    "nothing carried over": (
        [*trained(FALLING), evaluated(30, LOG_2, 0.51)], Options(), ["bad"], "no better than by chance (0.51)",
    ),
    "displaced": (
        [*trained(FALLING), evaluated(30, 0.2, chosen=-1.5, rejected=-4.0)], Options(), ["bad"],
        "less likely, by 15.0 nats, and the rejected ones by 40.0 (likelihood displacement)",
    ),
    "displaced with sft in it": (
        [*trained(FALLING), evaluated(30, 0.2, chosen=-1.5, rejected=-4.0)],
        Options(loss_type=("sigmoid", "sft")), ["bad"], "Try a larger weight of sft",
    ),
    "displaced, in training alone": (
        trained(FALLING, chosen=[-0.1 * i for i in range(30)]), Options(), ["bad", "note"], "displacement",
    ),
    "less than a nat lost": (
        [*trained(FALLING), evaluated(30, 0.2, chosen=-0.09, rejected=-4.0)], Options(), ["good"], "margin",
    ),
    "no reference: rewards are no gain": (
        [*trained(FALLING), evaluated(30, 0.2, chosen=-9.0, rejected=-12.0)], Options(has_reference=False), ["good"],
        "margin",
    ),
    "no reference, displaced": (
        [evaluated(0, 0.9, **{"logps/chosen": -20.0, "logps/rejected": -20.0}), *trained(FALLING),
         evaluated(30, 0.2, **{"logps/chosen": -25.0, "logps/rejected": -60.0})],
        Options(has_reference=False), ["bad"], "by 5.0 nats, and the rejected ones by 40.0",
    ),
    "another start than the reference: rewards are no gain": (
        [*trained(FALLING), evaluated(30, 0.2, chosen=-9.0, rejected=-12.0)], Options(starts_at_reference=False),
        ["good"], "margin",
    ),
    "another start than the reference, displaced": (
        [evaluated(0, 0.9, **{"logps/chosen": -20.0, "logps/rejected": -20.0}), *trained(FALLING),
         evaluated(30, 0.2, **{"logps/chosen": -25.0, "logps/rejected": -60.0})],
        Options(starts_at_reference=False), ["bad"], "by 5.0 nats, and the rejected ones by 40.0",
    ),
    "by length": (
        [*trained(FALLING), evaluated(30, 0.2, 0.6, **{"rewards/accuracies_longer": 0.98,
                                                       "rewards/accuracies_shorter": 0.1})],
        Options(), ["bad"], "The policy learned to write longer answers.",
    ),
    "both lengths are ranked": (
        [*trained(FALLING), evaluated(30, 0.2, **{"rewards/accuracies_longer": 0.98,
                                                  "rewards/accuracies_shorter": 0.8})],
        Options(), ["good"], "0.90",
    ),
    "diverged": (trained([LOG_2 + 0.05 * i for i in range(20)]), Options(learning_rate=3e-4), ["bad", "note"],
                 "The loss rose from 0.718 to 1.618"),
    "not finite": (
        [*trained(FALLING), *trained([math.nan], first=31)], Options(), ["bad"], "The loss was nan at step 31",
    ),
    "a part of a log": (trained(FALLING, first=101), Options(), ["good", "note", "note"], "begins at step 101"),
    "logged every 50 steps": (
        [entry | {"step": 50 * (i + 1)} for i, entry in enumerate(trained(FALLING))], Options(), ["good", "note"],
        "No pairs were held out",
    ),
    "nothing but a loss": ([{"step": 1, "loss": 0.5}], Options(), ["note", "note"], "no figures to judge by"),
    "beta 0": (trained(FALLING), Options(beta=0.0), ["good", "note"], "margin"),
    "chance": (
        [*trained(FALLING), evaluated(30, 0.69, 0.52, chosen=0.1, rejected=0.0)][-1:] + trained(FALLING, **{
            "rewards/accuracies": 0.55}), Options(), ["note"], "not much happened",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_a_log_says(name):
    log, options, kinds, said = KINDS[name]
    found = findings(log, options)
    assert [finding.kind for finding in found] == kinds, found
    assert said in " ".join(map(str, found)), found
    assert all(finding.advice for finding in found if finding.kind == "bad")


def test_a_log_without_a_step_says_nothing():
    assert findings([]) == []
    assert findings([evaluated(0, LOG_2)]) == []


def test_points_are_numbers_in_order_once_a_step():
    log = [{"step": 2, "loss": 1}, {"step": 1, "loss": math.nan}, {"step": 3}, {"step": 2, "loss": 0.5}, {"loss": 4}]
    assert points(log, "loss") == [(0, 4.0), (2, 0.5)]
    even = [{"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}]
    assert points(even, "eval_rewards/accuracies") == []  # neither answer gained anything
    assert points(even, "eval_rewards/margins") == [(0, 0.0)]


def test_names_of_held_out_sets():
    assert held_out([{"eval_loss": 1, "eval_a_loss": 2}], "loss") == {"": "eval_loss"}
    assert held_out([{"eval_a_loss": 1}, {"eval_b_loss": 2, "loss": 3}], "loss") == {
        "a": "eval_a_loss", "b": "eval_b_loss",
    }  # fmt: skip


def test_smoothing_keeps_the_ends_and_the_mean_of_a_line():
    assert smoothed([]) == []
    assert smoothed([3.0]) == [3.0]
    line = [float(i) for i in range(100)]
    assert smoothed(line) == pytest.approx(line)
    noisy = [value + (-1) ** i for i, value in enumerate(line)]
    assert smoothed(noisy)[0] == noisy[0]
    assert abs(smoothed(noisy)[50] - 50) < 0.2


def test_figures_are_readable():
    logs = {"loss": 0.69314, "rewards/margins": 12.3456, "rewards/accuracies": 0.9375, "tokens_per_second": 10500.4}
    keys = ("loss", "rewards/margins", "rewards/accuracies", "tokens_per_second", "logps/chosen")
    assert dict(shown(logs, keys)) == {
        "loss": "0.6931", "reward margin": "12.3", "reward accuracy": "0.94", "tokens/s": "10,500",
    }  # fmt: skip
    assert dict(shown({"loss": math.nan}, keys)) == {"loss": "nan"}
    assert figure("logps/chosen", -1234.5) == "-1,234.5"


def test_which_losses_start_at_log_2():
    assert loss_without_learning(["sigmoid"]) == LOG_2
    assert loss_without_learning(["hinge"]) is None
    assert loss_without_learning(["sigmoid", "sft"]) is None
