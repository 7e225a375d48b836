"""A head whose weight is a DTensor, split by rows: its parts on this rank as plain tensors, and a `VocabShard`."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.call import LowRank
from dpo_kernels.vocab_shard import VocabShard, chunk

HOW = "expected a weight whose rows are split, Shard(0), over one mesh dimension"


class Head(NamedTuple):
    """What a call is given, as plain tensors of this rank."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    low_rank: LowRank | None
    shard: VocabShard | None


def local_head(given: Head) -> Head:
    """The same call on this rank; itself where the weight is no DTensor.

    weight: `Shard(0)`, rows as `torch.chunk` cuts them; bias and low_rank.b alike. hidden: plain, `Replicate`, or
    `Shard` of a dimension before the features. labels: plain, of the whole shape, or placed in any way. low_rank.a:
    plain or `Replicate`.

    Raises:
        TypeError: a tensor is placed in another way, or on another mesh than the weight.
        ValueError: a shard is given too.
    """
    if not is_dtensor(given.weight):
        return given
    if given.shard is not None:
        raise ValueError("weight is a DTensor, which says which rows are here; leave shard out, or give local tensors")
    weight: Any = given.weight
    mesh, dim = weight.device_mesh, _split_dim(weight)
    labels = whole_value(given.labels)
    hidden, hidden_dim = _hidden(given.hidden, weight, dim)
    rows = chunk(weight.shape[0], mesh.size(dim), mesh.get_local_rank(dim))
    low_rank = given.low_rank
    if low_rank is not None:
        low_rank = LowRank(
            _alike("low_rank.a", low_rank.a, weight, dim, None),
            _alike("low_rank.b", low_rank.b, weight, dim, 0),
            low_rank.scale,
        )
    return Head(
        hidden, weight.to_local(), labels,
        None if given.bias is None else _alike("bias", given.bias, weight, dim, 0),
        low_rank, VocabShard(mesh.get_group(dim), rows.start, weight.shape[0], hidden_dim),
    )  # fmt: skip


def whole_value(tensor: Tensor) -> Tensor:
    """A DTensor's, on every rank; what is no DTensor stays as it is."""
    found: Any = tensor
    return found.full_tensor() if is_dtensor(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; what is no DTensor stays as it is."""
    found: Any = tensor
    return found.to_local() if is_dtensor(tensor) else tensor


def alike_on_all_ranks(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, as a DTensor on the mesh of `like`, where that is one: hooks may expect it."""
    if not is_dtensor(like):
        return tensor
    module: Any = sys.modules["torch.distributed.tensor"]
    mesh = like.device_mesh  # type: ignore[attr-defined]
    return module.DTensor.from_local(tensor, mesh, [module.Replicate()] * mesh.ndim, run_check=False)


def is_dtensor(tensor: Any) -> bool:
    """Without importing what makes them."""
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _split_dim(weight: Any) -> int:
    """The mesh dimension that splits the rows; dimensions of one rank split nothing."""
    mesh, placements = weight.device_mesh, weight.placements
    split = [i for i in range(mesh.ndim) if mesh.size(i) > 1] or [0]
    if len(split) != 1 or not placements[split[0]].is_shard(0):
        raise TypeError(
            f"weight is a DTensor with placements {placements} on a mesh of {tuple(mesh.shape)}; {HOW}. Where every "
            "rank holds all of it, give its local part (to_local); else gather it first (full_tensor)"
        )
    return split[0]


def _alike(name: str, tensor: Tensor, weight: Any, dim: int, shard: int | None) -> Tensor:
    """A DTensor on the weight's mesh, split in dimension `shard`, as its local part. None: the same on all ranks, as a
    plain tensor may be."""
    if shard is None and not is_dtensor(tensor):
        return tensor
    given: Any = tensor
    wanted = "Replicate()" if shard is None else f"Shard({shard})"
    if not is_dtensor(tensor) or given.device_mesh != weight.device_mesh:
        raise TypeError(f"{name} is no DTensor on the weight's mesh; expected one that is placed {wanted}")
    placement = given.placements[dim]
    if not (placement.is_replicate() if shard is None else placement.is_shard(shard)):
        raise TypeError(f"{name} is a DTensor with placements {given.placements}; expected {wanted}, beside the weight")
    return given.to_local()


def _hidden(hidden: Tensor, weight: Any, dim: int) -> tuple[Tensor, int | None]:
    """This rank's hidden states, and the dimension in which they are split."""
    if not is_dtensor(hidden):
        return hidden, None
    given: Any = hidden
    if given.device_mesh != weight.device_mesh:
        raise TypeError("hidden and weight are DTensors on different meshes; expected one mesh")
    placement = given.placements[dim]
    if placement.is_replicate():
        return given.to_local(), None
    if not placement.is_shard() or placement.dim >= hidden.ndim - 1:
        raise TypeError(
            f"hidden is a DTensor with placements {given.placements}; expected Replicate(), or Shard of a dimension "
            f"before the features, less than {hidden.ndim - 1}: redistribute it first"
        )
    return given.to_local(), placement.dim
