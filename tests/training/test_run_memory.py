"""The memory of a step: counted, planned without numbers, tried, lowered; and what happens where it does not do."""

from __future__ import annotations

import dataclasses
import gc
import json
import mmap
import subprocess
import sys
import time
import types
from contextlib import contextmanager

import pytest
import torch
import transformers
from helpers import slow
from peft import LoraConfig
from training_helpers import SMALL, Trees, logs, make_model, make_trainer, weights
from transformers import TrainerCallback

from dpo_kernels import ops
from dpo_kernels.commands.run_plan import take
from dpo_kernels.training import FusedHead
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.layouts import Layout, PairTokens
from dpo_kernels.training.memory import checkpointing, device_memory, lower, run_plan, step_memory
from dpo_kernels.training.memory.device_memory import Limit
from dpo_kernels.training.memory.fake_models import fake_mode, make_fake, quantised_bytes
from dpo_kernels.training.memory.live_bytes import GRADIENTS, HOST, LiveBytes
from dpo_kernels.training.memory.pairs import longest_pairs, made_pairs
from dpo_kernels.training.memory.rehearsal import rehearse
from dpo_kernels.training.memory.step_memory import (
    ADAPTERS,
    ALLOCATOR,
    KEPT,
    LIBRARIES,
    OPTIMIZER,
    REFERENCE,
    WEIGHTS,
    FakeRun,
    PlanError,
    StepOptions,
)
from dpo_kernels.units import in_words

MIB = 2**20
WIDE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 4096,
        "head_dim": 16}  # fmt: skip
BUDGET = 32 * MIB  # of the head: what it holds is its plan's, and the rest is seen


def config_of(name="Llama", **options):
    return getattr(transformers, f"{name}Config")(**(SMALL | WIDE | options))


def fake_run(name="Llama", layout=None, lora=None, reference=False, config=None, **options):
    mode = fake_mode()
    config = config or config_of(name)
    policy = make_fake(mode, config, torch.float32, peft_config=lora, memory_budget=BUDGET)
    second = make_fake(mode, config, torch.float32, memory_budget=BUDGET) if reference else None
    layout = layout or Layout("bucketed")
    return FakeRun(mode, policy, second, layout, scores=reference or lora is not None, **options)


def numbers(model):
    return sum(p.numel() for p in model.parameters())


# Live bytes


def test_live_bytes_are_those_of_storages_that_live():
    counts = LiveBytes()
    x = torch.zeros(256)
    with counts:
        with counts.of_kind("a"):
            y = x + 1
            z = y[::2]  # a view: the same storage
        with counts.of_kind("b"):
            y.add_(1)  # in place: nothing new
            w = y * 2
    assert (counts.live["a"], counts.live["b"], counts.peak) == (1024, 1024, 2048)
    del y
    assert counts.live["a"] == 1024  # the view holds it
    del z, w
    assert not any(counts.live.values())
    assert counts.at_peak == {"a": 1024, "b": 1024}


def test_what_was_there_counts_nothing_and_gradients_have_their_name():
    layer = torch.nn.Linear(16, 16)
    counts = LiveBytes()
    handles = counts.watch_gradients(layer)
    with counts, counts.of_kind("step"):
        layer(torch.zeros(4, 16)).sum().backward()
    assert counts.live[GRADIENTS] == 4 * numbers(layer)
    assert counts.live["step"] <= 8  # nothing but the number 1 of backward, if that
    for handle in handles:
        handle.remove()


def test_the_host_is_no_part_of_the_peak():
    counts = LiveBytes()
    with counts:
        with counts.of_kind(HOST):
            a = torch.zeros(1000)
        b = torch.zeros(10)
    assert (counts.peak, counts.live[HOST]) == (40, 4000)
    del a, b


# The plan


class WithoutHead(LiveBytes):
    """What the head saves is its plan's."""

    def after(self, func, args, kwargs, results):
        return (results[: ops.STATS] if "token_stats.default" in str(func) else results), {}


