"""A head whose weight tensor parallelism has split: what transformers has put around its forward."""

from __future__ import annotations

from typing import Any

from dpo_kernels.dtensors import is_dtensor

# Where a fused head keeps the forward that it found, which makes logits of all ranks.
PARALLEL_FORWARD = "_parallel_forward"


def is_parallel(module: Any) -> bool:
    """Whether a module's forward is one that transformers has put on a layer whose weight it has split over ranks."""
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel"


def ranks_of(head: Any) -> int | None:
    """How many ranks hold a head's rows together in its forward; None: one holds all of them.

    Of a mesh of several dimensions it is the last: the others are FSDP's, which gathers them before.
    """
    if not is_parallel(head) and PARALLEL_FORWARD not in vars(head):
        return None
    weight = head.weight
    return weight.device_mesh.size(weight.device_mesh.ndim - 1) if is_dtensor(weight) else None
