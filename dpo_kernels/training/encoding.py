"""A pair to token ids and masks that fit: tokenized, told where its answers begin, truncated so that they survive."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training import chat
from dpo_kernels.training.chat_template import Span, Template, check_template, prepared
from dpo_kernels.training.formats import SIDES, ChatPair, Pair, TextPair
from dpo_kernels.training.messages import DataError, Message

TRUNCATION_MODES = ("keep_answer", "keep_start", "drop")
# What becomes of a pair that truncation leaves nothing to learn from, or that never had it; DataReport counts them.
TOO_LONG, WITHOUT_REPLY, EQUAL_ANSWERS = "too_long", "without_reply", "equal_answers"


@dataclass(frozen=True)
class Encoded:
    """One side: input_ids and mask (1 where a token of the assistant counts), equally long.

    Positions in it: opening, behind the beginning-of-sequence token; keep, the tokens at its start (that one, and the
    system message) that keep_answer leaves alone; fork, where what the two sides do not share begins, with its header;
    header, where the last reply's header begins; answer, the last reply's first token.
    rewritten: whether the template has changed the last reply's words.
    """

    input_ids: list[int]
    mask: list[int]
    opening: int
    keep: int
    fork: int
    header: int
    answer: int
    rewritten: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def reply(self) -> list[int]:
        """The tokens of the last reply that count and are predicted: the first token of a sequence is not."""
        start = max(self.answer, 1)
        return [token for token, counts in zip(self.input_ids[start:], self.mask[start:], strict=True) if counts]

    @property
    def counted(self) -> list[int]:
        return [token for token, counts in zip(self.input_ids[1:], self.mask[1:], strict=True) if counts]


Both = tuple[Encoded, Encoded]


@dataclass(frozen=True)
class EncodedPair:
    """Both sides, cut to max_length and after the last token that counts.

    lengths: of prompt, chosen and rejected answer in tokens, before anything was cut. cut_prompt, cut_answer: whether
    truncation took something of them. rewritten: whether the template has changed an answer's words. dropped: why the
    pair is not used; empty if it is.
    """

    chosen: Encoded
    rejected: Encoded
    lengths: tuple[int, int, int]
    cut_prompt: bool
    cut_answer: bool
    rewritten: bool
    dropped: str


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """What training needs of a tokenizer: a pad token, offsets.

    Raises:
        ValueError: one of them is missing; says which and what to do.
    """
    name = f"the tokenizer {tokenizer.name_or_path!r}"
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{name} has no pad token; name one with --pad_token TOKEN (the end-of-sequence token "
            f"{tokenizer.eos_token!r} will do), or set tokenizer.pad_token"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name} is {type(tokenizer).__name__}, which gives no character offsets; load a fast tokenizer "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))"
        )


def prompts_differ(pair: Pair) -> bool:
    """Whether the sides of a pair answer different conversations."""
    return isinstance(pair, ChatPair) and pair.chosen[:-1] != pair.rejected[:-1]


def has_empty_reply(pair: Pair) -> bool:
    """Whether a last reply says nothing at all and calls no tool."""
    if isinstance(pair, TextPair):
        return not (pair.chosen.strip() and pair.rejected.strip())
    last = (pair.chosen[-1], pair.rejected[-1])
    return any(not (message["content"] or "").strip() and "tool_calls" not in message for message in last)


def encode(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_turns: str = "all",
    truncation_mode: str = "keep_answer",
) -> EncodedPair:
    """Token ids of both sides of a pair and the masks of what the assistant says.

    Args:
        tokenizer: fast; with a chat template if the pair is one of conversations.
        max_length: of each side, in tokens.
        assistant_turns: "all" counts every reply, "last" those behind the messages that both sides share (of strings
            there is one), as TRL does.
        truncation_mode: of sides longer than max_length. "keep_answer": the prompt's oldest tokens go first, whole
            turns where the template allows, but for the first system message; an answer that is too long by itself is
            cut at its end, beside the newest quarter of max_length of its prompt. "keep_start": the end goes, as in
            TRL. "drop": the pair is not used.

    Raises:
        DataError: a conversation cannot be rendered, or a reply not be told apart.
        ValueError: the tokenizer lacks a chat template, or an end-of-sequence token for strings.
    """
    if isinstance(pair, ChatPair):
        check_template(tokenizer)
        template = Template(tokenizer, pair.tools, pair.template_kwargs)
        chosen, rejected = (prepared(side, template) for side in (pair.chosen, pair.rejected))
        pair = replace(pair, chosen=chosen, rejected=rejected)
    whole = sides = _tokenized(pair, tokenizer, assistant_turns)
    too_long = max(map(len, sides)) > max_length
    if too_long and truncation_mode == "keep_answer":
        if isinstance(pair, ChatPair):
            sides = _without_old_turns(pair, sides, tokenizer, max_length, assistant_turns)
        sides = _without_old_tokens(sides, max_length)
    sides = (_cut(sides[0], max_length), _cut(sides[1], max_length))
    return EncodedPair(
        *sides, lengths=(whole[0].answer, len(whole[0]) - whole[0].answer, len(whole[1]) - whole[1].answer),
        cut_prompt=any(after.answer < before.answer for before, after in zip(whole, sides, strict=True)),
        cut_answer=any(len(after.reply) < len(before.reply) for before, after in zip(whole, sides, strict=True)),
        rewritten=any(side.rewritten for side in sides),
        dropped=TOO_LONG if too_long and truncation_mode == "drop" else _nothing_to_learn(whole, sides),
    )  # fmt: skip


def _nothing_to_learn(whole: Sequence[Encoded], sides: Sequence[Encoded]) -> str:
    if not all(side.reply for side in sides):
        return WITHOUT_REPLY
    (was, was_too), (chosen, rejected) = ([side.reply for side in pair] for pair in (whole, sides))
    became_equal = chosen == rejected and was != was_too
    return EQUAL_ANSWERS if became_equal or sides[0].counted == sides[1].counted else ""


def _tokenized(pair: Pair, tokenizer: PreTrainedTokenizerBase, assistant_turns: str) -> Both:
    """Both sides whole, up to the last token that counts."""
    if isinstance(pair, TextPair):
        sides = [_encode_text(pair.prompt, getattr(pair, side), tokenizer) for side in SIDES]
        same_prompt = True
    else:
        shared = _shared(pair)
        sides = [_encode_chat(getattr(pair, side), shared, pair, tokenizer, assistant_turns) for side in SIDES]
        same_prompt = not prompts_differ(pair)
    # Both answers begin at the same token, also where one of them alone merges with the end of the prompt, or alone
    # repeats what a prompt that opens thinking has begun.
    first = min(side.answer for side in sides)
    if same_prompt and sides[0].input_ids[:first] == sides[1].input_ids[:first]:
        sides = [replace(side, answer=first, mask=_set(side.mask, first, side.answer)) for side in sides]
    chosen, rejected = (_cut(side, len(side)) for side in sides)
    return chosen, rejected


def _encode_chat(
    messages: list[Message], shared: int, pair: ChatPair, tokenizer: PreTrainedTokenizerBase, assistant_turns: str
) -> Encoded:
    template = Template(tokenizer, pair.tools, pair.template_kwargs)
    text, spans, answer = chat.render(messages, template, assistant_turns, shared)
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(batch["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    counts = np.zeros(len(starts), dtype=bool)
    for span in spans:
        counts |= _touches(starts, ends, span)
    in_answer = _touches(starts, ends, answer)
    first = int(in_answer.argmax()) if in_answer.any() else len(starts)
    asked = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)

    def tokens_before(character: int | None) -> int:  # never more than up to the answer
        return first if character is None else min(int((ends <= character).sum()), first)

    ids = batch["input_ids"]
    opening = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    keep = chat.content_start(text, messages, asked, template) if asked < len(messages) - 1 else None
    return Encoded(
        ids, counts.astype(int).tolist(), opening,
        keep=opening if keep is None else max(opening, tokens_before(keep)),
        fork=tokens_before(chat.message_start(text, messages, shared, template)),
        header=tokens_before(chat.message_start(text, messages, len(messages) - 1, template)),
        answer=first,
        rewritten=chat.rewrites(text, messages, template),
    )  # fmt: skip


def _encode_text(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Prompt and answer as one text, with the end-of-sequence token once, whoever adds it."""
    end = tokenizer.eos_token
    if not isinstance(end, str):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, which ends an answer that is a "
            "plain string; set tokenizer.eos_token, or make messages of the strings with --string_format chat"
        )
    answer = answer.rstrip() if answer.rstrip().endswith(end) else answer + end
    text = prompt + answer
    rendered = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # what a template made of it
    batch = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not rendered)
    special = [sequence is None for sequence in batch.sequence_ids()]  # what the tokenizer adds around a text
    length = len(special) - next((i for i, added in enumerate(reversed(special)) if not added), len(special))
    starts, ends = np.array(batch["offset_mapping"][:length], dtype=np.int64).reshape(-1, 2).T
    mask = (_touches(starts, ends, (len(prompt), len(text))) & ~np.array(special[:length])).astype(int).tolist()
    first, opening = mask.index(1), max(special.index(False), int(rendered))
    return Encoded(batch["input_ids"][:length], mask, opening, opening, first, first, first)


