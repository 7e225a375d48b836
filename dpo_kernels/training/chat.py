"""Where in a rendered conversation the assistant speaks: its text and its end-of-turn token, nothing else.

A conversation is rendered as text first; the assistant's spans are found in the text and carried over to tokens by
their offsets. So no token is ever counted in two halves, and merges across a boundary shift nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from dpo_kernels.training.chat_template import SENTINEL, Span, Template, as_content, has_parts
from dpo_kernels.training.messages import DataError, Message

ASSISTANT_TURNS = ("all", "last")

HERE, NEXT = SENTINEL.format("here"), SENTINEL.format("next")


class Rendered(NamedTuple):
    """A conversation as text.

    spans: where the assistant's words that count are, with their end-of-turn tokens. answer: of the last reply.
    """

    text: str
    spans: list[Span]
    answer: Span


def render(messages: Sequence[Message], template: Template, assistant_turns: str = "all", first: int = 0) -> Rendered:
    """The conversation as text, and where in it the assistant speaks.

    Args:
        messages: `chat_template.prepared`; the last one is the assistant's.
        assistant_turns: "all": each reply and its end-of-turn token. "last": of the replies from message `first` on,
            and behind the last one all that the template puts there, as TRL counts.

    Raises:
        DataError: a reply cannot be told apart from what the template puts around it; says which option helps.
    """
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = replies if assistant_turns == "all" else [i for i in replies if i >= first]
    if template.has_markers:
        text, marked = template.marked(messages)
        first_wanted, last = (len(template.marked(messages[:i])[1]) if i else 0 for i in (wanted[0], replies[-1]))
        if len(marked) < len(replies) or last >= len(marked):  # a reply may be marked in several pieces
            raise DataError(
                f"the chat template marks {len(marked)} replies with {{% generation %}}, the conversation has "
                f"{len(replies)}; mark every reply, or remove the markers to have the replies found in the text"
            )
        return Rendered(text, marked[first_wanted:], (marked[last][0], marked[-1][1]))
    text = template.text(messages)
    spans = [_span(text, messages, i, template, assistant_turns) for i in wanted]
    if assistant_turns == "last":
        spans[-1] = (spans[-1][0], len(text))
    return Rendered(text, spans, spans[-1])


def message_start(text: str, messages: Sequence[Message], i: int, template: Template) -> int | None:
    """Where what the template writes of message i begins, its header included; None where that cannot be told."""
    before = template.try_text(messages[:i]) if i else ""
    return len(before) if before is not None and text.startswith(before) else None


def content_start(text: str, messages: Sequence[Message], i: int, template: Template) -> int | None:
    """Where the content of message i begins; None where that cannot be told."""
    other = {"role": messages[i]["role"], "content": as_content(HERE, has_parts(messages))}
    for rest in (messages[i + 1 :], ()):
        marked = template.try_text([*messages[:i], other, *rest])
        start = -1 if marked is None else marked.find(HERE)
        if marked is not None and start >= 0 and text[:start] == marked[:start]:
            return start
    return None


def _span(text: str, messages: Sequence[Message], i: int, template: Template, assistant_turns: str) -> Span:
    span = _found(text, messages, i, template)
    if span is None:
        raise DataError(_cannot_tell(messages, i, template, assistant_turns))
    return span


def _found(text: str, messages: Sequence[Message], i: int, template: Template) -> Span | None:
    """Reply i lies between the conversation before it, with the prompt to generate, and the conversation through it.

    Where the template writes those otherwise than the whole (a prompt that opens thinking, thinking that is taken out
    of earlier turns, another end of the last turn), its beginning and its end are found by putting other texts in its
    place and in the next message's. None where that does not help either.
    """
    prompt, before = (template.try_text(messages[:i], add) for add in (True, False))
    if prompt is not None and prompt != before and text.startswith(prompt):
        start: int | None = len(prompt)
    else:
        start = content_start(text, messages, i, template)
    if start is None:
        return None
    through = text if i == len(messages) - 1 else template.try_text(messages[: i + 1])
    through = None if through is None else through.rstrip()  # white space after the end of a turn is the next turn's
    if through is not None and text.startswith(through) and start <= len(through):
        return start, len(through)
    end = _end(text, messages, i, template)
    return None if end is None or end < start else (start, end)


def _end(text: str, messages: Sequence[Message], i: int, template: Template) -> int | None:
    """Where reply i ends, with its end-of-turn token: as far before the next message's content as in a conversation in
    which both are other texts."""
    there = content_start(text, messages, i + 1, template)
    here, after = (as_content(mark, has_parts(messages)) for mark in (HERE, NEXT))
    both = [*messages[:i], {"role": "assistant", "content": here}, {**messages[i + 1], "content": after}]
    other = template.try_text([*both, *messages[i + 2 :]]) or template.try_text(both)
    if there is None or other is None or not 0 <= other.find(HERE) < other.find(NEXT):
        return None
    gap = other[other.find(HERE) + len(HERE) : other.find(NEXT)]
    if not text[:there].endswith(gap):
        return None
    blank = len(gap) - len(gap.lstrip())
    ending = next(iter(template.tokenizer.tokenize(gap[blank:])), "")
    if ending in template.tokenizer.get_added_vocab() and gap[blank + len(ending) :].strip():
        return there - len(gap) + blank + len(ending)
    return there - len(gap)  # the gap is the next message's header alone


def _cannot_tell(messages: Sequence[Message], i: int, template: Template, assistant_turns: str) -> str:
    """What is said of reply i, with the options that were tried and help."""

    def helps(turns: str, other: Template) -> bool:
        try:
            render(messages, other, turns, len(messages) - 1)
        except DataError:
            return False
        return True

    advice: list[tuple[str, Callable[[], bool]]] = []
    if assistant_turns != "last":
        advice.append(("count only the last reply (--assistant_turns last)", lambda: helps("last", template)))
    if template.reads("enable_thinking"):
        for value, what in ((False, "turn thinking off"), (True, "turn thinking on")):
            if template.kwargs.get("enable_thinking") is not value:
                other = replace(template, kwargs={**template.kwargs, "enable_thinking": value})
                option = f"{what} (--chat_template_kwargs '{{\"enable_thinking\": {str(value).lower()}}}')"
                advice.append((option, lambda other=other: helps(assistant_turns, other)))  # type: ignore[misc]
    sentences = [sentence for sentence, works in advice if works()]
    sentences += ["use a template that marks the replies with {% generation %} (--chat_template FILE)",
                  "leave such lines out (--on_bad_line skip)"]  # fmt: skip
    told = "; or ".join(sentences)
    content = str(messages[i].get("content") or messages[i].get("tool_calls"))
    return (
        f"the chat template writes message {i} (assistant: {content[:30]!r}{'...' if len(content) > 30 else ''}) in "
        f"the whole conversation otherwise than alone, and it cannot be told apart. {told[0].upper()}{told[1:]}"
    )


def rewrites(text: str, messages: Sequence[Message], template: Template) -> bool:
    """Whether the last message's content is not in the text as it is: thinking taken out of it, say."""
    content = messages[-1]["content"] or ""
    content = str(content[0]["text"] if isinstance(content, list) else content).strip()
    return content not in text[message_start(text, messages, len(messages) - 1, template) or 0 :]
