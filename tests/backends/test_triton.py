"""What is the Triton back end's own: splits, buffers, strategies, functions of kernels, reasons."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_close, check_against_reference, loss_of, make_head, slow

from benchmarks.predict import scheduled
from dpo_kernels import available_impls, hidden_to_log_probs, logits_to_log_probs, reference, token_stats
from dpo_kernels.backends import triton as triton_backend
from dpo_kernels.backends import triton_tiles
from dpo_kernels.backends.pytorch import PyTorchBackend
from dpo_kernels.backends.triton_fused import FusedTileOps
from dpo_kernels.backends.triton_state import TritonState
from dpo_kernels.dispatch import BACKENDS
from dpo_kernels.kernels import configs, launch
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.kernels.finish import log1p
from dpo_kernels.kernels.softmax_state import expm1, tanh
from dpo_kernels.statistics import OPTIONAL_OUTPUTS, Finished, finish

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPPED = {"softcap": 6.0, "temperature": 1.5, "logit_scale": 0.7}
TRANSFORMS = [pytest.param({}, id="plain"), pytest.param(CAPPED, id="capped")]

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="these look at what the interpreter is given")
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


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, CAPPED), slow(torch.bfloat16, {}), slow(torch.float32, CAPPED)], ids=str
)
def test_shorter_splits_at_the_end_change_no_bit(strategy, small_tiles, override, options, dtype):
    """Also in part kept, in tiles wider than what a program folds at once, which end in shorter ones."""
    small_tiles((128, 256))
    override(kernels={"rows": {"block_m": 32, "block_n": 64}, "at_once": 2})
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


def test_logits_are_split_over_programs_where_rows_are_few(override):
    labels, logits = torch.randint(5000, (3,)), torch.randn(3, 5000)
    launched = []
    override(launch=lambda *a: (launched.append(a[:3]), launch.run_kernel(*a)))
    assert_close(
        logits_to_log_probs(logits, labels, impl="triton"), reference.logits_to_log_probs(logits, labels), 1e-5
    )
    assert launched[0] == ("logits", "fold_kernel", 10)


@pytest.mark.parametrize("at_once", [1, 300])
def test_splits_do_not_change_the_answer(override, at_once):
    head = make_head(20, 32, 640, bias=True)
    override(kernels={"at_once": at_once})
    check_against_reference(head, outputs=OPTIONAL_OUTPUTS, impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grads", ["hidden", "hidden,weight"])
def test_operands_in_half_precision(strategy, override, monkeypatch, dtype, grads):
    """As on a GPU: shares, kept exponentials and gradients of logits are rounded, and logits rise from tile to tile."""
    override(capabilities={"tiles": ((64, 64),), "scratch": 0, "widens": ()})
    monkeypatch.setattr(
        triton_tiles, "library_multiply",
        lambda out, a, b, add: out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=float(add)),
    )  # fmt: skip
    head = make_head(100, 32, 300, dtype, grads=grads)
    rising = head._replace(bias=torch.linspace(0, 40, 300, dtype=torch.float64).to(dtype))
    for budget in (900, 130):
        check_against_reference(rising, 3e-4, outputs=(), impl="triton", memory_budget=budget * 1024)


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


@triton.jit
def each(x, t, d, e, p, q, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    capped, derivative = tanh(value)
    tl.store(t + at, capped)
    tl.store(d + at, derivative)
    tl.store(e + at, expm1(-tl.abs(value)))
    tl.store(p + at, log1p(tl.exp(-tl.abs(value))))
    tl.store(q + at, log1p(tl.minimum(tl.abs(value), 1.0)))


def test_functions_of_the_kernels():
    """tanh, its derivative, expm1 and log1p keep their relative precision where Triton's own functions lose it."""
    x = torch.cat([torch.logspace(-6, 1.5, 511), torch.zeros(1)]) * torch.tensor([1.0, -1.0]).repeat(256)
    exact = x.double()
    t, d, e, p, q = (torch.empty(512) for _ in range(5))
    each[(1,)](x, t, d, e, p, q, N=512)
    truths = (
        exact.tanh(), exact.cosh() ** -2, torch.expm1(-exact.abs()), torch.log1p((-exact.abs()).exp()),
        torch.log1p(exact.abs().clamp(max=1)),
    )  # fmt: skip
    for got, truth in zip((t, d, e, p, q), truths, strict=True):
        bound = 4e-6 if got is d or got is p else 4e-7  # exp(-60) itself has rounded its argument
        assert ((got.double() - truth).abs() <= bound * truth.abs()).all()


