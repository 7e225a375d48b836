"""A fused model stays the model it was: it generates, saves, copies, and can be fused again or given back."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import types

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils.operations import convert_outputs_to_fp32
from helpers import assert_close
from training_helpers import LOG2, SMALL, Pairs, batch, logs, make_model, make_trainer

from dpo_kernels import reference
from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead, HeadError
from dpo_kernels.training.head_check import check_head, has_experts
from dpo_kernels.training.randomness import disable_dropout

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97}


def generate(model):
    """Greedy, two prompts of which one is padded on the left."""
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    return model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: make_model("Llama"), gpt2, lambda: make_model("Gemma2")],
    ids=["llama", "gpt2", "gemma2"],
)
def test_it_generates_what_its_unfused_twin_does(make):
    model, twin = make(), make()
    disable_dropout(model)
    FusedHead(model).check(model)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert torch.equal(generate(model), generate(twin))
    hook.remove()
    assert seen == [1] * 6  # logits of the last token alone, not of the whole prompt


def test_a_second_head_takes_the_place_of_the_first_and_unfuse_gives_the_model_back():
    ids, labels = batch()
    model, plain = make_model("Gemma2", {"final_logit_softcapping": 5.0}), make_model("Gemma2")
    truth = reference.logits_to_log_probs(model(input_ids=ids).logits, labels)
    head_class = type(model.lm_head)
    first = FusedHead(model)
    second = FusedHead(model, impl="torch")
    second.check(model)
    assert model.lm_head.fused is second
    assert_close(model(input_ids=ids, labels=labels)["log_probs"], truth, 2e-5)
    first.unfuse(model)
    assert type(model.lm_head) is head_class
    assert vars(model).keys() == vars(plain).keys()
    assert vars(model.lm_head).keys() == vars(plain.lm_head).keys()
    assert model(input_ids=ids, labels=labels.clamp(min=0)).loss is not None
    first.unfuse(model)  # once more is nothing
    with FusedHead(model):
        assert "log_probs" in model(input_ids=ids, labels=labels)
    assert type(model.lm_head) is head_class


def test_a_forward_of_another_wrapper_comes_back():
    model = make_model("Llama")
    own, calls = model.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = wrapper
    ids, labels = batch()
    head = FusedHead(model)
    model(input_ids=ids, labels=labels)
    assert calls == [1]
    head.unfuse(model)
    assert model.forward is wrapper


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_are_fused_models_of_their_own(how):
    ids, labels = batch()
    model = make_model("Cohere", {"logit_scale": 0.25})
    FusedHead(model).check(model)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    before = model(input_ids=ids, labels=labels)["log_probs"]
    assert torch.equal(copied(input_ids=ids, labels=labels)["log_probs"], before)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    assert torch.equal(model(input_ids=ids, labels=labels)["log_probs"], before)
    truth = reference.logits_to_log_probs(copied(input_ids=ids).logits, labels)
    assert_close(copied(input_ids=ids, labels=labels)["log_probs"], truth, 2e-5)
    copied.lm_head.fused.unfuse(copied)
    assert type(copied.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks(when):
    ids, labels = batch()
    model = make_model("Llama")
    truth = reference.logits_to_log_probs(model(input_ids=ids).logits, labels)

    def hook():
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        add_hook_to_module(model.lm_head, AlignDevicesHook("cpu", io_same_device=True))

    if when == "before":
        hook()
    head = FusedHead(model)
    if when == "after":
        hook()
    check_head(head, model)
    assert_close(model(input_ids=ids, labels=labels)["log_probs"], truth, 2e-5)
    assert model(input_ids=ids).logits.shape == (3, 9, 97)
    if when == "before":
        head.unfuse(model)
        assert_close(reference.logits_to_log_probs(model(input_ids=ids).logits, labels), truth, 2e-5)


def test_a_head_with_a_forward_of_its_own_is_refused():
    model = make_model("Llama")
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T * 2
    with pytest.raises(HeadError, match="has put a forward of its own on the output head Linear"):
        FusedHead(model)


def test_two_trainings_one_after_the_other_with_one_reference(tmp_path):
    """Iterative DPO, or a cell of a notebook that runs twice."""
    first = make_trainer(tmp_path / "first")
    first.train()
    args = DPOConfig(
        output_dir=str(tmp_path / "second"), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=2
    )
    second = DPOTrainer(first.model, first.ref_model, args, Pairs())
    second.train()
    assert logs(tmp_path / "second")[0]["rewards/margins"] != 0
    args.output_dir = str(tmp_path / "third")
    DPOTrainer(second.model, copy.deepcopy(second.model), args, Pairs()).train()
    assert logs(tmp_path / "third")[0]["loss"] == LOG2


@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_saved_as_it_was_and_more_than_once(tmp_path, bf16):
    trainer = make_trainer(tmp_path, options={"attention_dropout": 0.25}, bf16=bf16)
    trainer.train()
    assert trainer.model.config.attention_dropout == 0.0
    for _ in range(2):
        trainer.save_model()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attention_dropout"] == 0.25
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert trainer.model.config.attention_dropout == 0.0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, _ = batch()
    trainer.head.unfuse(trainer.model)
    assert_close(model(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, 1e-5)


def test_folders_in_what_is_saved_are_saved_again(tmp_path, monkeypatch):
    """A named adapter, a tokenizer with two templates: save_pretrained makes folders."""
    trainer = make_trainer(tmp_path)
    original = transformers.Trainer.save_model

    def save_model(self, output_dir=None, _internal_call=False):
        original(self, output_dir, _internal_call=True)
        from pathlib import Path

        folder = Path(output_dir) / "named" / "inner"
        folder.mkdir(parents=True)
        (folder / "adapter.json").write_text(str(self.state.global_step))

    monkeypatch.setattr(transformers.Trainer, "save_model", save_model)
    trainer.save_model()
    trainer.state.global_step = 7
    trainer.save_model()
    assert (tmp_path / "named" / "inner" / "adapter.json").read_text() == "7"
    assert not (tmp_path / ".incomplete" / "model").exists()


def test_jitter_is_off_in_training_and_stays_in_the_config():
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}
    model = make_model("Mixtral", options)
    ids, labels = batch()
    FusedHead(model)
    model.train()
    twice = [model(input_ids=ids, labels=labels)["log_probs"] for _ in range(2)]
    assert not torch.equal(*twice)
    with pytest.raises(HeadError, match=r"has jitter_noise 0.3, which makes its routes random"):
        FusedHead(model).check(model)
    silenced = disable_dropout(model)
    twice = [model(input_ids=ids, labels=labels)["log_probs"] for _ in range(2)]
    assert torch.equal(*twice)
    FusedHead(model).check(model)
    assert model.config.router_jitter_noise == 0.0
    with silenced.as_they_were():
        assert model.config.router_jitter_noise == 0.3


def test_encoders_are_not_causal():
    config = transformers.BertConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")})
    model = transformers.BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    with pytest.raises(HeadError, match=r"BertLMHeadModel is not causal.*set is_decoder in its config"):
        FusedHead(model).check(model)


def test_what_does_not_run_on_tokens_alone():
    model = make_model("Llama")
    model.model.forward = lambda **kwargs: (_ for _ in ()).throw(IndexError("no images"))
    with pytest.raises(HeadError, match=r"LlamaForCausalLM does not run .* on tokens alone: IndexError: no images"):
        FusedHead(model).check(model)


def test_the_check_leaves_everything_as_it_was():
    model = make_model("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})
    model.train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    FusedHead(model).check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_mask_reaches_a_model_that_needs_none(tmp_path):
    """Padding on the right changes nothing before it; a load-balancing loss is over real tokens."""
    given = {}
    for name, options in (("Llama", {}), ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2,
                                                      "moe_intermediate_size": 16})):  # fmt: skip
        trainer = make_trainer(tmp_path / name, name, options, max_steps=1)
        masks = given.setdefault(name, [])
        for model in (trainer.model, trainer.ref_model):
            model.model.register_forward_pre_hook(
                lambda _, args, kwargs, masks=masks: masks.append(kwargs.get("attention_mask")), with_kwargs=True
            )
        trainer.train()
    assert given["Llama"] == [None, None]
    policy, ref = given["Qwen3Moe"]
    assert torch.equal(policy, ref)  # the same way through attention for both
    assert policy.shape[1] > 1


def test_after_a_training_in_bf16_it_generates_and_unfuses_as_ever(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1)
    trainer.train()
    model = trainer.model.eval()
    own = inspect.signature(type(model).forward).parameters
    assert list(inspect.signature(model.forward).parameters) == list(own)[1:]
    twin = make_model("Llama")
    twin.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(twin)
    assert torch.equal(generate(model), expected)
    trainer.head.unfuse(model)
    assert vars(model).get("forward") is None
    assert torch.equal(generate(model), generate(twin))


@pytest.mark.parametrize("keep", [True, False])
def test_it_unfuses_after_accelerate_has_let_it_go(keep):
    model = make_model("Llama")
    head = FusedHead(model)
    accelerate.Accelerator(cpu=True)
    model._original_forward = model.forward
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=keep)
    ids, labels = batch()
    assert "log_probs" in model(input_ids=ids, labels=labels)
    head.unfuse(model)
    assert "forward" not in vars(model)
    assert model(input_ids=ids, labels=labels.clamp(min=0)).loss is not None


def test_a_copy_after_a_forward_of_its_own_with_gradients():
    ids, labels = batch()
    model = make_model("Llama")
    FusedHead(model).check(model)
    model(input_ids=ids).logits.sum().backward()
    one, other = (m(input_ids=ids, labels=labels)["log_probs"] for m in (model, copy.deepcopy(model)))
    assert torch.equal(one, other)


def test_a_second_training_saves_the_dropout_of_before_the_first(tmp_path):
    first = make_trainer(tmp_path / "first", options={"attention_dropout": 0.25}, max_steps=1)
    first.train()
    options = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    args = DPOConfig(output_dir=str(tmp_path / "second"), **options)
    second = DPOTrainer(first.model, make_model("Llama"), args, Pairs())
    second.save_model()
    assert json.loads((tmp_path / "second" / "config.json").read_text())["attention_dropout"] == 0.25


def test_a_dense_model_is_not_looked_at_as_a_mixture():
    assert not has_experts(make_model("Qwen3"))
    assert has_experts(
        make_model("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})
    )
    assert has_experts(make_model("Mixtral", {"num_local_experts": 4}))
