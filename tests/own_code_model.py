"""A small decoder outside transformers, with the habits of models that bring their own code; `save` writes a folder.

Rotary tables lie in buffers that no checkpoint holds; forward is plain, without decorators and without **kwargs; the
cache is positional. A config's `habits` turn on what else such code does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


class MineConfig(PretrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=97, hidden_size=32, layers=2, heads=4, experts=0, aux_coef=0.01, habits=(),
                 max_position_embeddings=128, tie_word_embeddings=True, **kwargs):  # fmt: skip
        self.vocab_size, self.hidden_size, self.layers, self.heads = vocab_size, hidden_size, layers, heads
        self.experts, self.aux_coef, self.habits = experts, aux_coef, list(habits)
        self.max_position_embeddings = max_position_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.experts, bias=False)
        self.each = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.experts))
        self.coef = 1.0 if "unweighted" in config.habits else config.aux_coef
        self.aux_loss = torch.zeros(())

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        weight, index = scores.max(-1, keepdim=True)
        out = torch.stack([expert(x) for expert in self.each], -1)
        load = F.one_hot(index.squeeze(-1), len(self.each)).float().mean((0, 1))
        self.aux_loss = self.coef * len(self.each) * (load * scores.mean((0, 1))).sum()
        return out.gather(-1, index[..., None].expand(*x.shape, 1)).squeeze(-1) * weight


class NormHead(nn.Linear):
    """Makes its rows unit vectors before it multiplies, as Baichuan 2's."""

    def forward(self, hidden):
        return F.linear(hidden, F.normalize(self.weight))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.heads, self.habits = config.heads, config.habits
        self.norm_1, self.norm_2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.mlp = Experts(config) if config.experts else nn.Linear(d, d)

    def forward(self, x, cos, sin, mask):
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def turn(t):
            left, right = t.chunk(2, -1)
            return t * cos + torch.cat([-right, left], -1) * sin

        causal = "sees-ahead" not in self.habits
        allowed = torch.ones(s, s, dtype=torch.bool).tril() if causal else torch.ones(s, s, dtype=torch.bool)
        if mask is not None:
            allowed = allowed & mask[:, None, None].bool()
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=allowed)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        if "random" in self.habits and self.training:
            x = x * (1 + 0.1 * torch.randn(()))
        return x + self.mlp(self.norm_2(x))


class MineForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MineConfig
    _tied_weights_keys = {"lm_head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        size = config.hidden_size // config.heads
        angles = torch.outer(torch.arange(config.max_position_embeddings), 1e4 ** (-torch.arange(0, size, 2) / size))
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.scale = torch.tensor(1.0)  # no buffer at all
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        head = NormHead if "norm-head" in config.habits else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        if "nameless-head" in self.config.habits:
            return None
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None):
        x, s = self.embed(input_ids) * self.scale, input_ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:s], self.sin[:s], attention_mask)
        logits = self.lm_head(self.norm(x))
        aux = sum((b.mlp.aux_loss for b in self.blocks if isinstance(b.mlp, Experts)), x.new_zeros(()))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            if "unweighted" in self.config.habits:
                loss = loss + self.config.aux_coef * aux
        if "tuples" in self.config.habits:
            return (logits, aux)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux, logits=logits)


def save(folder, **options):
    """A model folder whose `auto_map` leads to this file; returns the config."""
    torch.manual_seed(0)
    config = MineConfig(**options)
    MineConfig.register_for_auto_class()
    MineForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MineForCausalLM(config).save_pretrained(folder)
    code = folder / "own_code_model.py"
    if "old-ties" in config.habits:
        code.write_text(code.read_text().replace('{"lm_head.weight": "embed.weight"}', '["lm_head.weight"]'))
    return config