def test_the_kernel_that_finishes_is_the_function():
    """States of any kind: random, without any other logit, with the label nowhere, beyond float32, with NaN."""
    torch.manual_seed(0)
    special = torch.tensor([0.0, 1.0, -1.0, 80.0, -3e38, 3e38, torch.inf, -torch.inf, torch.nan])
    pairs = torch.cartesian_prod(special, special)
    n = 100 + len(pairs)
    maximum = torch.cat([5 * torch.randn(100), pairs[:, 0]])
    state = TritonState(torch.randint(1000, (n,)), 1000, OPTIONAL_OUTPUTS)
    state.tensor.copy_(torch.stack([
        maximum, torch.where(maximum == -torch.inf, 0, 1 + 100 * torch.rand(n)),
        torch.cat([5 * torch.randn(100), pairs[:, 1]]), -10 * torch.rand(n), torch.rand(n), torch.randn(n),
        torch.randint(1000, (n,)).float(),
    ]))  # fmt: skip
    made = state.finish()
    meant = finish(state.part(), state.labels, 1000, OPTIONAL_OUTPUTS)
    known = ~state.part().label_logit.isnan()
    for name, got, truth in zip(
        ("log_probs", *OPTIONAL_OUTPUTS, *Finished._fields[1:]),
        (*made.stats[:5], *made[1:]),
        (*meant.stats[:5], *meant[1:]),
        strict=True,
    ):
        rows = known if name == "maximum" else slice(None)  # of no label any number will do: nothing else is one
        if name == "log_probs":  # where the model is sure, down to the smallest
            sure = truth > -1e-3
            assert sure.sum() > 5
            torch.testing.assert_close(got[sure], truth[sure], rtol=4e-6, atol=1e-44)
        close = torch.isclose(got[rows], truth[rows], rtol=2e-6, atol=1e-6, equal_nan=True)
        assert close.all(), (name, got[rows][~close], truth[rows][~close])


@pytest.mark.parametrize("budget", [None, 13 * MIB])
@pytest.mark.parametrize("grads", ["none", "hidden", "hidden,weight"])
def test_few_tokens_take_wide_tiles(override, grads, budget):
    """The numbers of narrow ones, by both ways to cut a vocabulary, and with several of them."""
    override(capabilities={"widens": (), "scratch": 0, "wide_tiles": ((60, 1024), (150, 512))})
    for tokens, vocab in ((50, 960), (50, 2000), (50, 1007), (120, 960), (120, 1007), (300, 960)):
        head = make_head(tokens, 32, vocab, grads=grads)
        check_against_reference(head, impl="triton", memory_budget=budget)


@pytest.mark.parametrize("vocab", [1000, 1001])
@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0, 1e-20, 1e-35, 1e35])
def test_a_fold_of_logits(vocab, scale):
    """Rows that start on 16 bytes and not; blocks without a finite logit; scales beyond those of the fast kernel."""
    torch.manual_seed(0)
    logits = torch.randn(70, vocab, dtype=torch.float64) * (2 / max(abs(scale), 1))
    logits[:20, :900] = -torch.inf * (1 if scale > 0 else -1)
    logits[20] = -torch.inf * (1 if scale > 0 else -1)
    labels = torch.randint(900, vocab, (70,))
    logits[20, labels[20]] = 1.0
    got = logits_to_log_probs(logits.float(), labels, logit_scale=scale, impl="triton")
    truth = reference.logits_to_log_probs(logits.float().double(), labels, logit_scale=scale)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-6)


def test_a_descriptor_names_rows_apart_from_one_another():
    rows = torch.zeros(4, 64)
    assert launch.describable(rows)
    assert launch.describable(rows[1:2])
    assert not launch.describable(rows[:1].expand(4, 64))
    assert not launch.describable(rows.view(-1).as_strided((4, 64), (32, 1)))
    assert not launch.describable(rows[:, 1:])


