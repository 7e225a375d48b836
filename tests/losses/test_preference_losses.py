"""Each loss against TRL's own code or a plain formula, at the edges, and where TRL is wrong."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields

import pytest
import torch
from helpers import assert_close, slow
from loss_oracles import CASES, differences, make_batch, trl_dpo

from dpo_kernels import FusedLinearDPOLoss, dpo_loss, reference, token_stats
from dpo_kernels.preference_losses import (
    DIVERGENCES,
    DIVERGING,
    EXPONENT_LIMIT,
    LOSSES,
    POSITIVE_BETA,
    SMOOTHED,
    SORTED,
    LossOptions,
)
from dpo_kernels.training import DPOConfig

NEEDED = {"exo_pair": {"label_smoothing": 1e-3}}  # options that a loss cannot do without
EVERY = [{"loss_type": name, **NEEDED.get(name, {})} for name in LOSSES]
EVERY_DIVERGENCE = [
    {"loss_type": name, "f_divergence_type": divergence, **NEEDED.get(name, {})}
    for divergence in DIVERGENCES
    for name in DIVERGING
]


def label(options):
    return "-".join(str(value) for value in options.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.label} | {case.against}".replace(" ", "-"))
def test_value_and_gradient_are_those_of_trl_or_of_a_plain_formula(case):
    value, gradient = differences(case)
    assert value <= case.bound
    assert gradient <= case.bound


def test_every_loss_has_a_case_and_a_paper_and_is_short():
    compared = {name for case in CASES for name in [case.options["loss_type"]] if isinstance(name, str)}
    assert compared == set(LOSSES)
    for name, loss in LOSSES.items():
        assert loss.name == loss.function.__name__ == name
        assert "arXiv:" in loss.function.__doc__
        assert len(inspect.getsource(loss.function).splitlines()) < 20


# Around the exponents' limit too, where they are largest before they go on as a line.
MARGINS = [EXPONENT_LIMIT - 0.1, EXPONENT_LIMIT + 0.1, 2 * EXPONENT_LIMIT - 0.1, 2 * EXPONENT_LIMIT + 0.1, 1e2, 1e6]


@pytest.mark.parametrize(
    "options", [*EVERY, *EVERY_DIVERGENCE, {"loss_type": "discopop", "discopop_tau": 2.0}], ids=label
)
@pytest.mark.parametrize("size", MARGINS)
def test_huge_margins_are_finite_in_float32(options, size):
    """Both signs of every side at once: answers that the policy has made certain, and ruled out."""
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # 4 chosen, then 4 rejected
    ref = torch.full((8, 1), -size)
    policy = (ref + signs[:, None] * size).requires_grad_()
    result = dpo_loss(ref, policy, torch.ones(8, 1), beta=1.0, **options)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert torch.isfinite(torch.stack(result)).all()
    assert torch.isfinite(policy.grad).all()
    squared = options["loss_type"] in ("ipo", "ipo_unnormalized")
    if not (squared and options.get("f_divergence_type") in ("forward_kl", "alpha_divergence")):
        assert math.isfinite(policy.grad.norm())


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"f_divergence_type": "forward_kl"}, 0),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, 0),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}, 1),
        ({"loss_type": "discopop", "discopop_tau": 2.0}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("h", [19.0, 21.0, 41.0, 81.0, 1000.0])
def test_the_side_that_has_gone_wrong_is_pulled_back_from_however_far(options, side, h):
    """A chosen answer that was ruled out, or a rejected one that was made certain."""
    policy = torch.zeros(2, 1)
    policy[side] = -h if side == 0 else h
    policy.requires_grad_()
    beta = 2.0 if options.get("loss_type") == "discopop" else 0.1
    dpo_loss(torch.zeros(2, 1), policy, torch.ones(2, 1), beta, **options).loss.backward()
    pull = -policy.grad if side == 0 else policy.grad
    assert pull[side] > 100
    # Never weaker than nearer by.
    nearer = (policy.detach() * 0.9).requires_grad_()
    dpo_loss(torch.zeros(2, 1), nearer, torch.ones(2, 1), beta, **options).loss.backward()
    assert pull[side] >= (-nearer.grad if side == 0 else nearer.grad)[side] * (1 - 1e-6)


def test_three_lists_of_options_have_the_same_defaults():
    defaults = {field.name: field.default for field in fields(LossOptions)}
    of_dpo_loss = {name: p.default for name, p in inspect.signature(dpo_loss).parameters.items()}
    of_config = {field.name: field for field in fields(DPOConfig)}
    for name, default in defaults.items():
        assert of_dpo_loss[name] == default, name
        own = of_config["dpo_aggregate" if name == "aggregate" else name]
        assert ([default] == own.default_factory()) if name == "loss_type" else (own.default == default), name


def test_label_smoothing_in_a_sum_counts_where_a_loss_has_it():
    ref, policy, mask, _ = make_batch(12)
    for names in (["hinge", "robust"], ["sigmoid", "exo_pair"]):
        both = dpo_loss(ref, policy, mask, loss_type=names, label_smoothing=0.1).loss
        single = [
            dpo_loss(ref, policy, mask, loss_type=name, label_smoothing=0.1 if name in SMOOTHED else 0.0).loss
            for name in names
        ]
        assert_close(both, sum(single), 1e-12)


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("empty", [[0], [4], [0, 3], [0, 1, 2], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("options", EVERY, ids=label)
def test_answers_without_a_token_have_no_gradient_and_masked_nan_never_leaks(options, empty, aggregate):
    ref, policy, mask, spread = make_batch(7, torch.float32)
    assert len(mask) == 6
    mask[empty] = False
    more = {"use_weighting": True} if options["loss_type"] not in SORTED else {}
    results = []
    for filler in (0.0, float("nan")):
        leaf = torch.where(mask, policy, filler).detach().requires_grad_()
        values = {"log_sum_sq_probs": torch.where(mask, spread, filler)} if more else {}
        result = dpo_loss(
            torch.where(mask, ref, filler), leaf, mask, 0.5, aggregate, ld_alpha=0.5, **options, **more, **values
        )
        result.loss.backward()
        results.append((*result, leaf.grad))
    for clean, noisy in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, noisy)
    assert results[0][-1][~mask].eq(0).all()


@pytest.mark.parametrize("options", EVERY, ids=label)
def test_without_a_reference_is_with_one_of_zeros(options):
    _, policy, mask, _ = make_batch(3)
    without, zeros = (dpo_loss(ref, policy, mask, 0.5, **options) for ref in (None, torch.zeros_like(policy)))
    for value, same in zip(without, zeros, strict=True):
        assert torch.equal(value, same)


@pytest.mark.parametrize("options", EVERY, ids=label)
def test_gradients_are_those_of_finite_differences(options):
    ref, policy, mask, _ = make_batch(8)
    assert torch.autograd.gradcheck(lambda p: dpo_loss(ref, p, mask, 0.7, **options).loss, policy)


SUM = {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.2)}
COMPILED = ("sigmoid", "aot", "discopop", "orpo")


@pytest.mark.parametrize(
    "options", [SUM, *(one if one.get("loss_type") in COMPILED else slow(one) for one in EVERY)], ids=label
)
def test_every_loss_compiles_whole(options):
    torch.compiler.reset()  # else the cases count as recompilations of one function
    ref, policy, mask, _ = make_batch(9, torch.float32)
    compiled = torch.compile(lambda p: dpo_loss(ref, p, mask, 0.5, **options), fullgraph=True, backend="aot_eager")
    for value, eager in zip(compiled(policy), dpo_loss(ref, policy, mask, 0.5, **options), strict=True):
        assert_close(value, eager, 1e-6)


def test_equal_answers_of_policy_and_reference_start_where_they_should():
    ref, _, mask, _ = make_batch(11, torch.float32)
    for name in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "discopop"):
        loss, chosen, rejected = dpo_loss(ref, ref.clone(), mask, loss_type=name)
        assert loss.item() == pytest.approx(math.log(2) if name != "discopop" else 0.5 + math.log(2) / 2, abs=1e-7)
        assert chosen.item() == rejected.item() == 0.0


def test_several_losses_are_their_weighted_sum():
    ref, policy, mask, spread = make_batch(12)
    weighting = {"use_weighting": True, "log_sum_sq_probs": spread}
    names, weights = ["sigmoid", "ipo", "sft"], [1.0, 0.3, 2]
    single = [dpo_loss(ref, policy, mask, loss_type=name, **weighting).loss for name in names]
    both = dpo_loss(ref, policy, mask, loss_type=names, loss_weights=weights, **weighting).loss
    assert_close(both, sum(w * loss for w, loss in zip(weights, single, strict=True)), 1e-12)
    plain = dpo_loss(ref, policy, mask, loss_type=names, **weighting).loss
    assert_close(plain, sum(single), 1e-12)


def test_the_mean_is_not_divided_by_the_length_twice():
    ref, policy, mask, _ = make_batch(13)
    for name in ("ipo", "sigmoid_norm", "simpo", "orpo"):
        by_sum, by_mean = (dpo_loss(ref, policy, mask, 0.5, how, loss_type=name).loss for how in ("sum", "mean"))
        assert_close(by_sum, by_mean, 1e-12)
    norm = dpo_loss(ref, policy, mask, 0.5, loss_type="sigmoid_norm").loss
    assert_close(norm, dpo_loss(ref, policy, mask, 0.5, "mean").loss, 1e-12)
    unnormalized = dpo_loss(ref, policy, mask, 0.5, "mean", loss_type="ipo_unnormalized").loss
    assert_close(unnormalized, dpo_loss(ref, policy, mask, 0.5, loss_type="ipo").loss, 1e-12)


def test_ld_alpha_by_hand():
    """The chosen answer has 3 tokens, the rejected one 1: the chosen's last two count 0.25 each."""
    policy = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    loss = dpo_loss(torch.zeros(2, 4), policy, mask, 1.0, ld_alpha=0.25)
    assert loss.chosen_rewards.item() == pytest.approx(-2.0 - 0.25 * (3.0 + 4.0))
    assert loss.rejected_rewards.item() == -7.0
    whole = dpo_loss(torch.zeros(2, 4), policy, mask, 1.0, ld_alpha=1.0)
    assert torch.equal(whole.loss, dpo_loss(torch.zeros(2, 4), policy, mask, 1.0).loss)


