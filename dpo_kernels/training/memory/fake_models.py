"""The models of a run as their configs describe them, with fake tensors for weights: in a second, without a file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from dpo_kernels.training import adapters
from dpo_kernels.training.loading import auto_class
from dpo_kernels.training.memory.step_memory import PlanError
from dpo_kernels.training.model import FusedHead
from dpo_kernels.training.output_head import find_head
from dpo_kernels.training.randomness import disable_dropout

BITS = {"load_in_4bit": 4, "load_in_8bit": 8}
BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale in 4 bits; scales that share one


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(
    mode: FakeTensorMode,
    config: Any,
    dtype: torch.dtype,
    *,
    peft_config: Any = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    memory_budget: int | None = None,
    impl: str | None = None,
    gradient_filter: float | None = None,
    has_dropout: bool = False,
) -> Any:
    """A fused model whose parameters are fake tensors of `mode`, in the state in which it is trained.

    Args:
        config: of the model.
        dtype: of its weights.
        peft_config: of an adapter that is put into it; the rest is frozen then.
        has_dropout: whether it trains with the dropout of its config (`DPOConfig.disable_dropout`).

    Raises:
        PlanError: its class cannot be made of a config alone.
    """
    config = copy.deepcopy(config)  # a model may change it, and the real one has its own
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if trust_remote_code:
        options["trust_remote_code"] = True
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, **options)
        model.tie_weights()  # outside: a parameter that is registered within is another one
        with init_empty_weights(include_buffers=False):
            if peft_config is not None:
                model = adapters.adapted(model, peft_config)
        _fake(model, mode)
    except ValueError:
        raise
    except Exception as error:  # a constructor may raise anything
        raise PlanError(
            f"a model of the config {type(config).__name__} cannot be made without its weights "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from error
    if not has_dropout:
        disable_dropout(model)
    FusedHead(model, memory_budget, impl, gradient_filter=gradient_filter)
    return model


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors on the CPU in the place of parameters and buffers; those that are tied stay tied."""
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, tensor.requires_grad)
                        made[id(tensor)] = tensor, fake  # the tensor too, so that its id stays its own
                    tensors[name] = made[id(tensor)][1]


def quantised_bytes(model: nn.Module, option: str, nested: bool, itemsize: int) -> tuple[int, int]:
    """What bitsandbytes makes of a model's linear layers, all but the head: bytes that they take less than in their
    dtype, and bytes of the largest, which a product has in the compute dtype for its time."""
    head = find_head(model)
    linear = [
        m.weight for m in model.modules()
        if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad and "lora" not in type(m).__name__
    ]  # fmt: skip
    if not linear:
        return 0, 0
    numbers = sum(w.numel() for w in linear)
    scales = 4 * numbers // BLOCK if BITS[option] == 4 else 4 * sum(w.shape[0] for w in linear)
    if BITS[option] == 4 and nested:
        scales = numbers // BLOCK + 4 * numbers // BLOCK // NESTED_BLOCK
    taken = numbers * BITS[option] // 8 + scales
    return sum(w.nbytes for w in linear) - taken, itemsize * max(w.numel() for w in linear)