def test_specialised_warps_change_no_bit(override, monkeypatch):
    """The kernel is the same, by the interpreter; on a GPU it is the compiler that tells warps apart."""
    head = make_head(70, 32, 300)
    found, launched = [], []

    def launch_of(*what):
        launched.append(what[-1].get("SPECIALIZED"))
        launch.run_kernel(*what)

    override(launch=launch_of)
    for specialized in (False, True):
        monkeypatch.setattr(FusedTileOps, "_specializes", lambda *_, chosen=specialized: chosen)
        with torch.no_grad():
            found.append(hidden_to_log_probs(head.hidden, head.weight, head.labels, impl="triton"))
    assert torch.equal(*found)
    assert {False, True} <= set(launched)


@pytest.mark.parametrize(
    ("operand", "outputs", "expected"),
    [(torch.bfloat16, (), True), (torch.bfloat16, ("entropy",), False), (torch.float32, (), False)],
)
def test_what_specialised_warps_hold(operand, outputs, expected):
    ops = FusedTileOps.__new__(FusedTileOps)
    ops.operand = operand
    blocks = configs.ProductBlocks(128, 128, 64, 16, 8, 3, descriptors=True, specialized=True)
    assert ops._specializes(blocks, outputs) is expected
    assert not ops._specializes(blocks._replace(descriptors=False), outputs)
    assert not ops._specializes(blocks._replace(specialized=False), outputs)


class TestConfigs:
    def test_later_devices_take_the_last_row_of_their_kind(self):
        newest = configs.product_blocks(Arch("cuda", 12), torch.bfloat16, options=False)
        assert configs.product_blocks(Arch("cuda", 13), torch.bfloat16, options=False) == newest
        assert newest != configs.product_blocks(Arch("cuda", 11), torch.bfloat16, options=False)
        assert configs.product_blocks(Arch("cuda", 9), torch.float16, options=True).block_n == 128

    @pytest.mark.parametrize(
        ("tokens", "vocab"),
        [
            (8192, 151_936),
            (4096, 128_256),
            (16_384, 248_320),
            (1024, 151_936),
            (512, 32_000),
            (100, 151_936),
            (3000, 50_257),
        ],
    )
    def test_splits_leave_little_of_a_device_idle(self, tokens, vocab):
        """Within 3% of the best width, as the programs would be scheduled one by one."""
        config = configs.resolve(Arch("cuda", 9), 4096, torch.bfloat16, options=False)
        splits = config.splits(config.product)
        assert (splits.rows, splits.columns, splits.at_once) == (128, 256, 132)
        chosen = splits.width(tokens, vocab, 8192)
        times = {width: scheduled(splits, tokens, vocab, width) for width in [256 << i for i in range(6)]}
        assert chosen in times
        assert times[chosen] <= 1.03 * min(times.values())
        assert splits.width(tokens, vocab, 512) <= 512

    @pytest.mark.parametrize("kind", ["cuda", "hip"])
    def test_strategies(self, kind):
        assert configs.resolve(Arch(kind, 9), 4096, torch.bfloat16, False).strategy == "fused"
        assert configs.resolve(Arch(kind, 9), 4090, torch.bfloat16, False).strategy == "tiles"
        asked = configs.resolve(Arch(kind, 9), 4096, torch.bfloat16, False, {"strategy": "tiles"})
        assert asked.strategy == "tiles"

    def test_changes_replace_fields_of_a_row(self):
        changes = {"product": {"block_n": 64}, "rows": {"warps": 2}, "at_once": 7}
        made = configs.resolve(Arch("cuda", 9), 64, torch.bfloat16, False, changes)
        assert (made.product.block_n, made.rows.warps, made.at_once) == (64, 2, 7)
        with pytest.raises(TypeError, match="no_such_field"):
            configs.resolve(Arch("cuda", 9), 64, torch.bfloat16, False, {"no_such_field": 1})

    def test_blocks_hold_whole_slots_of_block_maxima(self):
        """And tiles hold whole blocks."""
        for (arch, _, _), product in configs.PRODUCTS.items():
            capable = triton_backend.CAPABILITIES[arch.kind]
            assert product.block_n % capable.maxima_columns == 0
            assert all(vocab % product.block_n == 0 for _, vocab in capable.tiles if vocab >= product.block_n)


def test_vast_vocabularies_go_to_pytorch(monkeypatch):
    head = make_head(9, 16, 40)
    monkeypatch.setattr(BACKENDS["triton"], "largest_vocabulary", 39)
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
