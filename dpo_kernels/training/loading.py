"""Tokenizers, configs and models from folders and hub names, those that bring their own code too."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import cached_file

from dpo_kernels.training import adapters
from dpo_kernels.training.output_head import below_adapters
from dpo_kernels.warn import warn

# One of these is there wherever a tokenizer is.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

UNREADABLE = (SafetensorError, UnpicklingError, EOFError, JSONDecodeError)  # what the libraries raise of damaged files

Loaded = TypeVar("Loaded")


class LoadError(ValueError):
    """A model folder does not hold the model that it says, or its code may not or cannot run."""


def load_tokenizer(
    policy: str, reference: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, or the reference's where the policy has none; of an adapter without one its base's.

    Args:
        policy, reference: folders or hub names; None: there is no reference.
        trust_remote_code: whether code that they bring may run.

    Raises:
        LoadError: it brings code, which was not allowed.
        ValueError: neither has a tokenizer; or the reference's gives other ids to the same text, so that it would score
            other text than the policy.
    """
    policy = policy if _has_tokenizer(policy) else adapters.base_of(policy) or policy
    if reference is not None and not _has_tokenizer(reference):
        reference = adapters.base_of(reference) or reference
    found: dict[str, Any] = {
        name: _asked(name, functools.partial(AutoTokenizer.from_pretrained, name, trust_remote_code=trust_remote_code))
        for name in dict.fromkeys(filter(None, (policy, reference))) if _has_tokenizer(name)
    }  # fmt: skip
    if not found:
        who = policy if reference in (None, policy) else f"neither {policy} nor the reference {reference}"
        holds = "holds no tokenizer" if reference in (None, policy) else "holds a tokenizer"
        raise ValueError(
            f"{who} {holds}, none of {', '.join(FILES)}; copy its files there, or save it beside the model with "
            "tokenizer.save_pretrained(FOLDER)"
        )
    tokenizer = found.get(policy) or next(iter(found.values()))
    if len(found) == 2:
        assert reference is not None
        _compare(policy, tokenizer, reference, found[reference])
    return tokenizer


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Of a model, or of what an adapter is for.

    Raises:
        LoadError: it brings code, which was not allowed.
    """
    _check_exists(name)
    name = adapters.base_of(name) or name
    return _asked(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))


def load_model(
    name: str, *, trust_remote_code: bool = False, dtype: Any = "auto", is_trainable: bool = False, **options: Any
) -> Any:
    """A causal language model, or one of images and text whose text is trained alone, as its constructor makes it; of
    an adapter's name its base with the adapter, a `PeftModel`.

    transformers makes models without memory and fills in what the checkpoint holds. What no checkpoint holds (rotary
    tables in buffers that are not saved) is made again here for models that bring their own code, which would
    otherwise compute with whatever the memory held; transformers does it for its own classes.

    Args:
        name: a folder or hub name.
        trust_remote_code: whether code that it brings may run.
        dtype: of the weights; "auto" is the checkpoint's.
        is_trainable: whether an adapter shall be trained.
        options: for `from_pretrained`, such as attn_implementation.

    Raises:
        LoadError: it brings code, which was not allowed; the checkpoint lacks weights; buffers cannot be made again.
    """
    _check_exists(name)
    if (base := adapters.base_of(name)) is not None:
        model = load_model(base, trust_remote_code=trust_remote_code, dtype=dtype, **options)
        return adapters.go_on(model, name, is_trainable)
    config = load_config(name, trust_remote_code)
    auto = auto_class(config)
    _mend_old_ties(name, config, trust_remote_code)
    model, info = _asked(name, lambda: auto.from_pretrained(
        name, config=config, trust_remote_code=trust_remote_code, dtype=dtype, output_loading_info=True, **options
    ))  # fmt: skip
    _tie(model, set(info["missing_keys"]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(p) for key, p in parameters.items() if key not in info["missing_keys"]}
    missing = sorted(k for k in info["missing_keys"] if k in parameters and id(parameters[k]) not in tied)
    if missing or info["mismatched_keys"]:
        wrong = missing or [key for key, *_ in info["mismatched_keys"]]
        raise LoadError(
            f"the checkpoint {name} lacks {len(wrong)} weights of {type(model).__name__}, {wrong[:5]}, or has them in "
            "other shapes: they would be random numbers; give the folder of the whole model"
        )
    if is_own_code(model):
        made_again(model, [key for key in info["missing_keys"] if key not in parameters])
    return model


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens, scaled rotary embeddings included; None: no limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaled in (rope, *(inner for inner in rope.values() if isinstance(inner, dict))):
        factor, original = (scaled.get(name) for name in ("factor", "original_max_position_embeddings"))
        original = original or limits[0]
        if factor and original:
            limits.append(int(factor * original))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return max(known, default=None)


def check_positions(config: Any, max_length: int) -> None:
    """
    Raises:
        ValueError: sequences of max_length tokens have more positions than the model.
    """
    limit = max_positions(config)
    if limit is not None and max_length - 1 > limit:  # the last token is predicted, never read
        raise ValueError(
            f"max_length is {max_length:,}, and the model has {limit:,} positions (max_position_embeddings, with what "
            f"its rope parameters extend them by); give --max_length {limit:,} or less, or a model for longer sequences"
        )


def is_own_code(model: nn.Module) -> bool:
    """Whether a model's class is none of transformers' own."""
    return type(model).__module__.split(".")[0] != "transformers"


def is_of_its_own_kind(model: nn.Module) -> bool:
    """Whether a model, below its adapters, descends from none of transformers' models."""
    classes = type(below_adapters(model)).__mro__
    return not any(ancestor.__module__.startswith("transformers.models.") for ancestor in classes)