def _touches(starts: np.ndarray, ends: np.ndarray, span: Span) -> np.ndarray:
    """Which tokens, at these characters, lie in a span, wholly or in part. Tokenizers that trim offsets give a token of
    white space no width, at its end."""
    a, b = span
    inside = np.maximum(starts, a) < np.minimum(ends, b)
    return inside | ((starts == ends) & (a < starts) & (starts <= b))


def _set(mask: list[int], start: int, stop: int) -> list[int]:
    return mask[:start] + [1] * (stop - start) + mask[stop:]


def _shared(pair: ChatPair) -> int:
    """How many messages both sides begin with; the last one of a side is its answer."""
    most = min(len(pair.chosen), len(pair.rejected)) - 1
    same = zip(pair.chosen[:most], pair.rejected[:most], strict=True)
    return next((i for i, (a, b) in enumerate(same) if a != b), most)


def _without_old_turns(
    pair: ChatPair, sides: Both, tokenizer: PreTrainedTokenizerBase, max_length: int, assistant_turns: str
) -> Both:
    """The pair without as few of its oldest turns as make it fit, or with its last turn alone if none do.

    A turn begins with a message of the user. Where the template refuses what is left, nothing goes.
    """
    shared = pair.chosen[: _shared(pair)]
    system = next((i for i, message in enumerate(shared) if message["role"] not in ("system", "developer")), 0)
    starts = [i for i, message in enumerate(shared) if message["role"] == "user" and i > system]

    def without(start: int) -> Both:
        chosen, rejected = (side[:system] + side[start:] for side in (pair.chosen, pair.rejected))
        return _tokenized(replace(pair, chosen=chosen, rejected=rejected), tokenizer, assistant_turns)

    def fits(start: int) -> bool:
        return max(map(len, without(start))) <= max_length

    try:
        at = bisect_left(starts, True, key=fits)
        return without(starts[min(at, len(starts) - 1)]) if starts else sides
    except DataError:
        return sides


