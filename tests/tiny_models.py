"""Tiny random instances of transformers' causal language models, and of models of images whose text is trained alone.

A config's fields get small numbers by their names, from `SIZES`; what needs more than that stands in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from dpo_kernels.training.output_head import find_head

VOCABULARY = 256
# The first pattern that matches a field's whole name gives its value; None: as the config has it. Only fields that are
# whole numbers by default get one, but for what scales and caps: that does something in every model that has it.
SIZES: tuple[tuple[re.Pattern[str], float | None], ...] = tuple((re.compile(pattern), value) for pattern, value in (
    ("lm_head_multiplier|logit_scale", 0.25),
    ("logits_scaling|logits_mup_width_multiplier", 3.0),
    ("(final_logit|logits?|output_logit)_soft_?cap(ping)?", 5.0),
    ("embedding_multiplier", 2.0),
    ("residual_multiplier", 0.5),
    ("pad_token_id|pad_index", 0),
    ("bos_token_id|bos_index|cls_token_id|decoder_start_token_id", 1),
    ("eos_token_id|eos_index|sep_token_id", 2),
    ("(mask|unk)_(token_id|index)|eod_token_id", 3),
    ("type_vocab_size", 2),
    ("(.*_)?vocab_size(_per_layer_input)?|ngram_vocab_size_base", VOCABULARY),
    ("num_labels|.*_dropout.*|num_mel_bins|original_max_position_embeddings", None),
    ("num_(mtp|nextn_predict|kv_shared)_layers", 0),
    ("(swa_|num_|global_)*key_value_heads", 2),
    ("(mamba|n_mamba|mamba_n|mamba_num)_(n_)?heads", 8),
    ("index_n_heads", 2),
    ("(.*_)?(attention|linear|key|value|num|n|decoder|encoder|resampler)_heads?|heads", 4),
    ("index_head_dim", 16),
    ("(.*_)?(head_dim|kv_channels|dim_head|attention_head_size|d_kv|d_head)|query_pre_attn_scalar", 8),
    ("(mamba_)?(d_state|state_size)|ssm_state_size|(mamba_)?chunk_size", 8),
    ("(.*_)?lora_rank|laurel_rank|hidden_size_per_layer_input", 8),
    ("mamba_d_ssm", 64),
    ("(mamba_)?n_?groups?|topk_group|mamba_n_groups", 1),
    ("first_k_dense_replace|n_shared_experts|(moe_)?num_shared_experts", 1),
    ("(.*_)?(num|routed|local|moe_num)_(local_)?experts|n_routed_experts", 4),
    ("(.*num_)?experts_per_tok|moe_top_?k|moe_k|top_k_experts", 2),
    ("(moe_.*|shared_.*)intermediate_size|moe_hidden_size|router_hidden_size", 16),
    ("(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|mlp_dim|feed_forward_size"
     "|d_inner|share_expert_dim)", 48),
    ("(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|projection_dim|hidden_dim|output_dim)|dim"
     "|word_embed_proj_dim", 32),
    ("(num_|n_)?((hidden|encoder|decoder|conf_num_hidden)_)?(layers?|blocks)|(.*_)?depth", 2),
    ("max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length", 128),
    ("sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size", 16),
    ("image_size|index_topk", 32),
    ("patch_size|num_query_tokens|resampler_n_latents", 8),
    ("image_seq_length|num_image_tokens|mm_tokens_per_image|num_position_embeddings", 16),
    ("rotary_dim", 4),
))  # fmt: skip
SPECIAL_ID = re.compile(r".*_(token_id|token_index|id)")

# Rotary embeddings of three axes, for heads of 8 and of 16 features.
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
HALF_AXES = {"head_dim": 16, "rope_parameters": AXES["rope_parameters"] | {"partial_rotary_factor": 0.5}}
FULL_AXES = {"rope_parameters": {"full_attention": AXES["rope_parameters"]}}
AS_MANY_KEYS = {"num_key_value_heads": 4}
BYTES = AS_MANY_KEYS | {"vocab_size": 260}
HEADS = {"head_dim": 8}
FOUR_LAYERS = {"num_hidden_layers": 4}

# Of what AutoModelForImageTextToText loads. The others ask for an image (but idefics, which does so late), or need more
# than OVERRIDES to be built.
TEXT_ALONE = (
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2",
    "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr",
    "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics", "idefics2", "idefics3", "inkling2",
    "inkling2_loop", "internvl", "kimi_k25", "kosmos-2.5", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3",
    "mistral4", "mistral_large4", "muse_glimmer", "ovis2", "paddleocr_vl", "paligemma", "qianfan_ocr",
    "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
    "step3p7", "unlimited_ocr", "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": AS_MANY_KEYS,
    "axk2": AS_MANY_KEYS,
    "bailing_hybrid": AS_MANY_KEYS | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patching_threshold": 1.0, "vocab_size": 260,
            "encoder_config": BYTES | {"hidden_size_global": 64}, "decoder_config": BYTES | {"hidden_size_global": 64},
            "global_config": AS_MANY_KEYS | {"hidden_size": 64}, "patcher_config": BYTES},
    "cohere2": FOUR_LAYERS,
    "cohere_compass_text": FULL_AXES,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": AS_MANY_KEYS,
    "deepseek_v32": AS_MANY_KEYS,
    "deepseek_v4": FOUR_LAYERS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": AS_MANY_KEYS | {"head_dim": 16},
                   "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 2},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 32}},
    "dots3_note_text": AS_MANY_KEYS | {"head_dim": 16},
    "flint": FOUR_LAYERS,
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n_text": {"num_hidden_layers": 5, "activation_sparsity_pattern": [0.0] * 5, "intermediate_size": 48,
                     "layer_types": ["sliding_attention"] * 4 + ["full_attention"]},
    "glm4_moe_lite": AS_MANY_KEYS,
    "glm_moe_dsa": AS_MANY_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": AS_MANY_KEYS | {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "lfm3": FOUR_LAYERS,
    "mamba2": {"num_heads": 8},
    "minicpm3": AS_MANY_KEYS | {"dim_model_base": 8},
    "ministral": HEADS,
    "mistral4": AS_MANY_KEYS,
    "nemotron": HEADS | AS_MANY_KEYS,
    "qwen3_5": {"text_config": FOUR_LAYERS},
    "qwen3_5_moe": {"text_config": FOUR_LAYERS},
    "qwen3_5_moe_text": FOUR_LAYERS,
    "qwen3_5_text": FOUR_LAYERS,
    "qwen3_next": FOUR_LAYERS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 6], "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "num_buckets": 4, "attn_layers": ["local", "lsh"], "hash_seed": 0},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": AS_MANY_KEYS,
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": AS_MANY_KEYS | {"num_hidden_layers": 3,
                              "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
for name in ("gemma4_assistant", "gemma4_unified_assistant"):
    OVERRIDES[name] = {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        "backbone_hidden_size": 32, "num_centroids": 16, "centroid_intermediate_top_k": 4,
    }  # fmt: skip
INDEXED = FOUR_LAYERS | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
                         "indexer_compress_ratio": 4}  # fmt: skip
OVERRIDES |= {"qwen4_exp_text": INDEXED, "qwen4_exp": {"text_config": INDEXED}}
OVERRIDES |= {  # of images and text
    "cohere_compass": {"text_config": FULL_AXES},
    "cosmos3_edge": {"text_config": {"rope_parameters": AXES["rope_parameters"] | {"mrope_section": [2, 1, 1]}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "ernie4_5_vl_moe": {"text_config": AXES | {"moe_intermediate_size": [16, 16]}},
    "glm4v_moe": {"text_config": HALF_AXES},
    "hunyuan_vl": {"text_config": HEADS | {
        "rope_parameters": AXES["rope_parameters"] | {"mrope_section": [1, 1, 1, 1]}}},
    "step3p7": {"text_config": {"sliding_window": 16}},
}  # fmt: skip
for name in ("glm46v", "glm4v", "glm_ocr", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"):
    OVERRIDES[name] = {"text_config": AXES}
for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"):
    OVERRIDES[name] = {"text_config": AXES, "vision_start_token_id": 230, "vision_end_token_id": 231}
for name in ("kimi_k25", "mistral_large4"):
    OVERRIDES[name] = {"text_config": AS_MANY_KEYS}
for name in ("lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"):
    OVERRIDES[name] = {"text_config": FOUR_LAYERS}


def build(model_type: str, other_ties: bool = False) -> Any:
    """A tiny instance of the class that `load_model` loads for a model type; two calls give the same weights.

    Its weights are larger than at the start of a training, so that its logits are peaked, and its biases are not 0.

    Args:
        model_type: as in transformers' mappings.
        other_ties: tie head and embedding where the config by default does not, and the other way round.
    """
    model_class = getattr(transformers, (CAUSAL if model_type in CAUSAL else IMAGES)[model_type])
    config = tiny_config(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    if not isinstance(config, model_class.config_class or object):  # of several parts, of which it is one
        config = config.get_text_config(decoder=True)
    if hasattr(config, "is_decoder") and model_type in CAUSAL:
        config.is_decoder = True
    if other_ties:
        tied = getattr(config, "tie_word_embeddings", False)
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = not tied
    torch.manual_seed(0)
    with towers_stood_in_for():
        model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif parameter.ndim > 1 and not name.endswith("A_log"):
                parameter.mul_(5.0)
    try:
        head = find_head(model)
    except ValueError:
        return model
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def tiny_config(config_class: Any, given: dict[str, Any], ids: Iterator[int] | None = None) -> Any:
    """A config of small numbers; what is given, by the names of its fields, is taken as it is."""
    ids = itertools.count(VOCABULARY - 1, -1) if ids is None else ids
    values = {}
    for field in dataclasses.fields(config_class):
        value = next((value for pattern, value in SIZES if pattern.fullmatch(field.name)), field.name)
        whole = isinstance(field.default, int) and not isinstance(field.default, bool)
        if field.name in given or not (whole or isinstance(value, float)):
            continue
        if value is field.name:
            if SPECIAL_ID.fullmatch(field.name):
                values[field.name] = next(ids)
        elif value is not None and field.default != 0:
            values[field.name] = value
    for name, part in (getattr(config_class, "sub_configs_defaults", None) or {}).items():
        inner = given.get(name, {})
        if isinstance(inner, dict) and not (part.optional and name not in given):
            part_class = part.config_class
            if not issubclass(part_class, PreTrainedConfig):  # an AutoConfig
                part_class = CONFIG_MAPPING[inner.get("model_type", part.model_type)]
            inner = {name: value for name, value in inner.items() if name != "model_type"}
            values[name] = tiny_config(part_class, inner, ids)
    return config_class(**(given | values))


class Tower(transformers.PreTrainedModel):
    """In place of a vision tower that needs the package timm: training on text alone never runs it."""

    config_class = PreTrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.unused = nn.Linear(4, 4)
        self.post_init()


@contextmanager
def towers_stood_in_for() -> Iterator[None]:
    """While models of images are made, and loaded."""
    make = AutoModel.from_config

    def from_config(config: Any, **options: Any) -> Any:
        return Tower(config) if config.model_type in ("timm_wrapper", "gemma3n_vision") else make(config, **options)

    with mock.patch.object(AutoModel, "from_config", from_config):
        yield
