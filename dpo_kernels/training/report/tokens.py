"""Answers as tokens with their rewards, for the page: text that can be read, a colour, and figures to point at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training.answers import last_question, last_reply
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.scoring import ScoredAnswer, ScoredPair

MOST_TOKENS = 400  # of an answer that are shown
CONTEXT = 6  # tokens before a token that are decoded with it: what it looks like may depend on them
BROKEN = "\ufffd"  # the end of a text whose last character lacks bytes


@dataclass(frozen=True)
class ShownToken:
    """text: of one token, or of several that are one character together. way: "up" or "down". depth: of the colour,
    in [0, 1]. hover: its figures."""

    text: str
    way: str
    depth: float
    hover: str


@dataclass(frozen=True)
class ShownAnswer:
    name: str
    reward: str
    tokens: list[ShownToken]
    left_out: int


@dataclass(frozen=True)
class ShownPair:
    prompt: str
    sides: list[ShownAnswer]


def full_colour(pairs: Sequence[ScoredPair], beta: float) -> float:
    """The reward of a token from which on colours are full: nine of ten tokens are below it."""
    found = [
        abs(reward)
        for pair in pairs for side in (pair.chosen, pair.rejected)
        for reward, counts in zip(side.rewards(beta) or [], side.counted, strict=False) if counts
    ]  # fmt: skip
    return max(float(np.quantile(found, 0.9)), 1e-9) if found else 1.0


def reward_told(pairs: Sequence[ScoredPair], aggregate: str) -> str:
    """How the reward that stands beside an answer comes from those of its tokens.

    Args:
        aggregate: "sum" or "mean", as `DPOConfig.dpo_aggregate`.
    """
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    earlier = any(any(side.counted[: last_reply(side.counted)]) for side in sides)
    more = ", those of earlier replies too, which are not shown" if earlier else ""
    return f"An answer's reward is the {aggregate} of its tokens'{more}."


def shown_pair(
    pair: ScoredPair, tokenizer: PreTrainedTokenizerBase, beta: float, full: float, aggregate: str = "sum"
) -> ShownPair:
    """A pair whose reference is known; aggregate as in `reward_told`."""
    answers = (pair.chosen, pair.rejected)
    first = last_reply(pair.chosen.counted)
    sides = [
        _shown_answer(name, side, tokenizer, beta, full, aggregate) for name, side in zip(SIDES, answers, strict=True)
    ]
    return ShownPair(last_question(tokenizer, pair.chosen.ids[:first]), sides)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], first: int) -> list[tuple[int, int, str]]:
    """The text of the tokens from `first` on, as (start, end, text): a token each, or as many as a character takes."""
    found, start = [], first
    for end in range(first + 1, len(ids) + 1):
        context = list(ids[max(0, start - CONTEXT) : start])
        before = str(tokenizer.decode(context, skip_special_tokens=False))
        text = str(tokenizer.decode([*context, *ids[start:end]], skip_special_tokens=False))
        if text.endswith(BROKEN) and end < len(ids) and end - start < 8:
            continue
        own = text[len(before) :] if text.startswith(before) else tokenizer.decode(list(ids[start:end]))
        found.append((start, end, str(own)))
        start = end
    return found


def _shown_answer(
    name: str, side: ScoredAnswer, tokenizer: PreTrainedTokenizerBase, beta: float, full: float, aggregate: str
) -> ShownAnswer:
    rewards, first = side.rewards(beta), last_reply(side.counted)
    assert rewards is not None
    assert side.ref_log_probs is not None
    last = min(len(side.ids), first + MOST_TOKENS)
    tokens = []
    for start, end, text in pieces(tokenizer, side.ids[:last], first):
        reward, own, ref = (sum(values[start:end]) for values in (rewards, side.log_probs, side.ref_log_probs))
        several = f" ({end - start} tokens)" if end - start > 1 else ""
        hover = f"{text!r}{several}: reward {reward:+.4f}; log π {own:.3f}, log π_ref {ref:.3f}"
        depth = round(min(1.0, abs(reward) / full), 3)
        tokens.append(ShownToken(text, "up" if reward >= 0 else "down", depth, hover))
    total = sum(rewards) / (max(1, sum(side.counted)) if aggregate == "mean" else 1)
    return ShownAnswer(name, f"{total:+.3f}", tokens, len(side.ids) - last)
