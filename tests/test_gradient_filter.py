"""gradient_filter: what is left out is what was said, the rest is exact, and log-probs never change.

With the identity for a weight hidden states are logits and their gradient is dz itself, so each entry can be looked at:
where it was left out it is an even part of what its row leaves out, and only there.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Head, make_head, slow
from torch import Tensor

import dpo_kernels
from dpo_kernels import FusedLinearDPOLoss, LowRank, hidden_to_log_probs, plan, token_stats
from dpo_kernels.overrides import override

FILTER = 2**-10
TILES = ((192, 256), (64, 64))  # several of both, and groups that are not full
IMPLS = ("torch", "cpp", "triton")
V = 704  # features too: of "triton" a multiple of 16
# Where the interpreter takes long and other tests go the same way.
LESS_OF_TRITON = pytest.mark.parametrize("impl", [*IMPLS[:2], slow("triton")], indirect=True)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def peaked(n: int, v: int, impl: str = "torch") -> tuple[Tensor, Tensor]:
    """Logits whose softmax lies on few entries of a tenth of the vocabulary, and labels. Where forward may mark before
    it knows all sums, they are its first entries."""
    made, largest = torch.Generator().manual_seed(1), 14.0
    z = torch.randn(n, v, generator=made, dtype=torch.float64)
    some = torch.randperm(v, generator=made)[: v // 10]
    if impl == "triton":
        some = torch.arange(v // 10)
    z[:, some[:5]] += 6
    own = some[torch.randint(len(some), (n, 3), generator=made)]
    z.scatter_add_(1, own, torch.full((n, 3), largest, dtype=torch.float64))
    labels = torch.where(
        torch.rand(n, generator=made) < 0.5, own[:, 0], some[torch.randint(v // 10, (n,), generator=made)]
    )
    return z, labels


def sure_head(dtype: torch.dtype = torch.float32, grads: str = "hidden,weight,bias") -> Head:
    """300 tokens, 64 features, 2,000 entries: hidden states that point at their label."""
    torch.manual_seed(0)
    weight, labels = torch.randn(2000, 64) / 8, torch.randint(2000, (300,))
    hidden = 14 * weight[labels] + 0.5 * torch.randn(300, 64)
    labels[::9] = -100
    leaves = {"hidden": hidden, "weight": weight, "bias": 0.1 * torch.randn(2000)}
    leaves = {name: t.to(dtype).requires_grad_(name in grads.split(",")) for name, t in leaves.items()}
    return Head(leaves["hidden"], leaves["weight"], labels, leaves["bias"])


def run(z: Tensor, labels: Tensor, dtype: torch.dtype, share: float | None = FILTER, **options):
    """Statistics, the upstream gradient, and the gradients of hidden states, weight and bias."""
    hidden, weight = z.to(dtype).requires_grad_(), torch.eye(z.shape[1], dtype=dtype).requires_grad_()
    bias = torch.linspace(-1, 1, z.shape[1]).to(dtype).requires_grad_()
    with override(capabilities={"tiles": TILES}):
        stats = token_stats(hidden, weight, labels, bias, outputs=("dropped_mass",), gradient_filter=share, **options)
    upstream = torch.linspace(0.5, -1.5, len(labels), dtype=stats.log_probs.dtype)
    stats.log_probs.backward(upstream)
    return stats, upstream, hidden, weight, bias


def share_of(z: Tensor, temperature=1.0, logit_scale=1.0, softcap=None) -> tuple[Tensor, Tensor, Tensor]:
    """p, the cap's derivative, and p times it, in float64."""
    u = z * logit_scale
    capped = u if softcap is None else softcap * torch.tanh(u / softcap)
    derivative = torch.ones_like(u) if softcap is None else 1 - (capped / softcap) ** 2
    p = (capped / temperature).softmax(1)
    return p, derivative, p * derivative


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 30.0, "temperature": 1.5, "logit_scale": 1.3}], ids=["plain", "all"]
)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in IMPLS[:2] for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    + [("triton", torch.float32), slow("triton", torch.bfloat16), slow("triton", torch.float16)],
    indirect=["impl"],
)
def test_what_is_left_out_is_small_told_and_nothing_else(impl, dtype, options):
    z, labels = peaked(500, V, impl)
    labels[::7] = -100
    stats, upstream, hidden, weight, bias = run(z, labels, dtype, impl=impl, **options)
    counts = labels >= 0
    a = (hidden.detach().double() + bias.detach().double())[counts]
    p, derivative, share = share_of(a, **options)
    slope = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    one = torch.nn.functional.one_hot(labels[counts], V).double()
    exact = upstream.double()[counts, None] * (one - p) * derivative * slope
    got = hidden.grad.double()
    assert not got[~counts].any()
    got = got[counts]
    in_16_bits = dtype in (torch.float16, torch.bfloat16)
    relative, absolute = {torch.float32: (2e-6, 1e-7), torch.float64: (1e-12, 1e-15)}.get(dtype, (1e-2, 1e-6))
    told = stats.dropped_mass.double()
    assert not told[~counts].any()
    given_back = (told * upstream.double())[counts, None] * -slope / V
    step = 1e-7 if dtype == torch.float16 else 0  # between its smallest numbers
    out = (got - given_back).abs() <= relative * given_back.abs() + step
    if dtype == torch.float16:  # rounds small numbers so: of columns that all tokens of a group left out
        alike, sizes = out | (one == 1), [128, 64, 128, 64, len(got) - 384]
        sizes = [64] * 6 + sizes[4:] if impl == "triton" else sizes
        out = torch.cat([group.all(0).expand_as(group) for group in alike.split(sizes)]) & (one == 0)
    if not options:
        assert got.sum(1).abs().max() < (2e-2 if in_16_bits else 1e-6)
    got = got - given_back
    assert (weight.grad.double() - got.T @ hidden.detach().double()[counts]).abs().max() < (
        2e-2 if in_16_bits else 3e-6
    ) * weight.grad.abs().max()
    assert (bias.grad.double() - got.sum(0)).abs().max() < (2e-2 if in_16_bits else 3e-6) * got.abs().sum(0).max()
    torch.testing.assert_close(got[~out], exact[~out], rtol=relative, atol=absolute)
    assert 0.5 < out.double().mean() < 0.95
    assert share[out].max() < FILTER
    assert not (out & (one == 1)).any()
    assert ((share < FILTER) & ~out).any(), "groups keep columns for one token's sake"
    left = torch.where(out, share, 0.0).sum(1)
    # In float16 small exponentials are rounded to steps.
    torch.testing.assert_close(
        told[counts], left, rtol=3e-2 if in_16_bits else 1e-4, atol=3e-6 if dtype == torch.float16 else 1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_those_without_it_to_the_last_bit(impl, dtype):
    z, labels = peaked(300, V, impl)
    with_it, without = (run(z, labels, dtype, share, impl=impl)[0] for share in (FILTER, None))
    assert torch.equal(with_it.log_probs, without.log_probs)
    assert with_it.dropped_mass.max() > 0
    assert not without.dropped_mass.any()


@LESS_OF_TRITON
def test_a_filter_of_0_is_the_exact_path_to_the_last_bit(impl):
    z, labels = peaked(300, V, impl)
    first, second = (run(z, labels, torch.float32, share, impl=impl) for share in (0.0, None))
    for one, other in zip(first[2:], second[2:], strict=True):
        assert torch.equal(one.grad, other.grad)
    assert plan(300, V, V, impl=impl, gradient_filter=0.0) == plan(300, V, V, impl=impl)


@LESS_OF_TRITON
@pytest.mark.parametrize("shift", [-90.0, 60.0, 3000.0])
def test_logits_far_from_zero(impl, shift):
    """The kernels' sums are relative to something else there, which changes from tile to tile."""
    z, labels = peaked(300, V, impl)
    z = z + shift + torch.linspace(10, -10, V, dtype=torch.float64)
    stats, upstream, hidden, *_ = run(z, labels, torch.float32, impl=impl)
    bias = torch.linspace(-1, 1, V).double()
    p, _, _ = share_of(hidden.detach().double() + bias)
    exact = upstream.double()[:, None] * (torch.nn.functional.one_hot(labels, V) - p)
    given_back = (-stats.dropped_mass * upstream / V)[:, None]
    got = hidden.grad - given_back
    out = got.abs() < 1e-5 * given_back.abs()
    torch.testing.assert_close(got[~out].double(), exact[~out], rtol=1e-3, atol=1e-6)
    assert p[out].max() < FILTER
    assert out.double().mean() > 0.3
    torch.testing.assert_close(stats.dropped_mass.double(), torch.where(out, p, 0.0).sum(1), rtol=2e-3, atol=1e-9)


@LESS_OF_TRITON
def test_a_flat_softmax_goes_the_dense_way(impl):
    """Every entry is far above the filter: tiles are kept whole, and nothing is left out."""
    z = torch.randn(300, V, dtype=torch.float64)
    labels = torch.randint(V, (300,))
    filtered, exact = (run(z, labels, torch.float32, share, impl=impl) for share in (1e-7, None))
    assert not filtered[0].dropped_mass.any()
    for one, other in zip(filtered[2:], exact[2:], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS[:2], indirect=True)
def test_a_tile_that_was_kept_whole_is_looked_at_again(impl):
    """The likely entries are the last: what comes before seems worth it until they are known, but for the labels, whose
    logits are low."""
    torch.manual_seed(0)
    z, labels = torch.randn(200, V, dtype=torch.float64), torch.full((200,), V - 1)
    z[:, 600:620] += 14
    stats, upstream, hidden, *_ = run(z, labels, torch.float32, impl=impl)
    given_back = (-stats.dropped_mass * upstream / V)[:, None]
    out = (hidden.grad - given_back).abs() <= 2e-6 * given_back.abs()
    assert out[:, :256].all()  # the first of three tiles
    p = (hidden.detach() + torch.linspace(-1, 1, V)).double().softmax(1)
    torch.testing.assert_close(stats.dropped_mass.double(), torch.where(out, p, 0.0).sum(1), rtol=1e-4, atol=1e-9)


@LESS_OF_TRITON
def test_without_room_tiles_are_multiplied_again(impl):
    """Budgets from the least on: of an exact call, then of arenas that hold more and more."""
    head = sure_head()
    exact = _gradients(head, None, impl=impl)
    options = {"impl": impl, "gradient_filter": 2**-9, "labels": 300}
    with override(capabilities={"tiles": TILES, "scratch": 2**16}):
        least = dpo_kernels.functional.least_budget(
            int((head.labels >= 0).sum()), 64, 2000, torch.float32, grads=("hidden", "weight", "bias"), **options
        )
        dropped = []
        between = () if impl == "triton" else (int(1.3 * least), 2 * least, 8 * least)
        for budget in (least, *between, 2**30):
            got = _gradients(head, 2**-9, impl=impl, memory_budget=budget)
            dropped.append(float(got[0].mean()))
            for one, other in zip(got[1:], exact[1:], strict=True):
                assert (one - other).abs().max() <= 0.2 * other.abs().max()
    assert dropped == sorted(dropped)
    assert impl != "triton" or dropped[0] == 0, "the least has no room for marks"
    assert dropped[0] < dropped[-1], "less room, less left out"


def _gradients(head, share, **options):
    hidden, weight, bias = (t.detach().requires_grad_() for t in (head.hidden, head.weight, head.bias))
    stats = token_stats(hidden, weight, head.labels, bias, outputs=("dropped_mass",), gradient_filter=share, **options)
    stats.log_probs.sum().backward()
    return [stats.dropped_mass, hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("grads", ["hidden", "weight", "hidden,weight"])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in IMPLS[:2] for dtype in (torch.float32, torch.bfloat16)]
    + [slow("triton", torch.float32), slow("triton", torch.bfloat16)],
    indirect=["impl"],
)
def test_any_of_the_gradients_alone(impl, dtype, grads):
    made = []
    for share in (2**-9, None):
        head = sure_head(dtype, grads)
        with override(capabilities={"tiles": TILES}):
            stats = token_stats(
                head.hidden, head.weight, head.labels, outputs=("dropped_mass",), gradient_filter=share, impl=impl
            )
        stats.log_probs.sum().backward()
        made.append((stats, head))
    (filtered, got), (_, exact) = made
    assert filtered.dropped_mass.max() > 1e-4
    if "hidden" in grads:  # the bound of the docstring
        off = (got.hidden.grad - exact.hidden.grad).double().norm(dim=1)
        slack = 1e-5 if dtype == torch.float32 else 0.02 * exact.hidden.grad.double().norm(dim=1).max()
        assert (off <= 2 * filtered.dropped_mass * exact.weight.double().norm(dim=1).max() + slack).all()
    else:
        assert got.hidden.grad is None
    if "weight" in grads:
        assert (got.weight.grad - exact.weight.grad).norm() < 0.2 * exact.weight.grad.norm()
    else:
        assert got.weight.grad is None


