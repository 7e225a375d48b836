"""Everything that is compared, each once: how to call it, at which levels, and what one should know of it.

An adapter takes `Inputs` and returns, differentiable, the labels' log-probs (R, S) ("logits" and "hidden") or the loss
("dpo"); its values where the label is masked are not looked at. A trainer's adapter ("train") makes its step.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_kernels
from benchmarks import training
from benchmarks.cases import Case
from benchmarks.configurations import CONFIGURATIONS, Configuration
from benchmarks.inputs import IGNORE, Inputs
from benchmarks.verify import BETA
from dpo_kernels.planner import Plan

Adapter = Callable[[Inputs], Tensor]
UNLIMITED = 2**50  # bytes: the plan takes what the shape can use


@dataclass(frozen=True)
class Peer:
    """One thing that is compared.

    adapters: level -> function. modules: what must be importable. needs_cuda: its kernels are Triton's or CuTe's.
    marks: what a reader of its numbers has to know, by when it holds: "always", a level, a mode or "masked".
    impl, configuration: of ours, where they are not the defaults.
    """

    name: str
    adapters: dict[str, Callable[..., Any]]
    modules: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    needs_cuda: bool = False
    impl: str | None = None
    configuration: Configuration | None = None

    def notes(self, case: Case) -> list[str]:
        now = {"always", case.level, case.mode} | ({"masked"} if case.masked else set())
        return [mark for when, mark in self.marks.items() if when in now]

    def unavailable(self, device: torch.device) -> str | None:
        """None, or why it cannot be tried here."""
        if self.needs_cuda and device.type != "cuda":
            return "needs a GPU (its kernels are Triton's or CuTe's)"
        if self.impl is not None:
            if self.configuration is None and default_impl(device) == self.impl:
                return "it is what dpo_kernels takes here"
            return dpo_kernels.available_impls(device)[self.impl]
        try:
            for module in self.modules:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:  # an import may fail in any way that its authors did not think of
            return f"import fails: {first_line(error)}"
        return None

    def plan(self, case: Case, device: torch.device) -> Plan | None:
        """What dpo_kernels will do in a case; None where it plans nothing.

        A configuration has a budget of its own: in a full step all that a shape can use, or that without what is kept.
        """
        if case.level not in ("hidden", "dpo"):
            return None

        def under(budget: int | None) -> Plan:
            return dpo_kernels.plan(
                case.counted_tokens, case.hidden_size, case.vocab_size, case.torch_dtype, grads=case.wanted,
                memory_budget=budget, device=device, impl=self.impl, labels=case.tokens,
            )  # fmt: skip

        if self.configuration is None:
            return under(case.memory_budget)
        with self.configuration.applied(device):
            if case.mode != "full":
                return under(None)
            most = under(UNLIMITED)
            if self.configuration.keeps:
                return under(most.bytes)
            kept = (
                "kept probabilities", "hidden states, gathered and converted once",
                "hidden states times their scales",
            )  # fmt: skip
            # Where products read what is kept as it is, the gradient of a tile of logits has no room of its own there.
            tile = most.one_base * most.tile_tokens * most.tile_vocab * case.torch_dtype.itemsize
            return under(most.bytes - sum(most.memory.get(name, 0) for name in kept) + tile)


def default_impl(device: torch.device) -> str:
    """What dpo_kernels takes where nothing is asked for."""
    return next(name for name, reason in dpo_kernels.available_impls(device).items() if reason is None)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line, without the paths of this machine."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?:/[\w.\-+{}]+)+/", "", lines[0])
    return f"{type(error).__name__}: {text if len(text) < 160 else f'{text[:60]} ... {text[-60:]}'}"


def dpo_from_log_probs(log_probs: Adapter) -> Adapter:
    """DPO's loss (arXiv:2305.18290, equation 7) on top of per-token log-probs; the reference's by a second call."""

    def loss(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            reference = log_probs(inputs.reference())
        return dpo_kernels.reference.dpo_loss(reference, log_probs(inputs), inputs.labels != IGNORE, BETA)[0]

    return loss


def _levels(hidden: Adapter, logits: Adapter | None = None, dpo: Adapter | None = None) -> dict[str, Adapter]:
    adapters = {"hidden": hidden, "dpo": dpo or dpo_from_log_probs(hidden)}
    return adapters | ({"logits": logits} if logits else {})


def _logits(inputs: Inputs) -> Tensor:
    assert inputs.logits is not None
    return inputs.logits


def _flat(inputs: Inputs) -> list[Tensor]:
    """hidden (N, D) and weight (V, D), or logits (N, V); labels (N,)."""
    labels = inputs.labels.flatten()
    if inputs.logits is not None:
        return [inputs.logits.flatten(0, 1), labels]
    return [inputs.hidden.flatten(0, 1), inputs.weight, labels]


def unreduced(function: str, *more: Any, **options: Any) -> Adapter:
    """From a loss of each token: module:function, called with what `_flat` returns and these arguments."""

    def log_probs(inputs: Inputs) -> Tensor:
        loss = pkgutil.resolve_name(function)(*_flat(inputs), *more, **options)
        return -(loss[0] if isinstance(loss, tuple) else loss).view(inputs.labels.shape)

    return log_probs


def ours(name: str, impl: str | None = None, configuration: Configuration | None = None) -> Peer:
    def logits(inputs: Inputs) -> Tensor:
        return dpo_kernels.logits_to_log_probs(_logits(inputs), inputs.labels, impl=impl)

    def hidden(inputs: Inputs) -> Tensor:
        head = inputs.hidden, inputs.weight, inputs.labels
        return dpo_kernels.hidden_to_log_probs(*head, memory_budget=inputs.memory_budget, impl=impl)

    def dpo(inputs: Inputs) -> Tensor:
        loss = dpo_kernels.FusedLinearDPOLoss(BETA, memory_budget=inputs.memory_budget)
        head = inputs.hidden, inputs.weight, inputs.labels
        return loss(*head, ref_hidden=inputs.ref_hidden, ref_weight=inputs.ref_weight).loss

    # The primitive tells implementations apart; the loss on top is the same.
    adapters = {"logits": logits, "hidden": hidden} | ({"dpo": dpo} if impl is None else {})
    return Peer(name, adapters, impl=impl, configuration=configuration)


def _gather(logits: Tensor, labels: Tensor) -> Tensor:
    """What most code does: logits (..., V) in float32, log_softmax, gather."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _gather_hidden(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _gather(F.linear(hidden, weight), labels)


