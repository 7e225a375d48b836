"""What two ranks that hold a vocabulary together have to do: a function a contract, run by tests/test_vocab_shard.py.

Each runs on both ranks at once, so both have to make the same calls. A rank that fails says so and goes no further.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from vocab_dtensor_checks import (  # noqa: F401
    check_a_mesh_of_two_dimensions,
    check_dtensors,
    check_dtensors_that_are_placed_otherwise,
)
from vocab_ranks import (
    EVERY,
    FEW,
    IMPLS,
    Case,
    Here,
    V,
    call,
    compare,
    counted,
    inputs_of,
    mesh_of_all,
    near,
    plan_of,
    raises,
    same_on_ranks,
    shard_weight,
)

from dpo_kernels import (
    FusedLinearDPOLoss,
    VocabShard,
    hidden_to_log_probs,
    ops,
    plan,
    reference,
    token_stats,
)
from dpo_kernels.call import Grads, Options
from dpo_kernels.dispatch import BACKENDS
from dpo_kernels.vocab_shard import chunk


def check_modes_and_statistics() -> None:
    for impl in IMPLS:
        for case in (
            *(Case(impl, mode, outputs=FEW, shape=(150, 24, 515)) for mode in ("score", "frozen", "keep", "recompute")),
            Case(impl, "mixed", torch.bfloat16, shape=(150, 24, 515)),
            Case(impl, "recompute", outputs=EVERY, rank=3, shape=(150, 24, 515)),
            Case(impl, "keep", form="dtensor", hidden="split", rank=3, shape=(75, 24, 515)),
            Case(impl, "frozen", hidden="split", shape=(75, 24, 515)),
        ):
            made = compare(case)
            bound = 2**-8 if case.dtype == torch.bfloat16 else 1e-5
            assert made.same_bits, f"{case}: ranks differ"
            for name, value in made.values.items():
                assert value <= (1e-5 if name == "log_probs" or name in EVERY else bound), f"{case}: {name} {value:.1e}"


def check_any_cut() -> None:
    """Nothing, one row, all of it; gradients too."""
    for cut in (0, 1, V - 1, V):
        here = Here(cut=cut)
        here.check()
        for grads in ("hidden", "hidden weight bias"):
            for impl in IMPLS:
                leaves = [here.hidden, here.weight, here.bias]
                wants = [name in grads for name in ("hidden", "weight", "bias")]
                own = [t.detach().clone().requires_grad_(w) for t, w in zip(leaves, wants, strict=True)]
                part = [own[0], own[1][here.part], own[2][here.part]]
                hidden_to_log_probs(
                    part[0], part[1], here.labels, part[2], impl=impl, shard=here.shard
                ).sum().backward()
                exact = [t.detach().double().requires_grad_() for t in leaves]
                reference.hidden_to_log_probs(exact[0], exact[1], here.labels, exact[2]).sum().backward()
                near(own[0].grad, exact[0].grad)
                if wants[1]:
                    near(own[1].grad[here.part], exact[1].grad[here.part])
                    near(own[2].grad[here.part], exact[2].grad[here.part])


def check_saved_exponentials_of_one_base() -> None:
    """Triton: bases where the label is elsewhere, sums that are elsewhere too, and a rank without a row of W, whose
    numbers may be anything: nothing of them is 0 times something that is none."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(150, 32), torch.randn(1100, 32), torch.randint(1100, (150,))
    weight[:300] += 3 * hidden.mean(0)  # likelier ones
    hidden[:40] *= 12  # labels far below them
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    reference.hidden_to_log_probs(exact[0], exact[1], labels).sum().backward()
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    for cut in (0, 40, 550, 1100):
        part = (slice(0, cut), slice(cut, 1100))[dist.get_rank()]
        for budget in (None, 2**24):
            own = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
            shard = VocabShard(None, part.start, 1100)
            hidden_to_log_probs(*own, labels, impl="triton", shard=shard, memory_budget=budget).sum().backward()
            for got, right in zip(own, (exact[0].grad, exact[1].grad[part]), strict=True):
                assert (got.grad.double() - right).norm() <= 6e-3 * right.norm(), (cut, budget)
    torch.use_deterministic_algorithms(False)


def check_any_order_of_ranks() -> None:
    here = Here()
    cut = 40
    here.part = (slice(cut, V), slice(0, cut))[dist.get_rank()]
    here.shard = VocabShard(None, here.part.start, V)
    here.check()