def real_peak(layout, pairs, name="Llama", checkpointed=False):
    """Live bytes of a real step, without weights and what the head's plan says."""
    model = make_model(name, WIDE)
    FusedHead(model, BUDGET)
    from dpo_kernels.training.attention import use_branches

    use_branches(model, layout.attention == "branches")
    model.train()
    if checkpointed:
        checkpointing.switch(model, True)
    batch, counts = PairBatch(pairs, layout), WithoutHead()
    batch.mask, batch.positions  # noqa: B018  (made before it counts)
    with counts:
        log_probs = batch.run(model)["log_probs"]
        (log_probs * batch.mask).sum().backward()
    return counts.peak


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout("padded"), slow(Layout("bucketed")), Layout("shared", "branches"), Layout("bucketed", answers_at_once=1)],
    ids=str,
)
def test_a_step_without_numbers_holds_what_a_real_one_does(monkeypatch, layout, checkpointed):
    nothing = types.SimpleNamespace(bytes=0, gemms=0, memory={})
    monkeypatch.setattr(step_memory.StepBytes, "_plan", lambda *args: nothing)
    pairs = made_pairs(300, 500, 200, 2)
    run = fake_run(layout=layout)
    options = StepOptions(checkpointed, layout.answers_at_once, memory_budget=BUDGET)
    planned = run.step(pairs, options)
    found = planned.bytes - sum(planned.parts.get(name, 0) for name in (WEIGHTS, OPTIMIZER, ALLOCATOR))
    assert found == pytest.approx(real_peak(layout, pairs, checkpointed=checkpointed), rel=0.03)


def test_parts_of_a_run():
    run = fake_run(reference=True, libraries=1000, optimizer="adamw_torch")
    size = 4 * numbers(run.policy)
    found = run.step(made_pairs(20, 30, 30), StepOptions(memory_budget=BUDGET))
    assert found.parts[WEIGHTS] == pytest.approx(size, rel=1e-3)  # and a few buffers
    assert found.parts[REFERENCE] == found.parts[WEIGHTS]
    assert found.parts[OPTIMIZER] == 2 * size
    assert found.parts[LIBRARIES] == 1000
    assert found.bytes == sum(found.parts.values())
    tokens = 2 * (20 + 30 - 1) + 2  # of both answers, the last of each read too
    assert found.flops > 8 * tokens * numbers(run.policy) - 97 * 64  # 6 of the policy, 2 of the reference
    run = dataclasses.replace(run, optimizer="sgd")
    assert OPTIMIZER not in run.step(made_pairs(20, 30, 30), StepOptions(memory_budget=BUDGET)).parts
    without = run.step(made_pairs(20, 30, 30), StepOptions(memory_budget=BUDGET, precompute_ref_log_probs=True))
    assert REFERENCE not in without.parts


def test_an_adapter_is_what_is_trained():
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    run = fake_run(lora=lora)
    found = run.step(made_pairs(20, 30, 30), StepOptions(memory_budget=BUDGET))
    trained = 4 * sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    assert found.parts[ADAPTERS] == trained < found.parts[WEIGHTS]
    assert found.parts[OPTIMIZER] == 2 * trained


@pytest.mark.parametrize("layout", ["bucketed", "shared"])
@pytest.mark.parametrize("lora", [False, True])
def test_no_mask_is_planned_where_a_run_has_none(layout, lora):
    """Bytes grow with the tokens, not with their square, below an adapter too."""
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]) if lora else None
    run = fake_run(layout=Layout(layout, "branches" if layout == "shared" else ""), lora=adapter)
    sizes = [run.step(made_pairs(16, tokens, tokens), StepOptions()).bytes for tokens in (2000, 4000, 8000)]
    assert sizes[2] - sizes[1] < 2.5 * (sizes[1] - sizes[0])


