"""A batch of pairs: which answers are a pair, and which tokens belong to which answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.losses import Sides
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.gradient_cache import run_in_parts
from dpo_kernels.training.layouts import PADDED, Layout, PairTokens, Part, Sequences, arrange

Surrounding = Callable[[], AbstractContextManager[Any]]

IGNORE_INDEX = -100
PER_TOKEN = {"log_probs", "log_sum_sq_probs", "dropped_mass"}  # of what a fused model gives
PADDING = {"y_": IGNORE_INDEX}  # what tensors of a name are padded with, others with 0: it counts nowhere
UNCOUNTED = "uncounted"  # in a batch: its pair is there for a process that has nothing left to do


@dataclass(frozen=True)
class PairCollator:
    """Stacks items and cuts what no sequence of the batch needs: everything after the last token that counts.

    multiple_of: sequences are padded to a multiple of it, beyond the items' own length too. None: to the longest.
    """

    multiple_of: int | None = None

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        counted = batch["mask_chosen"] | batch["mask_rejected"]
        length = int(counted.any(0).nonzero().max()) + 1 if counted.any() else 1
        if self.multiple_of is not None:
            length = -(-length // self.multiple_of) * self.multiple_of
        return {name: _of_length(tensor, length, PADDING.get(name[:2], 0)) for name, tensor in batch.items()}


@dataclass(frozen=True)
class PairBatch:
    """2B answers, each behind its prompt: first the B chosen ones, then the rejected ones in the same order.

    Nothing else knows how pairs lie in the tensors. How their tokens lie in what a model is given, the layout knows;
    log-probs come back as (2B, S) from all of them.

    inputs: what `PairCollator` makes, (B, S) each: x, y and mask, and ref where the dataset has it, of both SIDES.
    """

    inputs: Mapping[str, Tensor]
    layout: Layout = PADDED

    def lying(self, layout: Layout) -> PairBatch:
        """The same pairs in another layout."""
        return self if layout == self.layout else replace(self, layout=layout)

    @property
    def pairs(self) -> int:
        """How many pairs count: 0 where the only one is there to keep step with other processes."""
        return 0 if UNCOUNTED in self.inputs else len(self.inputs["x_chosen"])

    @property
    def positions(self) -> int:
        """How many tokens a model is given, padding too."""
        return sum(part.arranged.tokens for part in self._parts)

    @property
    def chosen_tokens(self) -> int:
        """How many tokens of the chosen answers count."""
        return int(self.inputs["mask_chosen"].count_nonzero())

    @cached_property
    def mask(self) -> Tensor:
        """(2B, S) bool: which tokens count."""
        return self._of_both("mask")

    @cached_property
    def ref_log_probs(self) -> Tensor | None:
        """(2B, S): the reference's log-probs that the dataset holds; None where it holds none."""
        return self._of_both("ref") if "ref_chosen" in self.inputs else None

    @cached_property
    def segments(self) -> Tensor:
        """(2B, S) int64: the number of the answer, 0 to 2B - 1, that a token belongs to with its prompt, or -1.

        A token behind the last one that counts, padding or not, belongs to none: it changes nothing before it.
        """
        inside = self.mask.flip(1).long().cummax(1).values.flip(1).bool()
        answers = torch.arange(len(inside), device=inside.device)[:, None]
        return torch.where(inside, answers, -1)

    @property
    def attention_mask(self) -> Tensor:
        """(2B, S) int64: 1 for a token of an answer, 0 for one of none."""
        return (self.segments >= 0).long()

    def model_inputs(self) -> list[dict[str, Any]]:
        """What a fused model is called with, for each part of the batch; one, where the layout asks for no parts."""
        return [dict(part.arranged.given) for part in self._parts]

    def run(self, model: Any, around: Surrounding = nullcontext, **options: Any) -> dict[str, Tensor]:
        """What a fused model gives, per token (2B, S): log_probs of the labels, 0 where none counts, and what else.

        Where the layout asks for parts, gradients come as `gradient_cache.run_in_parts` says.

        Args:
            around: gives a context for each forward, such as one that moves what autograd saves.
            options: for the model.
        """

        def forward(**given: Any) -> Any:
            with around():
                return model(**given)

        if self.layout.answers_at_once is None:
            return self._run(self._parts[0], forward, options)
        forwards = [partial(self._per_token, part, forward, options) for part in self._parts]
        return run_in_parts(model, forwards, [part.rows for part in self._parts])

    def _per_token(self, part: Part, model: Callable[..., Any], options: dict[str, Any]) -> dict[str, Tensor]:
        output = self._run(part, model, options)
        return {name: output[name] for name in PER_TOKEN & output.keys()}

    def _run(self, part: Part, model: Callable[..., Any], options: dict[str, Any]) -> dict[str, Tensor]:
        arranged, shape = part.arranged, (len(part.rows), self.mask.shape[1])
        output = dict(model(**arranged.given | {"use_cache": False} | options))
        if arranged.answers is not None:
            for name in PER_TOKEN & output.keys():
                values = output[name].flatten()
                values = values if arranged.sources is None else values[arranged.sources]
                zeros = values.new_zeros(shape).flatten()
                output[name] = zeros.index_put((arranged.answers,), values).view(shape)
        return output

    @cached_property
    def _parts(self) -> list[Part]:
        both = Sequences(self._of_both("x"), self._of_both("y"), self.mask, self.segments >= 0)
        return arrange(self.layout, both)

    def sides(self, values: Tensor) -> Sides:
        """Values of all answers, (2B, ...), as those of the chosen and of the rejected ones."""
        return Sides.of(values)

    def _of_both(self, name: str) -> Tensor:
        return torch.cat([self.inputs[f"{name}_{side}"] for side in SIDES])


def _of_length(tensor: Tensor, length: int, fill: int) -> Tensor:
    more = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, more), value=fill) if more > 0 else tensor[:, :length].contiguous()


def pair_tokens(item: Mapping[str, Tensor]) -> PairTokens:
    """How long a pair of a dataset is, each tensor (S,)."""
    lengths = [int(item[f"mask_{side}"].nonzero().max()) + 1 if item[f"mask_{side}"].any() else 0 for side in SIDES]
    both = min(lengths)
    same = item["x_chosen"][:both] == item["x_rejected"][:both]
    prompt = both if same.all() else int(same.long().argmin())
    return PairTokens(prompt, *(length - prompt for length in lengths))


def keep_pairs(inputs: dict[str, Tensor], count: int) -> None:
    """Leaves the first so many pairs in the batch, in place. Of none, one stays to be computed, and counts nowhere."""
    for name, tensor in inputs.items():
        inputs[name] = tensor[: max(count, 1)]
    if count == 0:
        for side in SIDES:
            inputs[f"mask_{side}"] = torch.zeros_like(inputs[f"mask_{side}"])
            inputs[f"y_{side}"] = torch.full_like(inputs[f"y_{side}"], IGNORE_INDEX)
        inputs[UNCOUNTED] = torch.ones(1)
