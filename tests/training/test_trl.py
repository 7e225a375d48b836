"""TRL's trainers with our log-probs: the function that is replaced, how it is replaced, and a step of each trainer."""

from __future__ import annotations

import pytest
import torch
import trl
import trl.trainer.utils as utils
from helpers import EXAMPLE, assert_as_good, assert_close, make_head
from trl_trainers import TRAINERS, run

from dpo_kernels import TokenStats, reference
from dpo_kernels.integrations.trl import FusedLogProbs, disable, enable

OWN = utils._ChunkedLogProbFunction
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def trls_own_function_is_back():
    yield
    assert utils._ChunkedLogProbFunction is OWN


def inputs(dtype=torch.float32, **options):
    head = make_head(40, 16, 300, dtype, ignored=0, **options)
    return head.hidden, head.weight, head.bias, head.labels


class Exact:
    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, _, softcap=None, logit_scale=1.0, outputs=ALL):
        return reference.token_stats(
            hidden, weight, targets, bias, outputs=outputs, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap,
        )  # fmt: skip


def results(function, tensors, *options):
    """The five outputs, and the gradients of log-probs and entropy together."""
    made = function.apply(*tensors, *options)
    loss = (made[0] * torch.linspace(-1, 1, len(made[0]))).sum()
    if made[1] is not None:
        loss = loss + (made[1] * torch.linspace(2, -1, len(made[0]))).sum()
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return made, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((1.0, 128), id="two"),
        pytest.param((0.7, 64, None, 1.0, ()), id="temperature"),
        pytest.param((1.0, 128, 15.0, 0.5, ("entropy",)), id="softcap-scale-entropy"),
        pytest.param((1.3, 128, None, 2, ALL), id="all"),
        pytest.param((1.0, 128, None, 1.0, ("is_top1", "mean_logits")), id="some"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_nine_arguments_and_five_outputs(options, bias):
    tensors = inputs(bias=bias)
    (made, grads), (own, own_grads) = (results(f, tensors, *options) for f in (FusedLogProbs(OWN), OWN))
    assert len(made) == len(own) == 5
    for name, value, truth in zip(TokenStats._fields[:5], made, own, strict=True):
        assert (value is None) == (truth is None), name
        if value is not None:
            assert value.dtype == truth.dtype
            assert value.requires_grad == truth.requires_grad
            assert_close(value, truth, 2e-5, name)
    wide = tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors)
    _, exact = results(Exact, (*wide[:3], tensors[3]), *options)
    for value, theirs, truth in zip(grads, own_grads, exact, strict=True):
        assert_as_good(value, theirs, truth)
        assert_close(value, theirs, 1e-4)


def test_gradients_that_nobody_wants_are_none():
    """The entropy is logged and not trained on; the head is frozen, or the hidden states are."""
    for wanted in ("hidden", "weight", "bias"):
        hidden, weight, bias, targets = inputs(bias=True, grads=wanted)
        log_probs, entropy, *_ = FusedLogProbs(OWN).apply(hidden, weight, bias, targets, 1.0, 128)
        assert entropy is not None
        log_probs.sum().backward()
        grads = {"hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
        assert {name for name, grad in grads.items() if grad is not None} == {wanted}
    with torch.no_grad():
        assert not FusedLogProbs(OWN).apply(*inputs(), 1.0, 128)[0].requires_grad


def test_entropy_alone_can_be_trained_on():
    tensors = inputs()
    grads = [
        torch.autograd.grad(f.apply(*tensors, 1.0, 128, None, 1.0, ("entropy",))[1].sum(), tensors[0])[0]
        for f in (FusedLogProbs(OWN), OWN)
    ]
    assert_close(*grads, 2e-5)


def test_autocast_rounds_the_operands_to_its_dtype():
    hidden, weight, _, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        made, grads = results(FusedLogProbs(OWN), (hidden, weight, None, targets), 1.0, 128)
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight)]
    exact, exact_grads = results(FusedLogProbs(OWN), (*rounded, None, targets), 1.0, 128)
    assert made[0].dtype == torch.float32
    assert_close(made[0], exact[0], 1e-5)
    assert [g.dtype for g in grads] == [torch.float32] * 2
    for value, truth in zip(grads, exact_grads, strict=True):
        assert_close(value, truth, 0.01 * truth.abs().max().item())
    plain, _ = results(FusedLogProbs(OWN), (hidden, weight, None, targets), 1.0, 128)
    assert (plain[0] - made[0]).abs().max() > 1e-3


