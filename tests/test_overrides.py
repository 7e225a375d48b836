"""What calls resolve to is changed within a block, and by it alone."""

from __future__ import annotations

import pytest
import torch
from helpers import make_head

from dpo_kernels import hidden_to_log_probs, overrides, plan
from dpo_kernels.backends.cpp import CppTileOps
from dpo_kernels.overrides import override


def test_nothing_is_changed_outside():
    assert overrides.current() == overrides.Overrides()


def test_blocks_nest_and_mappings_merge():
    with override(backends=("torch",), capabilities={"scratch": 1, "tiles": ((64, 64),)}, kernels={"at_once": 2}):
        outer = overrides.current()
        with override(capabilities={"scratch": 2}, kernels={"strategy": "tiles"}):
            inner = overrides.current()
            assert inner.backends == ("torch",)
            assert inner.capabilities == {"scratch": 2, "tiles": ((64, 64),)}
            assert inner.kernels == {"at_once": 2, "strategy": "tiles"}
        assert overrides.current() is outer
        assert outer.capabilities == {"scratch": 1, "tiles": ((64, 64),)}


def test_an_exception_restores():
    with override(backends=("torch",)):
        with pytest.raises(KeyError), override(backends=("cpp",), capabilities={"scratch": 5}):
            raise KeyError
        assert overrides.current().backends == ("torch",)
        assert overrides.current().capabilities == {}
    assert overrides.current() == overrides.Overrides()


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match=r"override has no \['backend'\]; it has \['backends', 'capabilities'"):  # noqa: SIM117
        with override(backend="torch"):
            pass
    assert overrides.current() == overrides.Overrides()
    with override(capabilities={"no_such": 1}), pytest.raises(TypeError, match="no_such"):
        plan(4, 4, 4)


def test_calls_and_plans_resolve_to_it():
    with override(backends=("torch",), capabilities={"tiles": ((128, 96),), "scratch": 7}):
        made = plan(1000, 64, 500, grads=("hidden",))
        assert (made.tile_tokens, made.tile_vocab) == (128, 96)
    assert plan(1000, 64, 500, grads=("hidden",)).tile_vocab != 96


@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_what_forward_decided_holds_in_backward_after_the_block(monkeypatch, grads):
    """And a block around backward alone changes nothing."""
    ran = []
    for name in ("accumulate", "gradient_products", "multiply"):
        original = getattr(CppTileOps, name)
        monkeypatch.setattr(CppTileOps, name, lambda *a, f=original, name=name, **k: ran.append(name) or f(*a, **k))

    def gradients(inside, around_backward):
        torch.manual_seed(0)
        head = make_head(300, 16, 400, grads=grads)
        with override(**inside):
            log_probs = hidden_to_log_probs(*head[:3])
        ran.clear()
        with override(**around_backward):
            return torch.autograd.grad(log_probs.sum(), [t for t in head[:2] if t.requires_grad])

    pytorch = {"backends": ("torch",), "capabilities": {"tiles": ((64, 96),), "scratch": 0}}
    straight = gradients(pytorch, pytorch)
    assert not ran
    for got, same in zip(gradients(pytorch, {}), straight, strict=True):
        assert torch.equal(got, same)
    assert not ran
    for got, same in zip(gradients(pytorch, {"backends": ("cpp",)}), straight, strict=True):
        assert torch.equal(got, same)
    assert not ran
    by_cpp = gradients({"backends": ("cpp",)}, {})
    for got, same in zip(gradients({"backends": ("cpp",)}, pytorch), by_cpp, strict=True):
        assert torch.equal(got, same)
    assert ran or grads == "hidden"
