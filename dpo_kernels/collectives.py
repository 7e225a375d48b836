"""What ranks that hold a vocabulary together exchange: statistics of rows, hidden states, sums of gradients.

Rank r has accumulated its own part of the vocabulary. Forward takes two all-reduces: one of maxima, one of the sums
relative to the maximum of all; then each rank joins the label from the same numbers, so results are the same to the
last bit. Backward takes one, of the hidden states' gradient, in the accumulation dtype.

All ranks of a group make the same calls in the same order. Where the host may look, a first message of a fixed size
says how many tokens count (`agree`): the others' sizes depend on it. A rank that fails before its maxima says so in
their place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels.call import Tokens
from dpo_kernels.layout import places
from dpo_kernels.statistics import Finished, SoftmaxState, empty_state, finish, merge_into
from dpo_kernels.vocab_shard import VocabShard, chunk

OTHER_FAILED = "another rank of this vocabulary failed in the same call; its error says why"
SAME_TOKENS = (
    "expected the same tokens on each. A weight that FSDP has split between ranks of different tokens has to be whole: "
    "use it within the model's forward"
)
# What a rank says beside its maxima.
FINE, AGAIN, FAILED = 0.0, 1.0, 2.0
GREETING = 7  # numbers of the first message, of 8 bytes
# Numbers below it are exact in float32, and so are sums of a few thousand.
CHECKSUMS = 2**12
DIGESTS = 1048573  # a prime
ALL_BITS = 2**64 - 1


class State(Protocol):
    """What a back end has accumulated; see `dpo_kernels.backends.base.State`."""

    def part(self) -> SoftmaxState: ...

    def scale_to(self, maximum: Tensor) -> Tensor: ...


class RunAgainError(Exception):
    """On some rank the numbers were out of reach of its kernels: all ranks compute with others."""


def agree(shard: VocabShard | None, labels: Tensor, find: Callable[[], Tokens]) -> Tokens:
    """The tokens that a rank finds, once all have found as many.

    On GPUs nothing is sent or looked at without DPO_KERNELS_VALIDATE=1, which then has to be set on every rank.

    Args:
        labels: of the whole vocabulary, before they are looked at.

    Raises:
        RuntimeError: another rank failed.
        ValueError: the ranks' labels differ in number.
    """
    if shard is None or not _can_look(labels):
        return find()
    try:
        found = find()
    except Exception:
        _greet(shard, labels, 0, FAILED)
        raise
    status, most, least, most_labels, least_labels, shape, other_shape = _greet(shard, labels, found.count, FINE)
    if status == FAILED:
        raise RuntimeError(OTHER_FAILED)
    if most != -least or most_labels != -least_labels or shape != -other_shape:
        raise ValueError(
            f"the ranks of this vocabulary have different labels: {labels.numel():,} on this one (rank {shard.rank} of "
            f"{shard.ranks}), of shape {tuple(labels.shape)}, {found.count:,} of which count, and {-least_labels:,} to "
            f"{most_labels:,} on all, {-least:,} to {most:,} of which count; {SAME_TOKENS}"
        )
    return found


def _greet(shard: VocabShard, labels: Tensor, count: int, status: float) -> list[int]:
    shape = 0
    for size in labels.shape:
        shape = (shape * 1_000_003 + size + 1) % 2**61
    numbers = [part for number in (count, labels.numel(), shape) for part in (number, -number)]
    said = labels.new_tensor([int(status), *numbers], dtype=torch.int64)
    assert len(said) == GREETING
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=shard.group)
    return [int(number) for number in said.tolist()]


class Exchange:
    """The exchange of one forward. labels (M,): relative to the rank's first row."""

    def __init__(self, shard: VocabShard, rows: int, labels: Tensor, outputs: tuple[str, ...], wide: torch.dtype):
        self.shard, self.rows, self.labels, self.outputs, self.wide = shard, rows, labels, outputs, wide
        self.met = False

    def finish(self, state: State, out_of_reach: Callable[[Tensor], bool]) -> Finished:
        """The state of this rank's part -> rows whose label has joined, over the whole vocabulary.

        out_of_reach: of the back end, whether numbers are beyond what its kernels hold. `Finished.others` is for sums
        that are relative to what this state's own are.

        Raises:
            RunAgainError: a rank's numbers are out of reach of its kernels; on all ranks.
            RuntimeError: another rank failed.
            ValueError: the ranks' parts are not the whole vocabulary once, or their labels differ. On GPUs all three
                are looked at with DPO_KERNELS_VALIDATE=1 alone; without it the last gives NaN.
        """
        labels, outputs, shard, own = self.labels, self.outputs, self.shard, state.part()
        here = (labels >= 0) & (labels < self.rows)
        label_logit = torch.where(here, own.label_logit, 0)
        again = out_of_reach(own.maximum) or out_of_reach(label_logit)
        maximum, alike = self._meet(own.maximum, AGAIN if again else FINE)

        merged = empty_state(len(labels), outputs, self.wide, labels.device)._replace(maximum=maximum)
        merge_into(merged, own, outputs)
        sums = {"total": torch.where(alike, merged.total, torch.nan), "label_logit": label_logit}
        if "entropy" in outputs:
            sums["shifted"] = merged.shifted
        if "log_sum_sq_probs" in outputs:
            sums["squares"] = merged.squares
        if "mean_logits" in outputs:
            sums["logits"] = merged.logits
        if "is_top1" in outputs:  # whether the largest of all stands here, before the label
            sums["argmax"] = ((own.maximum == maximum) & (own.argmax < labels)).to(self.wide)
        ends = maximum.new_tensor(_ends(shard.first_row, shard.first_row + self.rows))
        sent = torch.cat([*sums.values(), ends])
        dist.all_reduce(sent, group=shard.group)
        whole = dict(zip(sums, sent[: -len(ends)].view(len(sums), len(labels)), strict=True))
        whole["total"] = torch.where(self._parts_fit(sent[-len(ends) :]), whole["total"], torch.nan)
        # A row with NaN has no largest logit, as in one process, whatever the all-reduce made of it.
        whole["maximum"] = torch.where(whole["total"].isnan(), torch.nan, maximum)
        known = (labels >= -shard.first_row) & (labels < shard.vocab_size - shard.first_row)
        whole["label_logit"] = torch.where(known, whole["label_logit"], torch.nan)
        if "is_top1" in outputs:
            whole["argmax"] = torch.where(whole["argmax"] > 0, labels - 1, labels + 1)
        done = finish(merged._replace(**whole), labels, shard.vocab_size, outputs)
        return done._replace(others=done.others * state.scale_to(maximum))

    def fail(self) -> None:
        """Tells the other ranks, where they still wait, that this one has an error of its own."""
        if not self.met:
            self._send(torch.full_like(self.labels, -torch.inf, dtype=self.wide), FAILED)

    def _meet(self, maximum: Tensor, status: float) -> tuple[Tensor, Tensor]:
        """The largest of all ranks' maxima, and whether their labels are the same ones."""
        got = self._send(maximum, status)
        status_of_all, most, least = got[-3:]
        if _can_look(got) and status_of_all != FINE:
            if status_of_all == AGAIN:
                raise RunAgainError
            raise RuntimeError(OTHER_FAILED)
        alike = most == -least
        if _can_look(got) and not alike:
            raise ValueError(f"the ranks of this vocabulary have different labels; {SAME_TOKENS}")
        return got[:-3], alike

    def _send(self, maximum: Tensor, status: float) -> Tensor:
        self.met = True
        place = torch.arange(len(self.labels), device=maximum.device)
        tokens = self.labels + self.shard.first_row
        digest = ((tokens + 7919 * place) % DIGESTS).square().sum() % DIGESTS  # exact in float32
        said = torch.stack([torch.full_like(digest, int(status)), digest, -digest]).to(maximum.dtype)
        sent = torch.cat([maximum, said])
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self.shard.group)
        return sent

    def _parts_fit(self, ends: Tensor) -> Tensor:
        """Whether parts lie one behind the other from row 0 to row V: all ends but the last are starts."""
        fit = (ends == ends.new_tensor(_ends(0, self.shard.vocab_size))).all()
        if _can_look(ends) and not fit:
            shard, rows = self.shard, self.rows
            raise ValueError(
                f"the ranks' parts are not the whole vocabulary once: this one (rank {shard.rank} of {shard.ranks}) "
                f"has rows {shard.first_row} to {shard.first_row + rows} of {shard.vocab_size}; let "
                "VocabShard.of(rows, process_group) count them"
            )
        return fit


