"""The Triton kernels: in the interpreter where there is no GPU (tests/conftest.py), against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_close, check_against_reference, detached, loss_of, make_head, note_errors, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_kernels import available_impls, hidden_to_log_probs, logits_to_log_probs, ops, plan, reference, token_stats
from dpo_kernels.backends import triton as triton_backend
from dpo_kernels.backends.pytorch import PyTorchBackend
from dpo_kernels.call import Grads, Options, Tokens, Transform
from dpo_kernels.kernels import configs, launch
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.kernels.softmax_state import expm1, tanh
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"softcap": 6.0, "temperature": 1.5, "logit_scale": 0.7}, id="capped"),
]

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the device to the same")
pytestmark = needs_interpreter


@pytest.fixture(params=["fused", "tiles"])
def strategy(request, override) -> str:
    """Everything by one strategy."""
    override(kernels={"strategy": request.param})
    return request.param


@pytest.fixture
def small_tiles(override):
    """Tiles that a small shape has many of."""
    return lambda *tiles: override(capabilities={"tiles": tiles, "scratch": 0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("grads", ["none", "hidden", "hidden,weight", "weight,bias", "hidden,weight,bias"])
@pytest.mark.parametrize("outputs", [(), OPTIONAL_OUTPUTS], ids=["log_probs", "all"])
def test_numbers(strategy, dtype, options, grads, outputs):
    head = make_head(100, 48, 700, dtype, bias="bias" in grads, grads=grads)
    check_against_reference(head, outputs=outputs, impl="triton", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "vocab"),
    [
        pytest.param(1, 16, 5, id="one-token-tiny-vocabulary"),
        pytest.param((5, 13), 32, 129, id="one-past-the-last-block"),
        pytest.param(33, 80, 64, id="one-block"),
        pytest.param(70, 7, 600, id="features-that-fused-kernels-cannot-read"),
    ],
)
def test_shapes(strategy, dtype, tokens, features, vocab):
    check_against_reference(make_head(tokens, features, vocab, dtype, bias=True), outputs=(), impl="triton")


MODES = [  # gradients, budget in KiB, mode, outer loops
    pytest.param("none", 900, "score", "", id="score"),
    pytest.param("hidden", 900, "frozen", "", id="frozen"),
    pytest.param("hidden,weight", 900, "keep", "vocab", id="keep"),
    pytest.param("hidden,weight", 340, "mixed", "vocab", id="mixed"),
    pytest.param("hidden,weight", 250, "recompute", "vocab", id="recompute"),
    pytest.param("hidden,weight", 200, "recompute", "tokens,vocab", id="two-sweeps"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize(("grads", "budget", "mode", "outer"), MODES)
def test_modes(strategy, small_tiles, grads, budget, mode, outer, options, dtype):
    # Where cuBLAS makes tiles, kept tokens fill whole ones.
    small_tiles((64, 128) if mode == "mixed" else (128, 128))
    head = make_head(200, 64, 500, dtype, grads=grads)
    if dtype == torch.bfloat16:
        wanted = tuple(name for name in grads.split(",") if name != "none")
        counted = int((head.labels != -100).sum())
        made = plan(
            counted, 64, 500, dtype, grads=wanted, memory_budget=budget * 1024, impl="triton", labels=200
        )  # fmt: skip
        assert (made.mode, ",".join(sweep.outer for sweep in made.sweeps)) == (mode, outer)
    check_against_reference(head, outputs=(), impl="triton", memory_budget=budget * 1024, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
def test_every_mode_gives_the_same_log_probs_to_the_last_bit(strategy, small_tiles, override, options, dtype):
    """Also in part kept, in tiles wider than what a program folds at once, which end in shorter ones."""
    small_tiles((128, 256))
    override(kernels={"rows": {"block_m": 32, "block_n": 64}, "programs": 2})
    results = []
    for grads, budget in (
        ("none", 900),
        ("hidden", 900),
        ("hidden,weight", 900),
        ("weight", 900),
        ("hidden,weight", 420),
    ):
        torch.manual_seed(0)
        head = make_head(150, 64, 500, dtype, grads=grads, ignored=0)
        results.append(
            hidden_to_log_probs(
                head.hidden, head.weight, head.labels, impl="triton", memory_budget=budget * 1024, **options
            )
        )
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("spread", [4.0, 200.0])
def test_the_frozen_heads_sum_follows_the_maximum(strategy, small_tiles, order, spread):
    """Logits that grow from tile to tile rescale the sum; falling ones never do."""
    small_tiles((64, 64))
    head = make_head(40, 16, 320, grads="hidden", ignored=0)
    ramp = torch.linspace(0, spread, 320, dtype=torch.float32)
    bias = ramp if order == "rising" else ramp.flip(0)
    check_against_reference(head._replace(bias=bias), outputs=(), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("rows", "vocab", "ignored"), [((2, 9), 700, 0.3), ((1,), 2100, 0.0), ((70,), 33, 0.0)])
def test_logits(dtype, options, inplace, rows, vocab, ignored):
    labels = torch.randint(vocab, rows)
    logits = torch.randn(*rows, vocab) * 3
    logits.scatter_add_(-1, labels.unsqueeze(-1), torch.rand(*rows, 1) * 20)
    labels[torch.rand(rows) < ignored] = -100
    leaf = logits.to(dtype).detach().clone().requires_grad_()
    exact = logits.to(dtype).double().detach().clone().requires_grad_()
    grad = torch.randn(rows)
    truth = reference.logits_to_log_probs(exact, labels, **options)
    truth.backward(grad.double())
    got = logits_to_log_probs(leaf * 1, labels, impl="triton", inplace_backward=inplace, **options)
    got.backward(grad)
    assert_close(got, truth, 1e-5)
    rounding = torch.finfo(dtype).eps * exact.grad.abs().max().item()
    assert_close(leaf.grad, exact.grad, rounding + 2e-6)
    error = (leaf.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    note_errors(
        "triton, from logits", dtype, log_probs=(got.double() - truth).abs().max().item(), gradients=error.item()
    )


def test_logits_are_split_over_programs_where_rows_are_few(override):
    labels, logits = torch.randint(5000, (3,)), torch.randn(3, 5000)
    launched = []
    override(launch=lambda *a: (launched.append(a[:3]), launch.run_kernel(*a)))
    assert_close(
        logits_to_log_probs(logits, labels, impl="triton"), reference.logits_to_log_probs(logits, labels), 1e-5
    )
    assert launched[0] == ("logits", "accumulate_kernel", 10)


@pytest.mark.parametrize("programs", [1, 3])
def test_splits_do_not_change_the_answer(override, programs):
    head = make_head(20, 32, 640, bias=True)
    override(kernels={"programs": programs})
    check_against_reference(head, outputs=OPTIONAL_OUTPUTS, impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_operands_in_half_precision(strategy, override, monkeypatch, dtype, grads):
    """As on a GPU: shares, kept exponentials and gradients of logits are rounded, and logits rise from tile to tile."""
    override(capabilities={"tiles": ((64, 64),), "scratch": 0, "widens": ()})
    monkeypatch.setattr(
        triton_backend, "library_multiply",
        lambda out, a, b, add: out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=float(add)),
    )  # fmt: skip
    head = make_head(100, 32, 300, dtype, grads=grads)
    rising = head._replace(bias=torch.linspace(0, 40, 300, dtype=torch.float64).to(dtype))
    for budget in (900, 130):
        check_against_reference(rising, 3e-4, outputs=(), impl="triton", memory_budget=budget * 1024)


@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_saved_tensors_may_come_back_with_other_strides(strategy, grads):
    """Hooks that offload them do: forward's choices must not be made again from what backward sees."""
    head = make_head((4, 15), 32, 300, ignored=0, grads=grads)

    def moved(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    plain = loss_of(token_stats(*head[:3], outputs=(), impl="triton"))
    wanted = torch.autograd.grad(plain, [t for t in head[:2] if t.requires_grad])
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
        loss = loss_of(token_stats(*head[:3], outputs=(), impl="triton"))
    got = torch.autograd.grad(loss, [t for t in head[:2] if t.requires_grad])
    for value, same in zip(got, wanted, strict=True):
        assert_close(value, same, 1e-6)


def test_buffers_are_those_of_a_tile(small_tiles, monkeypatch):
    """A first tile that is shorter than the next (fewer tokens are kept than a tile has) allocates no second buffer."""
    small_tiles((128, 128))
    sizes = []
    scratch = triton_backend.TritonTileOps._scratch

    def record(self, *arguments):
        made = scratch(self, *arguments)
        sizes.append((arguments[0], made.untyped_storage().nbytes()))
        return made

    monkeypatch.setattr(triton_backend.TritonTileOps, "_scratch", record)
    head = make_head(200, 64, 500, torch.bfloat16, grads="hidden,weight", ignored=0)
    loss_of(token_stats(*head[:3], outputs=(), impl="triton", memory_budget=400 * 1024)).backward()
    assert {name for name, _ in sizes} <= {"product", "dz", "maxima"}
    assert all(size <= 128 * 128 * 4 for _, size in sizes)


def test_layouts(strategy):
    """Operands of any strides and an expanded gradient: without descriptors, with the same blocks."""
    head = make_head((4, 15), 32, 300, ignored=0)
    exact = run(reference.token_stats, detached(head, torch.float64), outputs=())[0].log_probs
    strided = torch.stack([head.hidden.detach(), head.hidden.detach()], -1)[..., 0].requires_grad_()
    transposed = head.weight.detach().T.contiguous().T.requires_grad_()
    got = hidden_to_log_probs(strided, transposed, head.labels, impl="triton")
    assert_close(got, exact, 1e-5)
    got.backward(torch.ones(()).expand(4, 15))
    run(reference.token_stats, head, outputs=())
    again = hidden_to_log_probs(head.hidden, head.weight, head.labels, impl="triton")
    wanted = torch.autograd.grad(again.sum(), (head.hidden, head.weight))
    for value, same in zip((strided.grad, transposed.grad), wanted, strict=True):
        assert_close(value, same, 1e-5)


@pytest.mark.parametrize("grads", ["hidden,weight", "hidden"])
def test_autocast(strategy, grads):
    head = make_head(50, 32, 300, grads=grads)
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden_to_log_probs(head.hidden, head.weight, head.labels, impl="triton")
    got.sum().backward()
    rounded = detached(head, torch.bfloat16)
    exact = reference.hidden_to_log_probs(rounded.hidden.double(), rounded.weight.double(), head.labels)
    assert_close(got, exact, 1e-5)
    assert head.hidden.grad.dtype == torch.float32


def test_sure_models_keep_their_digits(strategy):
    """log p = -69 exp(-20): 1 - p and 1 + p are of no use."""
    weight = torch.zeros(70, 16)
    weight[3, 0] = 20.0
    hidden = torch.zeros(2, 16)
    hidden[:, 0] = 1.0
    labels = torch.tensor([3, 3])
    hidden.requires_grad_()
    got = hidden_to_log_probs(hidden, weight, labels, impl="triton")
    exact = reference.hidden_to_log_probs(hidden.double(), weight.double(), labels)
    assert ((got.double() - exact) / exact).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(got.sum(), hidden)
    (truth,) = torch.autograd.grad(exact.sum(), hidden)
    assert ((gradient - truth) / truth)[:, 0].abs().max() < 1e-4


def test_rows_of_very_negative_logits_do_not_underflow(strategy):
    head = make_head(20, 16, 300, ignored=0)
    shifted = head._replace(bias=torch.full((300,), -9000.0))
    exact = run(reference.token_stats, detached(shifted, torch.float64), outputs=())[0]
    got = run(token_stats, detached(shifted), outputs=(), impl="triton")[0]
    assert_close(got.log_probs, exact.log_probs, 4e-3)  # the logits themselves are 1e-3 apart in float32


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 90), features=st.sampled_from([16, 48]), vocab=st.integers(1, 400), seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES), grads=st.sampled_from(["hidden", "hidden,weight", "weight,bias"]),
    options=st.sampled_from([{}, {"softcap": 5.0}, {"temperature": 0.5}]), outputs=st.sampled_from([(), ("entropy",)]),
)  # fmt: skip
def test_random_calls(strategy, tokens, features, vocab, seed, dtype, grads, options, outputs):
    torch.manual_seed(seed)
    head = make_head(tokens, features, vocab, dtype, bias="bias" in grads, grads=grads)
    check_against_reference(head, 3e-4, outputs=outputs, impl="triton", **options)