@LESS_OF_TRITON
def test_an_adapter_on_the_head(impl):
    def gradients(share):
        head = sure_head()
        low_rank = LowRank(
            (0.1 * torch.randn(4, 64)).requires_grad_(), (0.1 * torch.randn(2000, 4)).requires_grad_(), 0.5
        )
        given = head.hidden, head.weight.detach()
        with override(capabilities={"tiles": TILES}):
            stats = token_stats(
                *given, head.labels, low_rank=low_rank, outputs=("dropped_mass",), gradient_filter=share, impl=impl
            )
        stats.log_probs.sum().backward()
        return stats.dropped_mass, head.hidden.grad, low_rank.a.grad, low_rank.b.grad

    filtered, exact = gradients(2**-9), gradients(None)
    assert filtered[0].max() > 1e-4
    for one, other in zip(filtered[1:], exact[1:], strict=True):
        assert 0 < (one - other).norm() < 0.2 * other.norm()


def test_backward_may_run_again(impl):
    z, labels = peaked(200, V, impl)
    hidden = z.float().requires_grad_()
    made = hidden_to_log_probs(hidden, torch.eye(V), labels, gradient_filter=FILTER, impl=impl).sum()
    first, second = (torch.autograd.grad(made, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.unique().numel() < 0.5 * first.numel(), "entries that are left out are alike in a row"


@LESS_OF_TRITON
def test_rows_that_are_nan_stay_so_and_touch_no_other(impl):
    z, labels = peaked(300, V, impl)
    clean = run(z, labels, torch.float32, impl=impl)[2].grad
    z[150, 30] = torch.nan
    stats, _, hidden, *_ = run(z, labels, torch.float32, impl=impl)
    assert stats.log_probs[150].isnan()
    assert hidden.grad[150].isnan().any()
    others = torch.arange(300) != 150
    assert not hidden.grad[others].isnan().any()
    torch.testing.assert_close(hidden.grad[others], clean[others], rtol=1e-5, atol=FILTER)


def test_no_token_and_no_gradient(impl):
    z, labels = peaked(50, V, impl)
    none = run(z, torch.full_like(labels, -100), torch.float32, impl=impl)
    assert not none[2].grad.any()
    assert not none[3].grad.any()
    with torch.no_grad():
        stats = token_stats(z.float(), torch.eye(V), labels, outputs=("dropped_mass",), gradient_filter=0.1, impl=impl)
    assert not stats.dropped_mass.any()


def test_a_compiled_call_has_it():
    z, labels = peaked(200, V)
    hidden = z.float().requires_grad_()

    def loss(hidden):
        stats = token_stats(hidden, torch.eye(V), labels, outputs=("dropped_mass",), gradient_filter=FILTER)
        return stats.log_probs.sum(), stats.dropped_mass

    expected = torch.autograd.grad(loss(hidden)[0], hidden)[0]
    compiled, dropped = torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    assert torch.equal(torch.autograd.grad(compiled, hidden)[0], expected)
    assert torch.equal(dropped, loss(hidden)[1])


def test_the_module_passes_it_on():
    torch.manual_seed(0)
    head = sure_head()
    made = []
    for share in (2**-5, None):
        hidden = head.hidden.detach().view(4, 75, 64).requires_grad_()
        loss = FusedLinearDPOLoss(reference_free=True, gradient_filter=share)
        loss(hidden, head.weight.detach(), head.labels.view(4, 75)).loss.backward()
        made.append(hidden.grad)
    assert not torch.equal(*made)
    assert "gradient_filter=0.03125" in repr(FusedLinearDPOLoss(gradient_filter=2**-5))


def test_the_plan_says_so():
    made = plan(4096, 512, 151_936, gradient_filter=2**-12, memory_budget=2**30)
    assert made.mode == "sparse"
    assert made.gemms == 1
    assert made.bytes <= 2**30
    assert "what passes the filter" in str(made)
    assert plan(4096, 512, 151_936, grads=(), gradient_filter=2**-12).mode == "score"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"gradient_filter": -0.1}, ValueError, "gradient_filter -0.1 must be >= 0 and < 1"),
        ({"gradient_filter": 1.0}, ValueError, "gradient_filter 1.0 must be"),
        ({"gradient_filter": float("nan")}, ValueError, "gradient_filter nan must be"),
        ({"gradient_filter": "auto"}, TypeError, "gradient_filter is 'auto'; expected a probability"),
        ({"gradient_filter": True}, TypeError, "gradient_filter is True"),
        ({"gradient_filter": 0.1, "outputs": ("entropy",)}, ValueError, "does not go with outputs"),
    ],
)
def test_what_it_does_not_go_with(given, error, words):
    head = make_head(10, 16, 100)
    with pytest.raises(error, match=words.replace("(", r"\(")):
        token_stats(head.hidden, head.weight, head.labels, **{"outputs": (), **given})


