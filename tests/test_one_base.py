"""Saved exponentials relative to one number a row (Triton, interpreted): products read them as they are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import assert_close, head_on, planned, step
from torch import Tensor

from dpo_kernels import hidden_to_log_probs, plan, planner, reference
from dpo_kernels.backends.triton_fused import FusedTileOps
from dpo_kernels.call import Grads
from dpo_kernels.dispatch import BACKENDS
from dpo_kernels.kernels import keep, launch
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.overrides import override
from dpo_kernels.workload import Workload

TOKENS, FEATURES, VOCAB = 150, 32, 1100  # three tiles of vocabulary, a last block of 76 columns
CPU = torch.device("cpu")
WITHOUT = {"one_base": False}


def head_of(scale: float = 1.0, grads: str = "hidden,weight", ignored: float = 0.2):
    torch.manual_seed(0)
    head = head_on(CPU, TOKENS, FEATURES, VOCAB, torch.bfloat16, grads=grads, ignored=ignored)
    with torch.no_grad():
        head.hidden.mul_(scale)
    return head


def gradients(head, budget: int | None = None) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return step(head, torch.randn(head.labels.shape), budget, impl="triton").grads


def exact(head) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    cotangent = torch.randn(head.labels.shape).double()
    hidden, weight = (t.detach().double().requires_grad_() for t in (head.hidden, head.weight))
    log_probs = reference.hidden_to_log_probs(hidden, weight, head.labels)
    return torch.autograd.grad(log_probs, (hidden, weight), cotangent)


def off(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


@pytest.mark.parametrize(
    ("changes", "one_base"),
    [
        ({}, True),
        ({"grads": ("hidden",), "outputs": ("entropy",)}, False),  # nothing is kept
        ({"grads": ("weight",)}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, False),
        ({"grads": ("hidden", "weight", "bias")}, False),
        ({"rank": 4}, False),
        ({"softcap": 30.0}, False),
        ({"gradient_filter": 2**-12}, False),
        ({"impl": "torch"}, False),
    ],
)
def test_which_plans_have_it(changes, one_base):
    assert plan(TOKENS, FEATURES, VOCAB, **{"dtype": torch.bfloat16, "impl": "triton"} | changes).one_base is one_base


@pytest.mark.parametrize("mode", ["keep", "mixed"])
@pytest.mark.parametrize("grads", ["hidden,weight", "weight"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 300.0])
def test_gradients_are_as_exact_as_by_blocks(scale, grads, mode):
    """30 and 300: the labels of most rows lie more than exp(40) below the likeliest token."""
    head = head_of(scale, grads)
    made = planned(head, mode, impl="triton")
    assert made.one_base
    assert made.mode == mode
    right = exact(head)[-len(grads.split(",")) :]
    got = gradients(head, made.bytes)
    with override(capabilities=WITHOUT):
        by_blocks = gradients(head, planned(head, mode, impl="triton").bytes)
    for a, b, c in zip(got, by_blocks, right, strict=True):
        assert off(a, c) < 1.5 * off(b, c) + 2e-3  # bfloat16 rounds by 2e-3; the interpreter's products are not rounded


def rounded(t: Tensor) -> Tensor:
    return t.bfloat16().double()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("likely", [False, True])
def test_rounding_does_not_grow(scale, likely):
    """What a GPU rounds, where, in float64 (the interpreter's products are wider): by blocks exponentials and the
    gradient; relative to one base exponentials, and hidden states times their scales. docs/triton.md has the numbers.
    """
    torch.manual_seed(0)
    tokens, features, vocab = 256, 64, 4096
    h, w = (rounded(torch.randn(n, features) * scale**0.5 / features**0.25) for n in (tokens, vocab))
    z = h @ w.T
    p = z.softmax(1)
    label = torch.multinomial(p, 1) if likely else torch.randint(vocab, (tokens, 1))
    log_sum, grad = z.logsumexp(1, keepdim=True), torch.randn(tokens, 1).double()
    log_prob = z.gather(1, label) - log_sum
    dz = (-grad * p).scatter(1, label, -grad * torch.expm1(log_prob))

    maxima = z.view(tokens, -1, 128).amax(2).repeat_interleave(128, 1)
    by_blocks = -grad * rounded((z - maxima).exp()) * (maxima - log_sum).exp()
    by_blocks = rounded(by_blocks.scatter(1, label, -grad * torch.expm1(log_prob)))

    base = z.gather(1, label)
    base = torch.where(z.amax(1, keepdim=True) - base < keep.FAR.value, base, log_sum)
    entry = torch.expm1(log_prob) * (log_sum - base).exp()
    e = rounded((z - base).exp().scatter(1, label, entry))
    given_back = torch.where(rounded(entry) != 0, entry / rounded(entry), 1)
    scales = -grad * (base - log_sum).exp() * given_back
    found = {
        "hidden": (scales * (e @ w), by_blocks @ w, dz @ w),
        "weight": (e.T @ rounded(scales * h), by_blocks.T @ h, dz.T @ h),
    }
    for name, (ours, before, right) in found.items():
        print(f"scale {scale:5} likely {likely:d} {name}: {off(ours, right):.1e}, by blocks {off(before, right):.1e}")
    assert off(found["hidden"][0], found["hidden"][2]) < 1.1 * off(*found["hidden"][1:])
    assert off(found["weight"][0], found["weight"][2]) < 1.7 * off(*found["weight"][1:])


def test_rows_far_above_their_label_are_moved_alone(monkeypatch):
    head, seen = head_of(30.0, ignored=0), {}
    usual = launch.run_kernel

    def record(module, name, programs, warps, stages, arguments):
        before = arguments["exps"].clone() if name == "settle_kernel" else None
        usual(module, name, programs, warps, stages, arguments)
        if before is not None:
            seen.update(arguments, before=before)

    logits = head.hidden.float() @ head.weight.float().T
    head.labels[::2] = logits.argmax(1)[::2]  # every other row has the likeliest token as its label
    with override(launch=record):
        gradients(head)
    far = logits.amax(1) - logits.gather(1, head.labels[:, None])[:, 0] > 50
    assert 0 < far.sum() < TOKENS
    moved = seen["moved"].bool()
    assert moved[far].all()
    assert not moved[::2].any()
    changed = (seen["exps"] != seen["before"])[:, :VOCAB]
    changed.scatter_(1, head.labels[:, None], False)
    assert not changed[~moved].any()
    assert changed[far].any(1).all()
    assert seen["exps"].isfinite().all()


def test_a_row_whose_sum_is_mostly_on_another_rank():
    """Nothing here is far above the base, but the sum is: relative to it, nothing overflows. The label is elsewhere."""
    rows, vocab, blocks = 3, 100, 4
    z = torch.randn(rows, vocab)
    bases, log_sums = z[:, 0].clone(), torch.tensor([z[0].logsumexp(0), 36.0, 200.0])
    exps = torch.zeros(rows, 112, dtype=torch.bfloat16)
    exps[:, :vocab] = (z - bases[:, None]).exp().bfloat16()
    before, settled = exps.clone(), torch.empty(rows)
    launch.run(
        "keep", "settle_kernel", 1, 4,
        exps=exps, block_maxima=bases[:, None].expand(rows, blocks).contiguous(), bases=bases,
        moved=torch.zeros(rows, dtype=torch.int32), labels=torch.tensor([-40, -1, 100]),
        log_probs=torch.full((rows,), -5.0), maxima=log_sums - 1, log_sums=torch.ones(rows), settled=settled,
        n=rows, V=vocab, stride=112, maxima_stride=blocks, MAXIMA_COLUMNS=32, SLOTS=1, BLOCK_M=4, BLOCK_N=32,
    )  # fmt: skip
    assert torch.equal(exps[:2], before[:2])
    assert_close(settled, torch.stack([bases[0], bases[1], log_sums[2]]), 1e-5)
    assert_close(exps[2, :vocab].float(), (z[2] - 200).exp(), 1e-2 * float((z[2] - 200).exp().max()))


def test_the_entry_of_a_label_is_exact():
    """Nearly all of an unsure row's gradient is its label's entry: what rounding takes from it the scale gives back."""
    head = head_of(0.01, ignored=0)
    got, right = gradients(head)[0], exact(head)[0]
    assert off(got, right.bfloat16().double()) < 5e-4


@pytest.mark.parametrize("size", [3.0, 12.0, 200.0])
def test_sure_labels(size):
    """1 - p from some thousandths down to 0: their entries are small, or nothing at all, beside likelier tokens'."""
    head = head_of(ignored=0)
    with torch.no_grad():
        direction = head.weight.float() / head.weight.float().norm(dim=1, keepdim=True)
        head.hidden.copy_(size * direction[head.labels])
    results = []
    for changes in ({}, WITHOUT):
        with override(capabilities=changes):
            results.append(gradients(head))
    assert all(gradient.isfinite().all() for gradient in results[0])
    for got, same, right in zip(*results, exact(head), strict=True):
        assert (got.double() - right).norm() <= 1.5 * (same.double() - right).norm() + 4e-3 * right.norm()


def test_a_row_that_is_no_number_stays_one():
    head = head_of(ignored=0)
    with torch.no_grad():
        head.hidden[7] = torch.nan
    hidden, weight = gradients(head)
    assert hidden[7].isnan().all()
    assert hidden[8].isfinite().all()
    assert weight.isnan().all()


@pytest.mark.parametrize("where", ["the label", "all but the label", "a block"])
def test_banned_entries(where):
    """A bias of -inf: its gradient is not asked for."""
    head = head_of(ignored=0)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16)
    label = int(head.labels[3])
    if where == "the label":
        bias[label] = -torch.inf
    elif where == "a block":
        bias[256:320] = -torch.inf
    else:
        head.labels[:] = label
        bias[:] = -torch.inf
        bias[label] = 0
    head = head._replace(bias=bias)
    results = []
    for changes in ({}, WITHOUT):
        with override(capabilities=changes):
            results.append(gradients(head))
    for got, same in zip(*results, strict=True):
        assert torch.equal(got.isnan(), same.isnan())
        assert (got - same).nan_to_num().norm() <= 4e-3 * same.nan_to_num().norm()