class TestCapture:
    """While a CUDA graph is captured nothing may depend on how many labels count; the device's part is in tests/gpu."""

    @pytest.fixture(autouse=True)
    def capturing(self, monkeypatch):
        self.now = False
        of = Tokens.of
        monkeypatch.setattr(
            Tokens, "of",
            staticmethod(lambda labels, ignore: (Tokens.all_masked if self.now else of)(labels, ignore)),
        )  # fmt: skip

    @pytest.mark.parametrize("grads", ["hidden", "hidden,weight,bias"])
    @pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")], ids=["log_probs", "entropy"])
    def test_hidden(self, grads, outputs):
        head = make_head((2, 20), 16, 90, bias=True, grads=grads)
        with torch.no_grad():
            head.hidden[head.labels == -100] = torch.nan
        eager, eager_grads = run(token_stats, detached(head), outputs=outputs, impl="triton")
        self.now = True
        got, grads_ = run(token_stats, detached(head), outputs=outputs, impl="triton")
        for value, same in zip((*got, *grads_), (*eager, *eager_grads), strict=True):
            assert (value is None) == (same is None)
            if value is not None:
                assert_close(value, same, 1e-5)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_logits(self, inplace):
        logits, labels = torch.randn(12, 70), torch.randint(70, (12,))
        labels[[2, 5]] = -100
        logits[2] = torch.nan
        results = []
        for self.now in (False, True):
            leaf = logits.clone().requires_grad_()
            log_probs = logits_to_log_probs(leaf * 1, labels, inplace_backward=inplace, impl="triton")
            log_probs.sum().backward()
            results.append((log_probs, leaf.grad))
        for value, same in zip(*results, strict=True):
            assert_close(value, same, 1e-6)

    def test_backward_takes_the_tokens_that_forward_took(self):
        """Whether or not backward is captured with forward."""
        results = []
        for forward, backward in ((False, False), (False, True), (True, True), (True, False)):
            torch.manual_seed(0)
            head, self.now = make_head(20, 16, 90), forward
            stats = token_stats(head.hidden, head.weight, head.labels, impl="triton")
            self.now = backward
            loss_of(stats).backward()
            results.append(head.hidden.grad)
        for other in results[1:]:
            assert_close(other, results[0], 1e-6)

    def test_the_copy_counts_in_the_budget(self):
        head = make_head(20, 16, 90)
        self.now = True
        with pytest.raises(ValueError, match="memory_budget is 1 bytes"):
            token_stats(head.hidden, head.weight, head.labels, impl="triton", memory_budget=20 * 16 * 4)


