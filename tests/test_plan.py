"""The plan: pure, exhaustive, printable."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import slow

import dpo_kernels
from dpo_kernels import host_memory, planner
from dpo_kernels.backends import cpp, pytorch, triton
from dpo_kernels.call import Grads
from dpo_kernels.capabilities import DEFAULT_BUDGET
from dpo_kernels.workload import Workload

MIB = 2**20
CAPABILITIES = {
    **{f"torch, {kind}": value for kind, value in pytorch.CAPABILITIES.items()},
    **{f"triton, {kind}": value for kind, value in triton.CAPABILITIES.items()},
    "triton, tiles": replace(triton.CAPABILITIES["cuda"], one_pass=False, saved_multiple=None),
    "cpp": cpp.CAPABILITIES,
    "cpp, no bfloat16 products": cpp.WITHOUT_BFLOAT16,
}
CPP = [cpp.CAPABILITIES, cpp.WITHOUT_BFLOAT16]
SIZES = list(itertools.product((0, 1, 511, 8192, 131_072), (1, 64, 4096), (1, 2049, 151_936)))


def plan(
    tokens, hidden_size, vocab_size, dtype=torch.bfloat16, *, grads=("hidden", "weight"), outputs=(), softcap=None,
    compute_dtype=None, memory_budget=None, labels=None, capabilities=CAPABILITIES["torch, cpu"],
):  # fmt: skip
    """As `dpo_kernels.plan`, of back ends that are not here."""
    workload = Workload(
        tokens, hidden_size, vocab_size, dtype, compute_dtype or dtype, Grads.of(grads), "entropy" in outputs,
        softcap is not None, tokens if labels is None else labels, capabilities,
    )  # fmt: skip
    return planner.plan(workload, memory_budget)


GRADS = [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "weight", "bias")]


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32), slow(torch.float64)], ids=str)
@pytest.mark.parametrize("budget", [None, 8 * MIB, slow(40 * MIB), 64 * MIB, slow(256 * MIB), slow(4096 * MIB), 2**50])
def test_every_plan_keeps_its_budget_or_says_the_least(name, dtype, budget):
    capabilities = CAPABILITIES[name]
    for (tokens, features, vocab), grads, outputs, softcap in itertools.product(
        SIZES, GRADS, [(), ("entropy",)], [None, 30.0]
    ):
        arguments = (tokens, features, vocab, dtype)
        options = {"grads": grads, "outputs": outputs, "softcap": softcap, "capabilities": capabilities}
        try:
            made = plan(*arguments, memory_budget=budget, **options)
        except ValueError as error:
            assert budget is not None
            least = int(str(error).split("at least ")[1].split(" ")[0].replace(",", ""))
            assert least > budget
            assert plan(*arguments, memory_budget=least, **options).bytes <= least
            with pytest.raises(ValueError, match="need at least"):
                plan(*arguments, memory_budget=least - 1, **options)
            continue
        assert made.bytes <= made.memory_budget
        assert all(size >= 0 for size in made.memory.values())
        assert 1 <= made.tile_tokens <= max(tokens, 1)
        assert 1 <= made.tile_vocab <= vocab
        assert 0 <= made.kept_tokens <= tokens
        assert made.kept_tokens == tokens or made.kept_tokens % (capabilities.saved_multiple or made.tile_tokens) == 0
        assert 1 <= made.gemms <= 5
        assert (made.mode == "score") == (not grads)
        if outputs and grads:
            assert made.kept_tokens == 0 or tokens == 0
            assert made.mode != "frozen"


@pytest.mark.parametrize(
    ("grads", "mode", "gemms"),
    [((), "score", 1), (("hidden",), "frozen", 2), (("weight",), "keep", 2), (("hidden", "weight"), "keep", 3)],
)
def test_gemms_of_each_mode(grads, mode, gemms):
    made = plan(8192, 4096, 151_936, grads=grads, memory_budget=2**40)
    assert (made.mode, made.gemms) == (mode, gemms)


def test_more_budget_never_costs_gemms_and_the_dial_is_smooth():
    budgets = range(192 * MIB, 3000 * MIB, 64 * MIB)
    gemms = [plan(8192, 512, 151_936, memory_budget=b).gemms for b in budgets]
    assert gemms == sorted(gemms, reverse=True)
    assert gemms[0] > 3.9
    assert gemms[-1] == 3
    assert max(a - b for a, b in itertools.pairwise(gemms)) < 0.1


@pytest.mark.parametrize("tokens", [64, 256, 512])
@pytest.mark.parametrize(("features", "vocab"), [(512, 32_000), (1024, 151_936)])
def test_a_wide_tile_never_costs_a_product(tokens, features, vocab):
    """It is taken where all that a narrow one would keep is kept beside it."""

    def made_of(budget, **grads):
        return plan(tokens, features, vocab, memory_budget=budget, capabilities=cpp.CAPABILITIES, **grads)

    made = [made_of(budget) for budget in range(64 * MIB, 400 * MIB, 3 * MIB)]
    gemms = [one.gemms for one in made]
    assert gemms == sorted(gemms, reverse=True)
    assert gemms[-1] == 3
    assert made[-1].tile_vocab > 4096
    assert all(one.tile_vocab <= 4096 for one in made if one.mode == "mixed")
    for one in made:  # a reference that wants no gradient goes the same way
        score = made_of(one.memory_budget, grads=())
        assert (score.tile_tokens, score.tile_vocab) == (one.tile_tokens, one.tile_vocab)


def test_a_gradient_through_the_entropy_recomputes():
    assert plan(100, 64, 5000, outputs=("entropy",)).mode == "recompute"
    assert plan(100, 64, 5000, outputs=("entropy",), grads=("hidden",)).mode == "recompute"
    assert plan(100, 64, 5000, outputs=("is_top1",), grads=("hidden",)).mode == "frozen"


def test_the_smaller_accumulator_is_the_one_that_is_held():
    few, many = plan(4096, 1024, 100_000, memory_budget=128 * MIB), plan(100_000, 1024, 4096, memory_budget=128 * MIB)
    assert [s.outer for s in few.sweeps] == ["vocab"]
    assert [s.outer for s in many.sweeps] == ["tokens"]
    assert few.memory["gradient accumulators"] < 4 * 1024 * (4096 + 2049)
    assert many.memory["gradient accumulators"] < 4 * 1024 * (4096 + 2049)


def test_without_room_for_an_accumulator_each_gradient_gets_a_sweep_of_its_own():
    made = plan(131_072, 4096, 128_256, memory_budget=256 * MIB)
    assert [(s.outer, s.hidden, s.weight) for s in made.sweeps] == [("tokens", True, False), ("vocab", False, True)]
    assert made.gemms > 4.9


def test_the_default_budget_grows_with_the_inputs_and_the_memory():
    def default(budget, ranks=0, **sizes):
        capable = replace(CAPABILITIES["cpp"], default_budget=budget)
        given = {"tokens": 100, "hidden_size": 64, "vocab_size": 1000, **sizes}
        bf16, grads = torch.bfloat16, Grads(True, True, False)
        return planner.plan(Workload(*given.values(), bf16, bf16, grads, False, False, 100, capable, ranks=ranks))

    assert default(DEFAULT_BUDGET).memory_budget == DEFAULT_BUDGET
    assert default(3 * DEFAULT_BUDGET).memory_budget == 3 * DEFAULT_BUDGET
    assert default(3 * DEFAULT_BUDGET, ranks=2).memory_budget == DEFAULT_BUDGET  # the same on machines that differ
    large = {"tokens": 131_072, "hidden_size": 4096, "vocab_size": 128_256}
    assert default(DEFAULT_BUDGET, **large).memory_budget == 2 * 2 * 4096 * (131_072 + 128_256)


@pytest.mark.parametrize(
    ("limits", "processes", "expected"),
    [
        ((), "1", 2), ((7,), "1", 2), ((23.5,), "1", 5), ((64,), "1", 16), ((64, 12), "1", 3), ((64,), "4", 4),
        ((64,), "none", 16), ((64,), "0", 16), ((0,), "1", 2),
    ],
)  # fmt: skip
def test_the_default_budget_on_a_cpu_is_an_eighth_of_the_memory_in_halves_of_a_gib(
    limits, processes, expected, monkeypatch
):
    monkeypatch.setattr(host_memory, "_limits", lambda: iter([int(limit * 2**30) for limit in limits]))
    monkeypatch.setattr(host_memory, "_memory", host_memory._memory.__wrapped__)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert host_memory.default_budget() == expected * 2**29


def test_the_memory_of_this_machine_is_known():
    assert 2**28 < min(host_memory._limits()) < 2**44


@pytest.mark.parametrize("name", ["torch, cpu", "cpp"])
@pytest.mark.parametrize("grads", [("hidden", "weight"), ("hidden",), ("weight",), ("hidden", "weight", "bias")])
def test_a_filter_is_planned_where_its_arena_gains_something(name, grads):
    """A budget that has no room for a tile, or a frozen head's that has none for all, gives the plan without one."""
    sizes = 2000, 256, 32_000, torch.bfloat16
    modes = set()
    for budget in (1, 24, 32, 48, 64, 100, 128, 256, 300, 1024, 4096):
        with_it, without = (
            Workload(*sizes, torch.bfloat16, Grads.of(grads), False, False, 2000, CAPABILITIES[name], filter=how)
            for how in ("keep", "")
        )
        least = planner.least_budget(with_it)
        assert least == planner.least_budget(without)
        made = planner.plan(with_it, max(budget * MIB, least))
        assert made.bytes <= made.memory_budget
        if not made.sparse:
            assert made == planner.plan(without, max(budget * MIB, least))
        else:
            assert made.arena_rows * made.vocab_size >= made.tile_tokens * made.tile_vocab
            assert made.arena_rows >= made.tokens or grads != ("hidden",)
            assert made.kept_tokens == 0
        modes.add(made.sparse)
    assert modes == {True, False}