def test_dropout_is_off_as_in_a_run():
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=2
    )
    found = []
    for has_dropout in (False, True):
        mode = fake_mode()
        policy = make_fake(mode, config, torch.float32, memory_budget=BUDGET, has_dropout=has_dropout)
        run = FakeRun(mode, policy, None, Layout("bucketed"), scores=False)
        found.append(run.step(made_pairs(4, 900, 900), StepOptions(memory_budget=BUDGET)).parts[KEPT])
    assert found[0] < 0.5 * found[1]


def test_tied_weights_count_once():
    tied, untied = (fake_run(config=config_of(tie_word_embeddings=tie)) for tie in (True, False))
    assert numbers(untied.policy) - numbers(tied.policy) == 97 * 64


def test_nothing_is_left_of_a_step_without_numbers():
    run = fake_run()
    options = StepOptions(True, 1, "auto", memory_budget=BUDGET)
    first = run.step(made_pairs(20, 600, 500), options)
    assert run.step(made_pairs(20, 600, 500), options) == first
    assert not checkpointing.is_on(run.policy)
    assert all(p.grad is None for p in run.policy.parameters())
    assert all("forward" not in vars(layer.mlp) for layer in run.policy.model.layers)


@pytest.mark.parametrize(
    ("change", "less"),
    [
        ({"gradient_checkpointing": True}, 0.7),
        ({"answers_at_once": 1}, 0.72),
        ({"gradient_checkpointing": True, "mlp_tiles": "4"}, 0.6),
    ],
    ids=str,
)
def test_each_part_lowers_what_is_planned(change, less):
    run, pairs = fake_run(), made_pairs(8, 1500, 1500)
    now = run.step(pairs, StepOptions(memory_budget=BUDGET)).bytes
    assert run.step(pairs, StepOptions(memory_budget=BUDGET, **change)).bytes < less * now


def test_offloading_moves_bytes_to_the_host():
    run, pairs = fake_run(device=torch.device("cuda")), made_pairs(8, 1500, 1500)
    run.policy.config._attn_implementation = "sdpa"
    kept = run.step(pairs, StepOptions(memory_budget=96 * MIB))
    moved = run.step(pairs, StepOptions(memory_budget=96 * MIB, activation_offloading=True))
    assert moved.bytes < kept.bytes
    assert kept.host == 0 < moved.host


