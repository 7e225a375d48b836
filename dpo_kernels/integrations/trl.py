"""TRL's DPO, KTO, GRPO and RLOO trainers with this package's log-probs: `enable()` before or after they are made.

TRL 1.16 computes the per-token log-probs of all of them by one function, `trl.trainer.utils._ChunkedLogProbFunction`,
which it looks up at each call. That name alone is replaced, and put back by `disable()`.

    from dpo_kernels.integrations.trl import enable

    enable()               # from here on
    with enable(): ...     # or for a while
"""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.head import OPTIONAL_OUTPUTS
from dpo_kernels.log_probs import token_stats

KNOWN = "1.16"
NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip

_own: Any = None  # TRL's function while ours stands in its place, else None


class FusedLogProbs:
    """What stands in for TRL's autograd function: the same `apply`, nine positional arguments in and five outputs out.

    Args:
        own: TRL's function, for the one head that ours cannot compute.
        memory_budget, impl: as in `hidden_to_log_probs`.
    """

    def __init__(self, own: Any, memory_budget: int | None = None, impl: str | None = None) -> None:
        self.own, self.memory_budget, self.impl = own, memory_budget, impl

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D), any floating dtype
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, (N,) each, None where not in `outputs`.

        chunk_size is TRL's tile of the vocabulary and without effect: tiles follow from the memory budget.
        """
        if any(hasattr(parameter, "ds_id") for parameter in (weight, bias)):
            # Its pieces are gathered around TRL's forward, and around its backward by TRL's function alone.
            warnings.warn("the head is partitioned by DeepSpeed ZeRO-3: TRL's own log-probs are used", stacklevel=2)
            return self.own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # TRL computes in the hidden states' dtype (cast_lm_head_to_fp32)
            bias = None if bias is None else bias.to(hidden.dtype)
        return token_stats(
            hidden, weight, targets, bias, outputs=outputs, temperature=temperature, logit_scale=logit_scale,
            softcap=final_logit_softcapping, memory_budget=self.memory_budget, impl=self.impl,
        )  # fmt: skip


class Enabled:
    """What `enable` returns: leaving a `with` block puts back what was there before."""

    def __init__(self, utils: ModuleType, before: Any) -> None:
        self._utils, self._before = utils, before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        global _own
        setattr(self._utils, NAME, self._before)
        if self._before is _own:
            _own = None


def enable(*, memory_budget: int | None = None, impl: str | None = None) -> Enabled:
    """From now on TRL's trainers compute log-probs with this package. Again, with other options: the last ones count.

    Args:
        memory_budget: as in `hidden_to_log_probs`.
        impl: as in `hidden_to_log_probs`.

    Returns:
        A context manager, for `with enable(): ...`; not needed otherwise.

    Raises:
        RuntimeError: this version of TRL is not known to work; nothing is replaced.
    """
    global _own
    utils = _known_utils()
    before = getattr(utils, NAME)
    if _own is None:
        _own = before
    setattr(utils, NAME, FusedLogProbs(_own, memory_budget, impl))
    return Enabled(utils, before)


def disable() -> None:
    """TRL's own function is back; nothing happens where it never left."""
    global _own
    if _own is not None:
        import trl.trainer.utils

        setattr(trl.trainer.utils, NAME, _own)
        _own = None


def _known_utils() -> ModuleType:
    """`trl.trainer.utils`, if the function in it is the one that is known here."""
    import trl

    found = trl.__version__
    if found.split(".")[:2] != KNOWN.split("."):
        raise RuntimeError(
            f"TRL {found} is installed; dpo_kernels knows the inside of TRL {KNOWN} only, and has replaced nothing: "
            f"install trl~={KNOWN}.0, or a version of dpo_kernels that knows yours"
        )
    import trl.trainer.utils as utils

    function = getattr(utils, NAME, None) if _own is None else _own
    forward = getattr(function, "forward", None)
    arguments = None if forward is None else tuple(inspect.signature(forward).parameters)[1:]  # the first is ctx
    if arguments != ARGUMENTS:
        raise RuntimeError(
            f"trl.trainer.utils.{NAME} of TRL {found} takes {arguments}; expected {ARGUMENTS}; dpo_kernels has "
            "replaced nothing"
        )
    return utils