def test_backward_may_run_again():
    head = head_of()
    log_probs = hidden_to_log_probs(*head[:3], impl="triton")
    first, second = (
        torch.autograd.grad(log_probs, (head.hidden, head.weight), torch.ones_like(log_probs), retain_graph=True)
        for _ in range(2)
    )
    twice = torch.autograd.grad(log_probs, (head.hidden, head.weight), torch.full_like(log_probs, 2.0))
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, twice, strict=True))


def test_log_probs_are_those_of_a_call_without_gradients():
    head = head_of()
    assert torch.equal(*(hidden_to_log_probs(*h[:3], impl="triton") for h in (head, head_of(grads="none"))))


def test_backward_makes_nothing_of_what_is_saved():
    head, names = head_of(), []

    def record(module, name, *rest):
        names.append(name)
        launch.run_kernel(module, name, *rest)

    with override(launch=record):
        gradients(head)
    assert set(names) == {
        "base_kernel", "forward_kernel", "merge_kernel", "finish_kernel", "settle_kernel", "scale_kernel",
    }  # fmt: skip
    assert names[-1] == "scale_kernel"


def test_a_plan_that_keeps_all_has_no_gradient_of_logits():
    """Its tile's room is free; the hidden states times their scales stand in it."""
    with override(arch=Arch("cuda", 9)):
        shape = (4096, 64, 128_000)
        made = plan(*shape, dtype=torch.bfloat16, device="cuda", impl="triton", memory_budget=2**32)
        with override(capabilities=WITHOUT):
            before = plan(*shape, dtype=torch.bfloat16, device="cuda", impl="triton", memory_budget=2**32)
    tile, scaled = 2 * made.tile_tokens * made.tile_vocab, 2 * made.tile_tokens * 64
    assert made.mode == before.mode == "keep"
    assert before.memory["tile and operands"] - made.memory["tile and operands"] == tile - scaled
    assert not made.hold_scaled  # one tile has all tokens