def made_again(model: Any, missing: list[str] | None = None) -> list[str]:
    """Sets what no checkpoint holds to what the model's constructor makes of its config; returns the names.

    Args:
        model: loaded, with its weights in place.
        missing: names of buffers that are saved, and which the checkpoint lacked.

    Raises:
        LoadError: the constructor cannot be run again, or makes something else than it did.
    """
    names = set(missing or [])
    for prefix, module in model.named_modules():
        unsaved = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        names |= {f"{prefix}.{name}".lstrip(".") for name in unsaved}
        names |= {f"{prefix}.{name}".lstrip(".") for name, value in vars(module).items() if isinstance(value, Tensor)}
    if not names:
        return []
    try:
        with torch.random.fork_rng(devices=[]), _default_dtype(model.dtype), init_empty_weights(include_buffers=False):
            made = type(model)(model.config)
        for name in sorted(names):
            owner, _, attribute = name.rpartition(".")
            _replace(model.get_submodule(owner), attribute, getattr(made.get_submodule(owner), attribute))
    except Exception as error:
        raise LoadError(
            f"{type(model).__name__} keeps {sorted(names)[:5]} outside its checkpoint, and its constructor cannot make "
            f"them again ({type(error).__name__}: {error}): the model would compute with whatever the memory held. "
            "Save them with the model (persistent buffers), or make them in its constructor"
        ) from error
    return sorted(names)


def _replace(module: nn.Module, name: str, value: Any) -> None:
    was = getattr(module, name)
    if not isinstance(value, Tensor) or value.shape != was.shape:
        raise ValueError(f"{name} was {tuple(was.shape)}, is {tuple(getattr(value, 'shape', ()))} now")
    if value.is_meta:
        raise ValueError(f"{name} is computed from weights")
    device = next((p.device for p in module.parameters() if not p.is_meta), value.device)
    setattr(module, name, value.detach().to(device=device if was.is_meta else was.device, dtype=was.dtype))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def auto_class(config: Any) -> Any:
    kind = getattr(config, "model_type", None)
    own = getattr(config, "auto_map", None) or {}
    text_alone = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own
    if not text_alone and (kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or "AutoModelForImageTextToText" in own):
        return AutoModelForImageTextToText
    named = getattr(transformers, next(iter(getattr(config, "architectures", None) or ()), ""), None)
    if not text_alone and named is not None:  # a class that saves a kind of config which no mapping has
        return named
    return AutoModelForCausalLM


