"""The softmax state of all tokens of a call, as the Triton kernels begin it, merge into it and finish it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.kernels import launch
from dpo_kernels.layout import rows_of
from dpo_kernels.statistics import Finished, SoftmaxState, TokenStats, finite

BLOCK = 128  # rows of a program


class Unmerged(NamedTuple):
    """What the programs of a tile left of its rows: (splits, FIELDS, n), of `split` vocabulary entries each, the tile's
    `width` from `first` on."""

    partials: Tensor
    labels: Tensor
    split: int
    first: int
    width: int


class TritonState:
    """The state of M tokens as kernels/softmax_state.py holds it.

    A tile that is the whole call waits to be merged, for `finish` to do it in the same kernel, if `waits`: a number of
    labels decides, not of those that count, so that the capture of a CUDA graph compiles nothing.

    share_base (M,): what the shares of a frozen head's sum are relative to. bases, moved (K,): of exponentials that are
    saved relative to one number a row, it, and whether some are not.
    """

    def __init__(self, labels: Tensor, vocab_size: int, outputs: tuple[str, ...], waits: bool = True) -> None:
        self.labels, self.vocab_size, self.outputs, self.waits = labels, vocab_size, outputs, waits
        # The first tile of a row writes its state.
        self._tensor = torch.empty((len(SoftmaxState._fields), len(labels)), dtype=torch.float32, device=labels.device)
        self._waiting: Unmerged | None = None
        if vocab_size == 0:  # no tile will come
            self.tensor.zero_()
            self.part().maximum.fill_(-torch.inf)
            self.part().label_logit.fill_(torch.nan)
        self._share_base: Tensor | None = None
        self.bases = self.moved = self._tensor

    @property
    def tensor(self) -> Tensor:
        """(FIELDS, M) float32, with all that was accumulated."""
        if self._waiting is not None:
            self._merge(0, self._waiting)
            self._waiting = None
        return self._tensor

    def share_base(self, rows: slice) -> Tensor:
        if self._share_base is None:
            self._share_base = self._tensor.new_full((len(self.labels),), torch.finfo(torch.float32).min)
        return rows_of(self._share_base, rows)

    def finish(self) -> Finished:
        n, waiting = len(self.labels), self._waiting
        states = self._tensor
        names = ("log_probs", "maxima", "log_sums", "others", "label_logits")
        made = {name: states.new_empty(n) for name in names}
        stats = {
            name: states.new_empty(n, dtype=torch.bool if name == "is_top1" else torch.float32) for name in self.outputs
        }
        unwanted = made["log_probs"]  # is not written
        if n:
            launch.run(
                "finish", "finish_kernel", -(-n // BLOCK), 4,
                states=states, partials=states if waiting is None else waiting.partials, labels=self.labels, **made,
                entropies=stats.get("entropy", unwanted),
                log_sums_sq_probs=stats.get("log_sum_sq_probs", unwanted),
                mean_logits=stats.get("mean_logits", unwanted), are_top1=stats.get("is_top1", unwanted),
                n=n, V=self.vocab_size, splits=0 if waiting is None else len(waiting.partials),
                split=1 if waiting is None else waiting.split, MERGE=waiting is not None,
                OUTPUTS=launch.bits(self.outputs), BLOCK_M=BLOCK,
            )  # fmt: skip
        self._waiting = None
        log_probs, *others = made.values()
        return Finished(TokenStats(log_probs, **stats), *others)

    def merge(self, rows: slice, partials: Tensor, labels: Tensor, split: int, first: int, width: int) -> None:
        """Merges what is `Unmerged` of a tile into its rows' states."""
        found = Unmerged(partials, labels, split, first, width)
        if self.waits and width == self.vocab_size and len(labels) == len(self.labels):
            self._waiting = found
        else:
            self._merge(rows.start, found)

    def _merge(self, row: int, of: Unmerged) -> None:
        n, (partials, labels, split, first, width) = len(of.labels), of
        launch.run(
            "softmax_state", "merge_kernel", -(-n // BLOCK), 4,
            partials=partials, states=self._tensor, labels=labels, n=n, M=self._tensor.shape[1], row=row,
            splits=len(partials), split=split, first=first, width=width, OUTPUTS=launch.bits(self.outputs),
            BLOCK_M=BLOCK,
        )  # fmt: skip

    def part(self) -> SoftmaxState:
        return SoftmaxState(*self.tensor)

    def scale_to(self, maximum: Tensor) -> Tensor:
        return (finite(self.part().maximum) - finite(maximum)).exp_()
