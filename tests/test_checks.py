"""What is refused, and what is said then: checked once, before any implementation is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import make_head

from dpo_kernels import available_impls, checks, hidden_to_log_probs, logits_to_log_probs, token_stats

INF, NAN = float("inf"), float("nan")
META = torch.device("meta")
H, W, Y = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.long)


def small():
    head = make_head(6, 4, 9, bias=True, ignored=0)
    return head.hidden, head.weight, head.labels, head.bias


def test_validation_can_be_asked_for_on_any_device(monkeypatch):
    labels = torch.tensor([[1, 2], [9, -100]])
    elsewhere = SimpleNamespace(
        device=torch.device("cuda"), dtype=labels.dtype, dim=labels.dim, reshape=labels.reshape, shape=labels.shape
    )
    checks.labels_in_range(elsewhere, -100, 9)
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    with pytest.raises(IndexError, match=r"labels\[1, 0\] is 9; expected a token in \[0, 9\) or ignore_index -100"):
        checks.labels_in_range(elsewhere, -100, 9)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("softcap", 0.0, r"softcap is 0.0; expected None or a finite number > 0"),
        ("softcap", -3.0, r"softcap is -3.0"),
        ("temperature", 0.0, r"temperature is 0.0; expected a finite number > 0"),
        ("temperature", NAN, r"temperature is nan"),
        ("logit_scale", INF, r"logit_scale is inf"),
        ("impl", "fast", r"impl is 'fast'; expected None or one of \('triton', 'cpp', 'torch'\)"),
        ("memory_budget", 0, r"memory_budget 0 must be >= 1"),
        ("memory_budget", 1000, r"memory_budget is 1,000 bytes .* need at least [\d,]+"),
        ("outputs", ("entropi",), r"outputs has \['entropi'\]; expected names from"),
    ],
)
def test_bad_options(argument, value, message):
    hidden, weight, labels, bias = small()
    with pytest.raises(ValueError, match=message):
        token_stats(hidden, weight, labels, bias, **{argument: value})


def test_bad_kinds_of_options():
    hidden, weight, labels, _ = small()
    with pytest.raises(TypeError, match="softcap is '3'; expected a number"):
        hidden_to_log_probs(hidden, weight, labels, softcap="3")
    with pytest.raises(TypeError, match="outputs is the string 'entropy'"):
        token_stats(hidden, weight, labels, outputs="entropy")
    with pytest.raises(TypeError, match=r"memory_budget is 1000000\.0; expected a whole number"):
        hidden_to_log_probs(hidden, weight, labels, memory_budget=1e6)
    for impl in (name for name, reason in available_impls().items() if reason):
        with pytest.raises(RuntimeError, match=f"impl '{impl}' cannot run on cpu"):
            hidden_to_log_probs(hidden, weight, labels, impl=impl)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((H, torch.randn(9, 5), Y), ValueError, r"hidden has 4 features, weight 5: \(6, 4\) x \(9, 5\)"),
        ((H, torch.randn(9), Y), ValueError, r"weight is \(9,\); expected \(V, D\)"),
        ((H, torch.randn(0, 4), Y), ValueError, r"weight is \(0, 4\); expected \(V, D\) with V >= 1"),
        ((torch.tensor(1.0), W, Y), ValueError, r"hidden is \(\); expected \(..., D\) with D >= 1"),
        ((torch.randn(6, 0), torch.randn(9, 0), Y), ValueError, r"hidden is \(6, 0\); expected"),
        ((H, W, Y[:5]), ValueError, r"labels are \(5,\), hidden \(6, 4\); expected labels of \(6,\)"),
        ((H, W, Y, torch.randn(8)), ValueError, r"bias is \(8,\), weight \(9, 4\); expected a bias of \(9,\)"),
        ((H, W.double(), Y), TypeError, "weight is torch.float64, hidden torch.float32"),
        ((H, W, Y, torch.randn(9).half()), TypeError, "bias is torch.float16, hidden torch.float32"),
        ((H.int(), W, Y), TypeError, "hidden is torch.int32; expected one of torch.float16"),
        ((H, W, Y.float()), TypeError, "labels are torch.float32; expected an integer dtype"),
        ((H, W, Y.bool()), TypeError, "labels are torch.bool"),
        ((H, [1.0], Y), TypeError, "weight is list; expected a torch.Tensor"),
        ((H, W.to(META), Y), ValueError, "weight is on meta, hidden on cpu"),
        ((H, W, Y.to(META)), ValueError, "labels is on meta, hidden on cpu"),
        ((H, W, Y, torch.randn(9, device=META)), ValueError, "bias is on meta, hidden on cpu"),
    ],
)
def test_mismatches_print_both_sides(arguments, error, message):
    with pytest.raises(error, match=message):
        hidden_to_log_probs(*arguments)


def test_logits_mismatches():
    with pytest.raises(ValueError, match=r"logits are \(6, 0\); expected \(..., V\) with V >= 1"):
        logits_to_log_probs(torch.randn(6, 0), Y)
    with pytest.raises(ValueError, match=r"labels are \(6,\), logits \(5, 9\)"):
        logits_to_log_probs(torch.randn(5, 9), Y)