def check_parts_that_are_counted() -> None:
    rows = (100, 31)[dist.get_rank()]
    assert VocabShard.of(rows) == VocabShard(None, (0, 100)[dist.get_rank()], V)


def check_parts_that_leave_a_gap_or_overlap() -> None:
    here = Here()
    for first in ((0, 0), (0, 65), (1, 66), (10, 66)):
        shard = VocabShard(None, first[dist.get_rank()], V + (first[0] > 0))
        if first == (0, 65):  # the second is one row short of the end, and one of the first's
            shard = VocabShard(None, first[dist.get_rank()], V)
        raises(ValueError, "are not the whole vocabulary once", here.local, shard=shard)
    here.check()  # no rank waits for another


def check_labels_that_differ() -> None:
    """As those of data parallel ranks would, whose weight FSDP has split."""
    here = Here()
    if dist.get_rank():
        here.labels[[0, 1]] = here.labels[[1, 0]]
    raises(ValueError, "the ranks of this vocabulary have different labels", here.local)
    here = Here()
    here.check()


def check_labels_that_differ_in_number() -> None:
    """In how many count, and in how many there are: a sentence on every rank, whatever the sizes of their messages."""
    for shorter in (False, True):
        here = Here()
        if dist.get_rank() and shorter:
            here.hidden, here.labels = here.hidden[:-3], here.labels[:-3]
        elif dist.get_rank():
            here.labels[:5] = -100
        counts = f"{21 if dist.get_rank() == 0 else 18 if shorter else 16} of which count"
        raises(ValueError, counts, here.local)
    Here().check()


def check_labels_outside_on_one_rank() -> None:
    here = Here()
    if dist.get_rank():
        here.labels[3] = V
        raises(IndexError, f"labels[3] is {V}; expected a token in [0, {V})", here.local)
    else:
        raises(RuntimeError, "another rank of this vocabulary failed", here.local)
    Here().check()


def check_an_implementation_that_one_rank_has_not() -> None:
    here = Here()
    if dist.get_rank():
        with mock.patch.object(type(BACKENDS["cpp"]), "cannot_run", return_value="no compiler was found"):
            raises(RuntimeError, "impl 'cpp' cannot run on cpu: no compiler", here.local, impl="cpp")
    else:
        raises(RuntimeError, "another rank of this vocabulary failed", here.local)
    Here().check()


def check_labels_outside() -> None:
    here = Here()
    here.labels[3] = V
    raises(IndexError, f"labels[3] is {V}; expected a token in [0, {V})", here.local)
    here.labels[3] = -1
    raises(IndexError, "labels[3] is -1", here.local)
    here.labels[3] = -100
    here.check()
    raises(IndexError, "labels[3] is -100", here.local, ignore_index=None)


def check_no_tokens() -> None:
    for labels in (torch.full((21,), -100), torch.zeros(0, dtype=torch.long)):
        here = Here(tokens=len(labels))
        here.labels = labels
        here.check()
        for impl in IMPLS:
            hidden, weight = here.hidden.clone().requires_grad_(), here.weight[here.part].clone().requires_grad_()
            hidden_to_log_probs(hidden, weight, labels, shard=here.shard, impl=impl).sum().backward()
            assert not hidden.grad.any()
            assert not weight.grad.any()


def check_narrow_labels_and_no_ignore_index() -> None:
    here = Here()
    here.labels = here.labels.to(torch.uint8)
    here.check(ignore_index=None)


def check_each_rank_has_its_own_back_end() -> None:
    here = Here()
    impl = IMPLS[dist.get_rank()]
    got = here.local(impl=impl, outputs=EVERY)
    for value, truth in zip(got[:5], here.exact(outputs=EVERY)[:5], strict=True):
        near(value.double(), truth.double())
        assert same_on_ranks(value)
    # A weight that does not lie in rows is left to the PyTorch back end, on this rank alone.
    weight = here.weight[here.part]
    weight = weight.T.contiguous().T if dist.get_rank() else weight
    got = hidden_to_log_probs(here.hidden, weight, here.labels, here.bias[here.part], impl="cpp", shard=here.shard)
    near(got.double(), here.exact().log_probs)


def check_numbers_out_of_reach_of_one_rank() -> None:
    """Logits of a million on one rank: all compute again, with PyTorch."""
    here = Here()
    here.weight[-1] *= 1e6
    got, exact = here.local(impl="cpp"), here.local(impl="torch")
    assert torch.equal(got.log_probs, exact.log_probs)
    assert same_on_ranks(got.log_probs)


