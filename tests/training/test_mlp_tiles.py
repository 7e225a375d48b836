"""MLPs over slices of the tokens: the numbers of the whole, fewer bytes kept, and the model given back."""

from __future__ import annotations

import copy
import functools
import os
import pickle
from unittest import mock

import pytest
import tiny_models
import torch
from own_code_model import MineConfig, MineForCausalLM
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from training_helpers import LOG2, Trees, batch, logs, make_model, make_trainer

from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead
from dpo_kernels.training.mlp_tiles import LEAST, TilingError, check_tiles, find_mlps, in_slices, slice_size, tile_mlps

IN_MLP = ["gate_proj", "up_proj", "down_proj"]


def with_lora(model):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=IN_MLP))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def llama():
    return make_model("Llama")


KINDS = [
    pytest.param(llama, id="llama"),
    pytest.param(lambda: with_lora(llama()), id="lora"),
    pytest.param(lambda: tiny_models.build("gpt2"), id="conv1d"),
    pytest.param(lambda: tiny_models.build("gpt_neox"), id="parallel"),
]


def step(model, autocast=False):
    """Log-probs of a batch of 27 tokens, and all gradients."""
    torch.manual_seed(1)
    ids, labels = batch()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        log_probs = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
    (log_probs * torch.linspace(-1, 1, labels.numel()).view_as(labels)).sum().backward()
    return log_probs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, log_probs=1e-6, gradients=1e-5):
    assert (one[0] - other[0]).abs().max() <= log_probs * one[0].abs().max()
    assert one[1].keys() == other[1].keys()
    assert one[1]
    largest = max(g.abs().max() for g in one[1].values())
    for name, g in one[1].items():
        assert (g - other[1][name]).abs().max() <= gradients * largest, name


