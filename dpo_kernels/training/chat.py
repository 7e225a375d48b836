"""Chat messages to token ids and a mask of what the assistant said: its text and its end-of-turn token, nothing else.

A template is rendered as text first and tokenized as a whole; the assistant's spans are found in the text and carried
over to tokens by their offsets. So no token is ever counted in two halves, and merges across a boundary shift nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

ASSISTANT_TURNS = ("all", "last")

SENTINEL = "\ufdd0reply\ufdd0"  # a noncharacter: no conversation holds it

Message = dict[str, Any]
Span = tuple[int, int]  # first character, one past the last


class TemplateError(ValueError):
    """The chat template cannot be trained on as asked; no other line of the file will fare better."""


class MessageError(ValueError):
    """These messages cannot be rendered; others may."""


@dataclass(frozen=True)
class Encoded:
    """input_ids and mask (1 where the assistant's token counts), equally long, cut after the last token that counts.

    truncated: whether max_length cut a token that counts.
    """

    input_ids: list[int]
    mask: list[int]
    truncated: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """What training needs of a tokenizer: a chat template, a pad token, offsets.

    Raises:
        ValueError: one of them is missing; says which and what to do.
    """
    name = f"the tokenizer {tokenizer.name_or_path!r}"
    if not isinstance(tokenizer.chat_template, str):
        found = "none" if tokenizer.chat_template is None else f"several: {sorted(tokenizer.chat_template)}"
        raise ValueError(
            f"{name} has no single chat template (found {found}); give one with --chat_template FILE, "
            "or set tokenizer.chat_template"
        )
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


def encode(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_turns: str = "all",
) -> Encoded:
    """Token ids of a conversation, cut to max_length on the right, and the mask of the assistant's replies.

    Args:
        messages: each with "role" and "content"; the last one is the assistant's.
        tokenizer: fast, with a chat template.
        max_length: of the whole, in tokens.
        assistant_turns: "all" counts every reply, "last" only the last one.

    Raises:
        TemplateError: the template rewrites earlier turns, so that a reply cannot be found where it was generated.
        MessageError: the template refuses these messages.
    """
    text, spans = render(messages, tokenizer, assistant_turns)
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(_counts(start, end, spans)) for start, end in batch["offset_mapping"]]
    truncated = any(mask[max_length:])
    mask = mask[:max_length]
    length = max((i + 1 for i, counts in enumerate(mask) if counts), default=0)
    return Encoded(batch["input_ids"][:length], mask[:length], truncated)


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, assistant_turns: str = "all"
) -> tuple[str, list[Span]]:
    """The conversation as text, and where in it the assistant speaks (with its end-of-turn token)."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if assistant_turns == "last":
        replies = replies[-1:]
    if has_generation_markers(tokenizer):
        text, marked = _render(messages, tokenizer, markers=True)
        if assistant_turns == "last":  # a reply may be marked in several pieces
            marked = marked[len(_render(messages[: replies[0]], tokenizer, markers=True)[1]) :]
        if len(marked) < len(replies):
            raise TemplateError(
                f"the chat template marks {len(marked)} replies with {{% generation %}}, the conversation has "
                f"{len(replies)}; mark every reply, or remove the markers to have the replies found in the text"
            )
        return text, marked
    text, _ = _render(messages, tokenizer)
    return text, [_span(text, messages, i, tokenizer) for i in replies]


def has_generation_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template says itself what the assistant generates, with {% generation %} ... {% endgeneration %}."""
    template = tokenizer.chat_template
    return isinstance(template, str) and "endgeneration" in template


def _span(text: str, messages: Sequence[Message], i: int, tokenizer: PreTrainedTokenizerBase) -> Span:
    """Reply i lies between the conversation before it, with the prompt to generate, and the conversation through it."""
    before, _ = _render(messages[:i], tokenizer, add_generation_prompt=True)
    through, _ = _render(messages[: i + 1], tokenizer)
    through = through.rstrip()  # white space after the end-of-turn token belongs to the next turn
    if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
        at = next((k for k, (a, b) in enumerate(_pairs(text, max(before, through, key=len))) if a != b), len(text))
        raise TemplateError(
            f"the chat template rewrites earlier turns: in the whole conversation, message {i} ({_short(messages[i])}) "
            f"and what leads to it are not what they were when it was generated; they part at ...{text[:at][-40:]!r}. "
            "Count only the last reply (--assistant_turns last), or use a template that marks the replies with "
            "{% generation %} (--chat_template FILE)"
        )
    start = len(before)
    if before == _render(messages[:i], tokenizer)[0]:  # no prompt to generate: a header may stand before the reply
        marked, _ = _render([*messages[:i], {**messages[i], "content": SENTINEL}], tokenizer)
        start = max(start, marked.find(SENTINEL, start))
    return start, len(through)


def _counts(start: int, end: int, spans: list[Span]) -> bool:
    """Whether a token at these characters lies in a span, wholly or in part. Tokenizers that trim offsets give a token
    of white space no width, at its end."""
    return any(max(start, a) < min(end, b) or (start == end and a < start <= b) for a, b in spans)


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    markers: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    try:
        options: dict[str, Any] = {**tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        result: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=markers,
            **options,
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        raise MessageError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from error
    (text,), spans = result
    return text, [(int(a), int(b)) for a, b in spans[0]] if markers else []


def _pairs(a: str, b: str) -> Iterator[tuple[str, str]]:
    return zip(a, b, strict=False)


def _short(message: Message) -> str:
    content = str(message["content"])
    return f"{message['role']}: {content[:30]!r}{'...' if len(content) > 30 else ''}"
