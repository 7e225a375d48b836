"""A step in parts: loss, metrics and gradients are those of the whole batch, the memory is that of one part."""

from __future__ import annotations

import weakref

import pytest
import torch
from accelerate import Accelerator
from helpers import assert_close
from peft import LoraConfig
from training_helpers import LOG2, SIZES, Trees, everything, logs, make_model, make_trainer, weights

from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead, PairCollator, gradient_cache
from dpo_kernels.training.attention import use_branches
from dpo_kernels.training.batch import PairBatch, keep_pairs
from dpo_kernels.training.layouts import Layout, parts
from dpo_kernels.training.reference import FrozenModel

WHOLE = [Layout(), Layout("bucketed"), Layout("shared", "branches"), Layout("packed", "branches"),
         Layout("shared", "mask"), Layout("shared", "cache")]  # fmt: skip
AT_ONCE = [
    Layout(layout.name, layout.attention, answers_at_once=n)
    for layout in WHOLE for n in (1, 2, 3, 9) if n > 1 or not layout.has_whole_pairs
]  # fmt: skip
ids = "{0.name}-{0.attention}-{0.answers_at_once}".format


def batch_of(pairs, layout=WHOLE[0]):
    return PairBatch(PairCollator()([pairs[i] for i in range(len(pairs))]), layout)


def fused(layout=WHOLE[0], options=()):
    model = make_model("Qwen3", options)
    FusedHead(model)
    use_branches(model, layout.attention == "branches")
    return model


def moved(trainer):
    """The policy is no longer its reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    return trainer


def assert_alike(found, exact, layout):
    """Metrics of each pair, (B, k), and gradients by name, relative to the largest."""
    (metrics, grads), (own_metrics, own) = exact, found
    assert_close(own_metrics, metrics, 1e-5 * max(1.0, metrics.abs().max().item()), f"{layout} metrics")
    assert own.keys() == grads.keys()
    largest = max(g.abs().max() for g in grads.values())
    for name, grad in grads.items():
        off = (own[name] - grad).abs().max() / (grad.abs().max() + 1e-2 * largest)
        assert off <= 1e-5, f"{layout} {name}: {off:.1e}"


def with_every_graph(model, forwards, rows):
    """`run_in_parts` without its memory: the same forwards, one after the other, in one graph."""
    outputs = []
    for forward in forwards:
        torch.clear_autocast_cache()
        outputs.append(forward())
    return gradient_cache._joined(outputs, rows)


def calls_of(model):
    """Whether each of the model's calls had gradients, as they come."""
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    return seen


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (Layout(answers_at_once=3), [[0], [1, 2, 3]]),
        (Layout(answers_at_once=2), [[0, 1], [2, 3]]),
        (Layout("bucketed", answers_at_once=3), [[1], [3, 0, 2]]),
        (Layout("bucketed", answers_at_once=1), [[1], [3], [0], [2]]),
        (Layout("shared", "branches", answers_at_once=3), [[0, 2], [1, 3]]),
        (Layout("packed", "mask", answers_at_once=2), [[0, 2], [1, 3]]),
        (Layout("bucketed", answers_at_once=4), [[0, 1, 2, 3]]),
        (Layout("shared", "branches", answers_at_once=9), [[0, 1, 2, 3]]),
    ],
)
def test_the_last_part_is_full_and_has_the_longest(layout, found):
    assert parts(layout, [5, 2, 9, 2]) == found


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = make_trainer(tmp_path_factory.mktemp("parts"), "Qwen3", pairs=Trees(), layout="padded")
    return moved(made)


@pytest.fixture(scope="module")
def of_whole_batches(trainer):
    return {(x.name, x.attention): everything_copied(trainer, x) for x in WHOLE}


def everything_copied(trainer, layout):
    metrics, grads = everything(trainer, batch_of(Trees()), layout)
    return metrics, {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("layout", AT_ONCE, ids=ids)
def test_loss_metrics_and_gradients_are_those_of_the_whole_batch(trainer, of_whole_batches, layout):
    exact = of_whole_batches[layout.name, layout.attention]
    found = everything_copied(trainer, layout)
    assert_alike(found, exact, layout)
    if layout.answers_at_once == 9:  # one part, and nothing is rounded anew
        assert torch.equal(found[0], exact[0])
        assert all(torch.equal(found[1][name], grad) for name, grad in exact[1].items())


@pytest.mark.parametrize("layout", [x for x in AT_ONCE if x.attention != "mask"], ids=ids)
def test_the_price_is_one_forward_less_the_last_part(layout):
    model, count = fused(layout), len(parts(layout, [9] * 8))
    seen = calls_of(model)
    batch_of(Trees(), layout).run(model)["log_probs"].sum().backward()
    assert seen == [False] * (count - 1) + [True] + [True] * (count - 1)
    seen.clear()
    with torch.no_grad():
        batch_of(Trees(), layout).run(model)
    assert seen == [False] * count


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"use_weighting": True}, id="WPO"),
        pytest.param({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, id="sft"),
    ],
)
def test_losses_of_more_than_log_ratios(tmp_path, options):
    made = moved(make_trainer(tmp_path, pairs=Trees(), layout="padded", **options))
    exact = everything_copied(made, Layout("bucketed"))
    assert_alike(everything_copied(made, Layout("bucketed", answers_at_once=3)), exact, options)