def test_a_bfloat16_head_under_float32_hidden_states():
    """What cast_lm_head_to_fp32 makes: TRL computes in the hidden states' dtype."""
    hidden, weight, bias, targets = inputs(bias=True)
    narrow, narrow_bias = (t.detach().bfloat16().requires_grad_() for t in (weight, bias))
    (made, grads), (own, own_grads) = (
        results(f, (hidden, narrow, narrow_bias, targets), 1.0, 128) for f in (FusedLogProbs(OWN), OWN)
    )
    assert_close(made[0], own[0], 2e-5)
    for value, truth in zip(grads, own_grads, strict=True):
        assert value.dtype == truth.dtype
        assert_close(value, truth, 1e-2)


def test_no_tokens():
    hidden, weight, _, targets = inputs()
    made, grads = results(FusedLogProbs(OWN), (hidden[:0], weight, None, targets[:0]), 1.0, 128, None, 1.0, ALL)
    assert [t.shape for t in made] == [(0,)] * 5
    assert all(g.eq(0).all() for g in grads)


def test_a_partitioned_head_is_left_to_trl_and_says_so():
    hidden, weight, _, targets = inputs()
    weight.ds_id = 0
    with pytest.warns(UserWarning, match="partitioned by DeepSpeed ZeRO-3: TRL's own log-probs"):
        log_probs = FusedLogProbs(OWN).apply(hidden, weight, None, targets, 1.0, 128)[0]
    assert "ChunkedLogProbFunction" in type(log_probs.grad_fn).__name__


def test_enable_and_disable():
    enable(memory_budget=2**20)
    assert utils._ChunkedLogProbFunction.memory_budget == 2**20
    enable(impl="torch")  # the last options count
    assert utils._ChunkedLogProbFunction.impl == "torch"
    assert utils._ChunkedLogProbFunction.memory_budget is None
    disable()
    assert utils._ChunkedLogProbFunction is OWN
    disable()
    assert utils._ChunkedLogProbFunction is OWN


def test_as_a_context():
    with enable():
        ours = utils._ChunkedLogProbFunction
        assert isinstance(ours, FusedLogProbs)
        with enable(impl="torch"):
            assert utils._ChunkedLogProbFunction.impl == "torch"
        assert utils._ChunkedLogProbFunction is ours
        with pytest.raises(KeyError), enable():
            raise KeyError
        assert utils._ChunkedLogProbFunction is ours
    assert utils._ChunkedLogProbFunction is OWN
    with enable():
        disable()
        assert utils._ChunkedLogProbFunction is OWN
    assert utils._ChunkedLogProbFunction is OWN


def test_disable_in_a_block_within_an_enabled_stretch_is_the_last_word():
    enable()
    with enable():
        disable()
        assert utils._ChunkedLogProbFunction is OWN
    assert utils._ChunkedLogProbFunction is OWN
    enable()
    disable()
    assert utils._ChunkedLogProbFunction is OWN


def test_a_context_can_be_entered_again():
    context = enable(impl="torch")
    for _ in range(2):
        with context:
            assert utils._ChunkedLogProbFunction.impl == "torch"
            with context:
                pass
            assert utils._ChunkedLogProbFunction.impl == "torch"
        assert utils._ChunkedLogProbFunction is OWN
    with enable() as other, context:
        assert utils._ChunkedLogProbFunction.impl == "torch"
        with other:
            assert utils._ChunkedLogProbFunction.impl is None
        assert utils._ChunkedLogProbFunction.impl == "torch"
    assert utils._ChunkedLogProbFunction is OWN


def test_what_replaced_a_context_outlives_it():
    with enable():
        enable(impl="torch")
    assert utils._ChunkedLogProbFunction.impl == "torch"
    disable()


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0.0", "1.160.0"])
def test_an_unknown_version_is_an_error_and_nothing_is_patched(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=f"TRL {version} is installed; dpo_kernels knows .* 1.16 only"):
        enable()
    assert utils._ChunkedLogProbFunction is OWN


def test_a_function_of_another_signature_is_an_error_and_nothing_is_patched(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            raise AssertionError

    for other in (Other, None):
        with monkeypatch.context() as patch:
            patch.setattr(utils, "_ChunkedLogProbFunction", other)
            with pytest.raises(RuntimeError, match=r"takes .*; expected \('hidden', .* has replaced"):
                enable()
            assert utils._ChunkedLogProbFunction is other


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_learns_the_same(trainer, model_dir, monkeypatch):
    calls = []
    apply = FusedLogProbs.apply
    monkeypatch.setattr(FusedLogProbs, "apply", lambda *a, **k: calls.append(a) or apply(*a, **k))
    own, ours = (run(trainer, enabled, str(model_dir), str(EXAMPLE), 2, 2, 128) for enabled in (False, True))
    assert len(calls) >= 2
    assert len(own["loss"]) == len(ours["loss"]) == 2
    assert ours["loss"] == pytest.approx(own["loss"], abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-4)
    assert min(own["grad_norm"]) > 0
