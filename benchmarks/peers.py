"""Everything that is compared, each once: how to call it, at which levels, and what one should know of it.

An adapter takes `Inputs` and returns, differentiable, the labels' log-probs (R, S) ("logits" and "hidden") or the loss
("dpo"); its values where the label is masked are not looked at. Whether it can run is found out by running it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_kernels
from benchmarks.cases import IGNORE, Case, Inputs

Adapter = Callable[[Inputs], Tensor]
BETA = 0.1


@dataclass(frozen=True)
class Peer:
    """One thing that is compared.

    adapters: level -> function. modules: what must be importable. impl: ours alone.
    marks: what a reader of its numbers has to know, by when it holds: "always", a level, a mode or "masked".
    """

    name: str
    adapters: dict[str, Adapter]
    modules: tuple[str, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    impl: str | None = None

    def notes(self, case: Case) -> list[str]:
        """The marks that hold in a case."""
        now = {"always", case.level, case.mode} | ({"masked"} if case.masked else set())
        return [mark for when, mark in self.marks.items() if when in now]

    def unavailable(self, device: torch.device | str) -> str | None:
        """None, or why it cannot be tried here."""
        if self.impl is not None:
            return dpo_kernels.available_impls(device)[self.impl]
        return next(filter(None, map(import_failure, self.modules)), None)


def import_failure(module: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        return "not installed" if module.startswith(missing) else f"needs {missing}, which is not installed"
    except Exception as error:  # an import may fail in any way that its authors did not think of
        return f"import fails: {first_line(error)}"
    return None


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


def _flat(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D), labels (N,)."""
    return inputs.hidden.flatten(0, 1), inputs.weight, inputs.labels.flatten()


def _shaped(inputs: Inputs, log_probs: Tensor) -> Tensor:
    return log_probs.view(inputs.labels.shape)


# Ours ----------------------------------------------------------------------------------------------------------------


def _ours(impl: str) -> Peer:
    def logits(inputs: Inputs) -> Tensor:
        return dpo_kernels.logits_to_log_probs(inputs.logits, inputs.labels, impl=impl)

    def hidden(inputs: Inputs) -> Tensor:
        budget = inputs.memory_budget
        return dpo_kernels.hidden_to_log_probs(
            inputs.hidden, inputs.weight, inputs.labels, memory_budget=budget, impl=impl
        )

    def dpo(inputs: Inputs) -> Tensor:
        loss = dpo_kernels.FusedLinearDPOLoss(BETA, memory_budget=inputs.memory_budget, impl=impl)
        return loss(
            inputs.hidden, inputs.weight, inputs.labels, ref_hidden=inputs.ref_hidden, ref_weight=inputs.ref_weight
        ).loss

    return Peer(f"dpo_kernels {impl}", _levels(hidden, logits, dpo), impl=impl)


# PyTorch -------------------------------------------------------------------------------------------------------------


def _gather(logits: Tensor, labels: Tensor) -> Tensor:
    """What most code does: logits (..., V) in float32, log_softmax, gather."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _gather_hidden(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _gather(F.linear(hidden, weight), labels)


_compiled = cache(partial(torch.compile, dynamic=True))


def _torch_linear_cross_entropy(chunked: bool, inputs: Inputs) -> Tensor:
    hidden, weight, labels = _flat(inputs)
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    loss = F.linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE, options=options)
    return _shaped(inputs, -loss)


# TRL -----------------------------------------------------------------------------------------------------------------


def _trl_selective(inputs: Inputs, logits: Tensor | None) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, inputs.labels.clamp(min=0))


def _trl_chunked(inputs: Inputs) -> Tensor:
    """As TRL's own model patch calls it: rows that count alone where Triton runs, all rows elsewhere."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight, labels = _flat(inputs)
    counts = labels != IGNORE
    compact = hidden.is_cuda
    if compact:
        hidden, labels = hidden[counts], labels[counts]
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    if compact:
        log_probs = log_probs.new_zeros(counts.shape).masked_scatter(counts, log_probs)
    return _shaped(inputs, log_probs)


# Liger ---------------------------------------------------------------------------------------------------------------


