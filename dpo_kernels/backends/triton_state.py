"""The softmax state of all tokens of a call, as the Triton kernels begin it, merge into it and finish it."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_kernels.kernels import launch
from dpo_kernels.layout import rows_of
from dpo_kernels.statistics import Finished, SoftmaxState, TokenStats, finite

BLOCK = 128  # rows of a program


class TritonState:
    """The state of M tokens as kernels/softmax_state.py holds it, (FIELDS, M) float32.

    share_base (M,): what the shares of a frozen head's sum are relative to.
    """

    def __init__(self, labels: Tensor, vocab_size: int, outputs: tuple[str, ...]) -> None:
        self.labels, self.vocab_size, self.outputs = labels, vocab_size, outputs
        # The first tile of a row writes its state.
        self.tensor = torch.empty((len(SoftmaxState._fields), len(labels)), dtype=torch.float32, device=labels.device)
        if vocab_size == 0:  # no tile will come
            self.tensor.zero_()
            self.part().maximum.fill_(-torch.inf)
            self.part().label_logit.fill_(torch.nan)
        self._share_base: Tensor | None = None

    def share_base(self, rows: slice) -> Tensor:
        if self._share_base is None:
            self._share_base = self.tensor.new_full((len(self.labels),), torch.finfo(torch.float32).min)
        return rows_of(self._share_base, rows)

    def finish(self) -> Finished:
        n = len(self.labels)
        names = ("log_probs", "maxima", "log_sums", "others", "label_logits")
        made = {name: self.tensor.new_empty(n) for name in names}
        stats = {
            name: self.tensor.new_empty(n, dtype=torch.bool if name == "is_top1" else torch.float32)
            for name in self.outputs
        }
        unwanted = made["log_probs"]  # is not written
        if n:
            launch.run(
                "finish", "finish_kernel", -(-n // BLOCK), 4,
                states=self.tensor, labels=self.labels, **made, entropies=stats.get("entropy", unwanted),
                log_sums_sq_probs=stats.get("log_sum_sq_probs", unwanted),
                mean_logits=stats.get("mean_logits", unwanted), are_top1=stats.get("is_top1", unwanted),
                n=n, V=self.vocab_size, OUTPUTS=launch.bits(self.outputs), BLOCK_M=BLOCK,
            )  # fmt: skip
        log_probs, *others = made.values()
        return Finished(TokenStats(log_probs, **stats), *others)

    def merge(self, rows: slice, partials: Tensor, labels: Tensor, split: int, first: int, width: int) -> None:
        """Merges what the programs of a tile left of its rows: (splits, FIELDS, n), of `split` vocabulary entries each,
        the tile's `width` from `first` on."""
        n = len(labels)
        launch.run(
            "softmax_state", "merge_kernel", -(-n // BLOCK), 4,
            partials=partials, states=self.tensor, labels=labels, n=n, M=self.tensor.shape[1], row=rows.start,
            splits=len(partials), split=split, first=first, width=width, OUTPUTS=launch.bits(self.outputs),
            BLOCK_M=BLOCK,
        )  # fmt: skip

    def part(self) -> SoftmaxState:
        return SoftmaxState(*self.tensor)

    def scale_to(self, maximum: Tensor) -> Tensor:
        return (finite(self.part().maximum) - finite(maximum)).exp_()