def test_hidden_states_are_scaled_once_where_there_is_room():
    """Where several tiles of tokens come again for each of the vocabulary."""
    head, scaled = head_of(ignored=0), []
    own = FusedTileOps._scale
    with override(capabilities={"tiles": ((64, 512), (64, 64))}):
        made = plan(TOKENS, FEATURES, VOCAB, torch.bfloat16, impl="triton", memory_budget=2**30)
        assert made.hold_scaled
        assert made.one_base
        assert made.memory["hidden states times their scales"] == 4 * FEATURES * (TOKENS - 64)
        with mock.patch.object(FusedTileOps, "_scale", lambda *what: scaled.append(1) or own(*what)):
            once = gradients(head, 2**30)
            assert len(scaled) == len(made.token_spans) == 3
            with mock.patch.object(planner.Workload, "scaled_rows", return_value=0):  # no room, by its own account
                each = gradients(head, 2**30 - 1)
    assert len(scaled) == 3 + 3 * made.vocab_tiles
    assert all(map(torch.equal, once, each))


def test_an_empty_part_of_a_vocabulary_has_no_scales():
    backend = BACKENDS["triton"]
    capable = backend.capabilities(CPU, backend.configure(CPU, FEATURES, torch.bfloat16, False))
    made = [
        planner.plan(Workload(
            TOKENS, FEATURES, vocab, torch.bfloat16, torch.bfloat16, Grads(True, True), entropy=False, softcap=False,
            labels=TOKENS, capabilities=capable, ranks=2,
        )) for vocab in (0, 1)
    ]  # fmt: skip
    assert [each.one_base for each in made] == [False, True]
