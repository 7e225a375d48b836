"""Weights of which each process keeps a part (DeepSpeed's ZeRO-3): whole where they are computed with, for as long.

Such a parameter is an empty tensor between its uses; DeepSpeed hangs on it what it is (`ds_shape`, `ds_numel`), and its
engine brings it back around each module. Before there is an engine, `by_module` here does the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def runs_together(*models: Any) -> bool:
    """Whether processes have to run one of the models together: each has a part of its parameters, DeepSpeed's or a
    DTensor's."""
    parameters = (p for model in models if isinstance(model, nn.Module) for p in model.parameters())
    return any(is_partitioned(p) or isinstance(p, DTensor) for p in parameters)


def any_partitioned(*models: Any) -> bool:
    """Whether one of the models, where there are models, has a parameter in parts."""
    return any(is_partitioned(p) for model in models if isinstance(model, nn.Module) for p in model.parameters())


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, whether it is in parts or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numbers_in(parameter: Any) -> int:
    """How many numbers the whole parameter has."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def own_part(parameter: Any) -> Tensor:
    """What this process has of a parameter: all of it, where it is not in parts."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    found: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter
    return found.detach()


def whole(parameters: Iterable[Any]) -> AbstractContextManager[Any]:
    """Within it the parameters are whole, to be read; entered by all processes alike, never twice at a time."""
    parts = [p for p in parameters if is_partitioned(p)]
    if not parts:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parts)
    return gathered


@contextmanager
def by_module(*models: Any) -> Iterator[None]:
    """Within it the models run forward without an engine, one module's own parameters whole at a time.

    There is no backward: what it would need is in parts again by then.
    """
    open_: list[tuple[nn.Module, ExitStack]] = []

    def before(module: nn.Module, _: Any) -> None:
        stack = ExitStack()
        stack.enter_context(whole(module.parameters(recurse=False)))
        open_.append((module, stack))

    def after(module: nn.Module, *_: Any) -> None:
        while open_:  # an exception that was caught may have left some
            inner, stack = open_.pop()
            stack.close()
            if inner is module:
                break

    hooks: list[Any] = []
    for module in (m for model in models if isinstance(model, nn.Module) for m in model.modules()):
        if any(is_partitioned(p) for p in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while open_:
            open_.pop()[1].close()
