"""Sequences that are split over processes (context parallel): each computes its tokens, the loss sees whole answers.

Process r of n has the chunks r and 2n - 1 - r of 2n, so that all have as many keys to attend to. Keys and values are
gathered for attention (as in Llama 3's training: Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2), log-probs
for the loss. Every process of a group reads the same pairs and computes the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_kernels.training.attention import Attention

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Split:
    """What a process of a group has of a row of tokens.

    group: of torch.distributed, the processes that share rows.
    """

    group: Any

    @property
    def parts(self) -> int:
        return dist.get_world_size(self.group)

    def columns(self, length: int, device: torch.device | None = None) -> Tensor:
        """(length / parts,) int64: where the tokens of this process stand in a row.

        Args:
            length: of the row, a multiple of 2 * parts.
        """
        return self._order(length, device).view(self.parts, -1)[dist.get_rank(self.group)]

    def padded(self, length: int) -> int:
        """The length of rows that can be split, from `length` on."""
        return -(-length // (2 * self.parts)) * 2 * self.parts

    def whole(self, own: Tensor) -> Tensor:
        """The whole rows of everyone's part, in the order of the tokens; the same on all processes, bit for bit.

        Differentiable, for a loss that all processes compute alike from the whole rows: each has the gradient of that
        one loss with respect to its own part.

        Args:
            own: (R, s) of this process' columns.

        Returns: (R, parts * s).
        """
        return self._in_order(_Shown.apply(own, self.group), 1)

    def gathered(self, own: Tensor, dim: int) -> Tensor:
        """As `whole` along `dim`, for what each process uses in another way, as keys and values: gradients are summed
        over the processes."""
        return self._in_order(_Shared.apply(own.contiguous(), self.group), dim)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, told: Attention) -> Tensor:
        """Causal attention of the own tokens to all that stand before them; (R, s, H, E').

        Args:
            query, key, value: (R, H, s, E), (R, H', s, E) and (R, H', s, E') of the own tokens.
            told: how, as a model tells its attention function.
        """
        key, value = self.gathered(key, 2), self.gathered(value, 2)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        chunk, rank = query.shape[2] // 2, dist.get_rank(self.group)
        made = []
        for number, queries in zip((rank, 2 * self.parts - 1 - rank), query.split(chunk, 2), strict=True):
            end = (number + 1) * chunk
            made.append(told(queries, key[:, :, :end], value[:, :, :end]))
        return torch.cat(made, 2).transpose(1, 2).contiguous()

    def _order(self, length: int, device: torch.device | None = None) -> Tensor:
        """Which token stands where, once the parts of all processes lie one behind the other."""
        chunks = torch.arange(length, device=device).view(2 * self.parts, -1)
        return torch.stack([chunks[: self.parts], chunks.flip(0)[: self.parts]], 1).flatten()

    def _in_order(self, parts: Tensor, dim: int) -> Tensor:
        """parts: (n, ...) what all processes have."""
        joined = torch.cat(parts.unbind(0), dim)
        return joined.index_select(dim, self._order(joined.shape[dim], joined.device).argsort())


class _Shown(torch.autograd.Function):
    """All parts, to a loss that is the same everywhere: the gradient of the own part is in the gradient already."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return _gather(own, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0][ctx.rank], None


class _Shared(torch.autograd.Function):
    """All parts, to computations that differ: the gradient of the own part is the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather(own, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # Not reduce-scatter, which not every backend has: n times the traffic of the smallest that would do.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


class _Averaged(torch.autograd.Function):
    """What it is given, with `times` its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, times: int) -> Tensor:
        ctx.times = times
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] * ctx.times, None


def _gather(own: Tensor, group: Any) -> Tensor:
    """(n, ...) of (...)."""
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.stack(parts)


def over(model: Callable[..., Any], split: Split | None) -> Callable[..., Any]:
    """A fused model as a function of whole rows, of which each process of the group computes its part.

    Of a parameter's gradient each process has the part of its tokens, times their number: FSDP and DDP average them
    over processes, where a sum is wanted.

    Args:
        model: fused, `use_branches` on; wrapped or not.
        split: None: the model itself.

    Returns: takes input_ids and labels (R, S), and gives log-probs (R, S), the same on all processes.
    """
    if split is None:
        return model

    def run(input_ids: Tensor, labels: Tensor, **options: Any) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        columns = split.columns(split.padded(length), input_ids.device)
        more = split.padded(length) - length
        ids = nn.functional.pad(input_ids, (0, more))[:, columns]
        own_labels = nn.functional.pad(labels, (0, more), value=IGNORE_INDEX)[:, columns]
        places = columns.expand(len(ids), -1)
        output = model(input_ids=ids, labels=own_labels, position_ids=places, spans=split, **options)
        if "aux_loss" in output:
            raise ValueError("a load-balancing loss is over all tokens, which here are split over processes")
        shares = {name: _Averaged.apply(values, split.parts) for name, values in output.items()}
        return {name: split.whole(values)[:, :length] for name, values in shares.items()}

    return run