def _without_old_tokens(sides: Both, max_length: int) -> Both:
    """Takes oldest tokens: of the prompt that both share, as many from each; then, of each side by itself, from what
    lies between that and its last reply."""
    keep, fork = min(side.keep for side in sides), min(side.fork for side in sides)
    if keep > max_length // 2:  # a system message that would leave no room goes as the rest does
        keep = min(side.opening for side in sides)
    both = _shortened(sides, keep, fork, max_length)
    chosen, rejected = (_shortened([side], max(side.fork, side.opening), side.header, max_length)[0] for side in both)
    return chosen, rejected


def _shortened(sides: Sequence[Encoded], start: int, end: int, max_length: int) -> list[Encoded]:
    """The sides without as many of the tokens in [start, end), the oldest first, as make them fit; where all of them
    would not be enough, the newest quarter of max_length stays."""
    longest, room = max(map(len, sides)), end - start
    is_last = all(side.header <= end for side in sides)  # nothing else can go
    spared = max_length // 4 if is_last and longest - room > max_length else 0
    if start == 0 and any(side.answer == end for side in sides):
        spared = max(spared, 1)  # something has to predict the answer's first token
    count = max(0, min(longest - max_length, room - spared))
    return [_remove(side, start, count) for side in sides]


def _remove(side: Encoded, start: int, count: int) -> Encoded:
    def moved(position: int) -> int:
        return position - max(0, min(position, start + count) - start)

    def rest(values: list[Any]) -> list[Any]:
        return values[:start] + values[start + count :]

    return replace(
        side, input_ids=rest(side.input_ids), mask=rest(side.mask), opening=moved(side.opening), keep=moved(side.keep),
        fork=moved(side.fork), header=moved(side.header), answer=moved(side.answer),
    )  # fmt: skip


def _cut(side: Encoded, max_length: int) -> Encoded:
    """At most max_length tokens, and nothing after the last one that counts."""
    mask = side.mask[:max_length]
    length = len(mask) - mask[::-1].index(1) if 1 in mask else 0
    return replace(side, input_ids=side.input_ids[:length], mask=mask[:length])
