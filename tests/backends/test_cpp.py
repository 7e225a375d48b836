"""What is the C++ back end's own: its exponential, blocks, threads, memory, every build, and checks at the boundary."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_close, check_against_reference, detached, make_head, run, slow

import dpo_kernels
from dpo_kernels import LowRank, hidden_to_log_probs, logits_to_log_probs, plan, reference, token_stats
from dpo_kernels.backends import cpp
from dpo_kernels.dispatch import BACKENDS
from dpo_kernels.statistics import OPTIONAL_OUTPUTS

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def only_cpp(override) -> None:
    assert BACKENDS["cpp"].cannot_run(torch.device("cpu")) is None
    override(backends=("cpp",))


@pytest.fixture
def threads():
    """Sets the number of threads, and brings back the old one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ops():
    return torch.ops.dpo_kernels_cpp


def test_the_exponential_keeps_its_bound():
    """2^x within 2 units in the last place from -126 to 126, 0 below -127, NaN for NaN."""
    x = torch.linspace(-126, 126, 4_000_000 // 64 * 64)
    y, exact = ops().exp2(x), torch.exp2(x.double())
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert ((y.double() - exact).abs() / ulp).max() <= 2
    edges = torch.tensor([-127.5, -1e4, -torch.inf, torch.nan] * 16)
    assert ops().exp2(edges).view(-1, 4)[0].tolist()[:3] == [0, 0, 0]
    assert ops().exp2(edges)[3::4].isnan().all()
    whole = torch.arange(-126.0, 2.0).repeat(2)
    assert torch.equal(ops().exp2(whole), torch.exp2(whole.double()).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64, 65, 130, 1100])
def test_few_rows_and_many(tokens, dtype):
    check_against_reference(make_head(tokens, 72, 300, dtype, ignored=0), outputs=())
    check_against_reference(make_head(tokens, 72, 300, dtype, ignored=0, grads="hidden"), outputs=())


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 4096, 4097, 8200])
def test_vocabularies_around_blocks_and_tiles(vocab):
    check_against_reference(make_head(70, 16, vocab, torch.bfloat16, bias=True), outputs=OPTIONAL_OUTPUTS)


