"""Where numbers lie in memory: rows of tensors of any strides, read and written without copying the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CAST = 2**21  # numbers that `spread_rows` casts at a time


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """tensor[rows]; the tensor itself where that is all of it: a view costs the host half as much as a launch."""
    return tensor if rows.start == 0 and rows.stop >= len(tensor) else tensor[rows]


def first_columns(matrix: Tensor, count: int) -> Tensor:
    """matrix[:, :count]; the matrix itself where that is all of it."""
    return matrix if matrix.shape[1] == count else matrix[:, :count]


def take_rows(tensor: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    """Rows `rows` of those that count, of a tensor (..., C) of any strides; never copies the whole tensor."""
    try:
        flat = tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
    except RuntimeError:  # no single stride: index the leading dimensions one by one
        where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
        return tensor[places(where, tensor.shape[:-1])]
    return rows_of(flat, rows) if index is None else flat.index_select(0, rows_of(index, rows))


def put_rows(tensor: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
    """The counterpart of take_rows: writes values (n, C) to those rows."""
    where = torch.arange(rows.start, rows.stop, device=tensor.device) if index is None else index[rows]
    tensor[places(where, tensor.shape[:-1])] = values.to(tensor.dtype)


def places(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Flat positions (M,) as one index a dimension. `torch.unravel_index` copies the shape to the device, and waits."""
    found = []
    for size in reversed(shape[1:]):
        found.append(index % size)
        index = index // size
    return (index, *reversed(found))


def spread_rows(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Rows (M, C) -> a new tensor of like's shape and dtype, 0 where `index` (M,) names no row; None: all are there."""
    if index is None:
        return rows.view(like.shape).to(like.dtype)
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    flat, step = out.view(-1, like.shape[-1]), max(CAST // like.shape[-1], 1)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        flat.index_copy_(0, index[part], rows[part].to(like.dtype))
    return out


def in_rows(matrix: Tensor) -> bool:
    """Whether the numbers of a row lie side by side; rows may lie any distance apart."""
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def lies_in_rows(tensor: Tensor) -> bool:
    """Whether `in_matrix` has a matrix for it."""
    return _row_step(tensor) is not None


def in_matrix(tensor: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A matrix over the same memory as a tensor (..., V), and the rows of it that are the tensor's.

    `logits[:, :-1]` of a batch has rows of two strides: its matrix has rows that are not the tensor's, which nobody
    reads.

    Args:
        index: (M,) int64, positions among the tensor's rows; None: all of them.

    Returns:
        (R, V), a step between its rows of at least V; (M,) int64, or None where its rows are those wanted, in order.
    """
    step = _row_step(tensor)
    assert step is not None
    shape, strides = tensor.shape[:-1], tensor.stride()[:-1]
    try:
        return tensor.view(-1, tensor.shape[-1]), index
    except RuntimeError:  # no single stride
        pass
    counts = [stride // step for stride in strides]
    rows = 1 + sum((size - 1) * count for size, count in zip(shape, counts, strict=True))
    if index is None:
        index = torch.arange(shape.numel(), device=tensor.device)
    found = torch.zeros_like(index)
    for place, count in zip(places(index, shape), counts, strict=True):
        found += place * count
    return tensor.as_strided((rows, tensor.shape[-1]), (step, 1)), found


def _row_step(tensor: Tensor) -> int | None:
    """The largest step that all rows of (..., V) lie a multiple of apart; None: numbers of a row do not lie side by
    side, or rows share memory."""
    width = tensor.shape[-1]
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1]
    step = math.gcd(*strides) if strides else width
    apart = step >= width and all(strides) and not overlaps(tensor)
    return step if apart and (width == 1 or tensor.stride(-1) == 1) else None


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


class Slice:
    """The last slice of an operand that was asked for, converted into one buffer that the next slice reuses."""

    def __init__(self) -> None:
        self.at: slice | None = None
        self.value: Tensor | None = None
        self.buffer: Tensor | None = None

    def get(
        self, at: slice, source: Callable[[], Tensor], convert: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        if self.value is None or self.at != at:
            self.value = None  # frees the last slice before the next is made
            taken = source()
            if self.buffer is not None and len(self.buffer) < len(taken):
                self.buffer = None  # the first slice may be shorter than the next
            self.value = convert(taken, None if self.buffer is None else self.buffer[: len(taken)])
            if self.buffer is None and self.value is not taken:
                self.buffer = self.value
            self.at = at
        return self.value
