"""Forward with warps of their own for products, of which no table has a row yet: held to the one that is chosen."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import planned, step
from helpers import MODES, assert_close, head_on

pytestmark = pytest.mark.gpu


@pytest.fixture
def with_warps(cuda: torch.device) -> torch.device:
    if torch.version.hip is not None or torch.cuda.get_device_capability(cuda)[0] not in (9, 10):
        pytest.skip("specialised warps are for compute capabilities 9 and 10")
    return cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [(8, 64, 300), (129, 80, 4000), (1000, 1024, 32_000), (777, 272, 50_257), (4096, 512, 151_936)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_the_same_numbers(with_warps, override, dtype, mode, shape):
    """Ragged in rows, columns and features; fewer slices than buffers, and many blocks a program."""
    head = head_on(with_warps, *shape, dtype, grads=MODES[mode], ignored=0.2)
    made = planned(head, mode) if shape[2] > 300 else None
    cotangent = torch.randn(shape[0]).to(with_warps)
    results = []
    for specialized in (False, True):
        override(kernels={"product": {"specialized": specialized}})
        results.append(step(head, cotangent, None if made is None else made.bytes))
    usual, other = results
    assert_close(other.log_probs, usual.log_probs, 2e-5)
    for got, expected in zip(other.grads, usual.grads, strict=True):
        assert_close(got, expected, 2 * torch.finfo(dtype).eps * expected.abs().max().item())


def test_it_gives_the_same_bits_again(with_warps, override):
    """Whatever group of warps is ahead."""
    override(kernels={"product": {"specialized": True}})
    head = head_on(with_warps, 1000, 512, 40_000, torch.bfloat16, ignored=0)
    cotangent = torch.ones(1000, device=with_warps)
    first = step(head, cotangent)
    for _ in range(20):
        again = step(head, cotangent)
        assert torch.equal(first.log_probs, again.log_probs)
        assert all(map(torch.equal, first.grads, again.grads))