@pytest.mark.parametrize("n", [None, 2])
def test_an_adapter_starts_as_its_reference_and_has_the_same_gradients(tmp_path, n):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, layout="shared", answers_at_once=n, disable_tqdm=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "lm_head"])
    made = DPOTrainer(make_model("Llama"), None, args, Trees(), peft_config=config)
    with torch.no_grad():
        loss, metrics = made.compute_loss(made.model, batch_of(Trees()).inputs, return_outputs=True)
    assert loss.item() == pytest.approx(LOG2, abs=1e-7)
    assert metrics[:, 1:4].eq(0).all()  # rewards, to the bit
    if n is not None:
        moved(made)
        assert_alike(everything_copied(made, made.layout), everything_copied(made, made.layout.whole), "LoRA")


RUNS = [
    pytest.param({"layout": "shared", "gradient_accumulation_steps": 2, "loss_type": ["sigmoid", "sft"]},
                 id="accumulation"),
    pytest.param({"layout": "bucketed", "gradient_checkpointing": True}, id="checkpointing"),
]  # fmt: skip


@pytest.mark.parametrize("options", RUNS)
def test_a_run_in_parts_is_the_run_of_whole_batches(tmp_path, options):
    found = []
    for n in (None, 2):
        made = make_trainer(
            tmp_path / str(n), pairs=Trees(SIZES * 2), eval_pairs=Trees(), optim="sgd", answers_at_once=n, **options,
        )  # fmt: skip
        made.train()
        seen = calls_of(made.model)
        found.append((logs(tmp_path / str(n)), weights(made), made.evaluate()["eval_loss"]))
        assert len(seen) > (2 if n else 0)  # an evaluation goes in parts too
    (log, own, own_eval), (exact_log, exact, exact_eval) = found[1], found[0]
    assert log[0]["rewards/margins"] == 0
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert [entry[name] for entry in log] == pytest.approx([entry[name] for entry in exact_log], abs=1e-4, rel=1e-4)
    assert own_eval == pytest.approx(exact_eval, abs=1e-5)
    for name, weight in exact.items():
        assert_close(own[name], weight, 1e-4, name)


def both_ways(model, layout, monkeypatch, autocast=False, seed=0):
    """Log-probs, gradients and the random state after it, in parts and with every graph of the same parts."""
    upstream = torch.linspace(-1, 1, batch_of(Trees()).mask.numel()).view(8, -1)
    for run in (gradient_cache.run_in_parts, with_every_graph):
        monkeypatch.setattr("dpo_kernels.training.batch.run_in_parts", run)
        model.zero_grad()
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_probs = batch_of(Trees(), layout).run(model)["log_probs"]
        (log_probs * upstream).sum().backward()
        yield (
            log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
        )  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 9])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_dropout_is_the_same_in_the_second_forward(monkeypatch, n, checkpointing):
    layout = Layout("bucketed", answers_at_once=n)
    model = fused(layout, {"attention_dropout": 0.3}).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    own, exact = both_ways(model, layout, monkeypatch)
    assert torch.equal(own[0], exact[0])
    assert_alike((own[0], own[1]), (exact[0], exact[1]), layout)
    assert torch.equal(own[2], exact[2])
    other = next(both_ways(model, layout, monkeypatch, seed=1))
    with pytest.raises(AssertionError):
        assert_alike((own[0], other[1]), (exact[0], exact[1]), layout)