@pytest.mark.parametrize("grads", [("hidden", "weight"), ("hidden",), ("weight", "bias")])
def test_columns_are_marked_where_there_is_room_for_it(grads):
    capabilities = replace(CAPABILITIES["triton, cuda"], filters="gather", group=128)
    sizes = 2000, 256, 32_000, torch.bfloat16, torch.bfloat16, Grads.of(grads), False, False, 2000
    with_it, without = (Workload(*sizes, capabilities, filter=how) for how in ("gather", ""))
    assert planner.least_budget(with_it) == planner.least_budget(without)
    made = planner.plan(with_it)
    assert (made.mode, made.group, made.kept_tokens, made.gemms) == ("gather", 128, 2000, 1)
    assert "leaves columns that pass it, of every 128 tokens" in str(made)
    marks = made.memory["what is left out, and products of the rest"]
    labels = 1024 * (256 * 16 + 8)  # whose logits are made before, at once
    assert 2000 * 32_000 / 128 < marks - labels < 5 * 2000 * 32_000 / 128
    least = planner.least_budget(without)
    assert planner.plan(with_it, least) == planner.plan(without, least)
    other = replace(with_it, capabilities=replace(capabilities, tiles=((96, 4096), *capabilities.tiles)))
    assert planner.plan(other).mode != "gather", "tiles that cut groups"


