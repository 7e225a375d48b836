"""A low-rank adapter on the head's weight: as if W + s B A had been made, in every mode, and it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import ALL, PLAIN, assert_as_good, assert_close, loss_of, make_head
from torch.utils.flop_counter import FlopCounterMode

import dpo_kernels
from dpo_kernels import LowRank, hidden_to_log_probs, plan, reference, token_stats

RANK = 5
NAMES = ("hidden", "weight", "a", "b")
BOTH = "hidden,low_rank"


def make(target, dtype=torch.float32, grads=BOTH, size=None, ignored=0.3):
    """Leaves (hidden, weight, a, b) and labels; an adapter is float32 beside a narrower head."""
    small = target.impl == "triton" and target.device.type == "cpu"  # interpreted: slow
    tokens, features, vocab = size or ((70, 32, 140) if small else target.size)
    head = make_head(tokens, features, vocab, dtype, grads="none", ignored=ignored)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = torch.randn(RANK, features, dtype=wide) / features**0.5
    b = torch.randn(vocab, RANK, dtype=wide)
    wanted = {"hidden": "hidden" in grads, "weight": "weight" in grads, "a": "low" in grads, "b": "low" in grads}
    leaves = [
        t.detach().to(target.device).requires_grad_(wanted[n])
        for n, t in zip(NAMES, (head.hidden, head.weight, a, b), strict=True)
    ]
    return leaves, head.labels.to(target.device)


def run(function, leaves, labels, dtype=None, **options):
    hidden, weight, a, b = leaves = [
        t.detach().to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad) for t in leaves
    ]
    stats = function(hidden, weight, labels, low_rank=LowRank(a, b, 0.5), **options)
    wanted = [t for t in leaves if t.requires_grad]
    if wanted:
        loss_of(stats).backward()
    return stats, [t.grad for t in leaves]


def check(leaves, labels, budget=None, impl=None, **options):
    exact, exact_grads = run(reference.token_stats, leaves, labels, torch.float64, **options)
    plain, plain_grads = run(reference.token_stats, leaves, labels, **options)
    got, grads = run(token_stats, leaves, labels, memory_budget=budget, impl=impl, **options)
    assert_as_good(got.log_probs, plain.log_probs, exact.log_probs, what="log_probs")
    for name, value, usual, truth in zip(NAMES, grads, plain_grads, exact_grads, strict=True):
        assert (value is None) == (truth is None), name
        if value is not None:
            assert_as_good(value, usual, truth, what=f"gradient of {name}")


def budgets(target, dtype, grads):
    """The bytes of a plan of each mode that budgets lead to; in both orders of the loops."""
    tokens, features, vocab = target.size
    found = {}

    def of(budget):
        return plan(
            tokens, features, vocab, dtype, grads=tuple(grads.split(",")), memory_budget=budget, device=target.device,
            impl=target.impl, rank=RANK,
        )  # fmt: skip

    most = of(2**50).bytes
    with pytest.raises(ValueError, match="need at least") as refused:
        of(1)
    least = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    for i in range(81):
        made = of(least + (most - least) * i // 80)
        found.setdefault((made.mode, ",".join(s.outer for s in made.sweeps)), made.bytes)
    assert {mode for mode, _ in found} == {"keep", "mixed", "recompute"}
    assert {outer for _, outer in found} == {"vocab", "tokens"}
    return [*{mode: size for (mode, _), size in found.items()}.values()]


@pytest.mark.parametrize(
    ("grads", "options"),
    [("none", ALL), ("low_rank", PLAIN), ("hidden", PLAIN), (BOTH, ALL), ("hidden,weight,low_rank", PLAIN)],
    ids=["none", "low_rank", "hidden", "both", "all"],
)
@pytest.mark.slow_on("triton-tiles")
def test_as_if_the_sum_had_been_made(target, grads, options):
    leaves, labels = make(target, grads=grads)
    check(leaves, labels, impl=target.impl, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.slow_on("triton-tiles")
def test_every_dtype(target, dtype):
    leaves, labels = make(target, dtype)
    check(leaves, labels, impl=target.impl)


def test_with_the_entropy(target):
    leaves, labels = make(target)
    check(leaves, labels, impl=target.impl, outputs=("entropy", "log_sum_sq_probs"))


@pytest.mark.slow_on("triton-tiles")
def test_every_budget_gives_the_same(target):
    """Log-probs to the bit where the tiles are the same; gradients to rounding."""
    leaves, labels = make(target, torch.bfloat16, size=target.size, ignored=0.0)
    found = budgets(target, torch.bfloat16, BOTH)
    results = [run(token_stats, leaves, labels, memory_budget=b, impl=target.impl, outputs=()) for b in found]
    for stats, grads in results[1:]:
        assert_close(stats.log_probs, results[0][0].log_probs, 1e-4)
        for got, first in zip(grads, results[0][1], strict=True):
            if first is not None:
                assert_close(got, first, 2e-2 * first.abs().max().item())


def test_an_adapter_that_is_off_or_zero_changes_no_bit(target):
    """As a policy before its first step, and its reference, are computed."""
    (hidden, weight, a, b), labels = make(target, torch.bfloat16, grads="none")
    off = hidden_to_log_probs(hidden, weight, labels, low_rank=LowRank(a, b, 0.0), impl=target.impl)
    new = hidden_to_log_probs(
        hidden.requires_grad_(), weight, labels, low_rank=LowRank(a, torch.zeros_like(b), 2.0), impl=target.impl
    )
    assert torch.equal(off, new)
    assert_close(off, hidden_to_log_probs(hidden, weight, labels, impl=target.impl), 1e-4)


def test_what_does_not_count_reaches_nothing(target):
    """A row whose label is ignored may hold anything."""
    leaves, labels = make(target, size=(40, 16, 130))
    with torch.no_grad():
        leaves[0][labels == -100] = torch.nan
    _, grads = run(token_stats, leaves, labels, outputs=(), impl=target.impl)
    assert all(g.isfinite().all() for g in grads if g is not None)
    assert grads[0][labels == -100].eq(0).all()


def test_few_tokens(target):
    leaves, labels = make(target, size=(1, 16, 130), ignored=0.0)
    check(leaves, labels, impl=target.impl)
    labels[:] = -100
    _, grads = run(token_stats, leaves, labels, outputs=(), impl=target.impl)
    assert all(g.eq(0).all() for g in grads if g is not None)


@pytest.mark.slow_on("torch", "triton-tiles")
def test_strides_and_compile(target):
    (hidden, weight, a, b), labels = make(target, size=(30, 16, 130))
    low_rank = LowRank(a.T.contiguous().T, b.T.contiguous().T, 0.5)
    exact = reference.hidden_to_log_probs(hidden, weight, labels, low_rank=low_rank)
    exact_grads = torch.autograd.grad(exact.sum(), (hidden, a, b))

    def call(hidden, a, b):
        return hidden_to_log_probs(hidden, weight, labels, low_rank=LowRank(a, b, 0.5), impl=target.impl)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        got = function(hidden, *low_rank[:2])
        assert_close(got, exact, 1e-5)
        grads = torch.autograd.grad(got.sum(), (hidden, a, b))
        for value, truth in zip(grads, exact_grads, strict=True):
            assert_close(value, truth, 1e-5 * truth.abs().max().item())


@pytest.mark.slow_on("torch", "triton-tiles")
def test_opcheck(target):
    (hidden, weight, a, b), labels = make(target, size=(6, 16, 30))
    options = dpo_kernels.call.Options(grads=dpo_kernels.call.Grads.of(("hidden", "low_rank"))).encode()
    torch.library.opcheck(dpo_kernels.ops.token_stats_op, (hidden, weight, None, a, b, labels, *options))


def test_the_products_are_counted(target):
    """One of D + r columns forward; backward dz W, and r columns for each of dz b and dz^T u."""
    leaves, labels = make(target, size=(50, 16, 130), ignored=0.0)
    with FlopCounterMode(display=False) as counter:
        run(token_stats, leaves, labels, outputs=(), impl=target.impl)
    own = {str(op): n for op, n in counter.get_flop_counts()["Global"].items() if "dpo_kernels" in str(op)}
    assert sum(own.values()) == 2 * 50 * 130 * ((16 + RANK) + 16 + 2 * RANK)
    planned = plan(50, 16, 130, torch.float32, grads=("hidden", "low_rank"), impl="torch", rank=RANK)
    assert planned.gemms == pytest.approx(((16 + RANK) + 16 + 2 * RANK) / 16)


def test_a_plan_says_it():
    made = plan(2048, 512, 151_936, torch.float32, grads=("hidden", "low_rank"), impl="torch", rank=16)
    assert "low rank 16" in str(made)
    assert "gradient of hidden and low rank" in str(made)
    assert made.memory["low-rank adapter"] < 16 * 4 * (2048 + 151_936) * 1.5
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    without = plan(2048, 512, 151_936, torch.float32, grads=("hidden",), impl="torch")
    assert "rank" not in str(without)
    assert without.mode == "frozen"


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda a, b: (a, b), TypeError, r"low_rank is tuple; expected dpo_kernels.LowRank"),
        (lambda a, b: LowRank(a.T, b), ValueError, r"low_rank.a is \(16, 5\), low_rank.b \(30, 5\), weight \(30, 16\)"),
        (lambda a, b: LowRank(a[:0], b[:, :0]), ValueError, "with r >= 1"),
        (lambda a, b: LowRank(a.double(), b), TypeError, "low_rank.a is torch.float64, hidden torch.float32"),
        (lambda a, b: LowRank(a, b.long()), TypeError, "low_rank.b is torch.int64"),
        (lambda a, b: LowRank(a, b.to("meta")), ValueError, "low_rank.b is on meta, hidden on cpu"),
        (lambda a, b: LowRank(a, b, float("nan")), ValueError, "low_rank.scale is nan; expected a finite number"),
        (lambda a, b: LowRank(a, b, "2"), ValueError, "low_rank.scale is '2'"),
    ],
)
def test_what_is_no_adapter_is_refused(change, error, told):
    a, b = torch.randn(5, 16), torch.randn(30, 5)
    with pytest.raises(error, match=told):
        hidden_to_log_probs(torch.randn(4, 16), torch.randn(30, 16), torch.zeros(4).long(), low_rank=change(a, b))