def test_products_of_the_library_s_tiles_have_no_columns_to_gather():
    """Features that are no multiple of 16 go to cuBLAS."""
    pytest.importorskip("triton")
    head = make_head(10, 18, 100)
    with pytest.raises(ValueError, match="18 features are no multiple of 16"):
        token_stats(head.hidden, head.weight, head.labels, outputs=(), gradient_filter=0.1, impl="triton")


@pytest.mark.parametrize("broken", [False, True])
def test_a_label_s_column_stays_and_so_does_one_that_is_no_number(broken):
    """Groups of 64: each token has its own label; the others' logits are far below it, but those that forward meets
    first, before it has seen a label."""
    pytest.importorskip("triton")
    z, labels = torch.full((128, V), -30.0), 64 + torch.arange(128) * 4
    z[:, 0], z[torch.arange(128), labels] = 0.0, 5.0
    if broken:
        z[100, V - 1] = torch.nan
    weight = torch.eye(V).requires_grad_()
    stats = token_stats(z, weight, labels, outputs=("dropped_mass",), gradient_filter=2**-8, impl="triton")
    of_each = [torch.autograd.grad(s.sum(), weight, retain_graph=True)[0] for s in stats.log_probs.split(64)]
    first, second = (grad.ne(0).any(1).nonzero()[:, 0].tolist() for grad in of_each)
    if broken:  # by whose product all logits of the row are no numbers
        assert len(second) == V
        assert stats.dropped_mass[100] == 0
    else:
        assert first == [0, *labels[:64].tolist()]
        assert second == [0, *labels[64:].tolist()]
        expected = torch.full((128,), (V - 65) * 2.718281828**-35 / (1 + 2.718281828**-5))
        torch.testing.assert_close(stats.dropped_mass, expected, rtol=1e-3, atol=0)