@pytest.mark.parametrize("budget", [900, 392])
def test_backward_runs_again(strategy, small_tiles, budget):
    small_tiles((128, 128))
    head = make_head(200, 64, 500, torch.bfloat16, grads="hidden,weight")
    loss = loss_of(token_stats(*head[:3], outputs=(), impl="triton", memory_budget=budget * 1024))
    first, second = (torch.autograd.grad(loss, head[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("grads", ["hidden,weight,bias", "hidden", "none"])
@pytest.mark.parametrize("outputs", ["", "entropy,is_top1"])
def test_opcheck_hidden(grads, outputs):
    head = make_head(20, 16, 50, bias=True, grads=grads)
    options = Options(
        transform=Transform(0.9, 1.1, 20.0), outputs=tuple(filter(None, outputs.split(","))),
        grads=Grads.of(grads.split(",")), impl="triton",
    )  # fmt: skip
    torch.library.opcheck(ops.token_stats_op, (head.hidden, head.weight, head.bias, head.labels, *options.encode()))


def test_opcheck_backward():
    head = make_head(20, 16, 50, ignored=0, grads="none")
    options = Options(grads=Grads(True, True), impl="triton").encode()
    inputs = (head.hidden, head.weight, None, head.labels)
    log_probs, entropy, _, _, _, *saved = ops.token_stats_op(*inputs, *options)
    torch.library.opcheck(
        ops.token_stats_backward_op,
        ([torch.ones(20), None], [log_probs, entropy, *saved], "hidden,weight", *inputs, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_opcheck_logits():
    logits, labels = torch.randn(5, 30, requires_grad=True), torch.randint(30, (5,))
    options = Options(impl="triton").encode()
    torch.library.opcheck(ops.logits_log_probs_op, (logits, labels, *options))
    made = [t.detach() for t in ops.logits_log_probs_op(logits, labels, *options)]
    for op in (ops.logits_log_probs_backward_op, ops.logits_log_probs_backward_inplace_op):
        arguments = (torch.ones(5), made, logits.detach().clone(), labels, *options)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("grads", ["hidden,weight", "hidden"])
def test_compile_fullgraph(grads):
    head = make_head(20, 16, 70, grads=grads)
    logits = torch.randn(6, 40, requires_grad=True)

    def step(hidden, weight, logits):
        from_hidden = hidden_to_log_probs(hidden, weight, head.labels, impl="triton").sum()
        return from_hidden + logits_to_log_probs(logits, head.labels[:6] % 40, impl="triton").sum()

    leaves = [t for t in (head.hidden, head.weight, logits) if t.requires_grad]
    compiled = torch.compile(step, fullgraph=True)(head.hidden, head.weight, logits)
    eager = step(head.hidden, head.weight, logits)
    assert_close(compiled, eager, 1e-5)
    for got, same in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert_close(got, same, 1e-6)


@triton.jit
def both(x, t, d, e, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    capped, derivative = tanh(value)
    tl.store(t + at, capped)
    tl.store(d + at, derivative)
    tl.store(e + at, expm1(-tl.abs(value)))


def test_functions_of_the_kernels():
    """tanh, its derivative and expm1 keep their relative precision where Triton's own building blocks lose it."""
    x = torch.cat([torch.logspace(-6, 1.5, 511), torch.zeros(1)]) * torch.tensor([1.0, -1.0]).repeat(256)
    exact = x.double()
    t, d, e = torch.empty(512), torch.empty(512), torch.empty(512)
    both[(1,)](x, t, d, e, N=512)
    for got, truth in ((t, exact.tanh()), (d, exact.cosh() ** -2), (e, torch.expm1(-exact.abs()))):
        bound = 4e-6 if got is d else 4e-7  # exp(-60) itself has rounded its argument
        assert ((got.double() - truth).abs() <= bound * truth.abs()).all()


class TestConfigs:
    def test_later_devices_take_the_last_row_of_their_kind(self):
        newest = configs.product_blocks(Arch("cuda", 12), torch.bfloat16, options=False)
        assert configs.product_blocks(Arch("cuda", 13), torch.bfloat16, options=False) == newest
        assert newest != configs.product_blocks(Arch("cuda", 11), torch.bfloat16, options=False)
        assert configs.product_blocks(Arch("cuda", 9), torch.float16, options=True).block_n == 128

    def test_splits_are_wide_only_where_programs_are_enough(self):
        config = configs.resolve(Arch("cuda", 9), 4096, torch.bfloat16, options=False)
        block = config.product
        assert block.block_n == 256
        assert config.split(block, 8192, 151936, 2**30) == 8192
        assert config.split(block, 1, 151936, 2**30) == 256
        assert config.split(block, 8192, 151936, 1024) == 1024
        for tokens in (1, 100, 1000, 8192):
            assert config.split(block, tokens, 151936, 2**30) % 256 == 0

    @pytest.mark.parametrize("kind", ["cuda", "hip"])
    def test_strategies(self, kind):
        assert configs.resolve(Arch(kind, 9), 4096, torch.bfloat16, False).strategy == "fused"
        assert configs.resolve(Arch(kind, 9), 4090, torch.bfloat16, False).strategy == "tiles"
        asked = configs.resolve(Arch(kind, 9), 4096, torch.bfloat16, False, {"strategy": "tiles"})
        assert asked.strategy == "tiles"

    def test_changes_replace_fields_of_a_row(self):
        changes = {"product": {"block_n": 64}, "rows": {"warps": 2}, "programs": 7}
        made = configs.resolve(Arch("cuda", 9), 64, torch.bfloat16, False, changes)
        assert (made.product.block_n, made.rows.warps, made.programs) == (64, 2, 7)
        with pytest.raises(TypeError, match="no_such_field"):
            configs.resolve(Arch("cuda", 9), 64, torch.bfloat16, False, {"no_such_field": 1})

    def test_blocks_hold_whole_slots_of_block_maxima(self):
        """And tiles hold whole blocks."""
        for (arch, _, _), product in configs.PRODUCTS.items():
            capable = triton_backend.CAPABILITIES[arch.kind]
            assert product.block_n % capable.maxima_columns == 0
            assert all(vocab % product.block_n == 0 for _, vocab in capable.tiles if vocab >= product.block_n)


def test_float64_and_vast_vocabularies_go_to_pytorch(monkeypatch):
    head = make_head(9, 16, 40, torch.float64)
    assert_close(
        hidden_to_log_probs(*head[:3], impl="triton"), hidden_to_log_probs(*head[:3], impl="torch"), 0
    )  # fmt: skip
    monkeypatch.setattr(triton_backend, "LARGEST_VOCABULARY", 40)
    called = []
    for name in ("tile_ops", "logits_forward"):
        original = getattr(PyTorchBackend, name)
        monkeypatch.setattr(
            PyTorchBackend, name, lambda *a, name=name, original=original: called.append(name) or original(*a)
        )
    single = [t.detach().float().requires_grad_() for t in head[:2]]
    hidden_to_log_probs(*single, head.labels, impl="triton").sum().backward()
    logits_to_log_probs(torch.randn(2, 40), torch.tensor([1, 2]), impl="triton")
    assert called == ["tile_ops", "tile_ops", "logits_forward"]  # forward, backward; logits


def test_logits_that_are_no_matrix_go_to_torch():
    logits = torch.randn(3, 4, 20).transpose(0, 1).requires_grad_()
    labels = torch.randint(20, (4, 3))
    got = logits_to_log_probs(logits, labels, impl="triton")
    assert_close(got, reference.logits_to_log_probs(logits.double(), labels), 1e-5)
    got.sum().backward()


def test_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "set TRITON_INTERPRET=1" in available_impls()["triton"]
    with pytest.raises(RuntimeError, match=r"impl 'triton' cannot run on cpu: .*TRITON_INTERPRET=1"):
        logits_to_log_probs(torch.randn(2, 5), torch.tensor([1, 2]), impl="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability (7, 5) is older than (8, 0)" in available_impls("cuda")["triton"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch._no_triton.cache_clear()
    monkeypatch.setattr("triton.__version__", "3.4.0")
    assert "triton is 3.4.0, and 3.5 or later is needed" in available_impls("cuda")["triton"]
    launch._no_triton.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "triton cannot be imported" in available_impls("cuda")["triton"]
    launch._no_triton.cache_clear()
