"""Modes: each is right, and all of them give the same log-probs to the last bit."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALL,
    MODES,
    PLAIN,
    assert_close,
    check_against_reference,
    detached,
    loss_of,
    planned,
    run,
    step,
)

from dpo_kernels import FusedLinearDPOLoss, hidden_to_log_probs, token_stats

EVERY = [  # the target's size, gradients, mode, outer loops of backward
    pytest.param("size", "none", "score", "", id="score"),
    pytest.param("size", "hidden", "frozen", "", id="frozen"),
    pytest.param("size", "hidden,weight", "keep", "vocab", id="keep"),
    pytest.param("size", "hidden,weight", "mixed", "vocab", id="mixed"),
    pytest.param("size", "hidden,weight", "recompute", "vocab", id="recompute"),
    pytest.param("deep", "hidden", "recompute", "tokens", id="frozen-head-that-does-not-fit"),
    pytest.param("deep", "hidden,weight", "recompute", "tokens,vocab", id="two-sweeps"),
    pytest.param("long", "hidden,weight", "mixed", "tokens", id="tokens-outside"),
]


@pytest.mark.parametrize(("size", "grads", "mode", "outer"), EVERY)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.bfloat16, PLAIN, id="bfloat16-plain", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, ALL, id="bfloat16-all"),
        pytest.param(torch.float32, ALL, id="float32-all"),
    ],
)
def test_every_mode_is_right(target, size, grads, mode, outer, options, dtype):
    head = target.head(*getattr(target, size), dtype, grads=grads, ignored=0.2)
    check_against_reference(head, outputs=(), memory_budget=planned(head, mode, outer).bytes, **options)


@pytest.mark.parametrize("options", [pytest.param(PLAIN, id="plain"), pytest.param(ALL, id="all")])
@pytest.mark.slow_on("triton-tiles")
def test_two_sweeps_in_part_kept(target, options):
    """In float32 a gradient is its own accumulator, so that one sweep fits wherever tokens are kept."""
    head = target.head(*target.deep, torch.bfloat16, grads="hidden,weight", ignored=0.2)
    budget = planned(head, "mixed", "tokens,vocab").bytes
    check_against_reference(head, outputs=(), memory_budget=budget, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow_on("triton-tiles")
def test_every_mode_is_right_in_float16(target, mode):
    head = target.head(*target.size, torch.float16, grads=MODES[mode])
    check_against_reference(head, outputs=(), memory_budget=planned(head, mode).bytes, **ALL)


@pytest.mark.parametrize(
    ("mode", "dtype", "options"),
    [
        pytest.param("keep", torch.bfloat16, ALL, id="keep-bfloat16-all"),
        pytest.param("keep", torch.float32, PLAIN, id="keep-float32-plain"),
        pytest.param("mixed", torch.bfloat16, PLAIN, id="mixed-bfloat16-plain"),
        pytest.param("mixed", torch.float32, ALL, id="mixed-float32-all"),
        pytest.param("recompute", torch.bfloat16, ALL, id="recompute-bfloat16-all"),
        pytest.param("recompute", torch.float32, PLAIN, id="recompute-float32-plain"),
    ],
)
@pytest.mark.slow_on("triton-tiles")
def test_policy_and_reference_get_the_same_log_probs_to_the_last_bit(target, dtype, options, mode):
    """A frozen reference (score) and a policy that start equal, under one budget: the first loss is exactly log 2."""
    budget = planned(target.head(*target.size, dtype, grads="hidden,weight"), mode).bytes
    results = {}
    for grads in ("hidden,weight", "none", "hidden", "weight"):
        torch.manual_seed(0)
        head = target.head(*target.size, dtype, grads=grads)
        results[grads] = hidden_to_log_probs(
            head.hidden, head.weight, head.labels, memory_budget=budget, **options
        ).detach()
    different = {grads: (r != results["none"]).sum().item() for grads, r in results.items()}
    assert not any(different.values()), f"tokens that differ from those without a gradient: {different}"
    assert results["none"].isfinite().all()


@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_the_first_loss_is_log_two(target, grads):
    tokens, features, vocab = target.size
    head = target.head((4, tokens // 4), features, vocab, torch.bfloat16, grads=grads)
    loss, chosen, rejected = FusedLinearDPOLoss(0.1)(
        head.hidden, head.weight, head.labels, ref_hidden=head.hidden.detach(), ref_weight=head.weight.detach()
    )
    log_two = -torch.nn.functional.logsigmoid(torch.zeros((), device=target.device))
    assert (loss, chosen, rejected) == (log_two, 0, 0)


def test_the_answer_does_not_depend_on_the_budget(target):
    head = target.head(*target.size, grads="hidden,weight")
    results = [
        run(token_stats, detached(head), outputs=(), memory_budget=planned(head, mode).bytes)
        for mode in ("keep", "mixed", "recompute")
    ]
    for stats, grads in results[1:]:
        assert_close(stats.log_probs, results[0][0].log_probs, 2e-6)
        for got, first in zip(grads[:2], results[0][1][:2], strict=True):
            assert_close(got, first, 2e-6 * first.abs().max().item())


@pytest.mark.parametrize("mode", ["frozen", "keep", "mixed", "recompute"])
def test_backward_runs_again(target, mode):
    head = target.head(*target.size, torch.bfloat16, grads=MODES[mode])
    loss = loss_of(token_stats(*head[:3], outputs=(), memory_budget=planned(head, mode).bytes))
    leaves = [t for t in head[:2] if t.requires_grad]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("spread", [4.0, 200.0])
def test_the_frozen_heads_sum_follows_the_maximum(target, order, spread):
    """Logits that grow from tile to tile rescale the sum; falling ones never do."""
    head = target.head(40, 16, target.wide, grads="hidden", ignored=0)
    ramp = torch.linspace(0, spread, target.wide, dtype=torch.float32, device=target.device)
    check_against_reference(head._replace(bias=ramp if order == "rising" else ramp.flip(0)), outputs=())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow_on("torch", "triton-tiles")
def test_a_label_out_of_range_is_nan_in_its_row_alone(target, unchecked_labels, mode):
    tokens, features, vocab = target.size
    bad = [3, tokens // 2]
    beside = torch.tensor([i for i in range(tokens) if i not in bad], device=target.device)
    head = target.head(tokens, features, vocab, torch.bfloat16, grads=MODES[mode], ignored=0)
    budget = planned(head, mode).bytes
    cotangent = torch.ones(tokens, device=target.device)
    right = step(head, cotangent, budget)
    head.labels[bad[0]], head.labels[bad[1]] = vocab, -7
    cotangent[bad] = 0
    got = step(head, cotangent, budget)
    assert got.log_probs[bad].isnan().all()
    assert torch.equal(got.log_probs[beside], right.log_probs[beside])
    if got.grads:
        assert torch.equal(got.grads[0][beside], right.grads[0][beside])
