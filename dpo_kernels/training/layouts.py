"""Layouts: how the answers of a batch lie in rows of tokens, and where each answer's log-probs come back.

    padded    an answer a row, all rows of one length
    bucketed  an answer a row, in groups of rows of like length; right for every causal model
    packed    the answers one behind the other
    shared    of every pair the prompt once, then the chosen answer, then the rejected one

What a token may attend to, `attention.py` tells the model. One that cannot be told is given the answers of `shared` one
after the other, each to go on from the cache of its prompt (`caches.py`). A prompt is what both sequences of a pair
begin with; its last hidden state predicts the first token of both answers, so hidden states are taken by their place,
some twice. What both sequences predict within the prompt is predicted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_kernels.training.attention import Spans, Tree

GROUP_COSTS = 64  # tokens: a group of its own has to save more


@dataclass(frozen=True)
class Layout:
    """name: as above. attention: how it is told in packed and shared, "branches" or "mask"; in shared also "cache": not
    at all, since answers go on from one. gives_mask: whether the model is given an attention mask: of the real tokens,
    each as often as it stands in a sequence. answers_at_once: a batch goes in parts of at most so many answers, each
    part in the layout, whole pairs in packed and shared; None: it goes whole."""

    name: str = "padded"
    attention: str | None = None
    gives_mask: bool = False
    answers_at_once: int | None = None

    @property
    def told(self) -> str:
        """In a few words."""
        way = {"mask": " with a mask", "cache": " through a cache"}.get(self.attention or "", "")
        parts = f", in parts of at most {self.answers_at_once:,} answers" if self.answers_at_once is not None else ""
        return f"{self.name}{way}{parts}"

    @property
    def has_whole_pairs(self) -> bool:
        """Whether both answers of a pair are given to a model together."""
        return self.name in ("packed", "shared")

    @property
    def goes_in_groups(self) -> bool:
        """Whether a batch is several forwards of the model, as many as its pairs ask for."""
        return self.name == "bucketed" or self.attention == "cache"

    @property
    def adds_up(self) -> bool:
        """Whether a batch has as many tokens as its pairs have alone."""
        return self.attention in ("branches", "cache")

    @property
    def whole(self) -> Layout:
        """The same layout of a batch that goes whole."""
        return replace(self, answers_at_once=None)


PADDED = Layout()


class Sequences(NamedTuple):
    """2B sequences, prompt and answer each; the first half is chosen, the second rejected."""

    ids: Tensor  # (2B, S)
    labels: Tensor  # (2B, S)
    counted: Tensor  # (2B, S) bool: whose label counts
    inside: Tensor  # (2B, S) bool: a sequence up to its last token that counts

    @property
    def counts(self) -> list[int]:
        """How many tokens a sequence has, at least 1: a row has to have one."""
        return [max(1, n) for n in self.inside.sum(1).tolist()]


class PairTokens(NamedTuple):
    """How long a pair is: the prompt, and what each sequence has behind it up to its last token that counts."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def sequences(self) -> tuple[int, int]:
        return self.prompt + self.chosen, self.prompt + self.rejected


class Arranged(NamedTuple):
    """given: to a fused model. answers: where its log-probs belong in 2B x S; None: they lie so already. tokens: how
    many the model runs, padding too. sources: for each of the answers, which of the log-probs it is; None: in order."""

    given: dict[str, Any]
    answers: Tensor | None
    tokens: int
    sources: Tensor | None = None


class Part(NamedTuple):
    """Answers that a model is given together. rows: which of the 2B they are. arranged: they alone."""

    rows: list[int]
    arranged: Arranged


def arrange(layout: Layout, sequences: Sequences) -> list[Part]:
    """The parts of a batch, in the order in which they are run; one, the whole, where the layout asks for no parts."""
    if layout.answers_at_once is None:
        return [Part([*range(len(sequences.ids))], _arranged(layout, sequences))]
    return [
        Part(rows, _arranged(layout, Sequences(*(t[rows] for t in sequences))))
        for rows in parts(layout, sequences.counts)
    ]


def _arranged(layout: Layout, sequences: Sequences) -> Arranged:
    made = {"padded": _padded, "bucketed": _bucketed, "packed": _in_rows, "shared": _in_rows}[layout.name]
    return (_through_caches if layout.attention == "cache" else made)(layout, sequences)


