"""What a call without `impl` takes on a GPU. Its numbers are in tests/conformance."""

from __future__ import annotations

import pytest
import torch
from helpers import detached, head_on

from dpo_kernels import hidden_to_log_probs, plan

pytestmark = pytest.mark.gpu


def test_the_implementation_of_choice_is_triton(cuda):
    head = head_on(cuda, 64, 64, 500, torch.bfloat16)
    chosen = hidden_to_log_probs(head.hidden, head.weight, head.labels)
    assert torch.equal(chosen, hidden_to_log_probs(head.hidden, head.weight, head.labels, impl="triton"))
    assert plan(64, 64, 500, device="cuda") == plan(64, 64, 500, device="cuda", impl="triton")
    doubles = detached(head, torch.float64)
    assert hidden_to_log_probs(doubles.hidden, doubles.weight, doubles.labels).dtype == torch.float64
