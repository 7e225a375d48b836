"""docs/dpo.ipynb: its cells run in order; shapes and both losses are those of plain PyTorch."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "dpo.ipynb").read_text(encoding="utf-8"))
SOURCES = {
    kind: ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]
    for kind in ("code", "markdown")
}


@pytest.fixture(scope="module")
def names():
    """What the cells leave behind."""
    left = {}
    for source in SOURCES["code"]:
        exec(compile(source, "docs/dpo.ipynb", "exec"), left)
    return left


def plain_loss(ref_log_probs, policy_log_probs, mask, beta, aggregate):
    """Loss and mean rewards, as a plain notebook computes them."""
    policy, reference = ((log_probs * mask).sum(dim=1) for log_probs in (policy_log_probs, ref_log_probs))
    if aggregate == "mean":
        policy, reference = (total / mask.sum(dim=1).clamp_min(1e-8) for total in (policy, reference))
    rewards = beta * (policy - reference)
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), chosen.mean(), rejected.mean()


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_both_losses_are_those_of_plain_pytorch(names, aggregate):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 8, 100), torch.randint(100, (4, 8))
    plain = F.log_softmax(logits, dim=2).gather(2, labels.unsqueeze(2)).squeeze(-1)
    log_probs = names["logits_to_log_probs"](logits, labels)
    assert log_probs.shape == (4, 8)
    torch.testing.assert_close(log_probs, plain, rtol=0, atol=2e-6)
    both = torch.cat([log_probs, log_probs])
    ref, policy = both + 0.1 * torch.randn(8, 8), both + 0.2 * torch.randn(8, 8)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1.0
    got = names["dpo_loss"](ref, policy, mask, beta=0.1, aggregate=aggregate)
    for value, expected in zip(got, plain_loss(ref, policy, mask, 0.1, aggregate), strict=True):
        torch.testing.assert_close(value, expected)


def test_the_cells_losses_and_shapes(names):
    assert names["log_probs"].shape == names["y"].shape == names["x"].shape == names["mask"].shape == (8, 255)
    assert names["sample"]["x_chosen"].shape == names["sample"]["y_chosen"].shape == (255,)
    assert names["fused"].shape == (4, 255)
    torch.testing.assert_close(names["fused"], names["from_logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(names["plain"], names["logits_to_log_probs"](names["logits"], names["labels"]))
    assert set(names["losses"]) == {"sum", "mean"}
    assert names["start"].loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert names["start"].chosen_rewards.item() == names["start"].rejected_rewards.item() == 0


def test_only_the_assistant_counts(names):
    sample, tokenizer = names["sample"], names["tokenizer"]
    counted = sample["y_chosen"][sample["mask_chosen"].bool()]
    assert tokenizer.decode(counted) == "1+1等于2。<|im_end|>"
    assert (sample["y_chosen"][~sample["mask_chosen"].bool()] == -100).all()


def test_training_starts_at_log_2_and_prefers_the_chosen(names):
    first, last = names["history"][0], names["history"][-1]
    assert first == pytest.approx((math.log(2), 0.0, 0.0), abs=1e-6)
    assert last[0] < 0.5 * first[0]
    assert last[1] > 0 > last[2]


def test_the_file_is_a_notebook_without_outputs_in_two_languages():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for text in SOURCES["markdown"]:
        assert "**中文**" in text or text.startswith("# ")
        assert "**English**" in text or text.startswith("# ")