def test_autocast_is_the_same_in_the_second_forward(monkeypatch):
    """The loss goes backward outside of it, as a trainer's does; what it cast without gradient is not used with one."""
    layout = Layout("bucketed", answers_at_once=3)
    model = fused(layout)
    own, exact = both_ways(model, layout, monkeypatch, autocast=True)
    assert torch.equal(own[0], exact[0])
    assert_alike((own[0], own[1]), (exact[0], exact[1]), layout)
    plain = next(both_ways(model, layout, monkeypatch))
    assert (plain[0] - own[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["bf16", *(["fp16"] if torch.cuda.is_available() else [])])  # which wants a GPU
def test_mixed_precision_of_a_trainer(tmp_path, monkeypatch, kind):
    """accelerate has wrapped the model's forward, and scales the loss of fp16."""
    found = []
    for name, run in (("parts", gradient_cache.run_in_parts), ("graphs", with_every_graph)):
        monkeypatch.setattr("dpo_kernels.training.batch.run_in_parts", run)
        made = make_trainer(
            tmp_path / name, pairs=Trees(), layout="bucketed", answers_at_once=2, optim="sgd",
            use_cpu=kind == "bf16", **{kind: True},
        )  # fmt: skip
        made.train()
        found.append([entry["loss"] for entry in logs(tmp_path / name)])
    assert found[0][0] == pytest.approx(LOG2, abs=1e-6)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


class Held:
    """Bytes of tensors that autograd saves, parameters aside: now, and at most."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.now = self.most = 0

    def pack(self, tensor):
        if tensor.untyped_storage().data_ptr() in self.parameters:
            return lambda: tensor
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)

        def kept():
            return tensor

        weakref.finalize(kept, self.freed, size)
        return kept

    def freed(self, size):
        self.now -= size

    def of(self, batch, model):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept()):
            log_probs = batch.run(model)["log_probs"]
            in_forward = self.now
            log_probs.sum().backward()
        return in_forward, self.most


@pytest.mark.parametrize("layout", [Layout("shared", "branches"), Layout("packed", "branches"), Layout("bucketed")],
                         ids=ids)  # fmt: skip
def test_what_is_saved_is_that_of_one_part(layout):
    """Of pairs that are all alike; a part's forward starts when no other part's graph is left."""
    model, pairs = fused(layout), Trees(((5, 0, 20, 20),) * 4)
    model.train()
    forward, most = Held(model).of(batch_of(pairs, layout), model)
    alone, _ = Held(model).of(PairBatch(batch_of([pairs[0]]).inputs, layout), model)
    in_parts = Layout(layout.name, layout.attention, answers_at_once=2)
    assert Held(model).of(batch_of(pairs, in_parts), model)[0] == alone
    assert forward > 3.5 * alone
    assert most > 3.5 * alone
    assert Held(model).of(batch_of(pairs, in_parts), model)[1] < 1.5 * alone


def test_a_batch_that_only_keeps_step_runs():
    inputs = dict(batch_of(Trees()).inputs)
    keep_pairs(inputs, 0)
    model = fused()
    log_probs = PairBatch(inputs, Layout(answers_at_once=1)).run(model)["log_probs"]
    assert log_probs.eq(0).all()
    log_probs.sum().backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


def test_a_second_backward_is_an_error():
    layout, model = Layout("bucketed", answers_at_once=2), fused()
    loss = batch_of(Trees(), layout).run(model)["log_probs"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have gone backward already; compute its loss anew"):
        loss.backward()


def test_a_frozen_model_has_no_graph():
    layout, model = Layout("bucketed", answers_at_once=2), fused().requires_grad_(False)
    assert not batch_of(Trees(), layout).run(model)["log_probs"].requires_grad


def test_auto_is_bucketed_and_told(tmp_path):
    made = make_trainer(tmp_path, pairs=Trees(((50, 0, 4, 5),) * 4), answers_at_once=3)  # else shared
    assert made.layout == made.reference.layout == Layout("bucketed", answers_at_once=3)
    assert made.layout_told.startswith("layout: bucketed, in parts of at most 3 answers (tokens a pair: padded 110")
    padded = make_trainer(tmp_path, pad_to_multiple_of=8, answers_at_once=3)
    assert padded.layout_told == "layout: padded, in parts of at most 3 answers"
    other = make_trainer(tmp_path, "Qwen3", layout="shared", answers_at_once=4)
    assert other.layout == Layout("shared", "branches", answers_at_once=4)


def test_log_probs_on_disk_say_in_which_parts_they_were_made(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, precompute_ref_log_probs=True)
    model, keys = make_model("Llama"), []
    for layout in (Layout("bucketed"), Layout("bucketed", answers_at_once=2)):
        made = FrozenModel(model, make_model("Llama"), Accelerator(cpu=True), args, layout, is_sharded=False)
        keys.append(made.identity())
    assert keys[1] == f"{keys[0]} 2 at once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers_at_once": 0}, "answers_at_once is 0; expected at least 1"),
        ({"answers_at_once": 1, "layout": "shared"}, "layout 'shared' keeps both answers .* layout 'bucketed', which"),
        ({"answers_at_once": 1, "layout": "packed"}, "layout 'packed' keeps both answers of a pair together"),
        ({"answers_at_once": 2, "torch_compile": True}, "not go with torch_compile: a compiled model would be"),
        ({"answers_at_once": 2, "ddp_static_graph": True}, "not go with ddp_static_graph: each part is a graph"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, monkeypatch, options, message):
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")  # transformers sets them, for good
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_load_balancing_loss_is_refused(tmp_path):
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.02}
    with pytest.raises(ValueError, match="answers_at_once is 2: the load-balancing loss is over all rows"):
        make_trainer(tmp_path, "Qwen3Moe", moe, answers_at_once=2)
    made = make_trainer(tmp_path, "Qwen3Moe", moe, answers_at_once=2, router_aux_loss_coef=0.0)
    assert made.layout.answers_at_once == 2


def test_what_takes_parameters_apart_is_refused():
    assert gradient_cache.refusal(False, False, False) == ""
    assert "with FSDP each part gathers the weights" in gradient_cache.refusal(False, True, False)
    assert "DeepSpeed reduces gradients in its own backward" in gradient_cache.refusal(False, False, True)