def parts(layout: Layout, counts: Sequence[int]) -> list[list[int]]:
    """Which of the 2B answers go together, by how long each is. The last part has as many as may be, and in bucketed
    the longest."""
    answers = len(counts)
    at_once = layout.answers_at_once or answers
    if at_once >= answers:
        return [[*range(answers)]]
    if layout.has_whole_pairs:
        pairs = answers // 2
        return [[*part, *(pairs + i for i in part)] for part in _chunks(range(pairs), at_once // 2)]
    in_order = sorted(range(answers), key=lambda i: (counts[i], i)) if layout.name == "bucketed" else range(answers)
    return _chunks(in_order, at_once)


def _chunks(order: Sequence[int], size: int) -> list[list[int]]:
    """Of so many each, but the first, which has what is left."""
    return [[*order[max(0, end - size) : end]] for end in range(len(order), 0, -size)][::-1]


def _padded(layout: Layout, s: Sequences) -> Arranged:
    given: dict[str, Any] = {"input_ids": s.ids, "labels": s.labels}
    if layout.gives_mask:
        given["attention_mask"] = s.inside.long()
    return Arranged(given, None, s.ids.numel())


def _bucketed(layout: Layout, s: Sequences) -> Arranged:
    counts = s.counts
    where = torch.zeros_like(s.ids)  # of each token of a sequence, among the places of all groups
    groups, at = [], 0
    for members in buckets(counts):
        length = max(counts[i] for i in members)
        group = {"input_ids": s.ids[members, :length]}
        if layout.gives_mask:
            group["attention_mask"] = s.inside[members, :length].long()
        groups.append(group)
        tokens = len(members) * length
        where[members, :length] = torch.arange(at, at + tokens, device=where.device).view(len(members), length)
        at += tokens
    return _in_groups(groups, _predictions(s, where))


def buckets(counts: Sequence[int], group_costs: int = GROUP_COSTS) -> list[list[int]]:
    """Sequences in groups, so that the padded tokens, and so many more a group, are fewest."""
    order = sorted(range(len(counts)), key=lambda i: (counts[i], i))
    best, begins = [0], [0]  # of the first n in order: the least, and where the last group of it begins
    for end in range(1, len(order) + 1):
        length = counts[order[end - 1]]
        least, begin = min((best[begin] + (end - begin) * length + group_costs, begin) for begin in range(end))
        best.append(least)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def _in_rows(layout: Layout, s: Sequences) -> Arranged:
    """Packed and shared: trees of tokens, in one row where attention walks through trees, else in rows as needed."""
    answers, width = s.ids.shape
    pairs, device = answers // 2, s.ids.device
    counts = s.inside.sum(1).tolist()
    prompts = _prompts(s) if layout.name == "shared" else [0] * pairs
    trees = []  # each a list of (sequence, first token, tokens)
    for i, p in enumerate(prompts):
        if layout.name == "shared":
            trees.append([(i, 0, p), (i, p, counts[i] - p), (pairs + i, p, counts[pairs + i] - p)])
        else:
            trees += [[(i, 0, counts[i])], [(pairs + i, 0, counts[pairs + i])]]
    trees = [tree for tree in trees if _tokens(tree)] or [[(0, 0, 1)]]
    sizes = [_tokens(tree) for tree in trees]
    rows = fill(sizes, sum(sizes) if layout.attention == "branches" else max(sizes))
    length = max(sum(sizes[i] for i in row) for row in rows)

    source = torch.zeros(len(rows), length, dtype=torch.long)  # of each place, in 2B x S
    weights = torch.zeros(len(rows), length, dtype=torch.long)
    where = torch.zeros(answers, width, dtype=torch.long)  # of each token of a sequence, in R x L
    spans = []
    for r, row in enumerate(rows):
        at, found = 0, []
        for tree in (trees[i] for i in row):
            found.append(Tree(at, tree[0][2], tuple(tokens for _, _, tokens in tree[1:])))
            for sequence, first, tokens in tree:
                source[r, at : at + tokens] = torch.arange(tokens) + sequence * width + first
                weights[r, at : at + tokens] = 1
                where[sequence, first : first + tokens] = torch.arange(tokens) + r * length + at
                at += tokens
            if len(tree) > 1:  # the prompt is the rejected answer's too
                i, _, p = tree[0]
                where[pairs + i, :p] = where[i, :p]
                weights[r, found[-1].start : found[-1].start + p] = 2
        spans.append(tuple(found))
    source, where, weights = (t.to(device) for t in (source, where, weights))
    predicted = _predictions(s, where, prompts)
    given = {
        "input_ids": s.ids.flatten()[source], "position_ids": torch.where(weights > 0, source % width, 0),
        "labels": predicted.labels[None], "places": predicted.places,
        "spans": Spans(tuple(spans), length), "use_cache": False,
    }  # fmt: skip
    if layout.gives_mask:
        given["attention_mask"] = weights
    return Arranged(given, predicted.answers, source.numel(), predicted.sources)


def _through_caches(layout: Layout, s: Sequences) -> Arranged:
    """Shared: of every pair the prompt as a row of its own, then each answer, which goes on from the prompt's cache."""
    pairs, counts, prompts = len(s.ids) // 2, s.counts, _prompts(s)
    where = torch.zeros_like(s.ids)
    groups, at = [], 0

    def row(sequence: int, first: int, end: int) -> dict[str, Any]:
        nonlocal at
        where[sequence, first:end] = torch.arange(at, at + end - first, device=where.device)
        at += end - first
        return {"input_ids": s.ids[sequence : sequence + 1, first:end]}

    for i, p in enumerate(prompts):
        if p == 0:
            groups += [row(side, 0, counts[side]) for side in (i, pairs + i)]
            continue
        group: dict[str, Any] = row(i, 0, p)
        where[pairs + i, :p] = where[i, :p]
        # Of the prompt too, as generation gives it: some models do not know without it where an answer stands.
        group["continued"] = [
            row(side, p, counts[side]) | {"attention_mask": s.ids.new_ones(1, counts[side])}
            for side in (i, pairs + i) if counts[side] > p
        ]  # fmt: skip
        groups.append(group)
    return _in_groups(groups, _predictions(s, where, prompts))


def _prompts(s: Sequences) -> list[int]:
    """Of each pair the tokens that both sequences begin with."""
    pairs = len(s.ids) // 2
    same = (s.ids[:pairs] == s.ids[pairs:]) & s.inside[:pairs] & s.inside[pairs:]
    return same.long().cumprod(1).sum(1).tolist()


class Predictions(NamedTuple):
    """labels (N,), and the places of the hidden states that predict them. answers, sources: as of `Arranged`."""

    labels: Tensor
    places: Tensor
    answers: Tensor
    sources: Tensor


def _predictions(s: Sequences, where: Tensor, prompts: Sequence[int] = ()) -> Predictions:
    """
    Args:
        where: (2B, S), of each token of a sequence its place among those that a model is given.
        prompts: what counts within them, as earlier replies do, counts in both sequences, and is one prediction.
    """
    answers, width = s.ids.shape
    device = s.ids.device
    counted = s.counted.flatten().nonzero().squeeze(1)
    if not len(counted):  # the head has to be run all the same; its label does not count
        counted = counted.new_zeros(1)
    own = torch.arange(answers * width, device=device).view(answers, width)
    if prompts:
        pairs = answers // 2
        inside = torch.arange(width) + 1 < torch.tensor(prompts)[:, None]
        twice = s.counted[:pairs] & s.counted[pairs:] & inside.to(device)
        own[pairs:] = torch.where(twice, own[:pairs], own[pairs:])
    predicted, sources = own.flatten()[counted].unique(return_inverse=True)
    return Predictions(s.labels.flatten()[predicted], where.flatten()[predicted], counted, sources)


def _in_groups(groups: list[dict[str, Any]], of: Predictions) -> Arranged:
    """Groups of rows that a model is given one after the other, each with the places of its own that predict something;
    the labels are in that order."""
    calls = [call for group in groups for call in (group, *group.get("continued", ()))]
    order = of.places.argsort(stable=True)
    places, begins = of.places[order], [0]
    for call in calls:
        begins.append(begins[-1] + call["input_ids"].numel())
    cuts = torch.searchsorted(places, torch.tensor(begins, device=places.device)).tolist()
    for call, begin, (first, end) in zip(calls, begins[:-1], pairwise(cuts), strict=True):
        call["places"] = places[first:end] - begin
    given = {"groups": groups, "labels": of.labels[order][None]}
    return Arranged(given, of.answers, begins[-1], order.argsort()[of.sources])


def _tokens(tree: list[tuple[int, int, int]]) -> int:
    return sum(tokens for _, _, tokens in tree)


def fill(sizes: Sequence[int], capacity: int, tokens: Callable[[list[int]], int] | None = None) -> list[list[int]]:
    """Rows of at most so many tokens: first-fit decreasing; within a row, and among rows, in the order given.

    Args:
        tokens: what a row takes, in that order, where that can be more than the sum of its sizes.
    """
    rows: list[list[int]] = []
    room = np.empty(len(sizes), dtype=np.int64)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = (r for r in np.flatnonzero(room[: len(rows)] >= sizes[i]).tolist()
                if tokens is None or tokens(sorted([*rows[r], i])) <= capacity)  # fmt: skip
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(i)
        room[row] = room[row] - sizes[i] if tokens is None else capacity - tokens(sorted(rows[row]))
    return sorted(sorted(row) for row in rows)


def most_tokens(layout: Layout, pairs: Sequence[PairTokens]) -> int:
    """How many tokens a model runs for a batch of these pairs, in all its parts, padding too; in bucketed at most so
    many."""
    counts = [max(1, pair.sequences[side]) for side in (0, 1) for pair in pairs]
    if layout.name == "padded":
        return len(counts) * max(counts)
    found = parts(layout, counts)
    if layout.name == "bucketed":
        return sum(_most_in_groups([counts[i] for i in part]) for part in found)
    return sum(_most_in_trees(layout, [pairs[i] for i in part[: len(part) // 2]]) for part in found)


def _most_in_groups(counts: Sequence[int]) -> int:
    """As many groups as there are lengths, in steps of what a group costs."""
    steps = [-(-count // GROUP_COSTS) for count in counts]
    return GROUP_COSTS * (sum(steps) + len(set(steps)) - 1)


def _most_in_trees(layout: Layout, pairs: Sequence[PairTokens]) -> int:
    if layout.attention == "cache":
        return sum(sum(pair) if pair.prompt else max(1, pair.chosen) + max(1, pair.rejected) for pair in pairs)
    of_trees = ([sum(pair)] if layout.name == "shared" else pair.sequences for pair in pairs)
    sizes = [size for sizes in of_trees for size in sizes if size] or [1]
    return sum(sizes) if layout.adds_up else max(sizes) * len(fill(sizes, max(sizes)))
