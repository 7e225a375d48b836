"""What a small call costs the host on a GPU, counted: PyTorch's operations, launches, and waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels import ops
from dpo_kernels.call import Grads, Options
from dpo_kernels.kernels.configs import Arch
from dpo_kernels.overrides import override

TOKENS, FEATURES, VOCAB = 512, 1024, 32_000  # whose kernels take some 50 us on an H100, by their products
# Before, with all tokens counted: 46, 136 and 131 operations, and 2, 16 and 14 kernels of ours and products.
LIMITS = {(): (23, 2), ("hidden",): (35, 5), ("hidden", "weight"): (41, 7)}
FILTERED = 97  # operations with a filter
WITH_INDEX = 8  # operations more where some labels do not count
WHERE_TOLD = 3  # more, which check on the device that as many count
WAITS = ("aten.nonzero.", "aten._local_scalar_dense", "aten.item", "aten.is_nonzero")


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [False, True], ids=["counted", "told"])
@pytest.mark.parametrize("ignored", [0, 212])
@pytest.mark.parametrize("grads", LIMITS)
def test_a_small_step_asks_little_of_the_host(grads, ignored, known):
    """Operators' own code on CPU tensors, with the launches left out; what only a CPU does, looking at labels, too."""
    hidden, weight = torch.zeros(TOKENS, FEATURES).bfloat16(), torch.zeros(VOCAB, FEATURES).bfloat16()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    labels[TOKENS - ignored :] = -100
    options = Options(grads=Grads.of(grads), compute_dtype=torch.bfloat16, impl="triton")
    encoded = replace(options, tokens=TOKENS - ignored if known else None).encode()
    head = (hidden, weight, None, None, None, labels)
    launches = []
    with (
        override(launch=lambda *what: launches.append(what), arch=Arch("cuda", 9), kernels={"strategy": "fused"}),
        mock.patch("dpo_kernels.backends.triton_tiles.library_multiply", lambda *what: launches.append(what)),
        mock.patch("dpo_kernels.checks.labels_in_range"),
        mock.patch("dpo_kernels.checks.counted_labels"),
        Counted() as counted,
    ):
        made = ops.token_stats_op._init_fn(*head, *encoded)
        if grads:
            wanted = [name in grads for name in ("hidden", "weight", "bias", "low_rank", "low_rank")]
            upstream = labels.float()
            counted.operations.pop()
            saved = list(made[ops.STATS :])
            ops.token_stats_backward_op._init_fn([upstream, None], saved, wanted, *head, *encoded)
    operations, kernels = LIMITS[grads]
    operations += (WITH_INDEX if ignored else 0) + (WHERE_TOLD if known else 0)
    assert len(counted.operations) <= operations, counted.operations
    assert len(launches) <= kernels, [what[1] for what in launches]
    waits = sum(name.startswith(WAITS) for name in counted.operations)
    assert waits == (0 if known else 1)  # to find the labels that count; in forward


@pytest.mark.parametrize(("labels", "merges"), [(8192, True), (10_000, False)])
def test_how_many_labels_count_decides_no_kernel(labels, merges):
    """Whether finish_kernel merges splits is compiled into it, and a captured CUDA graph computes every label."""
    hidden, weight = torch.zeros(labels, 16).bfloat16(), torch.zeros(512, 16).bfloat16()
    encoded, found = Options(compute_dtype=torch.bfloat16, impl="triton").encode(), []

    def launch(module, name, programs, warps, stages, arguments):
        if name == "finish_kernel":
            found.append(arguments["MERGE"])

    with override(launch=launch, arch=Arch("cuda", 9)), mock.patch("dpo_kernels.checks.labels_in_range"):
        for counted in (1, 6000, labels):
            given = torch.zeros(labels, dtype=torch.int64)
            given[counted:] = -100
            ops.token_stats_op._init_fn(hidden, weight, None, None, None, given, *encoded)
    assert found == [merges] * 3


@pytest.mark.parametrize("share", [None, 2**-12])
def test_a_filter_asks_a_little_more_and_waits_once_more(share):
    """In backward, for how many columns of each tile stay; of tiles by the number of tokens, nothing."""
    hidden, weight = torch.zeros(TOKENS, FEATURES).bfloat16(), torch.zeros(VOCAB, FEATURES).bfloat16()
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    options = Options(grads=Grads.of(("hidden", "weight")), compute_dtype=torch.bfloat16, impl="triton")
    encoded = replace(options, gradient_filter=share or 0.0).encode()
    head = (hidden, weight, None, None, None, labels)
    launches = []

    def launch(module, name, programs, warps, stages, arguments):
        launches.append(name)
        if name == "count_kernel":
            arguments["counts"].zero_()

    with (
        override(launch=launch, arch=Arch("cuda", 9), kernels={"strategy": "fused"}),
        mock.patch("dpo_kernels.backends.triton_tiles.library_multiply", lambda *what: launches.append(what)),
        mock.patch("dpo_kernels.checks.labels_in_range"),
        mock.patch("dpo_kernels.sparse.mean_row", lambda matrix, dtype: matrix[0].to(dtype)),  # on a GPU one operation
        Counted() as counted,
    ):
        made = ops.token_stats_op._init_fn(*head, *encoded)
        counted.operations.pop()
        wanted = [True, True, False, False, False]
        ops.token_stats_backward_op._init_fn([labels.float(), None], list(made[ops.STATS :]), wanted, *head, *encoded)
    operations, kernels, waits = (41, 7, 1) if share is None else (FILTERED, 10, 2)
    assert len(counted.operations) <= operations, counted.operations
    assert len(launches) <= kernels, launches
    assert sum(name.startswith(WAITS) for name in counted.operations) <= waits
