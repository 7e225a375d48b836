"""The forms of a reference: what a dataset holds, a frozen model, and that another form fits in."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_helpers import LOG2, Pairs, logs, make_model

import dpo_kernels.training
from dpo_kernels.training import DPOConfig, DPOTrainer, HeadError, PairCollator
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.layouts import PADDED
from dpo_kernels.training.reference import FrozenModel, Precomputed, Reference

FOLDER = Path(dpo_kernels.training.__file__).parent


def batch_of(count=2, **more):
    pairs = Pairs(count)
    return PairBatch(PairCollator()([pairs[i] for i in range(count)]) | more)


def held(batch, value=-1.5):
    """The same batch with log-probs that its dataset holds."""
    given = torch.full_like(batch.inputs["x_chosen"], value, dtype=torch.float32)
    return PairBatch({**batch.inputs, "ref_chosen": given, "ref_rejected": given - 1})


def frozen(tmp_path, model=None, policy=None, **config):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **config)
    model, policy = (m or make_model("Llama") for m in (model, policy))
    return FrozenModel(model, policy, Accelerator(cpu=True), args, layout=PADDED, is_sharded=False)


def test_what_a_dataset_holds_comes_first(tmp_path):
    batch = held(batch_of())
    for reference in (Precomputed(), Precomputed(freed=True), frozen(tmp_path)):
        assert reference.log_probs(batch) is batch.ref_log_probs


def test_without_a_model_there_is_none_unless_it_is_required():
    batch = batch_of()
    assert Precomputed().model is None
    assert Precomputed().log_probs(batch, required=False) is None
    with pytest.raises(ValueError, match="the reference is not there; give a ref_model"):
        Precomputed().log_probs(batch)
    for required in (True, False):
        with pytest.raises(ValueError, match="not there any more: precompute_ref_log_probs freed it"):
            Precomputed(freed=True).log_probs(batch, required)


@pytest.mark.parametrize(("freed", "required"), [(False, True), (True, False), (True, True)])
def test_a_dataset_without_log_probs_is_refused_at_the_start(freed, required):
    with pytest.raises(ValueError, match="no ref_model, and held holds no log-probs of one"):
        Precomputed(freed).check_dataset("held", Pairs(1), required)
    Precomputed(freed).check_dataset("held", [held(batch_of()).inputs], required)
    Precomputed().check_dataset("held", Pairs(1), required=False)


def test_a_frozen_model_gives_its_own_log_probs_without_gradient(tmp_path):
    model = make_model("Llama")
    reference, batch = frozen(tmp_path, model), batch_of()
    assert reference.model is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    got = reference.log_probs(batch)
    assert not got.requires_grad
    [given] = batch.model_inputs()
    logits = model(input_ids=given["input_ids"]).logits.log_softmax(-1)
    exact = logits.gather(2, given["labels"].clamp(min=0)[..., None]).squeeze(2)
    assert torch.allclose(got, torch.where(batch.mask, exact, 0), atol=1e-5)
    assert len(frozen(tmp_path, precompute_ref_log_probs=True).identity().split()[0]) == 64
    with pytest.raises(ValueError, match="made without precompute_ref_log_probs"):
        reference.identity()
    assert Precomputed().identity() is None


def test_equal_weights_are_looked_at_once_and_only_at_the_start(tmp_path):
    batch = batch_of()

    def check(reference, off=0.0, is_start=True):
        ref = reference.log_probs(batch)
        reference.check_start(reference.model, batch, ref + off, ref, is_start)

    reference = frozen(tmp_path)
    assert reference.starts_equal
    check(reference)
    assert not reference.starts_equal
    check(reference, off=1.0)
    check(resumed := frozen(tmp_path), off=1.0, is_start=False)
    check(resumed, off=1.0)  # a later training from the start has other weights
    with pytest.raises(HeadError, match="differ by up to"):
        check(frozen(tmp_path), off=1.0)
    other = make_model("Llama")
    other.lm_head.weight.data += 1
    assert not frozen(tmp_path, other).starts_equal
    assert not frozen(tmp_path, make_model("Qwen3")).starts_equal
    assert not frozen(tmp_path, disable_dropout=False).starts_equal


def test_another_form_defines_score_and_nothing_else(tmp_path):
    """As a policy that is its own reference would: here it is its own at every step, so that margins stay 0."""

    class Itself(Reference):
        def __init__(self, policy):
            self.policy = policy

        def score(self, batch, required):
            assert not torch.is_grad_enabled()
            return batch.run(self.policy)["log_probs"]

    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=2, save_strategy="no")
    trainer = DPOTrainer(make_model("Llama"), make_model("Llama"), args, Pairs(4))
    trainer.reference = Itself(trainer.model)
    assert trainer.ref_model is None
    trainer.train()
    assert [entry["loss"] for entry in logs(tmp_path)] == [LOG2] * 2


def test_only_the_package_itself_imports_the_trainer():
    """Callbacks, precompute and reference get what they need as arguments."""
    for path in FOLDER.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        assert "dpo_kernels.training.trainer" not in names or path.name == "__init__.py", path.name