def check_rows_without_a_number() -> None:
    """Banned tokens, a part that is banned altogether, NaN and infinities: they stay in their row."""
    here = Here()
    here.bias[5] = -torch.inf
    here.check()
    here = Here()
    here.bias[66:] = -torch.inf  # all of the second rank
    here.labels = here.labels % 66
    here.check(outputs=("is_top1", "log_sum_sq_probs"))
    here.check(outputs=("entropy",))
    for value in (torch.nan, torch.inf):
        here = Here()
        here.hidden[4] = value
        for impl in IMPLS:
            got = here.local(impl=impl, outputs=EVERY)
            assert got.log_probs[4].isnan()
            assert not torch.cat([got.log_probs[:4], got.log_probs[5:], got.entropy[:4], got.entropy[5:]]).isnan().any()
            assert same_on_ranks(got.log_probs)
            assert same_on_ranks(got.is_top1)


def check_nan_of_one_entry() -> None:
    """On one rank alone: every row is NaN on both, the row whose label it is too, and no label is the top one."""
    for entry in (3, V - 2):
        here = Here()
        here.labels[0] = entry
        here.bias[entry] = torch.nan
        here.bias[7] = 50.0
        here.labels[1] = 7
        for impl in IMPLS:
            got = here.local(impl=impl, outputs=EVERY)
            assert got.log_probs.isnan().all()
            assert got.entropy.isnan().all()
            assert not got.is_top1.any()
            assert all(same_on_ranks(value) for value in got[:5])


def check_infinite_weights_of_other_labels() -> None:
    """A frozen head's gradient takes the label's weight, and no other row in its place."""
    here = Here(cut=66)
    here.weight[0, 0] = here.weight[-1, 0] = torch.inf
    here.bias[0] = here.bias[-1] = -torch.inf
    here.weight[0, 1:] = here.weight[-1, 1:] = 0
    here.hidden[:, 0] = 0
    here.hidden, mask = here.hidden.requires_grad_(), (here.labels > 0) & (here.labels < V - 1)
    assert mask.all()
    own = here.weight[here.part].nan_to_num(posinf=0.0)
    exact = torch.autograd.grad(
        hidden_to_log_probs(here.hidden, own, here.labels, here.bias[here.part], shard=here.shard).sum(), here.hidden
    )[0]
    assert not exact.isnan().any()


def check_ties_across_ranks() -> None:
    """The first of equal logits is the top one, whichever rank has it."""
    here = Here(tokens=4)
    here.weight[:] = 0
    here.bias[:] = 0
    here.bias[[7, 100]] = 3.0
    here.labels = torch.tensor([7, 100, 0, V - 1])
    for impl in IMPLS:
        assert here.local(impl=impl).is_top1.tolist() == [True, False, False, False]
    here.bias[:] = 1.0
    here.labels = torch.tensor([0, 1, 66, V - 1])
    for impl in IMPLS:
        assert here.local(impl=impl).is_top1.tolist() == [True, False, False, False]


def check_one_rank_fails() -> None:
    """It has its own error; the other hears of it, and neither waits."""
    here = Here()
    small = 1000
    if dist.get_rank() == 0:
        raises(ValueError, "memory_budget is 1,000 bytes", here.local, memory_budget=small)
    else:
        raises(RuntimeError, "another rank of this vocabulary failed", here.local)
    here.check()


def check_arguments() -> None:
    here = Here()
    half = here.weight[here.part]
    raises(TypeError, "shard is int; expected dpo_kernels.VocabShard", here.local, shard=3)
    raises(
        ValueError, f"from row {V} on ends at", here.local, shard=VocabShard(None, V, V)
    )  # fmt: skip
    raises(ValueError, "weight is a DTensor, which says which rows are here", hidden_to_log_probs, here.hidden,
           shard_weight(here.weight), here.labels, shard=here.shard)  # fmt: skip
    split = VocabShard(None, here.part.start, V, 0)
    raises(ValueError, "its dimension 0 split over 2 ranks", hidden_to_log_probs, here.hidden, half, here.labels,
           shard=split)  # fmt: skip
    raises(ValueError, "expected a dimension before the features", hidden_to_log_probs, here.hidden, half, here.labels,
           shard=VocabShard(None, here.part.start, V, 1))  # fmt: skip
    raises(ValueError, "bias is", hidden_to_log_probs, here.hidden, half, here.labels, here.bias[:-1], shard=here.shard)
    for given, kind, text in (
        ((None, 1.5, V), TypeError, "first_row of a VocabShard is 1.5; expected a whole number"),
        ((None, -1, V), ValueError, "first_row of a VocabShard is -1; expected a number >= 0"),
        ((None, 0, 0), ValueError, "vocab_size of a VocabShard is 0; expected a number >= 1"),
        ((None, 0, V, -1), ValueError, "hidden_dim of a VocabShard is -1"),
    ):
        raises(kind, text, VocabShard, *given)