def test_label_smoothing_counts_with_sigmoid_where_trl_drops_it():
    ref, policy, mask, _ = batch = make_batch(4)
    plain, smoothed = (dpo_loss(ref, policy, mask, label_smoothing=eps).loss for eps in (0.0, 0.3))
    flipped = dpo_loss(ref.flip(0), policy.flip(0), mask.flip(0)).loss  # every preference the other way round
    assert_close(smoothed, 0.7 * plain + 0.3 * flipped, 1e-12)
    assert (smoothed - plain).abs() > 0.01
    assert_close(trl_dpo(batch, {"label_smoothing": 0.3}), plain, 1e-12)


def test_weighting_works_where_trl_writes_into_what_it_must_not():
    """TRL multiplies in place: sft's loss is one number expanded, hinge's is what its backward needs."""
    ref, policy, mask, spread = batch = make_batch(4)
    assert len(mask) > 2
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(batch, {"loss_type": "sft", "use_weighting": True})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trl_dpo(batch, {"loss_type": "hinge", "use_weighting": True}).backward()
    for name in ("sft", "hinge"):
        dpo_loss(ref, policy, mask, loss_type=name, use_weighting=True, log_sum_sq_probs=spread).loss.backward()
    assert torch.isfinite(policy.grad).all()


def test_nothing_to_learn_from_is_no_nan_where_trl_has_nan():
    ref, policy, mask, _ = batch = make_batch(4)
    mask[:] = False
    assert trl_dpo(batch, {"loss_type": "sft"}).isnan()
    loss = dpo_loss(ref, policy, mask, loss_type="sft").loss
    loss.backward()
    assert loss.item() == 0
    assert policy.grad.eq(0).all()


