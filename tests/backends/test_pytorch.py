"""What is the PyTorch back end's own: float64, in which gradients are checked against differences."""

from __future__ import annotations

import pytest
import torch
from helpers import ALL, PLAIN, make_head

from dpo_kernels import logits_to_log_probs, token_stats

MIB = 2**20
TRANSFORMS = [
    pytest.param(PLAIN, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": 1.3}, id="scaled"),
    pytest.param({"softcap": 6.0}, id="softcap"),
    pytest.param(ALL, id="all"),
]


@pytest.mark.parametrize("budget", [None, 20 * MIB])
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
@pytest.mark.parametrize("options", TRANSFORMS)
def test_gradcheck(options, outputs, budget):
    head = make_head((2, 3), 4, 7, torch.float64, bias=True, ignored=0)
    labels = head.labels.clone()
    labels[0, 1] = -100

    def function(hidden, weight, bias):
        stats = token_stats(hidden, weight, labels, bias, outputs=outputs, memory_budget=budget, **options)
        return tuple(t for t in stats if t is not None)

    assert torch.autograd.gradcheck(function, (head.hidden, head.weight, head.bias))
    assert torch.autograd.gradcheck(lambda h: function(h, head.weight.detach(), head.bias.detach()), (head.hidden,))


def test_logits_gradcheck():
    labels = torch.tensor([[1, -100, 3], [0, 4, 4]])
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: logits_to_log_probs(z, labels, softcap=3.0, temperature=0.5), logits)