_compiled = cache(partial(torch.compile, dynamic=True))


def _trl_selective(inputs: Inputs, logits: Tensor) -> Tensor:
    return pkgutil.resolve_name(f"{_TRL}:selective_log_softmax")(logits, inputs.labels.clamp(min=0))


def _trl_chunked(inputs: Inputs) -> Tensor:
    """As TRL's own model patch calls it: rows that count alone where Triton runs, all rows elsewhere."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight, labels = _flat(inputs)
    counts = labels != IGNORE
    if hidden.is_cuda:
        hidden, labels = hidden[counts], labels[counts]
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    if hidden.is_cuda:
        log_probs = log_probs.new_zeros(counts.shape).masked_scatter(counts, log_probs)
    return log_probs.view(inputs.labels.shape)


def _liger_cross_entropy(inputs: Inputs) -> Tensor:
    return unreduced(f"{_LIGER}:liger_cross_entropy", **_EACH)(replace(inputs, logits=_logits(inputs).clone()))


def _liger_dpo(inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, *_ = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA)(
        inputs.weight, inputs.hidden, inputs.labels, ref_input=inputs.ref_hidden, ref_weight=inputs.ref_weight
    )
    return loss


def _quack_linear_cross_entropy(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    hidden, weight, labels = _flat(inputs)
    return -linear_cross_entropy_func(hidden, weight, None, labels, IGNORE, "none").view(inputs.labels.shape)


def _torch(loss: str, **options: Any) -> Adapter:
    return unreduced(f"torch.nn.functional:{loss}", **_EACH, **options)


def _cce(**options: Any) -> dict[str, Adapter]:
    return _levels(unreduced("cut_cross_entropy:linear_cross_entropy", **_EACH, **options))


_EACH: dict[str, Any] = {"ignore_index": IGNORE, "reduction": "none"}
_ALL_ROWS = {"masked": "computes masked rows too"}
_SKIPS = "skips small gradients"
_TRL_LOG = {"always": "computes entropy, mean logits and top-1 for its log too", "masked": "masked rows too on a CPU"}
_TRL, _LIGER = "trl.trainer.utils", "liger_kernel.transformers.functional"
_SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"

PEERS: tuple[Peer, ...] = (
    ours("dpo_kernels"),
    ours("dpo_kernels torch", "torch"),
    Peer("dpo_kernels DPOTrainer", {"train": training.ours}, ("dpo_kernels.training",)),
    Peer("TRL DPOTrainer with dpo_kernels", {"train": training.trl_enabled}, ("trl",), _TRL_LOG),
    Peer("plain PyTorch",
         _levels(lambda i: _gather_hidden(i.hidden, i.weight, i.labels), lambda i: _gather(_logits(i), i.labels)),
         marks=_ALL_ROWS),
    Peer("torch.compile",
         _levels(lambda i: _compiled(_gather_hidden)(*_flat(i)).view(i.labels.shape),
                 lambda i: _compiled(_gather)(_logits(i), i.labels)),
         marks=_ALL_ROWS),
    Peer("torch F.cross_entropy", {"logits": _torch("cross_entropy")}, marks=_ALL_ROWS),
    Peer("torch F.linear_cross_entropy", _levels(_torch("linear_cross_entropy")), marks=_ALL_ROWS),
    Peer("torch F.linear_cross_entropy, chunked",
         _levels(lambda i: _torch("linear_cross_entropy", options=torch.nn.LinearCrossEntropyOptions())(i)),
         marks=_ALL_ROWS),
    Peer("TRL ChunkedLogProbFunction", _levels(_trl_chunked), ("trl.kernels", _TRL),
         {"masked": "computes masked rows too on a CPU"}),
    Peer("TRL selective_log_softmax",
         _levels(lambda i: _trl_selective(i, F.linear(i.hidden, i.weight)), lambda i: _trl_selective(i, _logits(i))),
         (_TRL,), _ALL_ROWS),
    Peer("Liger fused linear cross entropy",
         _levels(unreduced(f"{_LIGER}:liger_fused_linear_cross_entropy", **_EACH)), (_LIGER,), _ALL_ROWS,
         needs_cuda=True),
    Peer("Liger cross entropy", {"logits": _liger_cross_entropy}, (_LIGER,),
         {**_ALL_ROWS, "always": "overwrites its logits; a copy is included"}, needs_cuda=True),
    Peer("Liger scaled cross entropy",
         {"hidden": unreduced(f"{_SCALED}:LigerFusedLinearScaledCrossEntropyFunction.apply", 1.0, IGNORE)}, (_SCALED,),
         {**_ALL_ROWS, "always": "computes the entropy too on a CPU", "frozen": "and the frozen weight's gradient"}),
    Peer("Liger FusedLinearDPOLoss", {"dpo": _liger_dpo}, ("liger_kernel.chunked_loss",), _ALL_ROWS),
    Peer("CCE torch_compile", _cce(impl="torch_compile", filter_eps=None), ("cut_cross_entropy",)),
    Peer("CCE exact", _cce(impl="cce", filter_eps=None), ("cut_cross_entropy",), needs_cuda=True),
    Peer("CCE default", _cce(impl="cce"), ("cut_cross_entropy",), {"full": _SKIPS, "frozen": _SKIPS}, needs_cuda=True),
    Peer("quack linear cross entropy", _levels(_quack_linear_cross_entropy), ("quack.linear_cross_entropy",),
         {**_ALL_ROWS, "always": "unfused form; the chunked one offers mean and sum only"}, needs_cuda=True),
    Peer("quack cross entropy", {"logits": unreduced("quack.cross_entropy:cross_entropy", **_EACH)},
         ("quack.cross_entropy",), _ALL_ROWS, needs_cuda=True),
    Peer("transformers with logits", {"train": training.with_logits}, ("transformers",), _ALL_ROWS),
    Peer("TRL DPOTrainer", {"train": training.trl}, ("trl",), _TRL_LOG),
)  # fmt: skip
# Ours as a case asks for it by name.
CONFIGURED = tuple(ours(name, "triton", configuration) for name, configuration in CONFIGURATIONS.items())


def peers_of(case: Case) -> list[Peer]:
    """The peers that a case compares, ours first."""
    names = set(case.peers if case.peers is not None else (p.name for p in PEERS)) - set(case.without)
    configured = [p for p in CONFIGURED if p.name in case.configurations]
    return configured + [p for p in PEERS if case.level in p.adapters and p.name in names]
