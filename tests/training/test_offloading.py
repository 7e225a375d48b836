"""What a forward saves waits elsewhere: the same numbers, weights and the head left where they are."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from training_helpers import batch, logs, make_model, make_trainer

from dpo_kernels.training import FusedHead
from dpo_kernels.training.mlp_tiles import tile_mlps
from dpo_kernels.training.offloading import SMALL, Offloading, check_offloading, on_host


class Host:
    """Takes copies, as host memory does, and remembers of what."""

    def __init__(self):
        self.moved = []

    def __call__(self, t):
        self.moved.append(t)  # stays alive, so that no other tensor gets its place
        return t.clone()

    def hooks(self, model):
        return on_host(model, self)

    @property
    def storages(self):
        return {t.untyped_storage().data_ptr() for t in self.moved}


def fused(lora=False):
    model = make_model("Llama", {"vocab_size": 400})
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    FusedHead(model)
    return model


def step(model, offloading=None):
    torch.manual_seed(1)
    ids, labels = batch()
    model.zero_grad()
    if offloading is None:
        log_probs = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
    else:
        with offloading():
            log_probs = model(input_ids=ids, labels=labels, use_cache=False)["log_probs"]
    (log_probs * torch.linspace(-1, 1, labels.numel()).view_as(labels)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": log_probs.detach(), **grads}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["all", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_numbers_are_the_same(lora, checkpointing):
    model = fused(lora).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    host = Host()
    assert_equal(step(model), step(model, Offloading(model, host.hooks)))
    if checkpointing is not None:  # a layer's input, and the last norm's
        assert {tuple(t.shape) for t in host.moved} == {(3, 9, 32)}
    else:
        assert (3, 9, 48) in {tuple(t.shape) for t in host.moved}


def test_the_numbers_are_the_same_in_slices():
    model = fused()
    tile_mlps(model, 2)
    host = Host()
    assert_equal(step(model), step(model, Offloading(model, host.hooks)))
    assert (14, 32) in {tuple(t.shape[-2:]) for t in host.moved}


def test_weights_and_the_heads_tensors_stay():
    model = fused()
    host, of_head = Host(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: of_head.append(args[0].untyped_storage().data_ptr()))
    step(model, Offloading(model, host.hooks))
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not host.storages & weights
    assert not host.storages & set(of_head)
    assert min(t.numel() * t.element_size() for t in host.moved) >= SMALL
    everything = Host()
    with saved_tensors_hooks(everything, lambda t: t):
        model(input_ids=batch()[0], labels=batch()[1])
    assert everything.storages & weights, "autograd saves weights, views of them too"


def test_the_head_is_left_as_it_was():
    model = fused()
    hooks = [len(d) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
    host = Host()
    offloading = Offloading(model, host.hooks)
    step(model, offloading)
    with pytest.raises(RuntimeError, match="stop"), offloading():
        raise RuntimeError("stop")

    def stop(*_):
        raise RuntimeError("stop")

    handle = model.lm_head.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), offloading():
        model(input_ids=batch()[0])
    handle.remove()
    assert [len(d) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)] == hooks
    count = len(host.moved)
    torch.ones(1000, requires_grad=True).square()
    assert len(host.moved) == count > 0


def test_pytorchs_own_hooks_give_the_same_numbers():
    model = fused()
    assert_equal(step(model), step(model, Offloading(model, lambda _: save_on_cpu(pin_memory=False))))


def test_which_tensors_move():
    model, host = torch.nn.Linear(64, 64), Host()
    hooks = on_host(model, host)
    big, small = torch.randn(64, 64), torch.randn(8)
    for t, moves in (
        (big, True), (big.T, True), (small, False), (model.weight.detach(), False), (model.weight.T[1:], False),
        (small[:, None].expand(8, 400), False),
    ):  # fmt: skip
        packed = hooks.pack_hook(t)
        assert isinstance(packed, tuple) == moves
        back = hooks.unpack_hook(packed)
        assert torch.equal(back, t)
        assert back.stride() == t.stride()
    assert len(host.moved) == 2


def test_trl_does_it_where_it_is_there(monkeypatch):
    asked = []

    class OffloadActivations:
        def __init__(self):
            asked.append("made")

        def update_model_params(self, model):
            asked.append(model)

        def __enter__(self):
            asked.append("entered")

        def __exit__(self, *_):
            asked.append("left")

    module = types.ModuleType("trl.models.activation_offloading")
    module.OffloadActivations = OffloadActivations
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", module)
    model = fused()
    offloading = Offloading(model)
    assert asked == []
    for _ in range(2):
        step(model, offloading)
    assert asked == ["made", model, "entered", "left", model, "entered", "left"]
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", None)
    assert Offloading(model).hooks is on_host


def test_trls_class_is_what_is_asked_for():
    from trl.models.activation_offloading import OffloadActivations

    assert callable(OffloadActivations.update_model_params)
    assert issubclass(OffloadActivations, saved_tensors_hooks)


def test_where_there_is_nothing_to_move_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on a CPU it is there already; leave it out"):
        make_trainer(tmp_path, activation_offloading=True)
    with pytest.raises(ValueError, match="does not work with FSDP or ZeRO-3"):
        check_offloading(torch.device("cuda"), is_sharded=True)
    check_offloading(torch.device("cuda"), is_sharded=False)


def test_a_run_has_the_same_losses(tmp_path, monkeypatch):
    """As on a GPU, but for the device: training moves tensors, evaluation does not."""
    monkeypatch.setattr("dpo_kernels.training.trainer.check_offloading", lambda *_: None)
    plain = make_trainer(tmp_path / "plain", max_steps=2)
    plain.train()
    moving = make_trainer(tmp_path / "moving", max_steps=2, activation_offloading=True)
    host = Host()
    moving.offloading.hooks = host.hooks
    moving.train()
    losses = [[entry["loss"] for entry in logs(tmp_path / name)] for name in ("plain", "moving")]
    assert losses[0] == losses[1]
    count = len(host.moved)
    assert count > 0
    moving.evaluate(moving.train_dataset)
    assert len(host.moved) == count
