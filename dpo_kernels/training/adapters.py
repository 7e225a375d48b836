"""Adapters (PEFT): what a run asks for, how a model gets one or goes on with one, and the model as it is without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file

from dpo_kernels.training.head_adapter import is_lora
from dpo_kernels.training.head_check import logits_of, probe_ids
from dpo_kernels.training.output_head import accepted, find_head
from dpo_kernels.training.partitioned import shape_of, whole

CONFIG_NAME = "adapter_config.json"


@dataclass
class AdapterOptions:
    """LoRA and quantised bases. Names and defaults are TRL's."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the model itself stays as it is."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale is alpha / r (alpha / sqrt(r) with use_rslora)."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "On the adapter's inputs; off all the same unless --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers, or all-linear; default: what PEFT has for the class of the model."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters, such as those of experts that are one tensor."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers that are trained whole and saved with the adapter, such as lm_head."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised scale (arXiv:2312.03732)."})
    use_dora: bool = field(default=False, metadata={"help": "Magnitude and direction apart (arXiv:2402.09353)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The models' weights in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "In 8 bits."})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "What 4 bits mean."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "The scales of 4 bits in 8 bits."})
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of the products; default: --dtype."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also save the model with the adapter in its weights, in OUTPUT_DIR/merged."}
    )

    def peft_config(self) -> Any:
        """A `peft.LoraConfig`, or None where no new adapter is asked for.

        Raises:
            ValueError: PEFT is not installed, or an option is out of range.
        """
        self._check_used(self.use_peft, "use_peft", [f.name for f in fields(self) if f.name.startswith("lora_")])
        self._check_used(self.use_peft, "use_peft", ["use_rslora", "use_dora"])
        if not self.use_peft:
            return None
        needs("peft", "--use_peft")
        from peft import LoraConfig

        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; expected a rank of at least 1")
        targets: Any = self.lora_target_modules
        more: dict[str, Any] = {"target_parameters": self.lora_target_parameters} if self.lora_target_parameters else {}
        return LoraConfig(
            task_type="CAUSAL_LM", r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=self.lora_modules_to_save, use_rslora=self.use_rslora, use_dora=self.use_dora, **more,
        )  # fmt: skip

    def quantization(self, dtype: Any) -> dict[str, Any]:
        """Options for `from_pretrained`: none where nothing is quantised.

        Raises:
            ValueError: bitsandbytes is not installed, or both widths are asked for.
        """
        named = [f.name for f in fields(self) if "bnb" in f.name]
        self._check_used(self.load_in_4bit, "load_in_4bit", named)
        if not (self.load_in_4bit or self.load_in_8bit):
            return {}
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give one of --load_in_4bit and --load_in_8bit")
        needs("bitsandbytes", "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit")
        if not self.load_in_4bit:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        compute = dtype if self.bnb_4bit_compute_dtype is None else getattr(torch, self.bnb_4bit_compute_dtype)
        return {"quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute if isinstance(compute, torch.dtype) else torch.bfloat16,
        )}  # fmt: skip

    def _check_used(self, on: bool, switch: str, names: list[str]) -> None:
        usual = {f.name: f.default for f in fields(self)}
        if not on and (given := [name for name in names if getattr(self, name) != usual[name]]):
            raise ValueError(f"{given[0]} is {getattr(self, given[0])!r}, which does nothing without --{switch}")


def needs(package: str, what: str) -> None:
    """
    Raises:
        ValueError: a package is not installed; says what for, and how to get it.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        extra = "quant" if package == "bitsandbytes" else package
        raise ValueError(f"{what} needs the package {package}: pip install 'dpo-kernels[{extra}]'")


def base_of(name: str) -> str | None:
    """The model that an adapter's folder or hub name was trained on; None: this is no adapter.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        found = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    except OSError:  # a file, or a hub that cannot be asked: whoever loads the model says so
        return None
    if found is None:
        return None
    needs("peft", f"the adapter {name}")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    if not base:
        raise ValueError(f"{CONFIG_NAME} of {name} has no base_model_name_or_path; write the model's folder into it")
    return str(base)


