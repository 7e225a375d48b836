"""Adapters: the policy is its own reference, what is trained is what is saved, and a run goes on where it was."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers import slow
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from training_helpers import LOG2, Trees, logs, make_model, make_trainer

from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead, HeadError, PairCollator, adapters
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.loading import load_model

TARGETS = ["q_proj", "v_proj"]


def lora(**options):
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))


def trained_adapter(seed=1, **options):
    """A model with an adapter that changes what it computes."""
    torch.manual_seed(seed)
    model = get_peft_model(make_model("Llama"), lora(**options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def test_an_adapter_below_which_weights_are_bfloat16_is_float32(tmp_path):
    base = make_model("Llama", dtype=torch.bfloat16)
    trainer = adapter_trainer(tmp_path, model=base, peft_config=lora(), max_steps=2)
    trainer.train()
    trainer.save_model()
    make_model("Llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    again = adapters.go_on(load_model(str(tmp_path / "base"), dtype=torch.bfloat16), str(tmp_path), is_trainable=True)
    for model in (trainer.model, again):
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.float32}
        assert {dtype for name, dtype in dtypes.items() if "lora" not in name} == {torch.bfloat16}
    assert logs(tmp_path)[0]["loss"] == pytest.approx(LOG2, abs=1e-6)


def adapter_trainer(tmp_path, model=None, ref=None, pairs=None, peft_config=None, **config):
    config = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no",
              "disable_tqdm": True, "use_cpu": True, "seed": 5} | config  # fmt: skip
    if model is None and peft_config is None:
        peft_config = lora()
    torch.manual_seed(0)
    model = make_model("Llama") if model is None else model
    args = DPOConfig(output_dir=str(tmp_path), **config)
    return DPOTrainer(model, ref, args, pairs or Trees(), peft_config=peft_config)


def trained(trainer):
    return {n: p.detach().clone() for n, p in adapters.trained_parameters(trainer.model).items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "options", [{}, slow({"use_rslora": True}), {"use_dora": True}, slow({"target_modules": "all-linear"})], ids=str
)
def test_the_reference_is_the_model_without_its_adapter(tmp_path, options):
    own = adapter_trainer(tmp_path / "own", peft_config=lora(lora_dropout=0.1, **options))
    assert own.ref_model is None
    own.train()
    second = adapter_trainer(
        tmp_path / "second", peft_config=lora(lora_dropout=0.1, **options), ref=make_model("Llama")
    )
    second.train()
    first, *later = logs(tmp_path / "own")
    assert first["loss"] == pytest.approx(LOG2, abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert later[-1]["rewards/margins"] != 0
    if "use_dora" not in options:  # whose weights are rounded otherwise with the adapter than without
        same(trained(own), trained(second))
    assert all("lora" in name for name in trained(own))


def test_layouts_are_told_to_a_model_below_its_adapter(tmp_path):
    found = adapter_trainer(tmp_path, layout="shared")
    assert found.layout.attention == "branches"
    padded = adapter_trainer(tmp_path / "padded", layout="padded")
    for one in (found, padded):
        one.train()
    for name, p in trained(padded).items():
        torch.testing.assert_close(trained(found)[name], p, rtol=1e-3, atol=1e-4)


def test_a_trained_adapter_goes_on_from_itself(tmp_path):
    """The reference is a copy of its values at the start: as a second model that has them."""
    start = trained_adapter()
    own = adapter_trainer(tmp_path / "own", model=copy.deepcopy(start))
    second = adapter_trainer(tmp_path / "second", model=copy.deepcopy(start), ref=copy.deepcopy(start))
    for one in (own, second):
        one.train()
    first, *later = logs(tmp_path / "own")
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(LOG2, abs=1e-7), 0)
    assert [e["loss"] for e in logs(tmp_path / "own")] == [e["loss"] for e in logs(tmp_path / "second")]
    assert later[-1]["rewards/margins"] != 0
    same(trained(own), trained(second))


def test_the_base_can_be_asked_for_as_reference(tmp_path):
    start = trained_adapter()
    own = adapter_trainer(tmp_path / "own", model=copy.deepcopy(start), adapter_reference="base")
    second = adapter_trainer(tmp_path / "second", model=copy.deepcopy(start), ref=make_model("Llama"))
    for one in (own, second):
        one.train()
    assert logs(tmp_path / "own")[0]["rewards/chosen"] != 0
    assert [e["loss"] for e in logs(tmp_path / "own")] == [e["loss"] for e in logs(tmp_path / "second")]


def test_scoring_leaves_the_policy_as_it_was(tmp_path):
    trainer = adapter_trainer(tmp_path, model=trained_adapter())
    with torch.no_grad():
        for p in adapters.trained_parameters(trainer.model).values():
            p.mul_(1.5)
    before, modes = trained(trainer), {n: m.training for n, m in trainer.model.named_modules()}
    wants = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    batch = PairBatch(PairCollator()(trainer.train_dataset.items[:2]))
    policy = batch.run(trainer.model)["log_probs"]
    assert not torch.equal(trainer.reference.score(batch), policy)
    same(before, trained(trainer))
    assert torch.equal(batch.run(trainer.model)["log_probs"], policy)
    assert modes == {n: m.training for n, m in trainer.model.named_modules()}
    assert wants == {n: p.requires_grad for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("kind", ["new", "trained"])
def test_precomputed_log_probs_give_the_same_run(tmp_path, kind):
    from helpers import EXAMPLE

    from dpo_kernels.training import DPODataset
    from dpo_kernels.training.small_model import make_small_model

    model, tokenizer = make_small_model(EXAMPLE)
    data = DPODataset(EXAMPLE, tokenizer, 96, cache_dir=tmp_path / "cache").select(range(6))
    found = []
    for precompute in (False, True):
        torch.manual_seed(3)
        one = get_peft_model(copy.deepcopy(model), lora())
        if kind == "trained":
            with torch.no_grad():
                for name, p in one.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.1)
        trainer = adapter_trainer(
            tmp_path / str(precompute), model=one, pairs=data, precompute_ref_log_probs=precompute
        )
        trainer.train()
        found.append(logs(tmp_path / str(precompute)))
    for a, b in zip(*found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)


def test_the_head_is_trained_where_it_is_saved_with_the_adapter(tmp_path):
    trainer = adapter_trainer(tmp_path, peft_config=lora(modules_to_save=["lm_head"]))
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    heads = [name for name in after if "lm_head" in name]
    assert len(heads) == 1
    assert not torch.equal(before[heads[0]], after[heads[0]])
    frozen = trainer.model.get_base_model().lm_head.original_module
    assert torch.equal(frozen.weight, make_model("Llama").lm_head.weight)
    assert logs(tmp_path)[0]["loss"] == pytest.approx(LOG2, abs=1e-7)
    trainer.save_model()
    again = PeftModel.from_pretrained(make_model("Llama"), str(tmp_path))
    batch = PairBatch(PairCollator()(trainer.train_dataset.items[:2]))
    ids = batch.inputs["x_chosen"]
    logits = again(input_ids=ids).logits.log_softmax(-1)
    own = trainer.model(input_ids=ids, labels=batch.inputs["y_chosen"])["log_probs"]
    exact = logits.gather(-1, batch.inputs["y_chosen"].clamp(min=0)[..., None])[..., 0]
    mask = batch.inputs["mask_chosen"]
    torch.testing.assert_close(own[mask], exact[mask], rtol=1e-4, atol=1e-5)


ON_THE_HEAD = [*TARGETS, "lm_head"]


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_lora_on_the_head(tmp_path, tied):
    """Starts as its reference, trains both matrices alone, and is merged into the head without the embedding."""
    base = make_model("Llama", {"tie_word_embeddings": tied})
    trainer = adapter_trainer(tmp_path, model=base, peft_config=lora(target_modules=ON_THE_HEAD))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first = logs(tmp_path)[0]
    assert (first["loss"], first["rewards/chosen"], first["rewards/rejected"]) == (pytest.approx(LOG2, abs=1e-7), 0, 0)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert {name.rpartition("lm_head.")[2] for name in changed if "lm_head" in name} == {
        "lora_A.default.weight", "lora_B.default.weight"
    }  # fmt: skip
    assert all("lora" in name for name in changed)
    ids = torch.arange(20)[None]
    exact = trainer.model.eval()(input_ids=ids).logits
    trainer.save_merged(tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is False
    torch.testing.assert_close(merged.eval()(input_ids=ids).logits, exact, rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_gives_the_models_own_gradients():
    model = trained_adapter(target_modules=ON_THE_HEAD)
    ids = torch.arange(24).view(2, 12)
    labels = ids.roll(-1, 1)
    own = model(input_ids=ids).logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
    exact = torch.autograd.grad(own, list(adapters.trained_parameters(model).values()))
    with FusedHead(model) as fused:
        fused.check(model)
        got = model(input_ids=ids, labels=labels)["log_probs"].sum()
        found = torch.autograd.grad(got, list(adapters.trained_parameters(model).values()))
        with model.disable_adapter():
            off = model(input_ids=ids, labels=labels)["log_probs"]
            plain = model(input_ids=ids).logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            torch.testing.assert_close(off, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_several_adapters_on_the_head():
    model = trained_adapter(target_modules=ON_THE_HEAD)
    model.add_adapter("second", lora(target_modules=ON_THE_HEAD, r=2))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["second"].weight.normal_(std=0.1)
    ids = torch.arange(12)[None]
    labels = ids.roll(-1, 1)
    own = model(input_ids=ids).logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    FusedHead(model).check(model)
    torch.testing.assert_close(model(input_ids=ids, labels=labels)["log_probs"], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_dora": True}, "is a DoRA, whose weight is divided by the norms of its rows"),
        ({"target_modules": TARGETS, "target_parameters": ["lm_head.weight"]}, "leave the head out of the adapter"),
    ],
    ids=["dora", "parameter"],
)
def test_what_a_head_cannot_have_is_refused_with_the_reason(options, told):
    model = get_peft_model(make_model("Llama"), lora(**{"target_modules": ON_THE_HEAD} | options))
    with pytest.raises(HeadError, match=told):
        FusedHead(model)


def test_dropout_within_the_heads_adapter_is_refused(tmp_path):
    config = lora(target_modules=ON_THE_HEAD, lora_dropout=0.1)
    adapter_trainer(tmp_path / "off", peft_config=config, max_steps=1).train()
    with pytest.raises(ValueError, match=r"drops 0\.1 of its inputs, which the fused head cannot"):
        adapter_trainer(tmp_path / "on", peft_config=config, disable_dropout=False).train()


REFUSED = [
    (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PromptTuningConfig puts tokens"),
    (lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PrefixTuningConfig puts tokens"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED)
def test_kinds_that_cannot_be_trained_here_are_refused(tmp_path, config, told):
    with pytest.raises(ValueError, match=told):
        adapter_trainer(tmp_path, peft_config=config())
    with pytest.raises(ValueError, match=told):
        adapter_trainer(tmp_path, model=get_peft_model(make_model("Llama"), config()))


def test_a_new_adapter_is_that_of_the_seed(tmp_path):
    found = []
    for seed in (5, 5, 6):
        torch.rand(3)
        found.append(trained(adapter_trainer(tmp_path, model=make_model("Llama"), peft_config=lora(), seed=seed)))
    same(found[0], found[1])
    assert any(not torch.equal(found[0][name], p) for name, p in found[2].items())


def test_mistakes_are_told(tmp_path):
    base = make_model("Llama")
    with pytest.raises(ValueError, match="model and ref_model share layers: an adapter was put into the model"):
        adapter_trainer(tmp_path, model=get_peft_model(base, lora()), ref=base)
    with pytest.raises(ValueError, match="the model has an adapter already"):
        adapter_trainer(tmp_path, model=trained_adapter(), peft_config=lora())
    frozen = trained_adapter()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing of this model is trained.*--from_weight ADAPTER"):
        adapter_trainer(tmp_path, model=frozen)


@pytest.mark.parametrize("name", [slow("default"), "mine"])
def test_a_run_goes_on_and_is_saved_twice(tmp_path, name):
    def start():
        torch.manual_seed(2)
        return get_peft_model(make_model("Llama"), lora(), adapter_name=name)

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = adapter_trainer(tmp_path / "straight", model=start(), **options | {"save_strategy": "no"})
    straight.train()
    adapter_trainer(tmp_path / "stopped", model=start(), **options).train()
    resumed = adapter_trainer(tmp_path / "stopped", model=start(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    same(trained(straight), trained(resumed))
    for _ in range(2):
        resumed.save_model()
    folder = tmp_path / "stopped" if name == "default" else tmp_path / "stopped" / name
    again = PeftModel.from_pretrained(make_model("Llama"), str(folder))
    saved = {n.replace(".default", "").replace(f".{name}", ""): p for n, p in again.named_parameters() if "lora" in n}
    for key, p in trained(resumed).items():
        assert torch.equal(saved[key.replace(f".{name}", "")], p), key


def test_an_adapter_that_transformers_has_put_in_goes_on(tmp_path, monkeypatch):
    # transformers 5.24 asks for a PEFT that there is not yet everywhere, for what is not used here.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *_, **__: None)

    def start():
        torch.manual_seed(2)
        model = make_model("Llama")
        model.add_adapter(lora())
        return model

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = adapter_trainer(tmp_path / "straight", model=start(), **options | {"save_strategy": "no"})
    straight.train()
    assert logs(tmp_path / "straight")[0]["loss"] == pytest.approx(LOG2, abs=1e-7)
    adapter_trainer(tmp_path / "stopped", model=start(), **options).train()
    resumed = adapter_trainer(tmp_path / "stopped", model=start(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    same(trained(straight), trained(resumed))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_a_frozen_embedding(tmp_path, reentrant):
    plain = adapter_trainer(tmp_path / "plain", layout="shared")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checked = adapter_trainer(tmp_path / "checked", layout="shared", **options)
    for one in (plain, checked):
        one.train()
    for name, p in trained(plain).items():
        torch.testing.assert_close(trained(checked)[name], p, rtol=1e-4, atol=1e-5)


def test_bfloat16_base_with_a_float32_adapter(tmp_path):
    trainer = adapter_trainer(tmp_path, model=make_model("Llama", dtype=torch.bfloat16), peft_config=lora())
    assert {p.dtype for p in trained(trainer).values()} == {torch.float32}
    trainer.train()
    assert logs(tmp_path)[0]["loss"] == pytest.approx(LOG2, abs=1e-6)


@pytest.mark.parametrize("kind", ["full", slow("adapter"), "trained"])
def test_a_reference_that_moves(tmp_path, kind):
    """TR-DPO: theta_ref <- alpha theta + (1 - alpha) theta_ref, and a resumed run has the same one."""
    options = {
        "sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2, "max_steps": 5,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip

    def run(folder, **more):
        if kind == "full":
            return make_trainer(tmp_path / folder, pairs=Trees(), seed=5, **options | more)
        return adapter_trainer(tmp_path / folder, trained_adapter() if kind == "trained" else None, **options | more)

    still = run("still", max_steps=1, save_strategy="no")
    first = {name: t.clone() for name, t in still.reference.moving().items()}
    two = run("two", max_steps=2, save_strategy="no")
    two.train()
    for name, p in two.model.named_parameters():
        if name in first:
            expected = 0.25 * p.detach() + 0.75 * first[name]
            torch.testing.assert_close(two.reference.moving()[name], expected, rtol=1e-5, atol=1e-6)
    straight = run("straight")
    straight.train()
    resumed = run("straight")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    same(dict(straight.model.named_parameters()), dict(resumed.model.named_parameters()))
    same(straight.reference.moving(), resumed.reference.moving())


def test_a_moving_reference_needs_something_to_move(tmp_path):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "sync_ref_model": True}
    for more, told in (
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0"), ({"ref_model_sync_steps": 0}, "is 0"),
        ({"precompute_ref_log_probs": True}, "leave out precompute_ref_log_probs"),
        ({"loss_type": "simpo"}, "a loss that"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            DPOConfig(**args, **more)
    with pytest.raises(ValueError, match="here it is the base"):
        adapter_trainer(tmp_path, sync_ref_model=True, adapter_reference="base")
    adapter_trainer(tmp_path / "a", save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match=r"holds no reference \(dpo_reference.safetensors\)"):
        adapter_trainer(tmp_path / "a", max_steps=2, sync_ref_model=True).train(resume_from_checkpoint=True)


def test_an_adapter_is_loaded_with_its_base_and_merged(tmp_path):
    make_model("Llama", {"attention_dropout": 0.1}).save_pretrained(tmp_path / "base")
    model = PeftModel(load_model(str(tmp_path / "base")), lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert adapters.base_of(str(tmp_path / "adapter")) == str(tmp_path / "base")
    assert adapters.base_of(str(tmp_path / "base")) is None
    loaded = load_model(str(tmp_path / "adapter"), is_trainable=True)
    assert isinstance(loaded, peft.PeftModel)
    trainer = adapter_trainer(tmp_path / "out", model=loaded)
    trainer.train()
    ids = torch.arange(20)[None]
    exact = trainer.model.eval()(input_ids=ids).logits
    trainer.save_model()
    trainer.save_merged(tmp_path / "out" / "merged")
    again = load_model(str(tmp_path / "out")).eval()(input_ids=ids).logits
    assert torch.equal(exact, again)
    merged = load_model(str(tmp_path / "out" / "merged"))
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert merged.config.attention_dropout == 0.1  # which was off for the run
    assert "lora" not in "".join(load_file(tmp_path / "out" / "merged" / "model.safetensors"))
    torch.testing.assert_close(merged.eval()(input_ids=ids).logits, exact, rtol=1e-4, atol=1e-4)


def test_options_of_the_command_line():
    options = adapters.AdapterOptions(use_peft=True, lora_r=3, lora_target_modules=["all-linear"], use_rslora=True)
    config = options.peft_config()
    assert (config.r, config.target_modules, config.use_rslora) == (3, "all-linear", True)
    assert adapters.AdapterOptions(use_peft=True, lora_target_modules=TARGETS).peft_config().target_modules == set(
        TARGETS
    )
    assert adapters.AdapterOptions().peft_config() is None
    with pytest.raises(ValueError, match="lora_r is 0"):
        adapters.AdapterOptions(use_peft=True, lora_r=0).peft_config()
    with pytest.raises(ValueError, match="one of --load_in_4bit and --load_in_8bit"):
        adapters.AdapterOptions(load_in_4bit=True, load_in_8bit=True).quantization(torch.float32)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lora_r": 64}, "lora_r is 64, which does nothing without --use_peft"),
        ({"use_dora": True}, "use_dora is True, which does nothing without --use_peft"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "does nothing without --load_in_4bit"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, told):
    found = adapters.AdapterOptions(**options)
    with pytest.raises(ValueError, match=told):
        found.quantization(torch.float32) if "load_in_8bit" in options else found.peft_config()


def test_one_target_is_a_name():
    found = adapters.AdapterOptions(use_peft=True, lora_target_modules=["q_proj"]).peft_config()
    assert any("q_proj.lora_A" in name for name, _ in get_peft_model(make_model("Llama"), found).named_parameters())


def test_precomputed_log_probs_know_the_scale_of_the_adapter(tmp_path):
    found = [adapter_trainer(tmp_path, model=trained_adapter(lora_alpha=alpha)) for alpha in (8, 80)]
    assert found[0].reference._hash() != found[1].reference._hash()


def test_an_adapter_that_a_few_tokens_do_not_show_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "logits_of", lambda output: output.logits * 0)
    assert adapter_trainer(tmp_path, model=trained_adapter()).reference._values is not None


def test_what_would_not_follow_is_refused(tmp_path):
    with pytest.raises(ValueError, match="towards the policy, which has no parameter"):
        adapter_trainer(tmp_path, ref=make_model("Llama"), peft_config=lora(), sync_ref_model=True)
    with pytest.raises(ValueError, match="ref_model_sync_steps is 3, which does nothing without sync_ref_model"):
        adapter_trainer(tmp_path, ref_model_sync_steps=3)
    with pytest.raises(ValueError, match="adapter_reference is 'base', and there is another reference, or no adapter"):
        make_trainer(tmp_path, adapter_reference="base")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--use_peft needs the package peft: pip install 'dpo-kernels\[peft\]'"):
        adapters.AdapterOptions(use_peft=True).peft_config()
    with pytest.raises(ValueError, match=r"--load_in_4bit needs the package bitsandbytes: .*\[quant\]"):
        adapters.AdapterOptions(load_in_4bit=True).quantization(torch.float32)


def test_quantised_weights_are_asked_for_as_bitsandbytes_names_them(monkeypatch):
    monkeypatch.setattr(adapters, "needs", lambda *_: None)
    config = adapters.AdapterOptions(load_in_4bit=True, use_bnb_nested_quant=True).quantization(torch.bfloat16)
    config = config["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert adapters.AdapterOptions(load_in_8bit=True).quantization("auto")["quantization_config"].load_in_8bit
    assert adapters.AdapterOptions().quantization("auto") == {}
