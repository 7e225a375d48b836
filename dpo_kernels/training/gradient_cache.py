"""The forward and backward of a batch in parts, with the memory of one: gradient caching (Gao et al. 2021,
arXiv:2101.06983).

A loss of pairs sees an answer through its token log-probs alone. So these are computed first, a part at a time and
without graph; then the loss and its derivative by them, by whoever asked; then each part goes forward again, with its
graph, and backward from its share of that derivative. The last part keeps the graph of its first forward, so that the
price is one forward less that part's. Loss and gradients are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

Forward = Callable[[], dict[str, Tensor]]  # {"log_probs": (n, S), ...} of a part, each time anew


def refusal(balances: bool, is_sharded: bool, is_deepspeed: bool) -> str:
    """Why a run cannot go in parts, in a sentence; "" if it can.

    Args:
        balances: whether a load-balancing loss is added. is_sharded: whether the run uses FSDP.
    """
    if balances:
        return "the load-balancing loss is over all rows of the batch; give --router_aux_loss_coef 0 to leave it out"
    if is_sharded:
        return "with FSDP each part gathers the weights, and processes would have to have equally many; use DDP"
    if is_deepspeed:
        return "DeepSpeed reduces gradients in its own backward, which has to be one; use DDP"
    return ""


def run_in_parts(model: nn.Module, forwards: Sequence[Forward], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the parts give, as if they had been run together.

    With gradients, log_probs is what `Tensor.backward` of a loss goes through to the parameters' `grad`. The way leads
    past autograd's graph, so `torch.autograd.grad` finds no parameter behind it. Other results have no gradient.

    Args:
        model: what the forwards call, wrapped or not.
        forwards: of each part.
        rows: which of the 2B answers a part's are, each of them in one part.

    Returns: tensors (2B, S), under the names that all parts give.
    """
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in model.parameters()):
        return _joined([forward() for forward in forwards], rows)
    step = _Step(model, forwards, rows)
    outputs = step.run()
    leaf = torch.zeros((), requires_grad=True)  # without one that wants a gradient nothing goes backward
    return outputs | {"log_probs": _Cached.apply(leaf, outputs["log_probs"], step)}


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, log_probs: Tensor, step: _Step) -> Tensor:
        ctx.step = step
        return log_probs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.step.run_backward(grad)
        return None, None, None


class _Step:
    """Both passes over the parts of a batch.

    DDP reduces gradients in the backward that follows a forward in which it was to: of the parts the last one that
    runs. A graph that was kept would have to be prepared before the others, so there none is kept.
    """

    def __init__(self, model: nn.Module, forwards: Sequence[Forward], rows: Sequence[Sequence[int]]) -> None:
        self.model, self.forwards, self.rows = model, forwards, rows
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.kept: Tensor | None = None  # the last part's log-probs, with their graph
        self.surroundings: list[Surroundings] = []  # of each forward that is run again
        self.is_done = False

    def run(self) -> dict[str, Tensor]:
        outputs = []
        for i, forward in enumerate(self.forwards):
            keeps = self.ddp is None and i == len(self.forwards) - 1
            if not keeps:
                self.surroundings.append(Surroundings.now(self.model))
            # A weight that autocast has cast without gradient would be taken in a forward with one (pytorch#158232).
            torch.clear_autocast_cache()
            with torch.set_grad_enabled(keeps):
                output = forward()
            self.kept = output["log_probs"] if keeps else None
            outputs.append({name: value.detach() for name, value in output.items()})
        torch.clear_autocast_cache()
        return _joined(outputs, self.rows)

    def run_backward(self, grad: Tensor) -> None:
        """grad: of the loss by the log-probs, (2B, S)."""
        if self.is_done:
            raise RuntimeError("the parts of this batch have gone backward already; compute its loss anew")
        self.is_done = True
        shares = [grad[[*rows]] for rows in self.rows]
        if self.kept is not None:  # first, to be rid of its graph
            kept, self.kept = self.kept, None
            torch.autograd.backward(kept, shares[-1])
            del kept
        for i, surroundings in enumerate(self.surroundings):
            is_last = i == len(self.surroundings) - 1
            with nullcontext() if self.ddp is None or is_last else self.ddp.no_sync():
                with surroundings.restored(), torch.enable_grad():
                    log_probs = self.forwards[i]()["log_probs"]
                torch.autograd.backward(log_probs, shares[i])
                del log_probs  # and its graph, before the next


@dataclass(frozen=True)
class Surroundings:
    """What a forward depends on besides its arguments: random numbers, of the CPU and of a model's devices, and what
    autocast does."""

    device_type: str
    on_cpu: Tensor
    devices: list[int]
    on_devices: list[Tensor]
    autocasts: list[dict[str, Any]]

    @classmethod
    def now(cls, model: nn.Module) -> Surroundings:
        one_each = {p.device: p for p in model.parameters()}
        device_type = next((device.type for device in one_each if device.type != "cpu"), "cpu")
        autocasts = [
            {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            for kind in dict.fromkeys(("cpu", device_type))
        ]
        return cls(device_type, torch.get_rng_state(), *get_device_states(*one_each.values()), autocasts)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it all is as it was; after it, as it is now."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices, device_type=self.device_type))
            torch.set_rng_state(self.on_cpu)
            set_device_states(self.devices, self.on_devices, device_type=self.device_type)
            torch.clear_autocast_cache()
            for options in self.autocasts:
                stack.enter_context(torch.autocast(**options, cache_enabled=torch.is_autocast_cache_enabled()))
            yield
            torch.clear_autocast_cache()


def _joined(outputs: Sequence[dict[str, Tensor]], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    order = torch.tensor([row for part in rows for row in part]).argsort()
    return {
        name: torch.cat([output[name] for output in outputs])[order.to(outputs[0][name].device)] for name in outputs[0]
    }
