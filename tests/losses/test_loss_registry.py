"""The table of losses: rows are whole, a row alone adds a loss, docs/losses.md and the old module agree with it."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from training_helpers import Pairs, logs, make_model

from dpo_kernels import FusedLinearDPOLoss, dpo_loss, losses, preference_losses
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss
from dpo_kernels.losses import DIVERGENCES, LOSSES, Loss, LossOptions, Smoothing, check_options, register
from dpo_kernels.training import DPOConfig, DPOTrainer


def toy(pairs, options):
    """exp(-beta (h_c - h_r)) and a share of its flip."""
    x = options.beta * pairs.logratios.margin
    return (1 - options.label_smoothing) * torch.exp(-x) + options.label_smoothing * torch.exp(x)


@pytest.fixture
def row(monkeypatch):
    """Puts the toy loss into the table for one test, and its row here."""
    made = Loss("toy", toy, smoothing=Smoothing(below=0.4, positive=True, example="0.1"), positive_beta=True)
    monkeypatch.setitem(LOSSES, "toy", made)
    return made


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_row_is_whole(loss):
    assert loss.name in LOSSES
    assert loss.function.__module__ == "dpo_kernels.losses.formulas"
    assert loss.smoothing is None or 0 < loss.smoothing.below <= 1
    assert "reverse_kl" in loss.divergences
    assert set(loss.divergences) <= set(DIVERGENCES)
    assert isinstance(loss.needs_reference, bool)
    assert isinstance(loss.positive_beta, bool)
    assert isinstance(loss.paired, bool)
    with pytest.raises(FrozenInstanceError):
        loss.name = "other"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_a_row_says_is_what_the_function_does(loss):
    """Smoothing, the reference and a sorted batch change a number, or not, as the row says."""
    torch.manual_seed(0)
    ref, policy = -torch.rand(2, 8, 5, dtype=torch.float64).mul(3)
    mask = torch.ones(8, 5)
    eps = 0.1 if loss.smoothing is not None else 0.0
    options = LossOptions(beta=0.7, loss_type=loss.name, label_smoothing=eps)
    pairs = losses.make_pairs(ref, policy, mask, options)
    values = loss(pairs, options)
    assert values.shape == (4,)
    assert torch.equal(values, loss(pairs, replace(options, label_smoothing=0.2))) == (loss.smoothing is None)
    other = losses.make_pairs(ref.flip(1).roll(1, 0), policy, mask, options)
    assert torch.equal(values, loss(other, options)) == (not loss.needs_reference)
    order = torch.tensor([2, 0, 3, 1])
    mixed = losses.make_pairs(*(t[torch.cat([order, order + 4])] for t in (ref, policy, mask)), options)
    assert torch.allclose(loss(mixed, options), values[order]) == loss.paired


def test_a_row_is_enough_for_the_function_and_the_fused_loss(row):
    policy = (-torch.rand(4, 5)).requires_grad_()
    mask = torch.ones(4, 5)
    got = dpo_loss(torch.zeros(4, 5), policy, mask, 0.5, loss_type="toy", label_smoothing=0.1)
    chosen, rejected = policy.sum(1).chunk(2)
    x = 0.5 * (chosen - rejected)
    assert torch.allclose(got.loss, (0.9 * torch.exp(-x) + 0.1 * torch.exp(x)).mean())
    both = dpo_loss(torch.zeros(4, 5), policy, mask, 0.5, loss_type=["toy", "hinge"], label_smoothing=0.1)
    assert torch.allclose(both.loss, got.loss + F.relu(1 - x).mean())
    hidden, weight, labels = torch.randn(4, 6, 8), torch.randn(50, 8), torch.randint(50, (4, 6))
    start = {"ref_hidden": hidden, "ref_weight": weight}
    assert FusedLinearDPOLoss(loss_type="toy", label_smoothing=0.1)(hidden, weight, labels, **start).loss == 1.0
    liger = LigerFusedLinearDPOLoss(loss_type="toy", label_smoothing=0.1)
    assert liger(weight, hidden, labels, ref_input=hidden, ref_weight=weight)[0] == 1.0


def test_a_row_is_enough_for_training(row, tmp_path):
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2, loss_type="toy",
        label_smoothing=0.1, learning_rate=1e-2,
    )  # fmt: skip
    DPOTrainer(make_model("Llama"), make_model("Llama"), args, Pairs(4)).train()
    first, second = logs(tmp_path)
    assert first["loss"] == 1.0
    assert second["loss"] != 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.4}, r"label_smoothing is 0.4; expected a number in \(0, 0.4\) for loss_type 'toy'"),
        ({}, r"label_smoothing is 0.0; expected a number in \(0, 0.4\) for loss_type 'toy', such as 0.1"),
        ({"beta": 0, "label_smoothing": 0.1}, "beta is 0; expected a finite number > 0 for loss_type 'toy'"),
        ({"label_smoothing": 0.1, "f_divergence_type": "forward_kl"},
         r"loss_type 'toy' is not defined for; expected 'reverse_kl', or a loss_type from \('sigmoid', .*'sft'\)"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, r"does not have; these do: \('sigmoid', .*'cpo', 'toy'\)"),
        ({"loss_type": "no"}, r"loss_type is 'no'; expected one of \('sigmoid', .*'orpo', 'toy'\)"),
    ],
    ids=str,
)  # fmt: skip
def test_the_checks_read_the_row(row, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(LossOptions(**{"loss_type": "toy"} | options))


def test_a_row_without_pairs_and_without_a_reference(monkeypatch):
    monkeypatch.setitem(LOSSES, "toy", Loss("toy", toy, paired=False, needs_reference=False))
    assert not LossOptions(loss_type=["toy", "sft"]).needs_reference
    assert LossOptions(loss_type=["toy", "hinge"]).needs_reference
    with pytest.raises(ValueError, match="use_weighting is True, but loss_type 'toy' sorts the batch"):
        check_options(LossOptions(loss_type="toy", use_weighting=True))


def test_a_name_is_given_once(row):
    with pytest.raises(ValueError, match="there is a loss 'toy' already"):
        register(row)


@pytest.mark.parametrize(
    ("smoothing", "text", "inside", "outside"),
    [
        (Smoothing(), "[0, 1)", [0, 0.99], [-0.1, 1.0, float("nan")]),
        (Smoothing(below=0.5), "[0, 0.5)", [0.0, 0.49], [0.5]),
        (Smoothing(positive=True), "(0, 1)", [1e-9], [0.0, 0]),
    ],
)
def test_ranges_of_smoothing(smoothing, text, inside, outside):
    assert str(smoothing) == text
    assert all(value in smoothing for value in inside)
    assert not any(value in smoothing for value in outside)


def test_the_page_names_every_loss_where_it_belongs():
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| (pairs with a reference|without a reference|`f_divergence_type`) \| (.*) \|$", text, re.M)
    )
    assert len(rows) == 3
    named = [rows["pairs with a reference"].split(", "), rows["without a reference"].partition(";")[0].split(", ")]
    for needs_reference, names in zip((True, False), named, strict=True):
        assert names == [name for name, loss in LOSSES.items() if loss.needs_reference is needs_reference]
    assert rows["`f_divergence_type`"].split(", ") == list(DIVERGENCES)


def test_the_module_of_before_gives_the_same_objects():
    assert preference_losses.LOSSES is LOSSES
    assert preference_losses.DIVERGENCES is DIVERGENCES
    assert preference_losses.LossOptions is LossOptions
    assert preference_losses.pair_losses is losses.pair_losses
    for name, loss in LOSSES.items():
        assert getattr(preference_losses, name) is loss.function
    assert preference_losses.SORTED == ("aot", "aot_unpaired")
    assert preference_losses.REFERENCE_FREE == ("sft", "simpo", "cpo", "orpo")
    with pytest.raises(AttributeError):
        preference_losses.no_such_loss  # noqa: B018


def test_what_computes_log_probs_knows_no_loss():
    package = ROOT / "dpo_kernels"
    for path in (*package.glob("*.py"), *package.glob("impls/*.py"), *package.glob("kernels/*.py")):
        if path not in (package / "__init__.py", package / "preference_losses.py"):
            assert not re.search(r"\blosses\b.*\bimport\b|\bimport\b.*losses", path.read_text(encoding="utf-8")), path