def checkpointed(model, use_reentrant):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("make", KINDS)
def test_log_probs_and_gradients_are_those_of_the_whole(make):
    model = make().eval()
    FusedHead(model)
    whole = step(model)
    for tiles in (2, 4, 100):  # 27 tokens: two that do not divide, more than tokens
        tile_mlps(model, tiles)
        assert_same(whole, step(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", KINDS[:2])
def test_gradient_checkpointing_around_the_layers(make, use_reentrant):
    model = make()
    FusedHead(model)
    whole = step(model)
    tile_mlps(checkpointed(model, use_reentrant), 4)
    assert_same(whole, step(model))


@pytest.mark.parametrize("make", KINDS[:2])
def test_autocast(make):
    model = make()
    FusedHead(model)
    whole = step(model, autocast=True)
    tile_mlps(model, 4)
    assert_same(whole, step(model, autocast=True), log_probs=2**-7, gradients=2**-7)


def test_random_numbers_are_the_same_in_backward():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 6))
    seen = []
    layer[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    in_slices(layer, torch.randn(9, 6), 3).sum().backward()
    assert len(seen) == 6
    for first, again in zip(seen[:3], reversed(seen[3:]), strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(seen[0] == 0, seen[1] == 0)


def test_policy_and_reference_give_the_same_bits():
    model = llama()
    FusedHead(model)
    tile_mlps(model, 4)
    ids, labels = batch()
    with torch.no_grad():
        ref = model(input_ids=ids, labels=labels)["log_probs"]
    assert torch.equal(ref, model(input_ids=ids, labels=labels)["log_probs"])
    with torch.inference_mode():
        assert torch.equal(ref, model(input_ids=ids, labels=labels)["log_probs"])


def wide():
    return make_model("Llama", {"intermediate_size": 32 * 16})


def kept_bytes(model):
    """What autograd holds between forward and backward, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = t  # stays alive, so that no other gets its place
        return t

    ids, labels = batch()
    with saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=labels)
    return sum(t.untyped_storage().nbytes() for t in held.values())


def test_autograd_keeps_fewer_bytes():
    model = wide()
    FusedHead(model)
    whole = kept_bytes(model)
    tiled = tile_mlps(model, 4)
    layers, tokens, width = 2, 27, 32 * 16
    assert whole - kept_bytes(model) >= layers * tokens * 3 * width * 4
    tiled.undo()
    assert kept_bytes(model) == whole


@pytest.mark.parametrize("grad", [True, False])
def test_the_widest_intermediate_is_one_slices(grad):
    model = wide()
    FusedHead(model)
    tile_mlps(model, 4)
    seen = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, made: seen.append(made.shape[:-1].numel()))
    with torch.set_grad_enabled(grad):
        ids, labels = batch()
        log_probs = model(input_ids=ids, labels=labels)["log_probs"]
    assert seen == [7, 7, 7, 6] * 2
    if grad:
        log_probs.sum().backward()
        assert seen[8:] == [6, 7, 7, 7] * 2  # the last one first: its gradients are gone before the next


def test_slices_of_any_input():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
    for shape in ((1, 1, 6), (7, 6), (2, 5, 6), (2, 2, 3, 6)):
        x = torch.randn(shape, requires_grad=True)
        y = torch.randn(shape)
        for size in (1, 3, 7, 100):
            made = in_slices(layer, x, size)
            assert made.shape == x.shape
            wanted = (x, *layer.parameters())
            own, sliced = (torch.autograd.grad((out * y).sum(), wanted) for out in (layer(x), made))
            for a, b in zip(own, sliced, strict=True):
                torch.testing.assert_close(a, b)
    transposed = torch.randn(6, 8, requires_grad=True)
    made = in_slices(layer, transposed.T, 3)
    made.add_(1)  # as a model may do to what it is given
    torch.testing.assert_close(made, layer(transposed.T) + 1)
    (grad,) = torch.autograd.grad(made.square().sum(), transposed)
    (own,) = torch.autograd.grad((layer(transposed.T) + 1).square().sum(), transposed)
    torch.testing.assert_close(grad, own)


@pytest.mark.parametrize("with_gradient", [{1}, {2}, {3}, {1, 3}, {1, 2, 3}], ids=str)
def test_some_slices_alone_may_have_a_gradient(with_gradient):
    x = torch.randn(5, 3, requires_grad=True)
    calls = []

    def compute(piece):
        calls.append(len(piece))
        return piece * 2 if len(calls) in with_gradient else piece.detach() * 2

    in_slices(compute, x, 2).sum().backward()
    assert calls == [2, 2, 1]  # nothing is saved, so that nothing is computed again
    assert x.grad[:, 0].tolist() == [2.0 * (i // 2 + 1 in with_gradient) for i in range(5)]


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    model = wide().requires_grad_(False)
    FusedHead(model)
    tile_mlps(model, 4)
    ids, labels = batch()
    assert not model(input_ids=ids, labels=labels)["log_probs"].requires_grad
    model.model.embed_tokens.weight.requires_grad_()
    whole = wide()
    FusedHead(whole)
    assert_same(
        (step(whole)[0], {"model.embed_tokens.weight": step(whole)[1]["model.embed_tokens.weight"]}), step(model)
    )


@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "tiles", "size"),
    [
        (27, 32, 48, 4, 7), (27, 32, 48, 100, 1), (1, 32, 48, 4, 1), (27, 32, 48, 1, 27),
        (255, 4096, 14336, "auto", LEAST), (16384, 4096, 14336, "auto", 1560), (1024, 4096, 14336, "auto", LEAST),
    ],
)  # fmt: skip
def test_the_size_of_a_slice(tokens, hidden, width, tiles, size):
    assert slice_size(tokens, hidden, width, tiles) == size
    if tiles == "auto" and size > LEAST:
        assert 3 * size * width <= tokens * hidden < 3 * (size + 1) * width


def test_auto_leaves_short_batches_whole():
    model = wide()
    FusedHead(model)
    whole = kept_bytes(model)
    assert tile_mlps(model, "auto").told == "MLPs: 2 LlamaMLP run over slices of at least 256 tokens"
    assert kept_bytes(model) == whole
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("whole"))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, made: seen.append(made.shape[1]))
    with torch.no_grad():
        model.model.layers[0].mlp(torch.randn(3, 200, 32))
    assert seen == [256, 256, 88, "whole"]


def test_the_model_stays_the_model_it_was(tmp_path):
    model = llama()
    model.generation_config.eos_token_id = None
    before = [{**vars(module)} for module in model.modules()]
    ids = batch()[0]
    own = model.generate(ids, max_new_tokens=4, do_sample=False)
    names, logits = list(model.state_dict()), model(ids).logits
    tiled = tile_mlps(model, 3)
    assert list(model.state_dict()) == names
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), own)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        forward = twin.model.layers[0].mlp.forward
        assert forward.module is twin.model.layers[0].mlp
        torch.testing.assert_close(twin(ids).logits, logits)
    tile_mlps(model, 2)  # takes the place of the first
    tiled.undo()
    assert [{**vars(module)} for module in model.modules()] == before


def test_a_forward_that_was_there_before_is_kept():
    model = llama()
    mlp = model.model.layers[0].mlp
    forward = functools.partial(type(mlp).forward, mlp)
    mlp.forward = forward
    tiled = tile_mlps(model, 3)
    assert mlp.forward is not forward
    tiled.undo()
    assert mlp.forward is forward


def test_a_call_of_another_form_is_the_modules_own():
    model = llama()
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 9, 32)
    own = mlp(x)
    tile_mlps(model, 3)
    torch.testing.assert_close(mlp(x=x), own)
    assert mlp(x[0, 0]).shape == (32,)
    with pytest.raises(TypeError):
        mlp(x, x)


MIXTURES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_which_modules_are_found():
    assert find_mlps(tiny_models.build("phi")).classes == ("PhiMLP",)
    dense = make_model("Qwen3Moe", MIXTURES | {"mlp_only_layers": [0]})
    found = find_mlps(dense)
    assert found.classes == ("Qwen3MoeMLP",)
    assert "router" in found.left["Qwen3MoeSparseMoeBlock"]
    told = tile_mlps(dense, 2, found).told
    assert told.startswith("MLPs: 1 Qwen3MoeMLP run over 2 slices of the tokens; Qwen3MoeSparseMoeBlock is left alone")


def test_the_look_at_a_model_leaves_it_as_it_was():
    model = llama().train()
    tile_mlps(model, 2)
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    forward, state = model.model.layers[0].mlp.forward, torch.get_rng_state()
    find_mlps(model)
    assert [m.training for m in model.modules()] == modes
    assert model.model.layers[0].mlp.forward is forward
    assert torch.equal(torch.get_rng_state(), state)


class Shifts(nn.Module):
    """Mixes each token with the one before, as RWKV's channels do."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x):
        return self.own(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class Remembers(Shifts):
    def forward(self, x):
        self.aux_loss = x.square().mean()
        return self.own(x)


class InPlace(Shifts):
    def forward(self, x):
        return self.own(x.mul_(2))


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        (Shifts, "LlamaForCausalLM can be run over slices of the tokens: Shifts does not see each token alone"),
        (Remembers, "Remembers keeps something of the tokens that it has seen"),
        (InPlace, "InPlace changes its input in place"),
    ],
)
def test_what_is_no_mlp_is_refused(wrapper, reason):
    model = llama()
    for layer in model.model.layers:
        layer.mlp = wrapper(layer.mlp)
    with pytest.raises(TilingError, match=reason):
        tile_mlps(model, 2)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt", "no MLP of OPTForCausalLM can be run .*OPTAttention is given more than one tensor"),
        ("bloom", "no MLP of BloomForCausalLM .*BloomMLP is given more than one tensor"),
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock holds what the model records"),
    ],
)
def test_models_without_an_mlp_of_one_tensor_are_refused(name, reason):
    with pytest.raises(TilingError, match=reason):
        tile_mlps(tiny_models.build(name), 2)