def test_quantised_weights_take_their_bits():
    policy = fake_run(lora=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])).policy
    linear = [m.weight for n, m in policy.named_modules()
              if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad and "lm_head" not in n]  # fmt: skip
    less, largest = quantised_bytes(policy, "load_in_4bit", False, 2)
    total = sum(w.numel() for w in linear)
    assert less == 4 * total - (total // 2 + total // 16)
    assert largest == 2 * max(w.numel() for w in linear)


def test_a_model_that_asks_for_numbers_has_no_plan():
    run = fake_run()
    layer = run.policy.model.layers[0]
    layer.mlp.forward = lambda x: x * float(x.sum())
    with pytest.raises(PlanError, match="LlamaForCausalLM cannot be gone through without numbers"):
        run.step(made_pairs(8, 9, 9), StepOptions(memory_budget=BUDGET))


# The choice


def test_fit_takes_the_cheapest_that_suffices():
    run, pairs = fake_run(reference=True), made_pairs(8, 1500, 1500)
    now = StepOptions(memory_budget=BUDGET)
    whole = run.step(pairs, now)
    assert lower.fit(run, pairs, now, whole.bytes).options == now
    less = lower.fit(run, pairs, now, int(0.6 * whole.bytes))
    assert less.memory.bytes <= 0.6 * whole.bytes
    assert less.options.gradient_checkpointing
    assert less.options.answers_at_once is None
    assert not less.options.precompute_ref_log_probs  # would buy little beside what came after it
    least = lower.fit(run, pairs, now, 1)
    assert least.memory.bytes < less.memory.bytes
    assert least.options.answers_at_once == 1


def test_the_longest_pair_that_fits():
    run, options = fake_run(), StepOptions(True, memory_budget=BUDGET)
    budget = run.step(made_pairs(128, 896, 896), options).bytes
    longest = run_plan.longest_pair(run, PairTokens(32, 224, 224), options, budget, 4096)
    assert 900 <= max(longest.sequences) <= 1024 + 64
    assert run.step(made_pairs(*longest), options).bytes <= budget
    assert run_plan.longest_pair(run, PairTokens(32, 224, 224), options, 1, None) is None
    assert max(run_plan.longest_pair(run, PairTokens(32, 224, 224), options, 2**50, 512).sequences) <= 512


def test_a_plan_is_told_in_words_as_json_and_as_a_picture(tmp_path):
    run = fake_run(reference=True)
    shape = PairTokens(8, 300, 200)
    limit = Limit(2 * MIB, "a limit")
    plan = run_plan.make_plan(run, made_pairs(*shape), "a model", StepOptions(memory_budget=BUDGET), limit, fits=True)
    text = str(plan)
    for part in (
        "in all",
        "weights",
        "optimizer",
        "a limit",
        "--gradient_checkpointing buys",
        "--fit: by the plan that is ",
    ):
        assert part in text, part
    assert not plan.fits
    assert json.loads(json.dumps(plan.as_json()))["memory"]["parts"] == dict(plan.memory.parts)
    drawn = run_plan.save_picture(run, shape, plan.options, plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert sorted(drawn) == [*drawn]
    assert drawn[308].bytes == plan.memory.bytes
    sentence = run_plan.too_little(plan)
    for part in ("too little. --", "is left to you: a smaller --max_length", "Nothing was trained"):
        assert part in sentence, part
    others = [("--dtype bfloat16", dataclasses.replace(plan.memory, parts={WEIGHTS: plan.memory.bytes - 3 * MIB}))]
    plan = dataclasses.replace(plan, others=others)
    assert "with other numbers, each alone:" in str(plan)
    assert "is left to you: --dtype bfloat16 buys 3.00 MiB, a smaller --max_length" in run_plan.too_little(plan)
    assert plan.as_json()["others"][0]["option"] == "--dtype bfloat16"


def test_what_fit_chose_is_what_a_trainer_runs(tmp_path):
    run = fake_run(reference=True)
    chosen = lower.fit(run, made_pairs(8, 1500, 1500), StepOptions(memory_budget=BUDGET), 1)
    trainer = make_trainer(tmp_path / "a", pairs=Trees(), max_steps=1)
    trainer_args = trainer.args
    take(chosen, trainer_args, run)
    assert (trainer_args.gradient_checkpointing, trainer_args.answers_at_once) == (True, 1)
    assert trainer_args.layout == "bucketed"
    assert trainer_args.tiles == trainer_args.mlp_tiles
    assert StepOptions.of(trainer_args) == dataclasses.replace(chosen.options, bucketed=False)
    told = dataclasses.replace(chosen.options, mlp_tiles="auto")
    take(dataclasses.replace(chosen, options=told), trainer_args, run)
    assert trainer_args.tiles == "auto"
    trainer.train()
    assert checkpointing.is_on(trainer.model)


def test_what_a_run_cannot_do_is_not_chosen():
    run = fake_run(reference=True, can_tile=False, can_split=False, can_precompute=False)
    least = lower.fit(run, made_pairs(8, 500, 500), StepOptions(memory_budget=BUDGET), 1)
    assert least.options == StepOptions(True, memory_budget=BUDGET)


def test_sizes_in_words():
    assert [in_words(n) for n in (5, 1536, 3 * MIB, 20 * 2**30)] == ["5 B", "1.50 KiB", "3.00 MiB", "20.0 GiB"]


# What there is


@contextmanager
def fresh_pages(size):
    """Holds `size` bytes that were not this process's before: malloc may have as much free, and resident, already."""
    with mmap.mmap(-1, size) as pages:
        for page in range(0, size, mmap.PAGESIZE):
            pages[page] = 1
        yield


def test_what_a_process_holds_and_may_hold():
    device = torch.device("cpu")
    before = device_memory.held(device)
    with device_memory.peak_within(device) as most, fresh_pages(64 * MIB):
        pass
    assert most[0] >= before + 60 * MIB
    assert device_memory.limit_of(device).bytes > before


def test_the_most_is_watched_where_the_system_does_not_remember_it(monkeypatch):
    monkeypatch.setattr(device_memory, "_forgets_its_peak", lambda: False)
    with device_memory.peak_within(torch.device("cpu")) as most:
        before = device_memory.held(torch.device("cpu"))
        with fresh_pages(128 * MIB):
            time.sleep(0.05)
    assert most[0] >= before + 120 * MIB


def test_limits_of_the_process_count(tmp_path):
    code = (
        "import resource; import torch\n"
        "from dpo_kernels.training.memory import device_memory as d\n"
        "size = d._status('VmData') + 100 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (size, size))\n"
        "cpu = torch.device('cpu')\n"
        "found = d.limit_of(cpu); print(found.why, (found.bytes - d.held(cpu)) // 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().rsplit(" ", 1)[0] == "the limit RLIMIT_DATA of this process"
    assert 90 <= int(done.stdout.split()[-1]) <= 100


# The rehearsal


def test_a_rehearsal_changes_nothing(tmp_path):
    trainers = [make_trainer(tmp_path / str(i), pairs=Trees(), layout="bucketed") for i in range(2)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    modes = [m.training for m in trainers[0].model.modules()]
    found = rehearse(trainers[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in trainers[0].model.modules()] == modes
    assert all(p.grad is None for p in trainers[0].model.parameters())
    assert found.bytes > 100 * MIB
    assert found.seconds > 0
    for trainer in trainers:
        torch.set_rng_state(state)
        trainer.train()
    assert [e["loss"] for e in logs(tmp_path / "0")] == [e["loss"] for e in logs(tmp_path / "1")]
    assert all(torch.equal(a, b) for a, b in zip(*(weights(t).values() for t in trainers), strict=True))


def test_the_longest_batch_is_the_one_with_the_most_tokens():
    found = longest_pairs(Trees(), Layout("shared", "branches"), 1)
    assert found["x_chosen"].shape == (1, 51)  # 21 and 30 against 19
    assert longest_pairs(Trees(), Layout("padded"), 2)["x_chosen"].shape[0] == 2


# Over a run


class Held(TrainerCallback):
    def __init__(self):
        self.tensors = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 50 == 0:
            gc.collect()
            alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
            self.tensors.append((len(alive), sum(map(size_of, alive))))


def size_of(tensor):
    try:
        return tensor.nbytes
    except RuntimeError:  # of a graph that another test has compiled, without sizes
        return 0


def test_two_hundred_steps_leak_nothing(tmp_path):
    held = Held()
    trainer = make_trainer(
        tmp_path, pairs=Trees(), callbacks=[held], max_steps=200, logging_steps=50, layout="bucketed",
        per_device_train_batch_size=1, answers_at_once=1,
    )  # fmt: skip
    trainer.train()
    assert len(held.tensors) == 4
    (count, size), (later, larger) = held.tensors[1], held.tensors[3]  # both at the end of an epoch
    assert later - count < 20  # a tensor a step would be 100; what other tests left may go meanwhile
    assert larger - size < 10_000  # the batch at hand is longer or shorter
    entry = logs(tmp_path)[-1]
    assert 0 < entry["memory_mib"] <= 1.01 * entry["peak_memory_mib"]


def test_a_leak_is_found(tmp_path):
    held, kept = Held(), []
    trainer = make_trainer(
        tmp_path, pairs=Trees(), callbacks=[held], max_steps=100, logging_steps=50, per_device_train_batch_size=1
    )
    own = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: kept.append(own(*a, **k)) or kept[-1]
    trainer.train()
    assert held.tensors[-1][0] - held.tensors[0][0] >= 20
