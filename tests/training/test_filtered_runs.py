"""--gradient_filter in a run: what is left out is logged, what is checked at start is exact, and the loss goes down."""

from __future__ import annotations

import pytest
import torch
from training_helpers import Pairs, logs, make_model, make_trainer

from dpo_kernels.overrides import override
from dpo_kernels.training import DPOConfig, FusedHead

SURE = 30.0  # by which a head's weight is multiplied: no probability but a few


def test_a_run_logs_what_it_leaves_out(tmp_path):
    shared = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3}
    with override(capabilities={"tiles": ((64, 64),)}):
        for name, share in (("exact", None), ("filtered", 0.5)):
            trainer = make_trainer(tmp_path / name, pairs=Pairs(length=6), gradient_filter=share, **shared)
            trainer.train()
    exact, filtered = (logs(tmp_path / name) for name in ("exact", "filtered"))
    assert exact[0]["loss"] == filtered[0]["loss"], "the loss is exact"
    dropped = [entry["dropped_mass"] for entry in logs(tmp_path / "filtered", "dropped_mass")]
    assert len(dropped) == 3
    assert all(0 < value < 1 for value in dropped)
    assert not logs(tmp_path / "exact", "dropped_mass")


def test_a_fused_model_gives_it_and_its_check_is_exact():
    model = make_model("Llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SURE)
    head = FusedHead(model, gradient_filter=2**-6)
    ids = torch.randint(97, (2, 40))
    with override(capabilities={"tiles": ((64, 64),)}):
        output = model(input_ids=ids, labels=ids.roll(-1, 1))
        assert output["dropped_mass"].shape == ids.shape
        assert output["dropped_mass"].max() > 0
        head.check(model)
    assert head.gradient_filter == 2**-6
    with torch.no_grad():
        assert not model(input_ids=ids, labels=ids.roll(-1, 1))["dropped_mass"].any()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"gradient_filter": 2.0}, "gradient_filter 2.0 must be"), ({"gradient_filter": 0.1, "tp_size": 2}, "tp_size")],
)
def test_what_is_refused(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
