"""A short part of `make fuzz` with a fixed seed, and the fuzzer itself: planted faults are found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import fuzz_calls
import pytest
import torch
from fuzz import SIZES, TRITON, as_script, compare, failure, fuzz, shrink
from fuzz_calls import CallSpec, draw
from helpers import slow

from dpo_kernels import FusedLinearDPOLoss, driver, gathering, sparse
from dpo_kernels.backends import cpp, pytorch, triton_fused, triton_tiles

CALLS = {"cpp": 200, "torch": 150, "triton": 30}


@pytest.mark.parametrize("impl", CALLS)
def test_no_wrong_number(impl, override):
    if impl == "triton":
        override(capabilities=TRITON)
    # A compiled call takes as long as a hundred others: of those one.
    plain = [n for n in range(2 * CALLS[impl]) if not draw(n, SIZES[impl]).compiled][: CALLS[impl]]
    compiled = [next(n for n in itertools.count() if draw(n, SIZES[impl]).compiled)] if impl == "cpp" else []
    assert fuzz(impl, [*plain, *compiled], SIZES[impl]) is None


def no_label(*_):
    """The correction at the label is lost."""


def other_sign(z, grads, first, derivative, slope, own=pytorch.logits_gradient):
    return own(z, grads, first, derivative, -slope)


def one_column_twice(self, tile, own=pytorch.PyTorchTileOps._product):
    product = own(self, tile)
    if product.shape[1] > 3:
        product[:, -1] = product[:, -2]
    return product


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (pytorch, "_put_label", no_label),
        (pytorch, "logits_gradient", other_sign),
        (pytorch.PyTorchTileOps, "_product", one_column_twice),
    ],
    ids=["label", "sign", "column"],
)
def test_a_planted_fault_is_found(monkeypatch, where, name, fault):
    monkeypatch.setattr(where, name, fault)
    found = fuzz("torch", range(500), SIZES["torch"])
    assert found is not None
    number, spec, said = found
    assert number < 100
    assert "right is" in said
    assert spec.shape == (1,)


def left_out_twice(self, maximum, log_sum, own=sparse.Keeper.finish):
    dropped, table = own(self, maximum, log_sum)
    return 2 * dropped, table


def too_sparing(self, *given, own=sparse.Keeper.__init__):
    own(self, *given)
    self.bound *= 3


def no_labels(*_):
    """Their entries, which are added apart, are lost."""


def one_column_on(self, tile, own=sparse.Pieces._of):
    kept = own(self, tile)
    if not isinstance(kept, sparse.Sparse):
        return kept
    return kept._replace(columns=[(c + 1).clamp(max=len(tile.weight) - 1) for c in kept.columns])


@pytest.mark.parametrize(
    ("where", "name", "fault", "words"),
    [
        (sparse.Keeper, "finish", left_out_twice, "dropped_mass at"),
        (sparse.Keeper, "__init__", too_sparing, "is left out; the filter is"),
        (sparse, "_add_labels", no_labels, "gradient of"),
        (sparse.Pieces, "_of", one_column_on, "gradient of"),
        (driver, "_give_back", no_labels, "gradient of"),
    ],
    ids=["mass", "bound", "labels", "columns", "tail"],
)
def test_a_fault_planted_in_a_filter_is_found(monkeypatch, where, name, fault, words):
    monkeypatch.setattr(where, name, fault)
    found = fuzz("torch", filtered("torch", 600), SIZES["torch"])
    assert found is not None
    assert words in found[2]


def filtered(impl, calls):
    """The numbers of calls that may leave something out."""
    drawn = ((n, draw(n, SIZES[impl])) for n in range(calls))
    known = [(n, spec) for n, spec in drawn if spec.filter and not spec.compiled]
    return [n for n, spec in known if impl != "triton" or (spec.features % 16 == 0 and spec.trend)]


def of_one_base(impl, calls):
    """The numbers of calls that may keep exponentials relative to one base a row."""
    drawn = ((n, draw(n, SIZES[impl])) for n in range(calls))
    drawn = [(n, s) for n, s in drawn if s.dtype == torch.bfloat16 and "weight" in s.grads and s.features % 16 == 0]
    return [n for n, s in drawn if not (s.softcap or s.compiled or s.filter or s.rank or "bias" in s.grads)]


def columns_twice(self, maximum, log_sum, own=gathering.Marker.finish):
    dropped, table = own(self, maximum, log_sum)
    return 2 * dropped, table


def too_sparing(self, state, tile, marks, bound, own=triton_fused.FusedTileOps.accumulate_marked):
    own(self, state, tile, marks, 3 * bound)


def saved_too_sparing(self, saved, flags, maximum, log_sum, bound, own=triton_fused.FusedTileOps.mark_saved):
    return own(self, saved, flags, maximum, log_sum, 3 * bound)


def other_lists(self, flags, order=None, own=triton_fused.FusedTileOps._lists):
    made = own(self, flags, order)
    return made._replace(
        lists=(made.lists + 1).clamp(0, made.lists.shape[1] - 1)
    )  # what is behind a list may be anything


def half_as_many(self, flags, order=None, own=triton_fused.FusedTileOps._lists):
    made = own(self, flags, order)
    return made._replace(counts=made.counts // 2)


def every_other_column(self, product, left, flags, of, n, own=triton_fused.FusedTileOps._sum):
    own(self, product, left, flags, of if of.order is None else of._replace(order=of.order // 2 * 2), n)


@pytest.mark.parametrize(
    ("where", "name", "fault", "words"),
    [
        slow(gathering.Marker, "finish", columns_twice, "dropped_mass at"),
        slow(triton_fused.FusedTileOps, "accumulate_marked", too_sparing, "is left out; the filter is"),
        slow(triton_fused.FusedTileOps, "mark_saved", saved_too_sparing, "is left out; the filter is"),
        (triton_fused.FusedTileOps, "_lists", other_lists, "gradient of"),
        slow(triton_fused.FusedTileOps, "_lists", half_as_many, "gradient of"),
        (triton_fused.FusedTileOps, "_sum", every_other_column, "gradient of"),
    ],
    ids=["mass", "bound", "bound of saved", "lists", "counts", "order"],
)
def test_a_fault_planted_in_gathered_columns_is_found(monkeypatch, override, where, name, fault, words):
    override(capabilities=TRITON)
    monkeypatch.setattr(where, name, fault)
    found = fuzz("triton", filtered("triton", 2000), SIZES["triton"])
    assert found is not None
    assert words in found[2]


def scales_off(self, grads, bases, own=triton_fused.FusedTileOps.row_scales):
    return own(self, grads, bases).mul_(1.1)


def labels_unsettled(self, state, done, exps, maxima, own=triton_fused.FusedTileOps.settle):
    labels = state.labels[: len(exps), None].clamp(0, self.plan.vocab_size - 1)
    before = exps.gather(1, labels)
    bases = own(self, state, done, exps, maxima)
    exps.scatter_(1, labels, before)
    return bases


@pytest.mark.parametrize(
    ("name", "fault"), [("row_scales", scales_off), ("settle", labels_unsettled)], ids=["scales", "labels"]
)
def test_a_fault_planted_in_what_products_read_as_it_is_is_found(monkeypatch, override, name, fault):
    override(capabilities=TRITON)
    monkeypatch.setattr(triton_fused.FusedTileOps, name, fault)
    found = fuzz("triton", of_one_base("triton", 2000), SIZES["triton"])
    assert found is not None
    assert "gradient of" in found[2]


def cpp_other_sign(grads, own=cpp._vectors):
    gradient, *rest = own(grads)
    return (-gradient, *rest)


def cpp_one_column_off(self, tile, labels, own=cpp.CppTileOps._tile):
    packed, weight, bias, labels, first, *numbers = own(self, tile, labels)
    return packed, weight, bias, labels, first + (first > 0), *numbers


def cpp_no_label(grads, own=cpp._vectors):
    """Its correction is that of a label of probability one."""
    gradient, log_probs, *rest = own(grads)
    return (gradient, torch.zeros_like(log_probs), *rest)


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(cpp, "_vectors", cpp_other_sign), (cpp.CppTileOps, "_tile", cpp_one_column_off), (cpp, "_vectors", cpp_no_label)],
    ids=["sign", "column", "label"],
)
def test_a_fault_planted_before_the_cpp_kernels_is_found(monkeypatch, override, where, name, fault):
    override(capabilities={"tiles": ((64, 64), (64, 128))})
    monkeypatch.setattr(where, name, fault)
    found = fuzz("cpp", range(500), SIZES["cpp"])
    assert found is not None
    assert found[0] < 100
    assert "right is" in found[2]


def test_a_number_where_the_label_is_banned_is_found(monkeypatch):
    spec = CallSpec(seed=3, level="logits", shape=(2,), vocab=9, special="banned label")
    assert compare(spec, "torch") is None
    own = fuzz_calls.logits_to_log_probs
    monkeypatch.setattr(fuzz_calls, "logits_to_log_probs", lambda *a, **o: own(*a, **o).clamp(min=-1e4))
    assert "right is -inf" in compare(spec, "torch")


def test_a_loss_shrinks_to_a_loss(monkeypatch):
    monkeypatch.setattr(fuzz_calls, "FusedLinearDPOLoss", lambda beta, *_, **o: FusedLinearDPOLoss(1.01 * beta, **o))
    small = (24, 16, 60)
    first = next(
        n for n in itertools.count()
        if (spec := draw(n, small)).level == "losses" and not spec.compiled and failure(spec, "torch")
    )  # fmt: skip
    _, spec, said = fuzz("torch", range(first, first + 1), small)
    assert (spec.level, spec.shape[0]) == ("losses", 2)
    assert "right is" in said


def test_a_stride_that_is_forgotten_is_found(monkeypatch):
    def bias(self, tile):
        """Contiguous numbers from where the bias begins."""
        own = self.call.bias
        if own is None:
            return None
        n = len(tile.weight)
        return own.as_strided((n,), (1,), own.storage_offset() + tile.columns.start).to(self.call.compute_dtype)

    monkeypatch.setattr(triton_tiles.TritonTileOps, "_bias", bias)
    spec = CallSpec(seed=1, shape=(3,), features=8, vocab=40, bias="strided")
    assert compare(spec, "triton") is not None
    assert compare(CallSpec(seed=1, shape=(3,), features=8, vocab=40, bias="contiguous"), "triton") is None


def test_a_loss_of_another_beta_is_found(monkeypatch):
    monkeypatch.setattr(fuzz_calls, "FusedLinearDPOLoss", lambda beta, *_, **o: FusedLinearDPOLoss(1.001 * beta, **o))
    spec = CallSpec(seed=1, level="losses", shape=(4, 6), features=8, vocab=40)
    assert "loss at 0" in compare(spec, "torch")
    monkeypatch.undo()
    assert compare(spec, "torch") is None
    assert compare(replace(spec, compiled=True), "torch") is None


def test_a_failure_is_shrunk_and_printed_as_a_script():
    spec = CallSpec(seed=7, shape=(2, 9), features=12, vocab=40, softcap=3.0, dtype=torch.bfloat16)
    small = shrink(spec, lambda s: s.vocab >= 10)
    assert small == CallSpec(seed=7, shape=(1,), features=1, vocab=10)
    assert as_script(small, "cpp").endswith("print(compare(CallSpec(seed=7, shape=(1,), features=1, vocab=10), 'cpp'))")
