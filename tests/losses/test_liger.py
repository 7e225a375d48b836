"""Liger's DPO loss by our functions: its numbers where it has some, numbers where it has none."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import assert_close
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Liger
from liger_oracles import (
    BF16_BOUND,
    LOSS_TYPES,
    OUTPUTS,
    differences,
    failing_cases,
    make_inputs,
    outputs_and_gradients,
    random_case,
)

from dpo_kernels import dpo_loss, reference
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss
from dpo_kernels.preference_losses import LOSSES


def test_constructor_and_call_are_ligers():
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(Liger, name)).parameters
        ours = inspect.signature(getattr(LigerFusedLinearDPOLoss, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [p.default for p in list(ours.values())[: len(theirs)]] == [p.default for p in theirs.values()]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])


def test_two_hundred_random_inputs_give_ligers_numbers():
    assert {random_case(seed)[0]["loss_type"] for seed in range(200)} == set(LOSS_TYPES) == Liger._SUPPORTED_LOSS_TYPES
    for name, error in differences(200).items():
        assert error <= 1e-5, name


def test_bfloat16_differs_from_liger_by_roundings_of_logits():
    for name, error in differences(50, torch.bfloat16).items():
        assert error <= BF16_BOUND, name


def test_frozen_weights_give_ligers_gradient_of_the_hidden_states():
    for seed in range(20):
        case = random_case(seed)
        ours, theirs = (outputs_and_gradients(c, case, wanted=("_input",)) for c in (LigerFusedLinearDPOLoss, Liger))
        assert set(ours) == {*OUTPUTS, "d input"}
        for name, value in theirs.items():
            assert_close(ours[name], value, 1e-5 * max(1.0, value.abs().max().item()), name)


def test_only_the_loss_has_a_gradient():
    loss, others = LigerFusedLinearDPOLoss()(
        **{name: t.requires_grad_() if t.is_floating_point() else t for name, t in make_inputs(4, 5).items()}
    )
    assert loss.requires_grad
    assert not any(t.requires_grad for t in others)
    assert [t.shape for t in others] == [(2,), (2,), (), (), (), (2,), (2,)]


@pytest.mark.parametrize("name", [n for n in failing_cases() if n != "an odd batch"])
def test_numbers_where_liger_has_none(name):
    case = failing_cases()[name]
    ours = outputs_and_gradients(LigerFusedLinearDPOLoss, case)
    for output, value in ours.items():
        if not (name == "NaN in a masked token" and "logits_mean" in output):  # which is over all tokens
            assert torch.isfinite(value).all(), output
    try:
        theirs = outputs_and_gradients(Liger, case)
    except ValueError:
        assert name == "loss_type ipo"
    else:
        assert not (theirs["loss"] - ours["loss"]).abs() < 1e-4  # not a number, or another one


def test_an_odd_batch_raises(monkeypatch):
    options, inputs = failing_cases()["an odd batch"]
    monkeypatch.setattr(LigerFusedLinearDPOLoss, "_log_probs", None)  # found before any product
    with pytest.raises(ValueError, match="the batch has 3 sequences"):
        LigerFusedLinearDPOLoss(**options)(**inputs)
    assert torch.isfinite(Liger(**options)(**inputs)[0])  # which broadcasts one chosen answer over two rejected ones


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "exo_pair"])
def test_every_loss_is_there(loss_type):
    inputs = make_inputs(4, 5, bias=True)
    target = inputs["target"]
    log_probs = reference.hidden_to_log_probs(inputs["_input"], inputs["lin_weight"], target, inputs["bias"])
    ref = reference.hidden_to_log_probs(inputs["ref_input"], inputs["ref_weight"], target, inputs["ref_bias"])
    exact = dpo_loss(ref, log_probs, target != -100, 0.2, loss_type=loss_type)
    loss, others = LigerFusedLinearDPOLoss(beta=0.2, loss_type=loss_type)(**inputs)
    assert_close(loss, exact.loss, 1e-4)
    assert_close(others[OUTPUTS.index("chosen_rewards") - 1].mean(), exact.chosen_rewards, 1e-5)


def test_what_it_is_told_wrong():
    with pytest.raises(ValueError, match="use_ref_model is True; expected ref_input and ref_weight"):
        LigerFusedLinearDPOLoss()(*list(make_inputs(4, 5).values())[:3])
    with pytest.raises(ValueError, match="loss_type is 'kto'; expected one of"):
        LigerFusedLinearDPOLoss(loss_type="kto")
    with pytest.warns(UserWarning, match="label_smoothing is 0.1, which loss_type 'hinge' does not have"):
        LigerFusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1)


def test_a_list_of_losses_and_the_smoothing_of_those_that_have_it(recwarn):
    inputs = make_inputs(4, 5)
    names = ["sigmoid", "hinge"]
    made = LigerFusedLinearDPOLoss(loss_type=names, label_smoothing=0.2)(**inputs)[0]
    single = [
        LigerFusedLinearDPOLoss(loss_type="sigmoid", label_smoothing=0.2),
        LigerFusedLinearDPOLoss(loss_type="hinge"),
    ]
    assert not recwarn.list
    assert_close(made, sum(loss(**inputs)[0] for loss in single), 1e-6)


def test_a_changed_attribute_counts_everywhere():
    inputs = make_inputs(4, 5)
    changed = LigerFusedLinearDPOLoss()
    changed.beta, changed.loss_type, changed.average_log_prob = 0.5, "ipo", True
    fresh = LigerFusedLinearDPOLoss(beta=0.5, loss_type="ipo", average_log_prob=True)
    for value, truth in zip((a := changed(**inputs))[1] + (a[0],), (b := fresh(**inputs))[1] + (b[0],), strict=True):
        assert torch.equal(value, truth)


def test_autocast_and_bfloat16():
    inputs = make_inputs(4, 5, bias=True)
    exact = LigerFusedLinearDPOLoss()(**inputs)
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    in_narrow = LigerFusedLinearDPOLoss()(**narrow)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = LigerFusedLinearDPOLoss()(**inputs)
    for loss, others in (in_narrow, in_autocast):
        assert loss.dtype == torch.float32
        for name, value, truth in zip(OUTPUTS, (loss, *others), (exact[0], *exact[1]), strict=True):
            assert_close(value, truth, 0.05 * max(1.0, truth.abs().max().item()), name)