def test_a_model_that_does_not_run_is_refused():
    model = llama()
    model.model.layers[0].register_forward_pre_hook(lambda *_: {}["hidden"])
    with pytest.raises(TilingError, match="LlamaForCausalLM does not run on tokens alone: KeyError: 'hidden'"):
        tile_mlps(model, 2)
    assert not any(m._forward_pre_hooks for m in model.model.layers[0].children())


def test_experts_that_keep_a_loss_are_refused():
    torch.manual_seed(0)
    model = MineForCausalLM(MineConfig(experts=3))
    with pytest.raises(TilingError, match="Experts keeps something of the tokens"):
        tile_mlps(model, 2)
    with pytest.raises(TilingError, match="Linear has less than two matrices"):
        tile_mlps(MineForCausalLM(MineConfig()), 2)


@pytest.mark.parametrize("tiles", ["0", "-1", "many", "1.5", "", 0, "²"])
def test_tiles_out_of_range(tmp_path, tiles):
    for refuses in (check_tiles, lambda t: DPOConfig(output_dir=str(tmp_path), use_cpu=True, mlp_tiles=t)):
        with pytest.raises(ValueError, match=r"mlp_tiles is .*; expected auto, or a whole number of slices"):
            refuses(tiles)


def test_tiles_in_range(tmp_path):
    made = [DPOConfig(output_dir=str(tmp_path), use_cpu=True, mlp_tiles=t).tiles for t in ("auto", "4", 4, None)]
    assert made == ["auto", 4, 4, None]
    told = pytest.raises(ValueError, match="mlp_tiles does not go with torch_compile")
    with told, mock.patch.dict(os.environ):  # which transformers writes into
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, mlp_tiles="auto", torch_compile=True)


def test_a_run_has_the_same_losses(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=2)
    tiled = make_trainer(tmp_path / "tiled", max_steps=2, mlp_tiles="4")
    assert whole.tiled is None
    for trainer in (whole, tiled):
        trainer.train()
    first, second = (logs(tmp_path / name) for name in ("whole", "tiled"))
    assert [e["loss"] for e in first] == pytest.approx([e["loss"] for e in second], rel=1e-5)
    assert second[0]["loss"] == pytest.approx(LOG2, abs=1e-7)
    assert len(tiled.tiled.modules) == 2
    assert all("forward" in vars(layer.mlp) for layer in tiled.ref_model.model.layers)
    tiled.save_model()
    assert load_file(tmp_path / "tiled" / "model.safetensors").keys() == whole.model.state_dict().keys()


def test_a_run_of_an_adapter_in_the_mlp(tmp_path):
    losses = {}
    for tiles in (None, "4"):
        folder = tmp_path / str(tiles)
        config = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no",
                  "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": True}  # fmt: skip
        args = DPOConfig(output_dir=str(folder), mlp_tiles=tiles, **config)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=IN_MLP)
        trainer = DPOTrainer(llama(), None, args, Trees(), peft_config=lora)
        trainer.train()
        losses[tiles] = [entry["loss"] for entry in logs(folder)]
    assert losses[None] == pytest.approx(losses["4"], rel=1e-5)
    assert losses["4"][0] == pytest.approx(LOG2, abs=1e-7)
    assert losses["4"][1] != losses["4"][0]


def test_a_reference_without_mlps_is_refused(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, mlp_tiles="2")
    small = {"ffn_dim": 48, "word_embed_proj_dim": 32}
    with pytest.raises(TilingError, match="no MLP of OPTForCausalLM"):
        DPOTrainer(llama(), make_model("OPT", small), args, Trees())
