"""The fused head on real model classes: what stands before and behind it, and what it refuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import assert_close
from torch import nn
from training_helpers import SMALL, batch, make_model

from dpo_kernels import reference
from dpo_kernels.call import Transform
from dpo_kernels.training import FusedHead, HeadError
from dpo_kernels.training.aux_loss import coefficient
from dpo_kernels.training.randomness import disable_dropout

FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
             "mamba_chunk_size": 8, "lm_head_multiplier": 0.25, "embedding_multiplier": 2.0}  # fmt: skip
DROPS = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
MODELS = [  # class, what its config sets, what shall be measured behind its head
    pytest.param("Llama", {}, Transform(), id="llama-untied"),
    pytest.param("Qwen3", {"tie_word_embeddings": True}, Transform(), id="qwen3-tied"),
    pytest.param("Phi", {"num_key_value_heads": 4}, Transform(), id="phi-bias"),
    pytest.param("Gemma2", {"final_logit_softcapping": 5.0}, Transform(softcap=5.0), id="gemma2-softcap"),
    pytest.param("Cohere", {"logit_scale": 0.25}, Transform(logit_scale=0.25), id="cohere-logit_scale"),
    pytest.param("Granite", {"logits_scaling": 3.0}, Transform(logit_scale=1 / 3), id="granite-divides"),
    pytest.param("HyperCLOVAX", {"logits_scaling": 0.5}, Transform(logit_scale=0.5), id="hyperclovax-multiplies"),
    pytest.param("FalconH1", FALCON_H1, Transform(logit_scale=0.25), id="falcon-h1-lm_head_multiplier"),
    pytest.param("MiniCPM3", {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
                              "v_head_dim": 8, "dim_model_base": 8, "head_dim": 4, "num_key_value_heads": 4},
                 Transform(), id="minicpm3-scales-before-the-head"),
    pytest.param("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, Transform(),
                 id="qwen3-moe"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "expected"), MODELS)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(name, options, expected):
    ids, labels = batch()
    own = make_model(name, options)
    truth = reference.logits_to_log_probs(own(input_ids=ids).logits, labels)
    truth.sum().backward()
    model = make_model(name, options)
    head = FusedHead(model)
    head.check(model)
    assert head.transform.logit_scale == pytest.approx(expected.logit_scale, rel=1e-6)
    assert head.transform.softcap == (expected.softcap and pytest.approx(expected.softcap, rel=1e-6))
    log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)["log_probs"]
    log_probs.sum().backward()
    assert_close(log_probs, truth, 2e-5)
    exact = dict(own.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.grad is not None or exact[key].grad is not None:
            assert_close(parameter.grad, exact[key].grad, 1e-4 * max(1, exact[key].grad.abs().max().item()), key)
    assert model(input_ids=ids).logits.shape == (3, 9, 97)  # without labels the model is its own


def test_other_models_of_the_class_stay_what_they_are():
    ids, labels = batch()
    fused, plain = make_model("Llama"), make_model("Llama")
    FusedHead(fused)
    assert torch.equal(plain(input_ids=ids).logits, fused(input_ids=ids).logits)
    assert plain(input_ids=ids, labels=labels).loss is not None


def test_the_load_balancing_loss_comes_along():
    ids, labels = batch()
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.02}
    model = make_model("Qwen3Moe", options)
    own = model(input_ids=ids, output_router_logits=True).aux_loss
    FusedHead(model)
    output = model(input_ids=ids, labels=labels, output_router_logits=True)
    assert_close(output["aux_loss"], own, 1e-6)
    assert "aux_loss" not in model(input_ids=ids, labels=labels)
    assert coefficient(model) == 0.02
    assert coefficient(make_model("Llama")) is None


class Behind(nn.Module):
    """A head that leaves its logits to something that no scale and no softcap describes."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change
        self.scale = nn.Parameter(torch.tensor(2.0))

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, **kwargs):
        output = self.model(input_ids=input_ids, **kwargs)
        output.logits = self.change(self, output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, z: z + 1, "neither a scale nor a softcap"),
        (lambda _, z: z.clamp(-4, 4), "neither a scale nor a softcap"),
        (lambda this, z: z * this.scale, "has parameters behind its output head"),
        (lambda _, z: torch.cat([z, z], -1), r"turns 12 numbers from its head into logits of \(1, 1, 24\)"),
        (
            lambda _, z: z if z.shape[-1] < 97 else z.index_fill(-1, torch.arange(48, 53), -9.0),
            "would train Behind wrong",
        ),
        (
            lambda _, z: z if z.shape[-1] < 97 else z[..., :90],
            r"logits are \(2, 8, 90\), its head's weight has 97 rows",
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_would_be_trained_wrong_is_refused(change, message, dtype):
    model = Behind(make_model("Llama", dtype=dtype), change)
    head = FusedHead(model)
    with pytest.raises(HeadError, match=message):
        head.check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_the_check_passes_in_every_dtype(name, dtype):
    model = make_model(name, dtype=dtype)
    model.train()
    head = FusedHead(model)
    head.check(model)
    assert model.training


def test_a_head_that_lost_its_bias_is_refused():
    model = make_model("Phi")
    head = FusedHead(model)
    head.token_stats = lambda hidden, weight, labels, *_: FusedHead.token_stats(head, hidden, weight, labels, None)
    with pytest.raises(HeadError, match=r"would train PhiForCausalLM wrong: on 8 tokens its log-probs differ"):
        head.check(model)


def test_models_without_a_head():
    with pytest.raises(HeadError, match=r"Linear has no output head that it names itself, and 0 of its linear"):
        FusedHead(nn.Linear(2, 2))
    model = make_model("Llama")
    model.lm_head = nn.Identity()
    with pytest.raises(HeadError, match=r"found Identity with weight none"):
        FusedHead(model)


def test_a_forward_that_does_not_call_its_head():
    model = make_model("Llama")
    model.forward = lambda *args, **kwargs: SimpleNamespace()
    FusedHead(model)
    with pytest.raises(HeadError, match="did not call its output head"):
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[4, -100]]))