def test_a_tile_of_which_most_stays_is_computed_whole(monkeypatch):
    """And what does not stay of it is left out too."""
    pytest.importorskip("triton")
    from dpo_kernels.backends.triton_fused import FusedTileOps

    calls = {"masked_products": 0, "gathered_products": 0}
    for name in calls:
        own = getattr(FusedTileOps, name)

        def counted(self, *given, own=own, name=name):
            calls[name] += 1
            return own(self, *given)

        monkeypatch.setattr(FusedTileOps, name, counted)
    z, labels = peaked(192, V, "triton")
    z[:, :256], z[:, 256:] = torch.randn(192, 256), z[:, 256:].clamp(max=5) - 20  # most of the first tile stays
    z[:, 200:250] = -40
    labels = labels.clamp(max=190)
    stats, upstream, hidden, *_ = run(z, labels, torch.float32, 2**-9, impl="triton")
    assert calls == {"masked_products": 1, "gathered_products": 2}
    given_back = (-stats.dropped_mass * upstream / V)[:, None]
    out = (hidden.grad - given_back).abs() <= 2e-6 * given_back.abs()
    assert out[:, 200:250].all()
    assert out[:, 256:].all()
    assert not out[:, :200].any()


@pytest.mark.parametrize("vocab", [10_000, 9_999])
def test_columns_are_taken_in_parts_that_grow(vocab):
    """Where exponentials are not saved: each part knows what came before it."""
    pytest.importorskip("triton")
    with override(capabilities={"tiles": ((128, 512),), "scratch": 0}):
        options = {"impl": "triton", "gradient_filter": FILTER, "memory_budget": 2**21}
        made = plan(300, 64, vocab, torch.float32, **options)
    starts = [part.start for part in made.forward_spans]
    assert (made.mode, made.group, made.kept_tokens) == ("gather", 64, 0)
    assert made.one_pass
    first = made.first_part
    assert 0 < first < vocab / 2
    assert starts[:4] == [0, first, 2 * first, 4 * first]
    assert made.forward_spans[-1].stop == vocab
    assert f"leaves columns that pass it, of every {made.group} tokens" in str(made)
    assert plan(300, 64, vocab, torch.float32, impl="triton", gradient_filter=FILTER).first_part == 0, "all are saved"


