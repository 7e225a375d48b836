"""TRL's DPO, KTO, GRPO and RLOO trainers with this package's log-probs: `enable()` before or after they are made.

TRL 1.16 computes the per-token log-probs of all of them by one function, `trl.trainer.utils._ChunkedLogProbFunction`,
which it looks up at each call. That name alone is replaced, and put back by `disable()`.

    from dpo_kernels.integrations.trl import enable

    enable()               # from here on
    with enable(): ...     # or for a while
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.functional import token_stats
from dpo_kernels.statistics import OPTIONAL_OUTPUTS
from dpo_kernels.warn import warn

KNOWN = "1.16"
NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip


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
            warn("the head is partitioned by DeepSpeed ZeRO-3: TRL's own log-probs are used")
            return self.own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # TRL computes in the hidden states' dtype; a copy beyond the budget
            bias = None if bias is None else bias.to(hidden.dtype)
        stats = token_stats(
            hidden, weight, targets, bias, outputs=outputs, temperature=temperature, logit_scale=logit_scale,
            softcap=final_logit_softcapping, memory_budget=self.memory_budget, impl=self.impl,
        )  # fmt: skip
        return stats.log_probs, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1


class Enabled:
    """What `enable` returns: as often as it is entered its function stands in TRL, and leaving puts back what was there
    before, unless `disable()` or another `enable()` has replaced it meanwhile."""

    def __init__(self, utils: ModuleType, function: FusedLogProbs) -> None:
        self._utils, self._function = utils, function
        self._before: list[Any] = []  # what each `with` block that is open puts back
        self._found = getattr(utils, NAME)  # by enable(), for the first block to put back
        setattr(utils, NAME, function)

    def __enter__(self) -> Enabled:
        current, found, self._found = getattr(self._utils, NAME), self._found, None
        self._before.append(found if found is not None and current is self._function else current)
        setattr(self._utils, NAME, self._function)
        return self

    def __exit__(self, *_: object) -> None:
        before = self._before.pop()
        if getattr(self._utils, NAME) is self._function:
            setattr(self._utils, NAME, before)


def enable(*, memory_budget: int | None = None, impl: str | None = None) -> Enabled:
    """From now on TRL's trainers compute log-probs with this package. Again, with other options: the last ones count.

    A head in another dtype than the hidden states is copied whole into theirs, as long as no autocast is on: V x D
    numbers beyond memory_budget, held until backward (2.3 GiB in float32 at 151,936 x 4,096). It happens where TRL's
    cast_lm_head_to_fp32 widens the hidden states and the head is narrow all the same.

    Args:
        memory_budget: as in `hidden_to_log_probs`, beside that copy.
        impl: as in `hidden_to_log_probs`.

    Returns:
        A context manager, for `with enable(): ...`; not needed otherwise.

    Raises:
        RuntimeError: this version of TRL is not known to work; nothing is replaced.
    """
    utils = _known_utils()
    return Enabled(utils, FusedLogProbs(_own(utils), memory_budget, impl))


def disable() -> None:
    """TRL's own function is back; nothing happens where it never left."""
    utils = sys.modules.get("trl.trainer.utils")
    if utils is not None and isinstance(getattr(utils, NAME, None), FusedLogProbs):
        setattr(utils, NAME, _own(utils))


def _own(utils: ModuleType) -> Any:
    """TRL's function, whether ours stands in its place or not."""
    current = getattr(utils, NAME, None)
    return current.own if isinstance(current, FusedLogProbs) else current


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

    forward = getattr(_own(utils), "forward", None)
    arguments = None if forward is None else tuple(inspect.signature(forward).parameters)[1:]  # the first is ctx
    if arguments != ARGUMENTS:
        raise RuntimeError(
            f"trl.trainer.utils.{NAME} of TRL {found} takes {arguments}; expected {ARGUMENTS}; dpo_kernels has "
            "replaced nothing"
        )
    return utils