def test_labels_that_are_ignored_count_in_the_budget():
    some, all_of_them = (plan(100, 64, 1000, torch.float32, labels=labels) for labels in (200, 10_000_000))
    assert all_of_them.bytes - some.bytes == 4 * (10_000_000 - 200)


def test_a_plan_cannot_be_changed():
    made = plan(5, 5, 5)
    with pytest.raises(TypeError):
        made.memory["libraries and threads"] = 0
    with pytest.raises(TypeError, match="grads is the string 'hidden'; expected a sequence of names"):
        dpo_kernels.plan(5, 5, 5, grads="hidden")


def test_autocast_converts_operands_in_tiles():
    plain = plan(4096, 1024, 32_000, torch.float32, memory_budget=200 * MIB)
    cast = plan(4096, 1024, 32_000, torch.float32, compute_dtype=torch.bfloat16, memory_budget=200 * MIB)
    assert cast.memory["tile and operands"] > plain.memory["tile and operands"]


def test_it_tells_a_person_what_will_happen():
    text = str(plan(8192, 512, 151_936, memory_budget=256 * MIB))
    for part in ("mixed: 8,192 tokens x 512 features x 151,936 vocabulary, bfloat16", "GEMMs", "tiles", "kept", "sweep",
                 "of a budget of 256.0 MiB", "gradient of hidden and weight"):  # fmt: skip
        assert part in text
    assert "kept" not in str(plan(8, 8, 8, grads=()))
    assert "gradient of bias" in str(plan(8, 8, 8, grads=("bias",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"outputs": ("loss",)}, r"outputs has \['loss'\]"),
        (
            {"grads": ("labels",)},
            r"grads has \['labels'\]; expected names from \('hidden', 'weight', 'bias', 'low_rank'\)",
        ),
        ({"tokens": -1}, "tokens -1"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"memory_budget": 1}, "need at least"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_kernels.plan(**({"tokens": 4, "hidden_size": 4, "vocab_size": 4} | arguments))


def test_the_public_plan_is_that_of_the_implementation_that_will_run():
    on_cpu = host_memory.with_memory(CAPABILITIES["torch, cpu"])
    assert dpo_kernels.plan(100, 64, 1000, impl="torch") == plan(100, 64, 1000, capabilities=on_cpu)
    expected = [plan(100, 64, 1000, capabilities=host_memory.with_memory(c)) for c in CPP]
    assert dpo_kernels.plan(100, 64, 1000, impl="cpp") in expected
    assert dpo_kernels.plan(100, 64, 1000) == dpo_kernels.plan(100, 64, 1000, impl="cpp")
    assert dpo_kernels.plan(100, 64, 1000, torch.float64) == plan(100, 64, 1000, torch.float64, capabilities=on_cpu)
    assert dpo_kernels.plan(100, 64, 1000, device="mps") == plan(100, 64, 1000)
    assert dpo_kernels.plan(100, 64, 1000, device="cuda") == plan(
        100, 64, 1000, capabilities=CAPABILITIES["torch, cuda"]
    )


def test_a_tile_in_cache_holds_its_gradient_only_where_there_is_one():
    score, full = (
        plan(4096, 1024, 32_000, grads=g, capabilities=CAPABILITIES["cpp"]) for g in ((), ("hidden", "weight"))
    )
    assert score.memory["tile and operands"] < full.memory["tile and operands"] / 4
    # A single product over all tokens is its own sum: no accumulator of the weight's gradient.
    one, more = (plan(n, 1024, 32_000, capabilities=CAPABILITIES["cpp"]) for n in (1024, 1025))
    assert one.memory["gradient accumulators"] == 4 * 1024 * 1024
    assert more.memory["gradient accumulators"] == 4 * 1024 * (1025 + 4096)