def test_discopop_is_finite_where_trl_has_nan():
    policy = torch.tensor([[-200.0], [0.0]], requires_grad=True)
    batch = make_batch(0)._replace(ref=torch.zeros(2, 1), policy=policy, mask=torch.ones(2, 1, dtype=torch.bool))
    assert trl_dpo(batch, {"loss_type": "discopop", "beta": 1.0}).isnan()
    assert dpo_loss(batch.ref, policy, batch.mask, 1.0, loss_type="discopop").loss.item() == pytest.approx(200.0)


def test_alpha_divergence_works_in_float64_where_trl_does_not():
    batch = make_batch(2)
    with pytest.raises(KeyError, match=r"torch\.float64"):
        trl_dpo(batch, {"f_divergence_type": "alpha_divergence"})
    loss = dpo_loss(*batch[:3], f_divergence_type="alpha_divergence").loss
    narrow = dpo_loss(*(t.float() for t in batch[:2]), batch.mask, f_divergence_type="alpha_divergence").loss
    assert loss.dtype == torch.float64
    assert_close(narrow, loss, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "orp"}, r"loss_type is 'orp'; expected one of \('sigmoid', .*'orpo'\)"),
        ({"loss_type": ["sigmoid", "orp"]}, "loss_type is 'orp'; expected one of"),
        ({"loss_type": []}, r"loss_type is \[\]; expected at least one name"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights are \[1.0, 2.0\], loss_type 'sigmoid'; expected one weight each"),
        ({"loss_type": ["sigmoid"], "loss_weights": [math.inf]}, "a weight in loss_weights is inf"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; expected a number in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0.1; expected a number in \[0, 1\)"),
        ({"label_smoothing": math.nan}, "label_smoothing is nan"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing is 0.5; expected a number in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, r"label_smoothing is 0.0; expected a number in \(0, 1\) for loss_type 'exo_pair'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1, which loss_type 'hinge' does not"),
        ({"loss_type": "ipo", "beta": 0.0}, "beta is 0.0; expected a finite number > 0 for loss_type 'ipo'"),
        ({"f_divergence_type": "kl"}, r"f_divergence_type is 'kl'; expected one of \('reverse_kl', 'forward_kl', "),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"},
         "f_divergence_type is 'forward_kl', which loss_type 'bco_pair' is not defined for"),
        ({"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef is inf; expected a finite number"),
        ({"ld_alpha": 1.1}, r"ld_alpha is 1.1; expected None or a number in \[0, 1\]"),
        ({"discopop_tau": 0.0}, "discopop_tau is 0.0; expected a finite number > 0"),
        ({"simpo_gamma": -1}, "simpo_gamma is -1; expected a finite number >= 0"),
        ({"cpo_alpha": -1}, "cpo_alpha is -1; expected a finite number >= 0"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting is True, but loss_type 'aot' sorts"),
        ({"use_weighting": True}, "use_weighting is True, log_sum_sq_probs None; expected both or neither"),
        ({"log_sum_sq_probs": torch.zeros(6, 7)}, "use_weighting is False, log_sum_sq_probs given"),
        ({"use_weighting": True, "log_sum_sq_probs": torch.zeros(6, 8)},
         r"log_sum_sq_probs are \(6, 8\), policy_log_probs \(6, 7\)"),
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(6, 7), torch.zeros(6, 7), torch.ones(6, 7), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": None}, "loss_type is None; expected a name or a list of names"),
        ({"loss_type": ["sigmoid"], "loss_weights": 1.0}, "loss_weights are 1.0; expected None or a list of numbers"),
        ({"beta": "0.1"}, "beta is '0.1'; expected a finite number >= 0"),
        ({"label_smoothing": True}, "label_smoothing is True; expected a number"),
        ({"log_sum_sq_probs": 1.0, "use_weighting": True}, "log_sum_sq_probs is float; expected a torch.Tensor"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options, message):
    with pytest.raises(TypeError, match=message):
        dpo_loss(torch.zeros(6, 7), torch.zeros(6, 7), torch.ones(6, 7), **options)


def test_every_loss_but_those_that_want_a_positive_beta_runs_at_beta_0():
    for names in (SMOOTHED, DIVERGING, SORTED, POSITIVE_BETA):
        assert set(names) <= set(LOSSES)
    for name in LOSSES:
        if name not in POSITIVE_BETA:
            dpo_loss(
                torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), 0.0, loss_type=name, **NEEDED.get(name, {})
            )


def fused_inputs():
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (4, 6))
    labels[:, :2] = -100
    return hidden, weight, labels


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
        {"use_weighting": True},
        {"loss_type": "simpo"},
    ],
    ids=label,
)
def test_the_fused_loss_has_the_same_options(options):
    hidden, weight, labels = fused_inputs()
    ref = -torch.rand(4, 6)
    got = FusedLinearDPOLoss(0.4, **options)(hidden, weight, labels, ref_log_probs=ref)
    stats = reference.token_stats(hidden, weight, labels, outputs=("log_sum_sq_probs",))
    spread = {"log_sum_sq_probs": stats.log_sum_sq_probs} if options.get("use_weighting") else {}
    exact = dpo_loss(ref, stats.log_probs, labels != -100, 0.4, **options, **spread)
    for value, truth in zip(got, exact, strict=True):
        assert_close(value, truth, 1e-5)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got.loss, exact.loss)]
    for value, truth in zip(*grads, strict=True):
        assert_close(value, truth, 1e-5)


def test_the_fused_loss_says_when_it_has_no_reference():
    hidden, weight, labels = fused_inputs()
    free = FusedLinearDPOLoss(reference_free=True)(hidden, weight, labels)
    log_probs = token_stats(hidden, weight, labels).log_probs
    assert torch.equal(free.loss, dpo_loss(None, log_probs, labels != -100).loss)
    assert torch.isfinite(FusedLinearDPOLoss(loss_type="orpo")(hidden, weight, labels).loss)
    with pytest.raises(ValueError, match="reference_free is True, but a reference is given"):
        FusedLinearDPOLoss(reference_free=True)(hidden, weight, labels, ref_log_probs=torch.zeros(4, 6))
    with pytest.raises(ValueError, match="give the reference either as"):
        FusedLinearDPOLoss(loss_type=["orpo", "sigmoid"])(hidden, weight, labels)
    with pytest.raises(TypeError, match=re.escape("unexpected keyword argument 'label_smooth'")):
        FusedLinearDPOLoss(label_smooth=0.1)
