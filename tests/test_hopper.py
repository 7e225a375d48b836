"""The kernel with specialised warps for Hopper, by a model of what its barriers, copies and products do."""

from __future__ import annotations

import gluon_model
import pytest
import torch
from torch import Tensor

from benchmarks import predict
from dpo_kernels.call import Grads, Options
from dpo_kernels.kernels import hopper
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.ops import token_stats_op
from dpo_kernels.overrides import override
from dpo_kernels.statistics import SoftmaxState

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 8, "GROUP": 2, "STAGES": 4}
MAXIMUM, TOTAL, LABEL_LOGIT = range(3)


def arguments_of(tokens: int, features: int, vocab: int, split: int, first: int = 0, **options) -> dict:
    hidden, weight = torch.randn(tokens, features), torch.randn(vocab, features)
    labels = torch.randint(first - 5, first + vocab + 5, (tokens,))
    save = options.get("SAVE", False)
    slots = -(-vocab // BLOCKS["BLOCK_N"])
    made = {
        "partials": torch.full((-(-vocab // split), len(SoftmaxState._fields), tokens), torch.nan),
        "exps": torch.full((tokens, vocab + 3), torch.nan),
        "block_maxima": torch.full((tokens, slots), torch.nan),
        "bases": torch.randn(tokens),
        "moved": torch.zeros(tokens, dtype=torch.int32),
    }
    return {
        "hidden": gluon_model.Descriptor(hidden, BLOCKS["BLOCK_M"], BLOCKS["BLOCK_K"]),
        "weight": gluon_model.Descriptor(weight, BLOCKS["BLOCK_N"], BLOCKS["BLOCK_K"]),
        "labels": labels, **made, "n": tokens, "V": vocab, "D": features, "first": first, "split": split,
        "exps_stride": made["exps"].stride(0), "maxima_stride": slots, "outer": 1.7, "SAVE": save,
        "ONE_BASE": options.get("ONE_BASE", False), "MAXIMA_COLUMNS": BLOCKS["BLOCK_N"], **BLOCKS,
    }  # fmt: skip


def run(monkeypatch, given: dict, programs: int = 3, seed: int = 0, kept: int = 0, changes: dict | None = None) -> None:
    pointers = {n: gluon_model.Pointer(v) for n, v in given.items() if isinstance(v, Tensor)}
    gluon_model.run(monkeypatch, hopper, "hopper_forward_kernel", programs, given | pointers, seed, kept, changes)


def check(given: dict) -> None:
    """Against what fused.forward_kernel says that it writes."""
    z = (given["hidden"].matrix @ given["weight"].matrix.T) * given["outer"]
    local, vocab, split = given["labels"] - given["first"], given["V"], given["split"]
    at_label = torch.arange(vocab) == local[:, None]
    others = z.masked_fill(at_label, -torch.inf)
    for i, columns in enumerate(range(0, vocab, split)):
        part = slice(columns, columns + split)
        state = given["partials"][i]
        torch.testing.assert_close(state[MAXIMUM], others[:, part].amax(1))
        torch.testing.assert_close(state[MAXIMUM] + state[TOTAL].log(), others[:, part].logsumexp(1))
        torch.testing.assert_close(state[LABEL_LOGIT], (z * at_label)[:, part].sum(1))
    if not given["SAVE"]:
        assert given["exps"].isnan().all()
        return
    width = BLOCKS["BLOCK_N"]
    maxima = torch.stack([block.amax(1) for block in others.split(width, 1)], 1)
    near = maxima - given["bases"][:, None] < hopper.FAR.value
    relative = torch.where(near, given["bases"][:, None], maxima) if given["ONE_BASE"] else maxima
    torch.testing.assert_close(given["block_maxima"], relative)
    torch.testing.assert_close(
        given["exps"][:, :vocab], (others - relative.repeat_interleave(width, 1)[:, :vocab]).exp(), rtol=1e-4, atol=1e-6
    )
    assert given["exps"][:, vocab:].isnan().all()
    assert torch.equal(given["moved"].bool(), given["ONE_BASE"] & ~near.all(1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options", [{}, {"SAVE": True}, {"SAVE": True, "ONE_BASE": True}], ids=["score", "save", "base"]
)
def test_every_block_is_made_once_and_by_the_right_slices(monkeypatch, options, seed):
    """Three programs walk 3 x 4 parts, of which the last are ragged in rows, columns and features."""
    torch.manual_seed(seed)
    given = arguments_of(41, 44, 210, 64, first=3, **options)
    if seed == 1:
        given["bases"][:9] -= 80  # rows far above
    run(monkeypatch, given, seed=seed)
    check(given)


@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 32), (16, 8, 32, 32), (17, 16, 33, 32), (5, 200, 40, 64), (40, 24, 300, 96)]
)
@pytest.mark.parametrize("programs", [1, 2, 7])
def test_small_and_uneven_calls_end(monkeypatch, shape, programs):
    """Fewer slices in all than the first group is to be ahead; as many programs as there are parts, or one for all."""
    torch.manual_seed(0)
    given = arguments_of(*shape)
    parts = -(-shape[0] // BLOCKS["BLOCK_M"]) * -(-shape[2] // shape[3])
    run(monkeypatch, given, programs=min(parts, programs))
    check(given)


def test_a_product_that_reads_a_buffer_after_it_was_given_back_is_found(monkeypatch):
    torch.manual_seed(0)
    given = arguments_of(41, 44, 210, 64)
    run(monkeypatch, given, kept=1)
    with pytest.raises(AssertionError):
        check(given)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("arrive", lambda own: lambda barrier, pred=True: own(barrier)),  # a slice before the first is given back
        ("init", lambda own: lambda barrier, count: own(barrier, 1)),  # one group alone gives a buffer back
        ("wait", lambda own: lambda barrier, parity: own(barrier, parity ^ 1)),
        ("wait", lambda own: lambda barrier, parity: None),
        ("expect", lambda own: lambda barrier, size: own(barrier, size // 2)),
    ],
    ids=["predicate", "count", "parity", "no wait", "bytes"],
)
def test_slips_with_barriers_are_found(monkeypatch, name, change):
    torch.manual_seed(0)
    given = arguments_of(41, 44, 210, 64)

    def run_and_check():
        run(monkeypatch, given, changes={name: change})
        check(given)

    with pytest.raises((AssertionError, gluon_model.DeadlockError)):
        run_and_check()


def test_groups_that_wait_for_each_other_are_found(monkeypatch):
    """No group can be as many slices ahead as there are buffers."""
    monkeypatch.setattr(hopper.LEAD, "value", BLOCKS["STAGES"])
    with pytest.raises(gluon_model.DeadlockError):
        run(monkeypatch, arguments_of(41, 64, 210, 64))


def test_what_is_predicted_of_groups_that_take_turns():
    """Nothing is lost where nothing is accumulated; all of what is, where both begin together and stay so."""
    assert hopper.LEAD.value == predict.LEAD
    assert predict.turns(16, 1024.0, 0.0) == pytest.approx(16 * 1024)
    together = predict.turns(64, 1024.0, 3000.0, lead=0)
    apart = predict.turns(64, 1024.0, 3000.0)
    assert 64 * 1024 < apart < together <= 64 * 1024 + 3000
    assert predict.turns(64, 1024.0, 3000.0, stages=12, lead=6) < apart


@pytest.mark.parametrize(
    ("changes", "runs"),
    [
        ({}, {"hopper_forward_kernel"}),
        ({"outputs": ("is_top1",)}, {"forward_kernel"}),
        ({"gradient_filter": 2**-8, "memory_budget": 2**24}, {"forward_kernel"}),
        ({"compute_dtype": torch.float32}, {"forward_kernel"}),
        ({"arch": Arch("cuda", 10)}, {"forward_kernel"}),
    ],
    ids=["plain", "statistics", "marks", "float32", "blackwell"],
)
def test_what_takes_it(changes, runs):
    changes = {"compute_dtype": torch.bfloat16, "arch": Arch("cuda", 9)} | changes
    arch, dtype = changes.pop("arch"), changes["compute_dtype"]
    names = []

    def launch(module, name, programs, warps, stages, arguments):
        names.append(name)
        for flags in ("flags", "drops", "dropped"):
            if name in ("forward_kernel", "known_kernel") and flags in arguments and arguments.get("MARK", True):
                arguments[flags].zero_()

    tensors = torch.zeros(300, 64, dtype=dtype), torch.zeros(40_000, 64, dtype=dtype), None, None, None
    encoded = Options(grads=Grads.of(("hidden", "weight")), impl="triton", **changes).encode()
    with override(launch=launch, arch=arch, kernels={"product": {"specialized": True}}, capabilities={"scratch": 0}):
        token_stats_op._init_fn(*tensors, torch.zeros(300, dtype=torch.int64), *encoded)
    assert {name for name in names if "forward" in name} == runs