@pytest.mark.parametrize("features", [1, 2, 7, 1023, 1025, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_that_are_odd_or_deeper_than_a_block(features, dtype):
    check_against_reference(make_head(37, features, 190, dtype), 2e-5 * max(1, features / 1024), outputs=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
@pytest.mark.parametrize(
    ("tokens", "vocab"), [pytest.param(300, 5000, id="by-columns"), pytest.param(900, 90, id="by-tokens")]
)
def test_any_number_of_threads(threads, tokens, vocab, count, dtype):
    """Right at any number of threads, repeatable to the last bit at each; all gradients, and a frozen head."""
    for grads in ("hidden,weight,bias", "hidden,weight", "hidden"):
        head = make_head(tokens, 40, vocab, dtype, bias=True, grads=grads)
        threads(1)
        alone = run(token_stats, detached(head), outputs=())
        threads(count)
        first, second = (run(token_stats, detached(head), outputs=()) for _ in range(2))
        assert torch.equal(first[0].log_probs, second[0].log_probs)
        assert_close(first[0].log_probs, alone[0].log_probs, 2e-6)
        for a, b, c in zip(first[1], second[1], alone[1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a, b)
                assert_close(a, c, 4 * torch.finfo(dtype).eps * c.abs().max().item())


def test_logits_level_splits_a_row_among_threads(threads):
    threads(4)
    logits = (torch.randn(2, 40_000) * 4).requires_grad_()
    labels = torch.tensor([39_999, 3])
    exact = logits.detach().double().requires_grad_()
    got, truth = logits_to_log_probs(logits, labels), reference.logits_to_log_probs(exact, labels)
    assert_close(got, truth, 1e-5)
    got.sum().backward()
    truth.sum().backward()
    assert_close(logits.grad, exact.grad, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_part_of_a_tile_is_kept(dtype):
    """The dial turns in steps of 64 tokens: within a tile, some keep their probabilities, the others recompute."""
    head = make_head(700, 64, 14000, dtype, grads="hidden,weight", ignored=0)
    budget = plan(700, 64, 14000, dtype, memory_budget=64 * MIB).bytes - MIB
    made = plan(700, 64, 14000, dtype, memory_budget=budget)
    assert (made.mode, made.tile_tokens) == ("mixed", 700)
    assert made.kept_tokens % 64 == 0
    check_against_reference(head, outputs=(), memory_budget=budget)


@pytest.mark.parametrize("scale", [1e6, 3e7, -1e9, 3e38])
def test_far_logits_are_left_to_the_pytorch_back_end(scale):
    """Where float32 logits lie 0.06 or more apart, an exponent in base 2 would be a number of its own."""
    weight = torch.eye(9)
    hidden = torch.full((2, 9), scale)
    hidden[1, :3] *= 0.5
    hidden.requires_grad_()
    labels = torch.tensor([4, 0])
    exact = hidden.detach().double().requires_grad_()
    for function, z in ((hidden_to_log_probs, hidden), (reference.hidden_to_log_probs, exact)):
        (function(z, weight.to(z.dtype), labels) * torch.tensor([1.0, 0.0])).sum().backward()
    got, truth = (
        f(z, w, labels)
        for f, z, w in (
            (hidden_to_log_probs, hidden, weight),
            (reference.hidden_to_log_probs, exact, weight.double()),
        )
    )
    assert_close(got[0], truth[0], 1e-5)
    assert_close(hidden.grad[0], exact.grad[0], 1e-5)
    assert_close(logits_to_log_probs(hidden, labels)[0], truth[0], 1e-5)


def test_labels_of_one_dimension_with_a_stride():
    hidden, weight = torch.randn(10, 8), torch.randn(30, 8)
    logits = torch.randn(10, 30)
    for labels in (torch.randint(30, (20,))[::2], torch.tensor(3).expand(10)):
        assert_close(
            hidden_to_log_probs(hidden, weight, labels), reference.hidden_to_log_probs(hidden, weight, labels), 1e-5
        )
        assert_close(logits_to_log_probs(logits, labels), reference.logits_to_log_probs(logits, labels), 1e-5)


@pytest.mark.parametrize("vocab", [9, 200])
def test_forward_and_backward_agree_on_which_logits_are_far(vocab):
    """Just below the limit the kernels' own maximum, a rounded-up base, lies above it, the true one below."""
    for largest in torch.linspace(cpp.LARGEST_LOGIT - 2, cpp.LARGEST_LOGIT + 1, 13).tolist():
        hidden = torch.full((2, vocab), largest)
        hidden[:, 4] += 1
        hidden[:, 5:] -= 20
        exact = hidden.double().requires_grad_()
        hidden.requires_grad_()
        labels = torch.tensor([4, 0])
        hidden_to_log_probs(hidden, torch.eye(vocab).requires_grad_(), labels).sum().backward()
        reference.hidden_to_log_probs(exact, torch.eye(vocab, dtype=torch.float64), labels).sum().backward()
        assert_close(hidden.grad, exact.grad, 0.05)  # float32 logits lie 0.06 apart here


@pytest.mark.parametrize("low", [-6.9e5, -7.1e5, -1e7, -1e10, -1e38, -3e38])
@pytest.mark.parametrize("vocab", [2, 70, 5000])
def test_a_label_that_alone_is_not_far_below(low, vocab):
    """As where a mask leaves one token: nothing of the others' sums, which far from zero may be anything, is seen."""
    hidden = torch.full((3, vocab), low)
    hidden[0, 1], hidden[1, 0] = 0.6, -3.0
    labels = torch.tensor([1, 0, 1])
    for compute, oracle, weight in (
        (logits_to_log_probs, reference.logits_to_log_probs, ()),
        *([(hidden_to_log_probs, reference.hidden_to_log_probs, (torch.eye(vocab),))] if vocab < 100 else []),
    ):
        own, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        got, truth = compute(own, *weight, labels), oracle(exact, *(w.double() for w in weight), labels)
        (got.sum() + 0 * own.sum()).backward()
        truth.sum().backward()
        assert_close(got[:2], truth[:2], 1e-6)
        assert torch.equal(got[:2], torch.zeros(2))
        assert_close(own.grad[:2], exact.grad[:2], 1e-6)
        assert own.grad.isfinite().all()
    stats = token_stats(hidden[:2], torch.eye(vocab), labels[:2], outputs=OPTIONAL_OUTPUTS) if vocab < 100 else None
    if stats is not None:
        assert_close(stats.entropy, torch.zeros(2), 1e-6)
        assert_close(stats.log_sum_sq_probs, torch.zeros(2), 1e-6)
        assert stats.is_top1.all()


def test_bfloat16_without_onednn():
    head = make_head(40, 16, 200, torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        check_against_reference(head, outputs=())
    check_against_reference(head, outputs=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [9001, slow(32_000)])
def test_a_log_prob_is_the_same_whatever_the_number_of_tokens_beside_it(dtype, vocab):
    """To the last bit: few tokens take wider tiles, whose sums are made of the same pieces."""
    head = make_head(700, 64, vocab, dtype, ignored=0)
    whole = hidden_to_log_probs(*detached(head)[:3], impl="cpp")
    for tokens in (3, 64, 65, 256, 300, 512, 513):
        few = head._replace(hidden=head.hidden[:tokens], labels=head.labels[:tokens])
        assert torch.equal(hidden_to_log_probs(*detached(few)[:3], impl="cpp"), whole[:tokens])


def test_an_adapter_as_wide_as_the_features():
    check_an_adapter_as_wide_as_the_features()


def check_an_adapter_as_wide_as_the_features() -> None:
    """Its products have right operands of the same shapes as those of the weight, and room of their own."""
    hidden, weight, a, b = (torch.randn(n, 8, requires_grad=True) for n in (70, 300, 8, 300))
    labels = torch.randint(300, (70,))
    hidden_to_log_probs(hidden, weight, labels, low_rank=LowRank(a, b), impl="cpp").sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, a, b)]
    whole = exact[1] + exact[3] @ exact[2]
    reference.hidden_to_log_probs(exact[0], whole, labels).sum().backward()
    for got, right in zip((hidden, weight, a, b), exact, strict=True):
        assert_close(got.grad, right.grad, 1e-4 * right.grad.abs().max().item())


def test_every_size_is_checked_at_the_boundary():
    hidden, weight, labels = torch.randn(5, 8), torch.randn(30, 8), torch.randint(30, (5,))
    packed, state = ops().pack(hidden), torch.zeros(8, 5)

    def accumulate(
        packed=packed, weight=weight, labels=labels, state=state, row=0, by_token=None, by_vocab=None, bases=None,
        total=None,
    ):  # fmt: skip
        ops().accumulate(
            packed, weight, None, labels, 0, 1.0, 1.0, None, state, row, "", by_token, by_vocab, bases, total
        )

    accumulate()
    for wrong, message in [
        ({"packed": packed[:-1]}, "packed is"),
        ({"packed": packed.bfloat16()}, "weight is Float, the products BFloat16"),
        ({"packed": packed.half()}, "packed is Half; expected float or bfloat16"),
        ({"weight": weight.double()}, "weight is Double on cpu"),
        ({"weight": weight.T}, "weight has strides"),
        ({"labels": labels.int()}, "labels is Int"),
        ({"labels": labels[:0]}, "an empty tile"),
        ({"state": state[:7].contiguous()}, "state is"),
        ({"row": 1}, "for rows 1 to 6"),
        ({"row": -1}, "for rows -1"),
        ({"by_token": torch.empty(5, 30)}, "saved exponentials and their bases come together"),
        ({"by_token": torch.empty(5, 29), "bases": torch.empty(1, 5)}, "by_token is"),
        ({"by_token": torch.empty(5, 30).half(), "bases": torch.empty(1, 5)}, "by_token is Half, the products Float"),
        ({"by_vocab": torch.empty(5, 30), "bases": torch.empty(1, 5)}, "by_vocab is"),
        ({"by_vocab": torch.empty(30, 5), "bases": torch.empty(2, 5)}, "bases is"),
        ({"total": torch.empty(5, 8)}, "total needs by_token"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            accumulate(**wrong)
    out, room = torch.empty(5, 30), torch.empty(30 * 8)
    ops().multiply(out, hidden, weight.T.contiguous(), False, room)
    assert_close(out, hidden @ weight.T, 1e-5)
    for arguments, message in [
        ((out[:4], hidden, weight.T.contiguous(), False, room), "out is"),
        ((out, hidden, weight.T.contiguous(), False, room[1:]), "room is"),
        ((out, hidden, weight, False, room), "b is"),
        ((out.bfloat16(), hidden, weight.T.contiguous(), True, room), "cannot add to BFloat16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops().multiply(*arguments)
    rows = [torch.zeros(5) for _ in range(5)]
    usual = {"outs": [torch.empty(30, 8)], "rights": [hidden], "rooms": [torch.empty(40)], "of_vocab": [1], "adds": [0]}

    def gradient(by_vocab=torch.empty(30, 5), exps=None, bases=None, **changes):  # noqa: B008
        ops().gradient(
            packed, weight, None, labels, 0, 1.0, 1.0, None, *rows, None, None, None, by_vocab, None, exps, bases,
            *(usual | changes).values(),
        )  # fmt: skip

    gradient()
    two = {"outs": [torch.empty(30, 8)] * 2, "rights": [hidden] * 2, "of_vocab": [1, 1], "adds": [0, 0]}
    gradient(**two, rooms=[torch.empty(40), torch.empty(40)])
    for wrong, message in [
        ({"adds": []}, "products have"),
        ({"of_vocab": [0]}, "product 0 has no left operand"),
        ({"by_vocab": torch.empty(30, 5).bfloat16()}, "by_vocab is BFloat16, the products Float"),
        ({"exps": torch.empty(30, 5), "bases": torch.empty(1, 5)}, "by_vocab is what was saved"),
        ({"by_vocab": None, "exps": torch.empty(30, 5)}, "saved exponentials and their bases come together"),
        ({"rooms": [torch.empty(39)]}, "room is"),
        ({"rights": [hidden[:4]]}, "b is"),
        ({**two, "rooms": [torch.empty(40)] * 2}, "products 0 and 1 have the same room"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            gradient(**wrong)
    with pytest.raises(RuntimeError, match=r"index\[0\] is 9; logits have 5 rows"):
        ops().logits_forward(torch.randn(5, 9), torch.tensor([9]), torch.tensor([0]), 1.0, 1.0, None)


RECYCLES = pytest.mark.skipif(
    "fsanitize" in os.environ.get("DPO_KERNELS_CXXFLAGS", ""),
    reason="AddressSanitizer watches the usual allocator's memory alone, which is used then",
)


class TestRecycledMemory:
    """The large buffers of a step wait for the next one, and nobody's memory is taken."""

    HEAD = make_head(300, 64, 5000, torch.float32, ignored=0)

    @pytest.fixture(autouse=True)
    def nothing_waits(self):
        gc.collect()
        dpo_kernels.empty_cache()

    def step(self):
        head = detached(self.HEAD)
        hidden_to_log_probs(head.hidden, head.weight, head.labels).sum().backward()
        return head.weight.grad

    @RECYCLES
    def test_the_next_step_writes_where_the_last_one_wrote(self):
        grad = self.step()
        where, expected = grad.data_ptr(), grad.clone()
        grad.fill_(torch.nan)
        del grad
        again = self.step()
        assert again.data_ptr() == where
        assert torch.equal(again, expected)

    def test_what_is_held_stays(self):
        first = self.step()
        before = first.clone()
        second = self.step().mul_(2)
        assert second.data_ptr() != first.data_ptr()
        assert torch.equal(first, before)

    def test_any_size_after_any_other(self):
        for rows in (1000, 10, 999, 1001, 100, 3000):
            taken = ops().empty("sizes", rows, 1000, torch.float32).fill_(rows)
            assert taken.shape == (rows, 1000)
            assert bool((taken == rows).all())
            del taken
        assert ops().empty("sizes", 0, 7, torch.bfloat16).shape == (0, 7)

    @RECYCLES
    def test_a_small_buffer_does_not_hold_a_large_block(self):
        del_me = ops().empty("large, then small", 4000, 1000, torch.float32).fill_(1)
        del del_me
        small = ops().empty("large, then small", 100, 1000, torch.float32).fill_(2)
        del small
        assert 400_000 <= dpo_kernels.empty_cache() < 400_000 + 65536

    @RECYCLES
    def test_it_is_given_back_when_asked_for(self):
        assert dpo_kernels.empty_cache() == 0
        grad = self.step()
        assert dpo_kernels.empty_cache() >= 300 * 5000 * 4  # what forward kept waits, the gradient is held
        size = grad.numel() * grad.element_size()
        del grad
        assert size <= dpo_kernels.empty_cache() < size + 65536
        self.step()

    @RECYCLES
    def test_the_fallback_has_the_memory_for_itself(self):
        """Logits beyond float32's reach are computed again by the torch implementation, which keeps its own."""
        self.step()
        far = detached(self.HEAD)
        hidden_to_log_probs(far.hidden.detach() * 1e7, far.weight, far.labels)
        assert dpo_kernels.empty_cache() == 0

    def test_a_tensor_like_any_other(self):
        matrix = ops().empty("storage", 300, 300, torch.float32).fill_(3)
        matrix.untyped_storage().resize_(2 * 360_000)
        assert torch.equal(matrix, torch.full((300, 300), 3.0))
        matrix.untyped_storage().resize_(0)
        matrix.untyped_storage().resize_(360_000)
        assert torch.equal(matrix.fill_(4), torch.full((300, 300), 4.0))
        lazy = torch._lazy_clone(matrix)
        matrix.fill_(5)
        assert torch.equal(lazy, torch.full((300, 300), 4.0))
        assert torch.equal(matrix.share_memory_(), torch.full((300, 300), 5.0))

    @RECYCLES
    def test_the_profiler_sees_it(self):
        with torch.profiler.profile(profile_memory=True) as profile:
            ops().empty("profiled", 1000, 1000, torch.float32)
        assert max(e.self_cpu_memory_usage for e in profile.events()) >= 4_000_000

    def test_threads_get_memory_of_their_own(self):
        def work(number: int) -> bool:
            alone = True
            for i in range(200):
                mine = ops().empty("shared by threads", 1 + i % 7, 100_000, torch.float32).fill_(number)
                alone = alone and bool((mine == number).all())
            return alone

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))

    def test_a_child_that_is_forked_while_others_allocate_can_go_on(self):
        stop = threading.Event()

        def allocate() -> None:
            while not stop.is_set():
                ops().empty("fork", 100, 1000, torch.float32)

        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(allocate) for _ in range(2)]
            try:
                for _ in range(20):
                    child = os.fork()
                    if child == 0:
                        try:
                            signal.alarm(20)  # a child that waits for ever ends by it
                            ops().empty("fork", 100, 1000, torch.float32)
                        except BaseException:
                            os._exit(1)
                        os._exit(0)
                    assert os.waitpid(child, 0)[1] == 0
            finally:
                stop.set()
            assert all(r.result() is None for r in running)

    @RECYCLES
    def test_too_much_is_said_so(self):
        with pytest.raises(torch.OutOfMemoryError, match=r"not enough memory for 1125899906842624 bytes \(too much\)"):
            ops().empty("too much", 2**24, 2**24, torch.float32)

    def test_no_matrix_has_minus_one_row(self):
        with pytest.raises(RuntimeError, match="a matrix of -1 x 5"):
            ops().empty("negative", -1, 5, torch.float32)


OTHER_BUILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import check_against_reference, make_head
from dpo_kernels import build
from dpo_kernels.statistics import OPTIONAL_OUTPUTS
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for options in ({}, {"softcap": 9.0, "temperature": 1.5, "logit_scale": 0.25}):
        head = make_head(130, 40, 700, dtype, bias=True)
        check_against_reference(head, impl="cpp", outputs=OPTIONAL_OUTPUTS, **options)
        check_against_reference(head, impl="cpp", outputs=(), **options)
print(json.dumps({"library": build.cached_library().name}))
"""


@pytest.mark.parametrize("capability", ["avx2", slow("default")])
def test_builds_for_lesser_cpus(capability):
    """The same sources for AVX2 and for no vector instructions at all; a name of its own for each in the cache."""
    done = subprocess.run(
        [sys.executable, "-c", OTHER_BUILD, str(ROOT / "tests")],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"_{capability}_" in json.loads(done.stdout)["library"]


CPUINFO = Path("/proc/cpuinfo")
WAYS = [False, True] if CPUINFO.exists() and " avx512_bf16" in CPUINFO.read_text() else [False]


@pytest.mark.parametrize("in_bfloat16", WAYS)
def test_bfloat16_is_multiplied_as_it_is_or_in_float32(in_bfloat16, monkeypatch):
    """Whichever of the two this CPU takes by itself: all modes, an adapter, a weight of another dtype."""
    monkeypatch.setattr(cpp, "_multiplies_bfloat16", lambda: in_bfloat16)
    assert (torch.bfloat16 in BACKENDS["cpp"].capabilities(torch.device("cpu"), None).widens) != in_bfloat16
    for grads in ("hidden,weight,bias", "hidden", "weight"):
        head = make_head(130, 40, 700, torch.bfloat16, bias=True, grads=grads)
        check_against_reference(head, outputs=())
        check_against_reference(head, outputs=OPTIONAL_OUTPUTS)
        check_against_reference(head, outputs=(), memory_budget=20 * MIB)
    wide = make_head(300, 300, 2000, torch.bfloat16, bias=True, grads="hidden,weight,bias")
    check_against_reference(wide, outputs=())
    check_an_adapter_as_wide_as_the_features()
    full = make_head(130, 40, 700, torch.float32, grads="hidden,weight")
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = hidden_to_log_probs(*full[:3])
    exact = hidden_to_log_probs(*(t.detach().bfloat16().double() for t in full[:2]), full[2], impl="torch")
    assert_close(log_probs, exact, 1e-5)


def test_a_cpu_whose_bfloat16_products_are_slow():
    def cpu(vendor: str, model: int, *flags: str) -> str:
        return (
            f"vendor_id\t: {vendor}\ncpu family\t: 6\nmodel\t\t: {model}\nflags\t\t: {' '.join(('sse', *flags))}\n\n"
            * 2
        )

    assert not cpp.multiplies_bfloat16_faster("")
    assert not cpp.multiplies_bfloat16_faster(cpu("GenuineIntel", 106, "avx512f"))
    assert cpp.multiplies_bfloat16_faster(cpu("AuthenticAMD", 17, "avx512_bf16"))
    for model in (143, 207):
        assert not cpp.multiplies_bfloat16_faster(cpu("GenuineIntel", model, "avx512_bf16"))
        assert cpp.multiplies_bfloat16_faster(cpu("GenuineIntel", model, "avx512_bf16", "amx_bf16"))