def _mend_old_ties(name: str, config: Any, trust_remote_code: bool) -> None:
    """A list of tied weights, as code for earlier versions of transformers has it, is no mapping: `_tie` makes one."""
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is None or not trust_remote_code:
        return
    own_class: Any = get_class_from_dynamic_module(reference, name)
    if isinstance(getattr(own_class, "_tied_weights_keys", None), list | tuple | set):
        own_class._tied_weights_keys = None


def _tie(model: Any, missing: set[str]) -> None:
    """Ties the head to the embedding where the config says so and the class has not done it."""
    if not is_own_code(model) or not getattr(model.config, "tie_word_embeddings", False):
        return
    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if head is None or embedding is None or head.weight is embedding.weight:
        return
    names = {id(module): name for name, module in model.named_modules()}
    keys = [f"{names[id(module)]}.weight" for module in (head, embedding)]
    if keys[1] in missing and keys[0] not in missing:  # the checkpoint has the head's alone
        embedding.weight = head.weight
    else:
        head.weight = embedding.weight
    model.all_tied_weights_keys = dict([keys])
    setattr(type(model), "_tied_weights_keys", dict([keys]))  # noqa: B010  (of a class that comes with the model)


def _asked(name: str, load: Callable[[], Loaded]) -> Loaded:
    """What a loader gives; in words of ours what it says of damaged files, and of code that may not run.

    Raises:
        LoadError: there is no such folder, its files cannot be read, or it brings code, which was not allowed.
    """
    _check_exists(name)
    try:
        return load()
    except Exception as error:
        of_tokenizers = type(error) is Exception  # the library tokenizers has no class of its own
        of_torch = isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
        if isinstance(error, UNREADABLE) or of_tokenizers or of_torch:
            raise LoadError(
                f"{name} holds files that cannot be read, cut short perhaps ({type(error).__name__}: {error}); "
                "download or save it again"
            ) from error
        if not isinstance(error, ValueError):
            raise
        if "trust_remote_code" not in str(error):
            raise
        raise LoadError(
            f"{name} brings code of its own, which runs on this machine: read it, then allow it with "
            "--trust_remote_code (trust_remote_code=True)"
        ) from error


def _check_exists(name: str) -> None:
    if not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise LoadError(f"there is no model folder {name}, and no hub name is like this; give a folder, or owner/name")


def _has_tokenizer(name: str) -> bool:
    _check_exists(name)
    return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in FILES)


def _compare(policy: str, own: Any, reference: str, other: Any) -> None:
    ids, other_ids = own.get_vocab(), other.get_vocab()
    differing = [token for token in ids if ids[token] != other_ids.get(token)]
    differing += [token for token in other_ids if token not in ids]
    if differing:
        token = differing[0]
        raise ValueError(
            f"the tokenizers of policy and reference differ in {len(differing):,} of {len(ids):,} and "
            f"{len(other_ids):,} tokens ({token!r} is {ids.get(token)} for {policy} and {other_ids.get(token)} for "
            f"{reference}): the reference would read other text than the policy; give a reference with the policy's "
            "vocabulary"
        )
    names = {name for name, token in own.special_tokens_map.items() if other.special_tokens_map.get(name) != token}
    if names:
        listed = ", ".join(
            f"{name} {own.special_tokens_map[name]!r} / {other.special_tokens_map.get(name)!r}"
            for name in sorted(names)
        )
        warn(f"policy and reference have other special tokens ({listed}); both are given text with the policy's")
