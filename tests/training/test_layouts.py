"""Layouts: whatever way answers lie in rows, loss, metrics and gradients are those of padded rows."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from helpers import slow
from tiny_models import build
from torch.nn.attention.flex_attention import flex_attention
from training_helpers import SIZES, Trees, everything, logs, make_model, make_trainer, weights

from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead, PairCollator, attention
from dpo_kernels.training.attention import Attention, Spans, Tree, masks, use_branches
from dpo_kernels.training.batch import PairBatch
from dpo_kernels.training.layout_check import LayoutError, choose, count_tokens, refusal
from dpo_kernels.training.layouts import PADDED, Layout, buckets, fill
from dpo_kernels.training.trainer import PAIR_METRICS

LAYOUTS = [
    Layout("bucketed"), Layout("packed", "branches"), Layout("packed", "mask"),
    Layout("shared", "branches"), Layout("shared", "mask"),
]  # fmt: skip
WINDOWS = {"gemma2", "gemma3_text", "mistral", "gpt_oss", "olmo3", "cohere2"}  # of 16 tokens
RIGHT = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt_oss", "phi3",
    "olmo3", "cohere2", "granite", "deepseek_v3", "gpt2",
)  # fmt: skip


def batch_of(pairs, layout=PADDED):
    return PairBatch(PairCollator()([pairs[i] for i in range(len(pairs))]), layout)


def test_a_prompt_lies_once_and_its_last_state_has_two_labels():
    batch = batch_of(Trees(((3, 0, 2, 1), (2, 0, 0, 1))), Layout("shared", "branches", gives_mask=True))
    [given] = batch.model_inputs()
    assert given["spans"] == Spans(((Tree(0, 3, (2, 1)), Tree(6, 2, (0, 1))),), 9)
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert given["attention_mask"].tolist() == [[2, 2, 2, 1, 1, 1, 2, 2, 1]]  # how many sequences a token is in
    # Chosen answers, then rejected: what predicts each label. The prompts' last states, 2 and 7, twice each.
    assert given["places"].tolist() == [2, 3, 4, 7, 2, 5, 7, 8]
    x = batch.inputs["x_chosen"][0, :5].tolist()
    assert given["input_ids"][0, :5].tolist() == x
    assert torch.equal(
        given["labels"][0], torch.cat([batch.inputs[f"y_{s}"] for s in ("chosen", "rejected")])[batch.mask]
    )
    assert batch.positions == 9


def test_what_both_sequences_predict_in_the_prompt_is_predicted_once():
    batch = batch_of(Trees(((22, 0, 2, 1), (22, 3, 1, 2))), Layout("shared", "branches"))
    counted, earlier = int(batch.mask.sum()), 2 * (22 // 2 - 3)
    [given] = batch.model_inputs()
    # Of the second pair, whose answers begin alike, these tokens too; the last state of a prompt has two labels.
    assert given["labels"].shape == (1, counted - earlier - 3)
    places = given["places"].tolist()
    assert len(set(places)) == len(places) - 2
    log_probs = batch.run(fused("Llama"))["log_probs"]
    assert torch.equal(log_probs[:2, 3:11], log_probs[2:, 3:11])
    assert (log_probs[:, 3:11] < 0).all()


def test_rows_are_filled_and_told_by_a_mask():
    [given] = batch_of(Trees(((2, 0, 1, 1), (0, 0, 2, 2), (0, 0, 1, 1))), Layout("packed", "mask")).model_inputs()
    assert given["input_ids"].shape == (4, 3)
    seen = masks(make_model("Llama"), Spans(((Tree(0, 2, (1, 2)), Tree(5, 1, ())),), 7), torch.arange(7)[None])
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


def test_sequences_of_like_length_run_together():
    assert buckets([10, 500, 12, 480]) == [[0, 2], [3, 1]]
    assert buckets([100, 90, 95, 85]) == [[3, 1, 2, 0]]
    assert fill([5, 9, 4, 1], 10) == [[0, 2], [1, 3]]
    assert batch_of(Trees(), Layout("bucketed")).positions < batch_of(Trees()).positions


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout("shared", "cache")], ids=lambda x: f"{x.name}-{x.attention}")
def test_a_batch_in_which_nothing_counts_is_run(layout):
    pairs = Trees(SIZES[:2])
    for item in pairs.items:
        item |= {name: torch.zeros_like(t) if "mask" in name else t.fill_(-100) if "y_" in name else t
                 for name, t in item.items()}  # fmt: skip
    model = make_model("Llama")
    FusedHead(model)
    use_branches(model, layout.attention == "branches")
    log_probs = batch_of(pairs, layout).run(model)["log_probs"]
    log_probs.sum().backward()
    assert log_probs.tolist() == [[0.0]] * 4


def fused(name):
    model = make_model(name)
    FusedHead(model)
    use_branches(model, True)
    return model


def small(model_type):
    model = build(model_type)
    assert model_type not in WINDOWS or model.config.sliding_window == 16
    return model


def differences(trainer, batch, layouts):
    """Of each layout and padded rows: of loss and metrics, and of gradients, relative to the largest."""
    balances = trainer.aux_loss.weight > 0
    metrics, grads = everything(trainer, batch, Layout(gives_mask=balances))
    logps = metrics[:, [1 + PAIR_METRICS.index("logps/chosen"), 1 + PAIR_METRICS.index("logps/rejected")]].abs().max()
    scale = torch.maximum(metrics.abs().amax(0), trainer.args.beta * logps)
    largest = max(g.abs().max() for g in grads.values())
    for layout in layouts:
        layout = Layout(layout.name, layout.attention, gives_mask=balances)
        own, own_grads = everything(trainer, batch, layout)
        assert own_grads.keys() == grads.keys()
        # A key's bias has a gradient of 0, to rounding.
        off = max(((own_grads[n] - g).abs().max() / (g.abs().max() + 1e-2 * largest)).item() for n, g in grads.items())
        yield layout, ((own - metrics).abs() / scale).max().item(), off


@pytest.mark.parametrize("model_type", RIGHT)
def test_loss_metrics_and_gradients_are_those_of_padded_rows(tmp_path, model_type):
    batch = batch_of(Trees(vocab=256))
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, layout="padded", disable_tqdm=True)
    trainer = DPOTrainer(small(model_type), small(model_type), args, Trees(vocab=256))
    trainer.reference.starts_equal = False
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05 * p.std().nan_to_num().item())
    if trainer.aux_loss.weight > 0:  # so much that it shows
        trainer.aux_loss = type(trainer.aux_loss)(1.0, "")
    compared = list(differences(trainer, batch, [x for x in LAYOUTS if x.attention == "branches"]))
    trainer.aux_loss = type(trainer.aux_loss)(0.0, "")
    compared += differences(trainer, batch, [x for x in LAYOUTS if x.attention != "branches"])
    for layout, metrics, grads in compared:
        assert metrics <= 1e-5, layout
        assert grads <= 1e-5, layout
    for layout in LAYOUTS[1:]:
        assert refusal(trainer.model, layout) == "", layout


REFUSED = [
    ("mpt", "packed", "the forward of MptForCausalLM takes no position_ids"),
    ("bloom", "packed", "the forward of BloomForCausalLM takes no position_ids"),
    ("llama4_text", "packed", "Llama4ForCausalLM has layers of other kinds .*: chunked_attention"),
    ("mamba", "packed", "MambaForCausalLM has layers of other kinds .*: linear_attention"),
]


@pytest.mark.parametrize(("model_type", "name", "reason"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_model_that_would_be_trained_wrong_is_refused(model_type, name, reason):
    model, pairs = build(model_type), Trees(vocab=256)
    FusedHead(model).check(model, deterministic=False)
    with pytest.raises(LayoutError, match=f"--layout {name}: .*{reason}"):
        choose(model, name, pairs, 4)
    choice = choose(model, "auto", pairs, 4)  # the next best goes on
    assert choice.layout.name == "bucketed"
    assert reason.partition(";")[0].split(".*")[-1] in choice.told


def test_attention_by_places_in_a_row_is_found():
    model = build("gpt_neo")
    FusedHead(model)
    told = refusal(model, Layout("shared", "mask"))
    assert re.search(
        r"GPTNeoForCausalLM gives other log-probs in shared rows: .*; something in it goes by places", told
    )
    # Where places are as far apart as positions.
    assert choose(model, "packed", Trees(vocab=256), 4).layout == Layout("packed", "mask")


def test_a_mask_that_ignores_the_window_is_found(monkeypatch):
    from dpo_kernels.training import output_head

    def forgetful(model, spans, position_ids):
        full = masks(model, spans, position_ids)["full_attention"]
        return {"full_attention": full, "sliding_attention": full}

    model = build("gemma3_text")
    FusedHead(model)
    monkeypatch.setattr(output_head, "masks", forgetful)
    assert "Gemma3ForCausalLM gives other log-probs in packed rows" in refusal(model, Layout("packed", "mask"))


def test_a_gradient_that_goes_astray_is_found(monkeypatch):
    from dpo_kernels.training import attention

    own = attention._row
    monkeypatch.setattr(attention, "_row", lambda q, k, *rest: own(q, (k + k.detach()) / 2, *rest))
    model = make_model("Llama")
    FusedHead(model)
    assert "LlamaForCausalLM gives other gradients in shared rows" in refusal(model, Layout("shared", "branches"))


def test_a_layer_that_is_not_told_is_an_error_in_any_mode():
    """As with checkpointing that hands on some arguments of a layer and not others; nothing is computed silently."""
    model = make_model("Llama")
    FusedHead(model)
    use_branches(model, True)
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, spans=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="LlamaAttention was not told where answers lie in a row"):
        batch_of(Trees(), Layout("shared", "branches")).run(model)


def test_other_numbers_per_token_come_back_too(tmp_path):
    found = []
    for layout in ("padded", "bucketed", "shared"):
        trainer = make_trainer(tmp_path, pairs=Trees(), layout=layout, use_weighting=True)
        found.append(trainer.compute_loss(trainer.model, batch_of(Trees()).inputs).item())
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)


def test_auto_takes_the_fewest_tokens():
    model = make_model("Qwen3")
    FusedHead(model)
    long, short = Trees(((50, 0, 4, 5),) * 4), Trees(((1, 0, 40, 21),) * 4)
    chosen = choose(model, "auto", long, 2)
    assert chosen.layout == Layout("shared", "branches")
    assert chosen.told == "layout: shared (tokens a pair: padded 110, bucketed 110, packed 109, shared 59)"
    assert choose(model, "auto", short, 2).layout == Layout("packed", "branches")
    assert choose(model, "auto", Trees(((0, 0, 30, 30),) * 4), 2).layout == PADDED
    assert choose(model, "padded", long, 2).told == ""
    assert count_tokens(long, 4)[1] == 64


def trained(folder, layout):
    """With accumulation, evaluation and a reference; SGD, which does not magnify rounding."""
    trainer = make_trainer(
        folder, pairs=Trees(SIZES * 2), eval_pairs=Trees(), layout=layout, max_steps=2, optim="sgd",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert trainer.layout.name == layout
    trainer.train()
    return weights(trainer), trainer.evaluate()["eval_loss"], [e["loss"] for e in logs(folder)]


def test_a_load_balancing_loss_over_all_rows_keeps_them(monkeypatch):
    model, pairs = make_model("Llama"), Trees()
    FusedHead(model)
    with pytest.raises(LayoutError, match="the load-balancing loss of LlamaForCausalLM is over all rows"):
        choose(model, "bucketed", pairs, 4, balances=True)
    monkeypatch.setattr("dpo_kernels.training.layout_check.is_of_its_own_kind", lambda model: True)
    assert choose(model, "auto", pairs, 4, balances=True).layout == PADDED


@pytest.fixture(scope="module")
def in_padded_rows(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("padded"), "padded")


@pytest.mark.parametrize("name", ["bucketed", "packed", "shared"])
def test_training_in_a_layout_is_training_in_padded_rows(tmp_path, in_padded_rows, name):
    own, own_eval, own_losses = trained(tmp_path, name)
    padded, eval_loss, losses = in_padded_rows
    assert own_losses == pytest.approx(losses, abs=1e-5)
    assert own_eval == pytest.approx(eval_loss, abs=1e-5)
    for key, weight in padded.items():
        torch.testing.assert_close(own[key], weight, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("way", ["branches", "mask"])
def test_gradient_checkpointing_knows_the_layout_in_backward(way):
    """The layers run again when the forward, and whatever it set up, is long gone."""
    layout, found = Layout("shared", way), []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = make_model("Gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}).train()
        FusedHead(model)
        use_branches(model, way == "branches")
        if kwargs is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        batch_of(Trees(), layout).run(model)["log_probs"].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for again in found[1:]:
        for key, grad in found[0].items():
            torch.testing.assert_close(again[key], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item(), msg=key)


def test_calls_without_a_layout_and_what_is_saved_are_as_before(tmp_path):
    for name, options in (("Llama", {}), ("Gemma2", {"sliding_window": 16})):
        plain, model = make_model(name, options), make_model(name, options)
        head = FusedHead(model)
        use_branches(model, True)
        ids = torch.randint(3, 97, (2, 21))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        for given in ({}, {"attention_mask": mask}):
            assert torch.equal(model(ids, **given).logits[:, 5:], plain(ids, **given).logits[:, 5:])
        asked = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))
        model.save_pretrained(tmp_path / name)
        assert "dpo_" not in json.dumps(json.loads((tmp_path / name / "config.json").read_text()))
        head.unfuse(model)
        assert model.config._attn_implementation == plain.config._attn_implementation


def test_a_reference_that_cannot_follow_goes_its_own_way(tmp_path):
    """Log-probs come back alike from every layout."""
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, layout="shared", disable_tqdm=True)
    trainer = DPOTrainer(build("qwen3"), build("mpt"), args, Trees(vocab=256))
    assert trainer.layout.name == "shared"
    assert trainer.reference.layout == PADDED
    loss = trainer.compute_loss(trainer.model, batch_of(Trees(vocab=256)).inputs)
    args.layout = "padded"
    padded = DPOTrainer(build("qwen3"), build("mpt"), args, Trees(vocab=256))
    assert loss.item() == pytest.approx(
        padded.compute_loss(padded.model, batch_of(Trees(vocab=256)).inputs).item(), 1e-5
    )


def one_call(q, k, v, ends_q, ends_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What `torch.nn.attention.varlen.varlen_attn` documents, piece by piece: the queries are the last of the keys."""
    made = []
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert (ends_q.diff().max(), ends_k.diff().max()) == (max_q, max_k)
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        at, of = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        left, right = window_size
        seen = (of <= at + right) & ((of >= at - left) | (left < 0))
        made.append(torch.nn.functional.scaled_dot_product_attention(
            q[None, a:b].transpose(1, 2), k[None, c:d].transpose(1, 2), v[None, c:d].transpose(1, 2), attn_mask=seen,
            scale=scale, enable_gqa=enable_gqa,
        )[0].transpose(0, 1))  # fmt: skip
    return torch.cat(made)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "qwen3_moe"])