def sum_over_ranks(partial: Tensor, shard: VocabShard) -> Tensor:
    """In place."""
    dist.all_reduce(partial, group=shard.group)
    return partial


def gather_hidden(hidden: Tensor, shard: VocabShard, size: int) -> Tensor:
    """This rank's piece of the hidden states -> all of them, `size` long in the dimension that is split."""
    assert shard.hidden_dim is not None
    own, ranks = hidden.movedim(shard.hidden_dim, 0), shard.ranks
    step = -(-size // ranks)
    sent = own.contiguous() if len(own) == step else own.new_zeros((step, *own.shape[1:])).index_copy_(
        0, torch.arange(len(own), device=own.device), own
    )  # fmt: skip
    got = sent.new_empty((ranks * step, *own.shape[1:]))
    _single("all_gather")(got, sent, group=shard.group)
    return got[:size].movedim(0, shard.hidden_dim)


def scatter_hidden(partial: Tensor, index: Tensor | None, shape: torch.Size, shard: VocabShard) -> Tensor:
    """Sums the gradient of hidden states over ranks, and gives each its own piece of it.

    partial (M, D): of the rows that count. index (M,): their places in hidden states of `shape`; None: all count.
    """
    assert shard.hidden_dim is not None
    dim, ranks, size = shard.hidden_dim, shard.ranks, shape[shard.hidden_dim]
    step = -(-size // ranks)
    order = [dim, *(d for d in range(len(shape)) if d != dim)]
    sizes = (ranks * step, *(shape[d] for d in order[1:]))
    if index is None and sizes[0] == size and shape[:dim].numel() == 1:
        room = partial.view(sizes)  # the pieces lie one behind the other
    else:
        room = partial.new_zeros(sizes)
        rows = room[:size].movedim(0, dim)  # in the order of the labels
        if index is None:
            rows.copy_(partial.view(shape))
        else:
            rows[places(index, shape[:-1])] = partial
    own = partial.new_empty((step, *room.shape[1:]))
    _single("reduce_scatter")(own, room, group=shard.group)
    span = chunk(size, ranks, shard.rank)
    return own[: span.stop - span.start].movedim(0, dim)


def _can_look(tensor: Tensor) -> bool:
    """On a GPU the host would wait: there numbers that do not fit together give NaN, unless this is asked for."""
    return tensor.device.type == "cpu" or os.environ.get("DPO_KERNELS_VALIDATE") == "1"


def _single(name: str) -> Any:
    """all_gather and reduce_scatter of one tensor each, by the name that this torch gives them."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}
    return getattr(dist, f"{name}_single", None) or getattr(dist, older[name])


def _ends(first: int, end: int) -> list[int]:
    """Numbers of a part that sum to those of the whole where each part ends where another begins, and hardly ever
    elsewhere."""
    return [a - b for a, b in zip(_checksums(end), _checksums(first), strict=True)]


def _checksums(row: int) -> list[int]:
    """Two numbers below CHECKSUMS that look drawn at random (the mixing of splitmix64, Steele et al. 2014)."""
    mixed = (row + 1) * 0x9E3779B97F4A7C15 & ALL_BITS
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> shift) * factor & ALL_BITS
    mixed ^= mixed >> 31
    return [mixed % CHECKSUMS, mixed // CHECKSUMS % CHECKSUMS]