def check_pieces_that_lie_one_behind_the_other() -> None:
    """Hidden states in any number of dimensions, split in the first that has more than one entry, or in a later one."""
    here = Here(tokens=24)
    exact = here.hidden.double().requires_grad_()
    reference.hidden_to_log_probs(exact, here.weight.double(), here.labels).square().sum().backward()
    for shape, dim in (((24,), 0), ((1, 24), 1), ((24, 1), 0), ((4, 6), 0), ((4, 6), 1), ((2, 3, 4), 2)):
        hidden = here.hidden.view(*shape, -1)
        piece = chunk(shape[dim], 2, dist.get_rank())
        own = hidden.narrow(dim, piece.start, piece.stop - piece.start).clone().requires_grad_()
        shard = VocabShard(None, here.part.start, V, dim)
        got = hidden_to_log_probs(own, here.weight[here.part], here.labels.view(shape), shard=shard)
        got.square().sum().backward()
        true = exact.grad.view(*shape, -1).narrow(dim, piece.start, piece.stop - piece.start)
        near(own.grad.double(), true, 1e-5 * true.abs().max().item())
        assert own.grad.is_contiguous()


def check_losses() -> None:
    here = Here(tokens=4 * 6)
    hidden, labels = here.hidden.view(4, 6, -1), here.labels.view(4, 6)
    ref_hidden, ref_weight = hidden + 0.1, here.weight * 0.9
    loss = FusedLinearDPOLoss(use_weighting=True)
    whole = [t.clone().requires_grad_() for t in (hidden, here.weight)]
    exact = loss(*whole, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
    exact.loss.backward()
    own = [t.clone().requires_grad_() for t in (hidden, here.weight[here.part])]
    got = loss(*own, labels, ref_hidden=ref_hidden, ref_weight=ref_weight[here.part], shard=here.shard)
    got.loss.backward()
    near(got.loss, exact.loss, 1e-6)
    assert same_on_ranks(got.loss.view(1))
    near(own[0].grad, whole[0].grad, 1e-6)
    near(own[1].grad, whole[1].grad[here.part], 1e-6)
    split = [distribute_tensor(hidden, mesh_of_all(), [Shard(1)]), shard_weight(here.weight)]
    split = [t.requires_grad_() for t in split]
    got = loss(*split, distribute_tensor(labels, mesh_of_all(), [Shard(1)]),
               ref_hidden=ref_hidden, ref_weight=shard_weight(ref_weight))  # fmt: skip
    got.loss.backward()
    near(got.loss, exact.loss, 1e-6)
    near(split[0].grad.full_tensor(), whole[0].grad, 1e-6)
    near(split[1].grad.full_tensor(), whole[1].grad, 1e-6)


def check_unusual_calls() -> None:
    """Backward twice, one gradient of several, autocast, strides, a bias or an entropy alone, gradients of 0."""
    here = Here(tokens=24)
    for impl in IMPLS:
        hidden, weight, bias = (
            t.clone().requires_grad_() for t in (here.hidden, here.weight[here.part], here.bias[here.part])
        )
        got = hidden_to_log_probs(hidden, weight, here.labels, bias, impl=impl, shard=here.shard)
        first = torch.autograd.grad(got.sum(), [hidden, weight, bias], retain_graph=True)
        for i, leaf in enumerate((hidden, weight, bias)):
            near(torch.autograd.grad(got.sum(), leaf, retain_graph=True)[0], first[i], 1e-6)
        strided = here.hidden.view(4, 6, -1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        again = hidden_to_log_probs(strided, weight, here.labels.view(4, 6), bias, impl=impl, shard=here.shard)
        near(torch.autograd.grad(again.sum(), strided)[0].reshape(24, -1), first[0], 1e-6)
        stats = token_stats(here.hidden, weight, here.labels, bias, outputs=("entropy",), impl=impl, shard=here.shard)
        exact = [t.double().requires_grad_() for t in (here.weight, here.bias)]
        truth = reference.token_stats(here.hidden.double(), exact[0], here.labels, exact[1])
        found = torch.autograd.grad(stats.entropy.sum(), [weight, bias])
        true = torch.autograd.grad(truth.entropy.sum(), exact)
        for one, other in zip(found, true, strict=True):
            near(one.double(), other[here.part])
        with torch.autocast("cpu", torch.bfloat16):
            near(here.local(impl=impl).log_probs.double(), here.exact().log_probs, 0.2)
            assert same_on_ranks(here.local(impl=impl).log_probs)


def check_compiled() -> None:
    here = Here()
    compiled = torch.compile(
        lambda h, w, y: hidden_to_log_probs(h, w, y, shard=here.shard), fullgraph=True, backend="aot_eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden, weight = here.hidden.clone().requires_grad_(), here.weight[here.part].clone().requires_grad_()
        got = compiled(hidden, weight, here.labels)
    got.sum().backward()
    exact = here.hidden.clone().requires_grad_()
    plain = hidden_to_log_probs(exact, here.weight[here.part], here.labels, shard=here.shard)
    plain.sum().backward()
    near(got, plain)
    near(hidden.grad, exact.grad)


def check_operators() -> None:
    """What torch.compile asks of an operator; hidden states whole and split."""
    here = Here(tokens=20)
    for dim in (None, 0):
        hidden = here.hidden if dim is None else here.hidden[chunk(20, 2, dist.get_rank())]
        shard = VocabShard(None, here.part.start, V, dim)
        for grads in (Grads(hidden=True), Grads(hidden=True, weight=True, bias=True)):
            options = Options(grads=grads, outputs=("is_top1",), shard=shard)
            assert Options.decode(*options.encode()) == replace(
                options, shard=replace(shard, process_group=shard.group)
            )
            tensors = [hidden.clone(), here.weight[here.part].clone(), here.bias[here.part].clone()]
            tensors = [t.requires_grad_(w) for t, w in zip(tensors, grads.as_list(), strict=False)]
            arguments = (*tensors, None, None, here.labels, *options.encode())
            torch.library.opcheck(ops.token_stats_op, arguments)


def check_triton() -> None:
    """In its interpreter; one of the ranks may have nothing."""
    for mode, vocab in (("frozen", 131), ("keep", 131), ("frozen", 1), ("keep", 1)):
        made = compare(Case("triton", mode, outputs=FEW, shape=(40, 16, vocab)))
        assert made.same_bits
        assert max(made.values.values()) < 1e-5, made.values


def check_what_is_sent() -> None:
    """As the plan says, to the byte: nothing of the size of the vocabulary."""
    for hidden in ("whole", "split"):
        for mode, outputs in (("score", EVERY), ("frozen", ()), ("keep", FEW)):
            case = Case("cpp", mode, torch.bfloat16, outputs, hidden=hidden, shape=(150, 24, 515))
            part = chunk(515, 2, dist.get_rank())
            shard = VocabShard(None, part.start, 515, 1 if hidden == "split" else None)
            sizes: dict[str, int] = {}
            with counted(sizes):
                call(case, inputs_of(case), part, shard, None)
            expected: dict[str, int] = {}
            for name, size in plan_of(case, None, 2).exchanges:
                kind = name.split(",")[0].replace("-", "_")
                expected[kind] = expected.get(kind, 0) + size
            assert sizes == expected, f"{case}: sent {sizes}, the plan says {expected}"


def check_plans() -> None:
    made = plan(1000, 64, 1001, torch.bfloat16, ranks=4, impl="torch")
    assert made.vocab_size == 251
    assert "one of 4 ranks" in str(made)
    assert "all-reduce, gradient of hidden states" in str(made)
    assert made.memory["between ranks"] >= 4 * 1000 * 64
    alone = plan(1000, 64, 251, torch.bfloat16, impl="torch")
    assert alone.exchanges == ()
    assert alone.memory["between ranks"] == 0
    raises(ValueError, "hidden_split is True, ranks None", plan, 10, 8, 100, hidden_split=True)
    raises(ValueError, "ranks 0 must be >= 1", plan, 10, 8, 100, ranks=0)


CHECKS = {name.removeprefix("check_"): function for name, function in list(globals().items()) if name[:6] == "check_"}


def run_checks(folder: str) -> None:
    """On a rank: every check; one that fails on one rank alone may leave the other waiting, so it is the last."""
    found = {}
    for name, function in CHECKS.items():
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
        if found[name]:
            os._exit(1)
