"""Answers that go on from the cache of their prompt: for models that cannot be told what a token attends to."""

from __future__ import annotations

import types
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from own_code_model import MineConfig, MineForCausalLM
from tiny_models import build
from training_helpers import SIZES, Trees, everything, make_model, make_trainer, weights
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dpo_kernels.training import DPOConfig, DPOTrainer, FusedHead, HeadError, PairCollator, caches
from dpo_kernels.training.batch import PairBatch, pair_tokens
from dpo_kernels.training.layout_check import LayoutError, _rope_types, choose, expected, refusal
from dpo_kernels.training.layouts import Layout, PairTokens, most_tokens
from dpo_kernels.training.memory import rescue

CACHE = Layout("shared", "cache")
LONG = Trees(((50, 0, 4, 5),) * 4)


class Tuples(MineForCausalLM):
    """Keys and values in tuples, as code outside transformers keeps them; positions go on from their number."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        past = past_key_values or [None] * len(self.blocks)
        start = 0 if past[0] is None else past[0][0].shape[2]
        x, kept = self.embed(input_ids), []
        b, s, d = x.shape
        cos, sin = self.cos[start : start + s], self.sin[start : start + s]
        for block, before in zip(self.blocks, past, strict=True):
            q, k, v = block.qkv(block.norm_1(x)).view(b, s, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
            q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
            if before is not None:
                k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
            kept.append((k, v))
            allowed = torch.ones(s, start + s, dtype=torch.bool).tril(start)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + block.out(y.transpose(1, 2).reshape(b, s, d))
            x = x + block.mlp(block.norm_2(x))
        return CausalLMOutputWithPast(
            logits=self.lm_head(self.norm(x)), past_key_values=tuple(kept) if use_cache else None
        )


def model_of(model_type):
    torch.manual_seed(0)
    return Tuples(MineConfig(vocab_size=256)) if model_type == "tuples" else build(model_type)


def batch_of(pairs, layout=CACHE):
    return PairBatch(PairCollator()([pairs[i] for i in range(len(pairs))]), layout)


@pytest.mark.parametrize(
    "model_type",
    ["tuples", "bloom", "mpt", "falcon", "gpt_neo", "llama4_text", "llama", "gemma3_text", "gpt_oss"],
)
def test_loss_metrics_and_gradients_are_those_of_padded_rows(tmp_path, model_type):
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, layout="padded", disable_tqdm=True, router_aux_loss_coef=None
    )
    trainer = DPOTrainer(model_of(model_type), model_of(model_type), args, Trees(vocab=256))
    trainer.aux_loss = type(trainer.aux_loss)(0.0, "")
    trainer.reference.starts_equal = False
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05 * p.std().nan_to_num().item())
    batch = batch_of(Trees(((22, 0, 4, 3), *SIZES), vocab=256))
    metrics, grads = everything(trainer, batch, Layout())
    own, own_grads = everything(trainer, batch, CACHE)
    torch.testing.assert_close(own, metrics, rtol=1e-5, atol=1e-5 * metrics.abs().max().item())
    largest = max(g.abs().max() for g in grads.values())
    assert own_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (own_grads[name] - grad).abs().max() <= 1e-5 * (grad.abs().max() + 1e-2 * largest), name
    assert refusal(trainer.model, CACHE) == ""


def test_a_prompt_is_a_row_and_answers_go_on_from_it():
    batch = batch_of(Trees(((3, 0, 2, 1), (2, 0, 0, 1), (0, 0, 2, 2), (22, 0, 1, 1))))
    [given] = batch.model_inputs()
    first, second, chosen, rejected, earlier = given["groups"]
    assert first["input_ids"].shape == (1, 3)
    assert first["places"].tolist() == [2, 2]  # two labels
    assert [one["input_ids"].shape[1] for one in first["continued"]] == [2, 1]
    assert [one["places"].tolist() for one in first["continued"]] == [[0, 1], [0]]
    assert [one["attention_mask"].tolist() for one in first["continued"]] == [[[1] * 5], [[1] * 4]]
    assert len(second["continued"]) == 1  # the chosen answer is its first token alone, which the prompt predicts
    assert "continued" not in chosen  # nothing in common
    assert "continued" not in rejected
    places = earlier["places"].tolist()
    assert places == [*range(3, 11), 21, 21]  # what counts in both sequences is predicted once
    assert batch.positions == 6 + 3 + 4 + 24
    log_probs = batch.run(fused("Llama"))["log_probs"]
    assert torch.equal(log_probs[3, 3:11], log_probs[7, 3:11])


def fused(name):
    model = make_model(name)
    FusedHead(model)
    return model


@pytest.mark.parametrize("layout", [CACHE, Layout("bucketed")], ids=lambda x: x.told)
def test_the_head_is_called_once(monkeypatch, layout):
    model, rows = make_model("Llama"), []
    head = FusedHead(model)
    computed = head.token_stats

    def counted(hidden, *rest):
        rows.append(hidden.shape[1])
        return computed(hidden, *rest)

    monkeypatch.setattr(head, "token_stats", counted)
    batch = batch_of(Trees(), layout)
    batch.run(model)
    groups = batch.model_inputs()[0]["groups"]
    calls = [call for group in groups for call in (group, *group.get("continued", ()))]
    assert len(calls) > 1
    assert rows == [sum(len(call["places"]) for call in calls)]


def test_auto_takes_it_where_attention_cannot_be_told():
    model = build("mpt")
    FusedHead(model)
    chosen = choose(model, "auto", Trees(((50, 0, 4, 5),) * 4, width=64), 2)
    assert chosen.layout.name == "padded"  # so few tokens are not worth three forwards
    long = Trees(((400, 0, 40, 50),) * 4, vocab=256, width=512)
    chosen = choose(model, "auto", long, 2)
    assert chosen.layout == CACHE
    assert chosen.told.startswith("layout: shared through a cache (tokens a pair: ")
    assert choose(model, "shared", LONG, 2).layout == CACHE
    chosen = choose(model, "auto", long, 2, is_checkpointed=True)
    assert chosen.layout.name in ("padded", "bucketed")
    assert "with gradient checkpointing MptForCausalLM gives no cache" in chosen.told
    with pytest.raises(LayoutError, match="with FSDP the groups of shared through a cache would differ"):
        choose(model, "shared", LONG, 2, is_sharded=True)
    with pytest.raises(LayoutError, match="the load-balancing loss of MptForCausalLM is over all rows"):
        choose(model, "shared", LONG, 2, balances=True)
    # A GPU would wait for so many forwards: there it is what is left.
    cuda = torch.device("cuda")
    assert choose(model, "auto", long, 2, device=cuda).layout != CACHE
    assert choose(model, "shared", long, 2, device=cuda).layout == CACHE
    # Of a model without numbers nobody knows whether it passes.
    sizes = [PairTokens(400, 40, 50)] * 4
    assert expected(model, "auto", sizes, 2).name in ("padded", "bucketed")
    assert expected(model, "shared", sizes, 2) == CACHE
    assert expected(model, "shared", sizes, 2, is_checkpointed=True) == Layout()
    model.gradient_checkpointing_enable()  # by its owner
    assert choose(model, "auto", long, 2).layout != CACHE


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "MambaForCausalLM does not run shared rows: RuntimeError: The size of tensor"),
        ("qwen3_next", "Qwen3NextForCausalLM does not run shared rows: RuntimeError: .*inplace"),
        ("jamba", "other log-probs .*; what goes on from its cache is not what goes on from the prompt"),
        (
            "recurrent_gemma",
            "CacheError: RecurrentGemmaForCausalLM was asked for a cache and its output, a .*, has none",
        ),
        ("rwkv", "the forward of RwkvForCausalLM takes no cache"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(model_type, reason):
    model = build(model_type)
    FusedHead(model)
    with pytest.raises(LayoutError, match=f"--layout shared: .*{reason}"):
        choose(model, "shared", Trees(vocab=256), 4)


def test_a_cache_that_training_does_not_give_is_found():
    class InEvaluation(Tuples):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
            keeps = not (self.training and torch.is_grad_enabled())
            return super().forward(input_ids, attention_mask, past_key_values, use_cache and keeps)

    model = InEvaluation(MineConfig()).eval()
    FusedHead(model)
    assert choose(model, "auto", Trees(((400, 0, 40, 50),) * 4, width=512), 2).layout != CACHE
    model.train()
    assert "InEvaluation was asked for a cache and its output, a CausalLMOutputWithPast, has none" in refusal(
        model, CACHE
    )
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_cache_that_is_empty_in_training_is_found():
    class Empty(Tuples):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
            output = super().forward(input_ids, attention_mask, past_key_values, use_cache)
            if self.training and use_cache:  # answers would go on from the first position
                output.past_key_values = tuple((k[:, :, :0], v[:, :, :0]) for k, v in output.past_key_values)
            return output

    model = Empty(MineConfig()).train()
    FusedHead(model)
    assert "Empty gives other log-probs in shared rows" in refusal(model, CACHE)
    model.eval()  # as transformers loads it, and as it is when a layout is chosen
    assert "Empty gives other log-probs in shared rows" in refusal(model, CACHE)
    assert not any(module.training for module in model.modules())
    model.requires_grad_(False)  # a reference, which is never in training
    assert refusal(model, CACHE) == ""


def test_frequencies_by_length_are_refused():
    longer = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = make_model("Llama", {"rope_parameters": longer})
    FusedHead(model)
    assert "the rotary embedding of LlamaForCausalLM (dynamic) is another one" in refusal(model, CACHE)
    of_types = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    assert _rope_types(types.SimpleNamespace(rope_parameters=of_types, rope_scaling=None)) == {"longrope", "default"}


def test_a_head_that_gets_other_rows_is_found():
    class Sliced(Tuples):
        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
            return super().forward(input_ids[:, 1:], attention_mask, past_key_values, use_cache)

    model = Sliced(MineConfig())
    FusedHead(model)
    with pytest.raises(HeadError, match=r"the head of Sliced got \(4, 20, 32\) of \(4, 21\) tokens"):
        batch_of(Trees(((3, 0, 18, 18), (4, 0, 17, 5))), Layout("bucketed")).run(model)


def test_other_numbers_and_half_precision_come_back_too():
    model = build("bloom")
    FusedHead(model, with_log_sum_sq_probs=True)
    batch = batch_of(Trees(vocab=256))
    with torch.autocast("cpu", torch.bfloat16):
        own, padded = batch.run(model), batch.lying(Layout()).run(model)
    assert own.keys() == {"log_probs", "log_sum_sq_probs"}
    for name in own:
        torch.testing.assert_close(own[name], padded[name].masked_fill(~batch.mask, 0), rtol=0, atol=0.05)


def test_tokens_of_a_batch_are_told_beforehand():
    pairs = Trees(((3, 0, 2, 1), (2, 0, 0, 1), (0, 0, 2, 2), (22, 0, 1, 1), (0, 0, 0, 3)))
    batch = batch_of(pairs)
    assert most_tokens(CACHE, [pair_tokens(pairs[i]) for i in range(len(pairs))]) == batch.positions


def test_each_answer_has_a_cache_of_its_own():
    k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    cache = DynamicCache()
    cache.update(k, v, 0)
    own = [caches.of_output(types.SimpleNamespace(past_key_values=cache), "Mine") for _ in range(2)]
    own[0].update(k, v, 0)
    assert [one.get_seq_length() for one in (cache, *own)] == [3, 6, 3]
    assert own[1].layers[0].keys is cache.layers[0].keys  # with its graph
    Pair = namedtuple("Pair", ["keys", "values"])
    [pair] = caches.of_output(types.SimpleNamespace(cache=[Pair(k, v)]), "Mine")
    assert type(pair) is Pair
    assert pair.keys is k
    with pytest.raises(caches.CacheError, match="this is a dict; give --layout bucketed"):
        caches.of_output(types.SimpleNamespace(cache={"k": k}), "Mine")


@pytest.mark.parametrize(
    ("own", "in_padded"),
    [
        ({}, {}),
        ({"answers_at_once": 2}, {"answers_at_once": 2}),
        ({"tokens_per_batch": 2 * 29, "per_device_train_batch_size": 8},
         {"tokens_per_batch": 2 * 52, "per_device_train_batch_size": 8}),
    ],
    ids=["whole", "parts", "tokens"],
)  # fmt: skip
def test_training_through_caches_is_training_in_padded_rows(tmp_path, own, in_padded):
    found = []
    for layout, options in (("padded", in_padded), ("shared", own)):
        usual = {"output_dir": str(tmp_path / layout), "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
                 "train_sampling_strategy": "sequential", "max_steps": 2, "optim": "sgd", "learning_rate": 1e-2,
                 "per_device_train_batch_size": 2, "layout": layout}  # fmt: skip
        pairs = Trees(((22, 0, 4, 3),) * 4, vocab=256)
        trainer = DPOTrainer(build("bloom"), build("bloom"), DPOConfig(**usual | options), pairs)
        assert trainer.layout.attention == ("cache" if layout == "shared" else None)
        assert trainer.reference.layout == trainer.layout
        trainer.train()
        found.append(weights(trainer))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_without_memory_gives_up_the_cache_with_its_layers(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_kernels.training.layout_check._known_reason",
                        lambda model, layout: "" if layout.attention == "cache" else "not told")  # fmt: skip
    trainer = make_trainer(tmp_path, pairs=Trees(), layout="shared")
    assert trainer.layout == CACHE
    assert next(rescue.lower(trainer)) == "--gradient_checkpointing true --layout bucketed"
    assert trainer.layout == Layout("bucketed") == trainer.reference.layout
    trainer.train()