def peft_config_of(name: str) -> Any:
    """What an adapter's folder or hub name says of it.

    Raises:
        ValueError: it is of a kind that is not trained here.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(name)
    _check_kind(config)
    return config


def go_on(model: nn.Module, name: str, is_trainable: bool) -> Any:
    """A model with a trained adapter: a `PeftModel`.

    Raises:
        ValueError: the adapter is of a kind that is not trained here.
    """
    from peft import PeftModel

    peft_config_of(name)
    model = _prepared_for_training(model, gradient_checkpointing=False) if is_trainable else model
    return PeftModel.from_pretrained(model, name, is_trainable=is_trainable)


def adapted(model: Any, peft_config: Any, gradient_checkpointing: bool = False) -> Any:
    """A model with a new adapter: a `PeftModel`, whose weights besides the adapter's are frozen.

    A quantised model is prepared as PEFT prepares it: layers that are not quantised are float32.

    Raises:
        ValueError: it has an adapter already, or the adapter is of a kind that is not trained here.
    """
    needs("peft", "peft_config")
    from peft import get_peft_model

    if is_adapted(model):
        raise ValueError(
            "the model has an adapter already, and a peft_config would put another one over it: leave peft_config out "
            "to go on with it, or merge it first (model.merge_and_unload())"
        )
    _check_kind(peft_config)
    return get_peft_model(_prepared_for_training(model, gradient_checkpointing), peft_config)


def is_quantised(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _prepared_for_training(model: Any, gradient_checkpointing: bool) -> Any:
    if not is_quantised(model):
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)


def _check_kind(config: Any) -> None:
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        raise ValueError(
            f"a {type(config).__name__} puts tokens of its own before the text, so that labels and hidden states no "
            "longer lie alike; train an adapter of another kind, such as LoRA"
        )


def is_adapted(model: Any) -> bool:
    """Whether a model has adapters: PEFT's, or those that transformers has put into it."""
    return hasattr(model, "peft_config") and (_is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False))


def _is_peft_model(model: Any) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "base_model")


def prepare(model: Any, gradient_checkpointing: bool) -> None:
    """Makes an adapter's model ready to be trained; others are left as they are.

    Raises:
        ValueError: an adapter's model in which nothing is trained, or of a kind that is not trained here.
    """
    if not is_adapted(model):
        return
    for config in model.peft_config.values():
        _check_kind(config)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing of this model is trained: its adapter was loaded to be used. Load it with is_trainable=True "
            "(PeftModel.from_pretrained), or train.py with --from_weight ADAPTER"
        )
    for module in model.modules():
        # On such CPUs bitsandbytes (0.50) packs a weight at its first use without gradient, and has none after it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if gradient_checkpointing:  # a segment without an input that wants a gradient has no backward
        model.enable_input_require_grads()


def check_apart(model: nn.Module, ref_model: nn.Module | None) -> None:
    """
    Raises:
        ValueError: policy and reference share weights that are trained, or layers.
    """
    if model is ref_model:
        raise ValueError("model and ref_model are one object; the reference must stay what it is: load it twice")
    if ref_model is not None and {id(m) for m in model.modules()} & {id(m) for m in ref_model.modules()}:
        raise ValueError(
            "model and ref_model share layers: an adapter was put into the model that is given as reference. Leave "
            "ref_model out: the reference of an adapter is the model with it switched off"
        )


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """The model as it is without its adapters; which parameters are trained is as before afterwards."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        if _is_peft_model(model):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(trained[name])


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's run trains, by its name in the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def changes_nothing(model: Any) -> bool:
    """Whether a model is what it is without its adapter, as before its first step: it gives the same logits on a few
    tokens, and what LoRA adds is 0 for all."""
    added = [p for name, p in model.named_parameters() if "lora_B" in name]
    with whole(added):
        if any(bool(p.any()) for p in added):
            return False
    modes = {module: module.training for module in model.modules()}
    weight: Any = find_head(model).weight
    given = {"input_ids": probe_ids(shape_of(weight)[0], weight.device), **accepted(model, {"use_cache": False})}
    try:
        model.eval()
        own = logits_of(model(**given))
        with switched_off(model):
            return torch.equal(own, logits_of(model(**given)))
    finally:
        for module, mode in modes.items():
            module.training = mode


def load(model: Any, checkpoint: str) -> bool:
    """Takes an adapter's values from a checkpoint, where transformers itself has put the adapter into the model. (Where
    PEFT has, transformers' Trainer does it: then, and for whole models, False.)"""
    if not is_adapted(model) or _is_peft_model(model):
        return False
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(checkpoint), adapter_name=model.active_adapters()[0])
    return True


def save_merged(model: Any, folder: Path) -> None:
    """Saves the model with its adapter in its weights. The model given is that model afterwards.

    Raises:
        ValueError: it has no adapter of PEFT's; its weights are quantised: a sum would be rounded to their few bits.
    """
    if not _is_peft_model(model):
        raise ValueError(f"merge_adapter: a {type(model).__name__} is no PeftModel, whose adapter could be merged")
    if is_quantised(model):
        raise ValueError(
            "merge_adapter: the model's weights are quantised, and would round the adapter away; load the model "
            "without --load_in_4bit or --load_in_8bit, and merge with PEFT's merge_and_unload()"
        )
    _untie(model.get_base_model())
    model.merge_and_unload().save_pretrained(folder)


def _untie(model: Any) -> None:
    """Gives a head that an adapter is on a weight of its own: merged into one that is the embedding's too, the adapter
    would change both."""
    head, embedding = find_head(model), model.get_input_embeddings()
    if not is_lora(head) or embedding is None or head.weight is not getattr(embedding, "weight", None):
        return
    layer: Any = head.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
