"""A head whose weight tensor parallelism has split: what transformers has put around its forward."""

from __future__ import annotations

from typing import Any

# Where a fused head keeps the forward that it found, which makes logits of all ranks.
PARALLEL_FORWARD = "_parallel_forward"


def is_parallel(module: Any) -> bool:
    """Whether a module's forward is one that transformers has put on a layer whose weight it has split over ranks."""
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel"
