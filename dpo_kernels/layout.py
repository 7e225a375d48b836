"""Where numbers lie in memory: rows of tensors of any strides, read and written without copying the whole."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(tensor: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    """Rows `rows` of those that count, of a tensor (..., C) of any strides; never copies the whole tensor."""
    try:
        flat = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:  # no single stride: index the leading dimensions one by one
        where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
        return tensor[torch.unravel_index(where, tensor.shape[:-1])]
    return flat[rows] if index is None else flat.index_select(0, index[rows])


def put_rows(tensor: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
    """The counterpart of take_rows: writes values (n, C) to those rows."""
    where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
    tensor[torch.unravel_index(where, tensor.shape[:-1])] = values.to(tensor.dtype)


def spread_rows(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Rows (M, C) -> a new tensor of like's shape and dtype, 0 where `index` (M,) names no row; None: all are there."""
    if index is None:
        return rows.view(like.shape).to(like.dtype)
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    out.view(-1, like.shape[-1]).index_copy_(0, index, rows.to(like.dtype))
    return out


def in_rows(matrix: Tensor) -> bool:
    """Whether the numbers of a row lie side by side; rows may lie any distance apart."""
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def as_matrix(logits: Tensor) -> Tensor | None:
    """(..., V) as a matrix with contiguous rows, without a copy; None if its strides have none."""
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return None
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else None


def is_one_of_several(tensor: Tensor) -> bool:
    """Whether it is a view that came out of an operation with others (`split`, `chunk`, `unbind`): autograd lets nobody
    write to those."""
    meta = torch._C._autograd
    return tensor._is_view() and meta._get_creation_meta(tensor) == meta.CreationMeta.MULTI_OUTPUT_NODE


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor: then it cannot hold a gradient each."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * (size - 1) + 1) if size > 1 else reach
    return False
