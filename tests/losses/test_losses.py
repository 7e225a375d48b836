"""Masked aggregation and the DPO loss."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_kernels import DPOLoss, FusedLinearDPOLoss, dpo_loss, hidden_to_log_probs, reference
from dpo_kernels.losses import aggregate_log_probs


def batch(pairs=3, length=7, dtype=torch.float64):
    ref, policy = (-torch.rand(2 * pairs, length, dtype=torch.float64).mul(5).to(dtype) for _ in range(2))
    return ref, policy.requires_grad_(), torch.rand(2 * pairs, length) < 0.6


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.integers(1, 5), length=st.integers(0, 9), beta=st.sampled_from([0.0, 0.1, 2.0]),
    aggregate=st.sampled_from(["sum", "mean"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_against_the_reference(pairs, length, beta, aggregate, seed):
    torch.manual_seed(seed)
    ref, policy, mask = batch(pairs, length)
    got = dpo_loss(ref, policy, mask, beta, aggregate)
    exact = reference.dpo_loss(ref, policy, mask, beta, aggregate)
    for value, truth in zip(got, exact, strict=True):
        assert_close(value, truth, 1e-12)
    grads = [torch.autograd.grad(loss, policy)[0] for loss in (got.loss, exact[0])]
    assert_close(grads[0], grads[1], 1e-12)


def test_by_hand():
    ref = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])
    policy = torch.tensor([[-0.5, -1.0], [-4.0, -9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    loss, chosen, rejected = dpo_loss(ref, policy, mask, 0.5)
    assert chosen.item() == pytest.approx(0.5 * 1.5)
    assert rejected.item() == pytest.approx(0.5 * -1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * 2.5)))
    assert dpo_loss(ref, policy, mask, 0.5, "mean").chosen_rewards.item() == pytest.approx(0.5 * 0.75)


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_is_exactly_log_2(aggregate, dtype):
    ref, _, mask = batch(4, 900, dtype)
    loss, chosen, rejected = dpo_loss(ref, ref.clone().requires_grad_(), mask, 0.3, aggregate)
    assert loss.dtype == torch.float32
    assert loss.item() == torch.tensor(2.0).log().item()
    assert chosen.item() == rejected.item() == 0.0


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_a_sequence_without_tokens_contributes_nothing(aggregate):
    ref, policy, mask = batch()
    mask[1] = False
    assert aggregate_log_probs(policy, mask, aggregate)[1] == 0
    dpo_loss(ref, policy, mask, aggregate=aggregate).loss.backward()
    assert torch.isfinite(policy.grad).all()
    assert policy.grad[1].eq(0).all()


def test_long_half_precision_masks_are_counted_in_float32():
    log_probs = torch.full((2, 5000), -1.0, dtype=torch.float16)
    assert_close(aggregate_log_probs(log_probs, torch.ones(2, 5000, dtype=torch.float16), "mean"), -torch.ones(2), 1e-6)


def test_long_sums_keep_a_small_difference():
    """Subtracted token by token, a margin of 1e-3 per token survives sums of 1e5."""
    ref = -torch.rand(2, 20_000) * 10
    exact = torch.full((2, 20_000), 1e-3, dtype=torch.float64)
    policy = (ref.double() + exact).float()
    loss = dpo_loss(ref, policy, torch.ones(2, 20_000), beta=1.0)
    assert loss.chosen_rewards.item() == pytest.approx((policy[0].double() - ref[0].double()).sum().item(), abs=1e-5)


def test_rewards_are_detached_and_the_loss_is_not():
    ref, policy, mask = batch()
    result = dpo_loss(ref.requires_grad_(), policy, mask)
    assert isinstance(result, DPOLoss)
    assert result.loss.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
    result.loss.backward()
    assert ref.grad is None


def test_huge_margins_do_not_overflow():
    policy = torch.tensor([[-1e6], [0.0]], requires_grad=True)
    loss = dpo_loss(torch.zeros(2, 1), policy, torch.ones(2, 1), beta=1.0).loss
    assert loss.item() == 1e6
    loss.backward()
    assert policy.grad.tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -0.1}, r"beta is -0.1; expected a finite number >= 0"),
        ({"beta": float("nan")}, r"beta is nan"),
        ({"aggregate": "median"}, r"aggregate is 'median'; expected one of \('sum', 'mean'\)"),
        ({"loss_type": "dpo"}, r"loss_type is 'dpo'; expected one of \('sigmoid', 'sigmoid_norm', "),
        ({"mask": torch.ones(6, 8)}, r"log_probs are \(6, 7\), mask \(6, 8\)"),
        ({"ref_log_probs": torch.zeros(3, 7)}, r"ref_log_probs are \(3, 7\), policy_log_probs \(6, 7\)"),
    ],
)
def test_bad_arguments(change, message):
    ref, policy, mask = batch()
    arguments = {"ref_log_probs": ref, "policy_log_probs": policy, "mask": mask} | change
    with pytest.raises(ValueError, match=message):
        dpo_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.ones(6, 7, device="meta")}, ValueError, "mask is on meta, policy_log_probs on cpu"),
        ({"ref_log_probs": torch.zeros(6, 7, device="meta")}, ValueError, "ref_log_probs is on meta"),
        ({"ref_log_probs": [0.0]}, TypeError, "ref_log_probs is list; expected a torch.Tensor"),
        ({"policy_log_probs": torch.zeros(6, 7, dtype=torch.long)}, TypeError, "policy_log_probs is torch.int64"),
    ],
)
def test_bad_kinds_and_devices(change, error, message):
    ref, policy, mask = batch()
    arguments = {"ref_log_probs": ref, "policy_log_probs": policy, "mask": mask} | change
    with pytest.raises(error, match=message):
        dpo_loss(**arguments)


def test_half_precision_is_widened_before_it_is_subtracted():
    ref, policy = (-torch.rand(2, 400) * 30).bfloat16(), (-torch.rand(2, 400) * 30).bfloat16()
    exact = dpo_loss(ref.double(), policy.double(), torch.ones(2, 400))
    assert_close(dpo_loss(ref, policy, torch.ones(2, 400)).chosen_rewards, exact.chosen_rewards, 1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_an_odd_or_empty_batch_never_broadcasts(rows):
    zeros = torch.zeros(rows, 4)
    with pytest.raises(ValueError, match=f"the batch has {rows} sequences: .* expected an even number"):
        dpo_loss(zeros, zeros, zeros)


def test_a_flat_batch_is_refused():
    with pytest.raises(ValueError, match=r"log_probs are \(4,\), mask \(4,\); expected two equal shapes \(R, S\)"):
        dpo_loss(torch.zeros(4), torch.zeros(4), torch.ones(4))


def fused_inputs():
    hidden = torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (4, 6))
    labels[:, :2] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_fused_linear_loss_is_the_two_functions(aggregate):
    hidden, weight, labels = fused_inputs()
    ref_hidden, ref_weight, ref_bias, bias = torch.randn(4, 6, 5), torch.randn(50, 5), torch.randn(50), torch.randn(50)
    loss_fn = FusedLinearDPOLoss(0.2, aggregate, softcap=20.0, temperature=1.3)
    ref_log_probs = hidden_to_log_probs(ref_hidden, ref_weight, labels, ref_bias, softcap=20.0, temperature=1.3)
    given_log_probs = loss_fn(hidden, weight, labels, bias=bias, ref_log_probs=ref_log_probs)
    given_head = loss_fn(
        hidden, weight, labels, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
    )
    log_probs = reference.hidden_to_log_probs(hidden, weight, labels, bias, softcap=20.0, temperature=1.3)
    exact = reference.dpo_loss(ref_log_probs, log_probs, labels != -100, 0.2, aggregate)
    for a, b, c in zip(given_log_probs, given_head, exact, strict=True):
        assert_close(a, c, 1e-5)
        assert_close(b, a, 1e-6)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (given_head.loss, exact[0])]
    for got, truth in zip(*grads, strict=True):
        assert_close(got, truth, 1e-5)


def test_fused_linear_loss_starts_at_log_2():
    hidden, weight, labels = fused_inputs()
    loss, chosen, rejected = FusedLinearDPOLoss()(hidden, weight, labels, ref_hidden=hidden.detach(), ref_weight=weight)
    assert loss.item() == torch.tensor(2.0).log().item()
    assert chosen.item() == rejected.item() == 0.0


def test_fused_linear_loss_wants_one_reference():
    hidden, weight, labels = fused_inputs()
    whole = {"ref_log_probs": torch.zeros(4, 6)}
    for options in (
        {},
        {"ref_hidden": hidden},
        whole | {"ref_hidden": hidden},
        whole | {"ref_bias": hidden},
        {"ref_log_probs": labels, "ref_hidden": hidden, "ref_weight": weight},
    ):
        with pytest.raises(ValueError, match="give the reference either as ref_log_probs, or as"):
            FusedLinearDPOLoss()(hidden, weight, labels, **options)
    with pytest.raises(ValueError, match="aggregate is 'all'"):
        FusedLinearDPOLoss(aggregate="all")
    with pytest.raises(ValueError, match="loss_type is 'all'"):
        FusedLinearDPOLoss(loss_type="all")


def test_masked_positions_may_hold_anything():
    log_probs = torch.randn(4, 6, requires_grad=True)
    noisy = log_probs.detach().clone()
    mask = torch.rand(4, 6) < 0.5
    noisy[~mask] = float("nan")
    noisy.requires_grad_()
    losses = [dpo_loss(torch.zeros(4, 6), p, mask, aggregate="mean") for p in (log_probs, noisy)]
    for loss in losses:
        loss.loss.backward()
    assert_close(losses[1].loss, losses[0].loss, 0)
    assert_close(noisy.grad, log_probs.grad, 0)