def test_a_gpu_computes_branches_in_one_call(monkeypatch, model_type):
    """Of sequences of any length, the prompt's keys once a branch: what it is given, with a plain one in its place."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return one_call(*args, **kwargs)

    monkeypatch.setattr(attention, "one_call", lambda: counted)
    monkeypatch.setattr(Attention, "is_one_call", lambda *_: True)
    model = small(model_type)
    FusedHead(model).check(model)
    for layout in LAYOUTS:
        if layout.attention == "branches":
            assert refusal(model, layout) == ""
    assert len(calls) == 2 * model.config.num_hidden_layers
    rows = Spans(((Tree(0, 3, (2, 0, 4)), Tree(9, 2, ())), (Tree(0, 4, (1, 2)),)), 12)
    found = attention._pieces(rows, torch.device("cpu"))
    assert found.queries.tolist() == [*range(11), *range(12, 19)]
    assert found.keys.tolist() == [
        0,
        1,
        2,
        3,
        4,
        0,
        1,
        2,
        5,
        6,
        7,
        8,
        9,
        10,
        12,
        13,
        14,
        15,
        16,
        12,
        13,
        14,
        15,
        17,
        18,
    ]
    assert [ends.tolist() for ends in found.ends] == [[0, 5, 9, 11, 16, 18], [0, 5, 12, 14, 19, 25]]
    assert found.longest == (5, 7)


def flex_has_backward():
    x = torch.randn(1, 1, 16, 16, requires_grad=True)
    try:
        flex_attention(x, x, x).sum().backward()
    except (NotImplementedError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("model_type", ["llama", slow("gemma3_text")])
def test_flex_attention_is_given_blocks(monkeypatch, model_type):
    """Where flex attention has no backward on a CPU (torch 2.13; 2.10 has one), the check at start says so. Not
    compiled: PyTorch's kernels for the CPU do not compile for a second length (torch 2.13)."""
    plain = lambda *args, training=False, **kwargs: flex_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", plain)
    model, flex = small(model_type), small(model_type)
    flex.set_attn_implementation("flex_attention")
    for one in (model, flex):
        FusedHead(one)
    batch = batch_of(Trees(vocab=256))
    with torch.no_grad():
        exact = batch.run(model)["log_probs"]
        for name in ("packed", "shared"):
            assert torch.allclose(batch.lying(Layout(name, "mask")).run(flex)["log_probs"], exact, atol=1e-5)
    found = refusal(flex, Layout("shared", "mask"))
    assert "no position_ids" not in found
    if flex_has_backward():
        assert not found
    else:
        assert re.search("(Llama|Gemma3)ForCausalLM does not run shared rows", found)
    assert "is flex_attention; rows of several answers run with sdpa, eager" in refusal(
        flex, Layout("shared", "branches")
    )