def test_a_copy_is_a_model_of_its_own():
    ids, labels = batch()
    model = make_model("Llama")
    FusedHead(model).check(model)
    before = model(input_ids=ids, labels=labels)["log_probs"].detach().clone()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    truth = reference.logits_to_log_probs(copied(input_ids=ids).logits, labels)
    assert_close(copied(input_ids=ids, labels=labels)["log_probs"], truth, 1e-4)
    assert (truth - before).abs().max() > 0.1
    assert torch.equal(model(input_ids=ids, labels=labels)["log_probs"], before)


def test_a_head_with_more_parameters_is_refused():
    model = make_model("Llama")
    model.lm_head.lora_A = nn.Parameter(torch.zeros(2, 32))
    with pytest.raises(
        HeadError, match=r"parameters besides weight and bias.*\['lora_A'\]; if they are an adapter's, leave"
    ):
        FusedHead(model)


def test_a_head_that_was_replaced():
    model = make_model("Llama")
    FusedHead(model)
    model.lm_head = nn.Linear(32, 97)  # the head is replaced afterwards
    with pytest.raises(HeadError, match="got another output head since; make a FusedHead of it again"):
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[4, -100]]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2LMHead", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 1, "n_head": 2} | DROPS),
        ("FalconForCausalLM", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | DROPS),
        ("LlamaForCausalLM", SMALL | {"attention_dropout": 0.3}),
    ],
)  # fmt: skip
def test_dropout_goes(name, options):
    model_class = getattr(transformers, name if name.endswith("LM") else f"{name}Model")
    config = getattr(transformers, name.removesuffix("ForCausalLM").removesuffix("LMHead") + "Config")
    model = model_class(config(**{"vocab_size": 50} | options)).train()
    ids = torch.randint(3, 50, (1, 9))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
