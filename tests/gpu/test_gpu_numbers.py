"""The numbers of tests/test_log_probs.py on the device: every mode, dtype and option, on both paths."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import ALL, MODES, PLAIN, head_on, planned, step
from helpers import assert_as_good, assert_close, check_against_reference, detached

from dpo_kernels import FusedLinearDPOLoss, hidden_to_log_probs, logits_to_log_probs, plan, reference
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [pytest.param(PLAIN, id="plain"), pytest.param(ALL, id="all")]
SIZE = {"cuda": (1300, 512, 5000), "cpu": (210, 48, 700)}
RAGGED = [
    pytest.param(1, 16, 5, id="one-token-tiny-vocabulary"),
    pytest.param(33, 96, 130, id="ragged"),
    pytest.param((3, 7), 40, 2049, id="features-that-are-not-aligned"),
    pytest.param(129, 272, 8193, id="one-past-the-last-block"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes(device, strategy, dtype, options, mode):
    head = head_on(device, *SIZE[device.type], dtype, grads=MODES[mode])
    check_against_reference(head, outputs=(), memory_budget=planned(head, mode).bytes, impl="triton", **options)


@pytest.mark.parametrize("grads", ["none", "hidden,weight,bias"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(device, strategy, dtype, options, grads):
    tokens, features, vocab = SIZE[device.type]
    head = head_on(device, tokens // 2, features, vocab, dtype, bias=True, grads=grads)
    check_against_reference(head, outputs=OPTIONAL_OUTPUTS, impl="triton", **options)


@pytest.mark.parametrize("grads", ["bias", "hidden", "weight", "hidden,bias", "hidden,weight,bias"])
def test_wanted_gradients_with_a_bias(device, strategy, grads):
    tokens, features, vocab = SIZE[device.type]
    head = head_on(device, tokens // 2, features, vocab, torch.bfloat16, bias=True, grads=grads)
    check_against_reference(head, outputs=(), impl="triton", **ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "features", "vocab"), RAGGED)
def test_ragged_shapes(device, strategy, tokens, features, vocab, dtype):
    check_against_reference(head_on(device, tokens, features, vocab, dtype), outputs=(), impl="triton")


def test_float32_is_exact_at_default_settings(device, strategy):
    """1e-5 at the size of a real head, with TF32 neither asked for nor forbidden."""
    head = head_on(device, *((256, 2048, 32_000) if device.type == "cuda" else (40, 96, 500)), grads="none")
    truth = reference.hidden_to_log_probs(head.hidden.double(), head.weight.double(), head.labels)
    assert_close(step(head, None).log_probs, truth, 1e-5)


@pytest.mark.parametrize("mode", ["keep", "mixed", "recompute"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_and_reference_get_the_same_log_probs_to_the_last_bit(device, strategy, dtype, options, mode):
    """Under one budget, whatever gradients either wants: the first loss is exactly log 2."""
    results, budget = {}, None
    for grads in ("hidden,weight", "none", "hidden", "weight"):
        torch.manual_seed(0)
        head = head_on(device, *SIZE[device.type], dtype, grads=grads)
        budget = budget or planned(head, mode).bytes
        results[grads] = hidden_to_log_probs(
            head.hidden, head.weight, head.labels, memory_budget=budget, impl="triton", **options
        ).detach()
    different = {grads: (r != results["none"]).sum().item() for grads, r in results.items()}
    assert not any(different.values()), f"rows that differ from those without a gradient: {different}"


@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_the_first_loss_is_log_two(device, strategy, grads):
    head = head_on(device, (4, SIZE[device.type][0] // 4), *SIZE[device.type][1:], torch.bfloat16, grads=grads)
    loss, chosen, rejected = FusedLinearDPOLoss(0.1, impl="triton")(
        head.hidden, head.weight, head.labels, ref_hidden=head.hidden.detach(), ref_weight=head.weight.detach()
    )
    log_two = -torch.nn.functional.logsigmoid(torch.zeros((), device=device))
    assert (loss, chosen, rejected) == (log_two, 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_label_out_of_range_is_nan_in_its_row_alone(device, strategy, mode, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr("dpo_kernels.checks.labels_in_range", lambda *_: None)
    tokens, features, vocab = SIZE[device.type]
    bad, beside = (3, tokens // 2), torch.arange(tokens, device=device)
    beside = beside[(beside != bad[0]) & (beside != bad[1])]
    torch.manual_seed(0)
    head = head_on(device, tokens, features, vocab, torch.bfloat16, grads=MODES[mode], ignored=0)
    budget = planned(head, mode).bytes
    cotangent = torch.ones(tokens, device=device)
    right = step(head, cotangent, budget)
    head.labels[bad[0]], head.labels[bad[1]] = vocab, -7
    cotangent[list(bad)] = 0
    got = step(head, cotangent, budget)
    assert got.log_probs[list(bad)].isnan().all()
    assert torch.equal(got.log_probs[beside], right.log_probs[beside])
    if got.grads:
        assert torch.equal(got.grads[0][beside], right.grads[0][beside])


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_level(device, dtype, options, ignored):
    rows, vocab = (70, 9001) if device.type == "cuda" else (12, 1031)
    logits = (torch.randn(rows, vocab, dtype=torch.float64) * 6).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    labels = labels.to(device)
    cotangent = torch.randn(rows).to(device)
    exact, plain = (logits.detach().clone().to(t).requires_grad_() for t in (torch.float64, dtype))
    got = logits_to_log_probs(logits, labels, impl="triton", **options)
    truth = reference.logits_to_log_probs(exact, labels, **options)
    reference.logits_to_log_probs(plain, labels, **options).backward(cotangent)
    got.backward(cotangent)
    truth.backward(cotangent.double())
    assert_close(got.detach(), truth.detach(), 1e-5)
    assert_as_good(logits.grad, plain.grad, exact.grad)
    assert logits.grad[labels == -100].eq(0).all()


def test_the_implementation_of_choice_is_triton(cuda):
    head = head_on(cuda, 64, 64, 500, torch.bfloat16)
    chosen = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    assert torch.equal(chosen, hidden_to_log_probs(head.hidden, head.weight, head.labels, impl="triton"))
    assert plan(64, 64, 500, device="cuda") == plan(64, 64, 500, device="cuda", impl="triton")
    doubles = detached(head, torch.float64)
    assert hidden_to_log_probs(doubles.hidden, doubles.weight, doubles.labels).dtype == torch.float64
