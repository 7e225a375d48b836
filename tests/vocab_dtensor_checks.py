"""What two ranks have to do where a head is given as DTensors; run beside tests/vocab_checks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from vocab_ranks import Here, V, mesh_of_all, near, raises, same_on_ranks, shard_weight

from dpo_kernels import LowRank, hidden_to_log_probs, logits_to_log_probs, reference


def check_dtensors() -> None:
    """Every placement of the hidden states, uneven rows; gradients come back placed as what they are of."""
    here = Here(tokens=30)
    hidden3, labels = here.hidden.view(2, 15, -1), here.labels.view(2, 15)
    exact = [t.double().requires_grad_() for t in (hidden3, here.weight, here.bias)]
    truth = reference.hidden_to_log_probs(exact[0], exact[1], labels, exact[2])
    cotangent = torch.randn_like(truth)
    true_grads = torch.autograd.grad((truth * cotangent).sum(), exact)
    for placement in (None, Replicate(), Shard(0), Shard(1)):
        for given_labels in (labels, distribute_tensor(labels, mesh_of_all(), [Shard(1)])):
            hidden = hidden3.clone() if placement is None else distribute_tensor(hidden3, mesh_of_all(), [placement])
            weight, bias = shard_weight(here.weight), shard_weight(here.bias)
            leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
            # As it comes: where strides differ, torch 2.10 accumulates it as Replicate.
            comes_as = {leaf: [] for leaf in leaves if isinstance(leaf, DTensor)}
            for leaf, seen in comes_as.items():
                leaf.register_hook(lambda grad, seen=seen: seen.append(grad.placements))
            got = hidden_to_log_probs(leaves[0], leaves[1], given_labels, leaves[2])
            assert type(got) is Tensor
            near(got.double(), truth.detach())
            assert same_on_ranks(got)
            (got * cotangent).sum().backward()
            for leaf, exact_grad in zip(leaves, true_grads, strict=True):
                grad = leaf.grad
                if isinstance(leaf, DTensor):
                    assert comes_as[leaf] == [leaf.placements]
                    grad = grad.full_tensor()
                near(grad.double(), exact_grad)


def check_a_mesh_of_two_dimensions() -> None:
    """One of them of a single rank, which splits nothing; both of two would split rows twice."""
    here = Here()
    for shape, placements in (((2, 1), (Shard(0), Replicate())), ((1, 2), (Replicate(), Shard(0)))):
        mesh = init_device_mesh("cpu", shape)
        weight, bias = (distribute_tensor(t, mesh, placements) for t in (here.weight, here.bias))
        near(hidden_to_log_probs(here.hidden, weight, here.labels, bias).double(), here.exact().log_probs)


def check_dtensors_that_are_placed_otherwise() -> None:
    here = Here()
    mesh, whole = mesh_of_all(), distribute_tensor(here.weight, mesh_of_all(), [Replicate()])
    weight = shard_weight(here.weight)

    def call(hidden: Any = here.hidden, weight: Any = weight, bias: Any = None, **options: Any) -> Any:
        return hidden_to_log_probs(hidden, weight, here.labels, bias, **options)

    raises(TypeError, "expected a weight whose rows are split, Shard(0)", call, weight=whole)
    raises(TypeError, "expected a weight whose rows", call, weight=distribute_tensor(here.weight, mesh, [Shard(1)]))
    raises(TypeError, "expected one that is placed Shard(0)", call, bias=here.bias)
    raises(TypeError, "expected Shard(0), beside the weight", call,
           bias=distribute_tensor(here.bias, mesh, [Replicate()]))  # fmt: skip
    raises(TypeError, "expected Replicate(), or Shard of a dimension before the features", call,
           hidden=distribute_tensor(here.hidden, mesh, [Shard(1)]))  # fmt: skip
    a, b = torch.randn(2, 12), torch.randn(V, 2)
    raises(TypeError, "low_rank.b is no DTensor on the weight's mesh", call, low_rank=LowRank(a, b))
    # A whole weight takes no DTensor beside it, and logits none at all.
    raises(TypeError, "a tensor is a DTensor with placements", call, weight=here.weight,
           hidden=distribute_tensor(here.hidden, mesh, [Replicate()]))  # fmt: skip
    logits = distribute_tensor(here.hidden, mesh, [Shard(1)])
    raises(TypeError, "a tensor is a DTensor with placements", logits_to_log_probs, logits, here.labels % 12)
    near(call().double(), reference.hidden_to_log_probs(here.hidden.double(), here.weight.double(), here.labels))