@pytest.mark.parametrize("room", ["none", "some", "all"])
def test_sure_rows_leave_out_what_they_do_not_hold(room):
    """One of a group would keep all columns if the sum that its shares are of did not know its label."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    z, labels = torch.randn(192, V), torch.randint(V, (192,))
    z[torch.arange(192), labels] = 25.0
    budget = {"none": 3 * 2**20, "some": 4_000_000, "all": None}[room]
    with override(capabilities={"tiles": TILES, "scratch": 0}):
        made = plan(192, V, V, torch.float32, impl="triton", gradient_filter=FILTER, memory_budget=budget)
        stats, upstream, hidden, *_ = run(z, labels, torch.float32, impl="triton", memory_budget=budget)
    assert made.mode == "gather"
    assert (made.kept_tokens > 0, made.kept_tokens == 192) == (room != "none", room == "all")
    p = (hidden.detach().double() + torch.linspace(-1, 1, V)).softmax(1)
    given_back = (-stats.dropped_mass * upstream / V)[:, None]
    out = (hidden.grad - given_back).abs() <= 1e-4 * given_back.abs()
    assert out.double().mean() > 0.9
    torch.testing.assert_close(stats.dropped_mass.double(), torch.where(out, p, 0.0).sum(1), rtol=1e-4, atol=1e-12)