def _liger_fused_linear_cross_entropy(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(*_flat(inputs), ignore_index=IGNORE, reduction="none")
    return _shaped(inputs, -loss)


def _liger_cross_entropy(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    assert inputs.logits is not None
    logits = inputs.logits.flatten(0, 1)
    return _shaped(inputs, -liger_cross_entropy(logits, inputs.labels.flatten(), reduction="none"))


def _liger_scaled_cross_entropy(inputs: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    loss = LigerFusedLinearScaledCrossEntropyFunction.apply(*_flat(inputs), 1.0, IGNORE)
    return _shaped(inputs, -(loss[0] if isinstance(loss, tuple) else loss))


def _liger_dpo(inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, *_ = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA)(
        inputs.weight, inputs.hidden, inputs.labels, ref_input=inputs.ref_hidden, ref_weight=inputs.ref_weight
    )
    return loss


# CCE and quack -------------------------------------------------------------------------------------------------------


def _cce(impl: str, filter_eps: float | str | None, inputs: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, reduction="none", filter_eps=filter_eps, impl=impl
    )
    return -loss


def _quack_linear_cross_entropy(inputs: Inputs) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    hidden, weight, labels = _flat(inputs)
    return _shaped(inputs, -linear_cross_entropy_func(hidden, weight, None, labels, IGNORE, "none"))


def _quack_cross_entropy(inputs: Inputs) -> Tensor:
    from quack.cross_entropy import cross_entropy

    assert inputs.logits is not None
    loss = cross_entropy(inputs.logits.flatten(0, 1), inputs.labels.flatten(), ignore_index=IGNORE, reduction="none")
    return _shaped(inputs, -loss)


_ALL_ROWS = {"masked": "computes masked rows too"}

PEERS: tuple[Peer, ...] = (
    *(_ours(impl) for impl in ("triton", "cpp", "torch")),
    Peer(
        "plain PyTorch",
        _levels(
            lambda i: _gather_hidden(i.hidden, i.weight, i.labels),
            lambda i: _gather(i.logits, i.labels),
        ),
        marks=_ALL_ROWS,
    ),
    Peer(
        "torch.compile",
        _levels(
            lambda i: _shaped(i, _compiled(_gather_hidden)(*_flat(i))),
            lambda i: _compiled(_gather)(i.logits, i.labels),
        ),
        marks=_ALL_ROWS,
    ),
    Peer(
        "torch F.linear_cross_entropy",
        _levels(
            partial(_torch_linear_cross_entropy, False),
            lambda i: -F.cross_entropy(i.logits.flatten(0, 1), i.labels.flatten(), reduction="none").view(
                i.labels.shape
            ),
        ),
        marks={**_ALL_ROWS, "logits": "F.cross_entropy"},
    ),
    Peer(
        "torch F.linear_cross_entropy, chunked",
        _levels(partial(_torch_linear_cross_entropy, True)),
        marks=_ALL_ROWS,
    ),
    Peer(
        "TRL",
        _levels(_trl_chunked, lambda i: _trl_selective(i, i.logits)),
        ("trl.kernels", "trl.trainer.utils"),
        {
            "hidden": "ChunkedLogProbFunction", "dpo": "ChunkedLogProbFunction", "logits": "selective_log_softmax",
            "masked": "computes masked rows too on a CPU",
        },
    ),
    Peer(
        "TRL selective_log_softmax",
        _levels(lambda i: _trl_selective(i, F.linear(i.hidden, i.weight))),
        ("trl.trainer.utils",),
        _ALL_ROWS,
    ),
    Peer(
        "Liger fused linear cross entropy",
        _levels(_liger_fused_linear_cross_entropy, _liger_cross_entropy),
        ("liger_kernel.transformers.functional",),
        {**_ALL_ROWS, "logits": "its cross entropy"},
    ),
    Peer(
        "Liger scaled cross entropy",
        {"hidden": _liger_scaled_cross_entropy},
        ("liger_kernel.ops.fused_linear_scaled_cross_entropy",),
        {**_ALL_ROWS, "frozen": "computes the frozen weight's gradient too"},
    ),
    Peer(
        "Liger FusedLinearDPOLoss",
        {"dpo": _liger_dpo},
        ("liger_kernel.chunked_loss",),
        _ALL_ROWS,
    ),
    Peer("CCE torch_compile", _levels(partial(_cce, "torch_compile", None)), ("cut_cross_entropy",)),
    Peer("CCE exact", _levels(partial(_cce, "cce", None)), ("cut_cross_entropy",)),
    Peer(
        "CCE default",
        _levels(partial(_cce, "cce", "high")),
        ("cut_cross_entropy",),
        {"full": "skips small gradients", "frozen": "skips small gradients"},
    ),
    Peer(
        "quack",
        _levels(_quack_linear_cross_entropy, _quack_cross_entropy),
        ("quack.linear_cross_entropy", "quack.cross_entropy"),
        _ALL_ROWS,
    ),
)  # fmt: skip


def peers_of(case: Case) -> list[Peer]:
    """The peers that a case compares, ours first."""
    names = set(case.peers or (p.name for p in PEERS)) - set(case.without)
    return [p for p in PEERS if case.level in p.adapters and p.name in names]


# The floor -----------------------------------------------------------------------------------------------------------


def floor_name(case: Case) -> str:
    return "bare copy" if case.level == "logits" else "bare GEMMs"


def make_floor(case: Case, inputs: Inputs) -> Callable[[], None]:
    """What no peer can be expected to undercut: the products of rows that count, or copies of the logits.

    GEMMs, in the inputs' dtype into tensors made beforehand: 1 for score, 2 for a frozen head, 3 for all gradients, and
    1 more for DPO's reference. Logits: one copy forward, two with the gradient.
    """
    if inputs.logits is not None:
        source, target = inputs.logits.detach(), torch.empty_like(inputs.logits)

        def copy() -> None:
            for _ in range(1 if case.mode == "score" else 2):
                target.copy_(source)

        return copy
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach().flatten(0, 1)[: case.counted_tokens]
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def multiply() -> None:
        for _ in range(2 if case.level == "dpo" else 1):
            torch.mm(hidden, weight.T, out=logits)
        if "hidden" in case.wanted:
            torch.mm(logits, weight, out=grad_hidden)
        if "weight" in case.wanted:
            torch.mm(logits.T, hidden, out=grad_weight)

    return multiply
