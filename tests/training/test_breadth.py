"""A dozen families of the breadth test, and that it notices a fault; `make breadth` runs all classes."""

from __future__ import annotations

import breadth
import pytest
import tiny_models
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from dpo_kernels.training import FusedHead


@pytest.mark.parametrize(
    "model_type",
    ["bert", "cohere", "falcon_h1", "gemma2", "gpt2", "llama", "mamba", "phi", "qwen2_5_vl", "qwen3_5", "qwen3_moe",
     "recurrent_gemma"],
)  # fmt: skip
def test_a_class_is_right(model_type):
    outcome = breadth.check(model_type)
    assert outcome.failure == ""
    assert outcome.kind == "right"
    assert outcome.notes == []


@pytest.mark.parametrize("model_type", ["dory", "musicgen", "prophetnet", "xlnet"])
def test_a_class_is_refused(model_type):
    outcome = breadth.check(model_type)
    assert outcome.failure == ""
    assert outcome.kind == "refused"


def without_bias(own):
    return lambda self, hidden, weight, labels, bias, *more: own(self, hidden, weight, labels, None, *more)


def scaled(own):
    def token_stats(*args):
        stats = own(*args)
        return stats._replace(log_probs=stats.log_probs * 1.001)

    return token_stats


def without_gradient(own):
    return lambda self, hidden, weight, labels, *more: own(self, hidden, weight.detach(), labels, *more)


@pytest.mark.parametrize("fault", [without_bias, scaled, without_gradient])
def test_a_planted_fault_is_noticed(monkeypatch, fault):
    monkeypatch.setattr(FusedHead, "token_stats", fault(FusedHead.token_stats))
    if fault is without_bias:
        assert "would train PhiForCausalLM wrong" in breadth.check("phi").failure  # a refusal that nobody expects
    monkeypatch.setattr(FusedHead, "check", lambda *_: None)
    outcome = breadth.check("phi")
    assert outcome.kind == "wrong"
    what = "the gradient of lm_head.weight" if fault is without_gradient else "log-probs differ by"
    assert outcome.failure.startswith(f"log-probs and gradients: {what}")


def test_an_exception_that_is_no_refusal_is_a_fault(monkeypatch):
    def fails(*_):
        raise KeyError("weight")

    monkeypatch.setattr(FusedHead, "check", fails)
    assert breadth.check("llama").failure == "KeyError: 'weight'"


def test_a_refusal_that_goes_missing_is_a_failure(monkeypatch):
    monkeypatch.setitem(breadth.REFUSED, "is not causal", ("llama",))
    assert breadth.check("llama").failure == "has to be refused (is not causal), is not"


def test_a_class_that_hangs_ends(monkeypatch):
    def hangs(*_):
        while True:
            pass

    monkeypatch.setattr(FusedHead, "check", hangs)
    monkeypatch.setattr(breadth, "SECONDS", 1)
    assert breadth.check("llama").failure == "Late: takes more than 1 seconds"


def test_the_lists_name_classes_that_there_are():
    known = {*tiny_models.CAUSAL, *IMAGES}
    assert {
        *tiny_models.OVERRIDES,
        *tiny_models.TEXT_ALONE,
        *(t for ts in breadth.REFUSED.values() for t in ts),
    } <= known
    assert not set(tiny_models.TEXT_ALONE) & set(tiny_models.CAUSAL)


def test_the_page_counts_and_quotes():
    right, refused = breadth.Outcome("llama", "LlamaForCausalLM"), breadth.Outcome("xlnet", "XLNetLMHeadModel")
    refused.refusal = "XLNetLMHeadModel is not causal"
    page = breadth.page([right, refused, breadth.Outcome("llava", "Llava", notes=[breadth.NO_GENERATION])])
    assert "Of 2 entries of transformers' causal mapping: 1 right, 1 refused." in page
    assert "| llava | `Llava` | right, does not generate itself |" in page
    assert "- xlnet: (class) is not causal" in page
