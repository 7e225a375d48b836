"""Conversations to text by a chat template, and where in the text the assistant speaks.

A conversation is rendered as text first; the assistant's spans are found in the text and carried over to tokens by
their offsets. So no token is ever counted in two halves, and merges across a boundary shift nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_kernels.training.messages import STANDARD_ROLES, DataError, Message

ASSISTANT_TURNS = ("all", "last")

SENTINEL = "\ufdd0reply\ufdd0"  # a noncharacter: no conversation holds it
# What a template is given anyway, and no line may set.
RESERVED = ("messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
            "return_assistant_tokens_mask")  # fmt: skip

Span = tuple[int, int]  # first character, one past the last


class Rendered(NamedTuple):
    """A conversation as text.

    spans: where the assistant's words that count are, with their end-of-turn tokens. answer: of the last reply.
    """

    text: str
    spans: list[Span]
    answer: Span


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template and what it reads beside the messages.

    Raises:
        DataError: by each method, if the template refuses the messages.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and what stands in it between {% generation %} and {% endgeneration %}."""
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(int(a), int(b)) for a, b in spans[0]]

    @property
    def has_markers(self) -> bool:
        """Whether it says itself what the assistant generates, with {% generation %} ... {% endgeneration %}."""
        return "endgeneration" in str(self.tokenizer.chat_template)

    def mentions(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", str(self.tokenizer.chat_template)) is not None

    def _render(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            given: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.kwargs, **options}
            result: Any = render_jinja_template(
                conversations=[list(messages)], tools=self.tools or None,
                chat_template=self.tokenizer.chat_template, **given,
            )  # fmt: skip
            (text,), spans = result
        except Exception as error:  # a template is a program of its own and may raise anything
            raise DataError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from error
        return text, spans


def prepared(messages: Sequence[Message], template: Template) -> list[Message]:
    """The messages in the spelling that the template takes, once it is sure that it reads all that they hold.

    Templates differ in what they take for tool calls: arguments as an object or as JSON in a string, no content as null
    or as an empty string.

    Raises:
        DataError: the template ignores something that belongs to the conversation: tools, tool calls, an option.
    """
    for name in template.kwargs:
        if name in RESERVED:
            raise DataError(f"chat_template_kwargs sets {name!r}, which has a column or an option of its own")
        if not template.mentions(name):
            raise DataError(f"chat_template_kwargs sets {name!r}, which the chat template does not read: remove it")
    for message in messages:
        role = message["role"]
        if role not in STANDARD_ROLES and not template.mentions(role):
            raise DataError(
                f"a message is from {role!r}, which neither this package nor the chat template knows; the roles are "
                f"{', '.join(STANDARD_ROLES)}"
            )
    if any("tool_calls" in message for message in messages):
        messages = _with_readable_calls(messages, template)
    if template.tools:
        bare = Template(template.tokenizer, [], template.kwargs)
        if template.text(messages) == _try(bare, messages):
            raise DataError("has 'tools', which the chat template does not read; give one that does (--chat_template)")
    return list(messages)


def render(messages: Sequence[Message], template: Template, assistant_turns: str = "all") -> Rendered:
    """The conversation as text, and where in it the assistant speaks.

    Args:
        messages: `prepared`; the last one is the assistant's.
        assistant_turns: "all": each reply and its end-of-turn token. "last": the last reply and all that the template
            puts behind it, as TRL counts.

    Raises:
        DataError: a reply cannot be told apart from what the template puts around it; says which option helps.
    """
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if template.has_markers:
        text, marked = template.marked(messages)
        before = len(template.marked(messages[: replies[-1]])[1]) if len(replies) > 1 else 0
        if len(marked) < len(replies) or before >= len(marked):  # a reply may be marked in several pieces
            raise DataError(
                f"the chat template marks {len(marked)} replies with {{% generation %}}, the conversation has "
                f"{len(replies)}; mark every reply, or remove the markers to have the replies found in the text"
            )
        answer = (marked[before][0], marked[-1][1])
        return Rendered(text, marked if assistant_turns == "all" else marked[before:], answer)
    text = template.text(messages)
    if assistant_turns == "last":
        start, _ = _span(text, messages, replies[-1], template, assistant_turns)
        return Rendered(text, [(start, len(text))], (start, len(text)))
    spans = [_span(text, messages, i, template, assistant_turns) for i in replies]
    return Rendered(text, spans, spans[-1])


def message_start(text: str, messages: Sequence[Message], i: int, template: Template) -> int | None:
    """Where what the template writes of message i begins, its header included; None where that cannot be told."""
    before = _try(template, messages[:i]) if i else ""
    return len(before) if before is not None and text.startswith(before) else None


def content_start(text: str, messages: Sequence[Message], i: int, template: Template) -> int:
    """Where the content of message i begins; 0 where that cannot be told."""
    marked = _try(template, [*messages[:i], {**messages[i], "content": SENTINEL}, *messages[i + 1 :]])
    start = -1 if marked is None else marked.find(SENTINEL)
    return start if marked is not None and start >= 0 and text[:start] == marked[:start] else 0


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """What messages need of a tokenizer.

    Raises:
        ValueError: it has no chat template, or several; says what to do.
    """
    if not isinstance(tokenizer.chat_template, str):
        found = "none" if tokenizer.chat_template is None else f"several: {sorted(tokenizer.chat_template)}"
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no single chat template (found {found}); give one with "
            "--chat_template FILE, or set tokenizer.chat_template"
        )


def _span(text: str, messages: Sequence[Message], i: int, template: Template, assistant_turns: str) -> Span:
    """Reply i lies between the conversation before it, with the prompt to generate, and the conversation through it.

    Where the template writes those otherwise than the whole (a prompt that opens thinking, thinking that is taken out
    of earlier turns), it is found by putting another text in its place.
    """
    prompt, before = (_try(template, messages[:i], add) for add in (True, False))
    through = _try(template, messages[: i + 1])
    through = None if through is None else through.rstrip()  # white space after the end of a turn is the next turn's
    start = None
    if prompt is not None and prompt != before and text.startswith(prompt):
        start = len(prompt)
    if start is not None and through is not None and text.startswith(through) and start < len(through):
        return start, len(through)
    span = _located(text, messages, i, template)
    if span is None:
        raise DataError(_cannot_tell(text, messages, i, template, assistant_turns, prompt, through))
    return (start if start is not None and start <= span[1] else span[0]), span[1]


def _located(text: str, messages: Sequence[Message], i: int, template: Template) -> Span | None:
    """Reply i in the text, by what stays the same around it when its content is another; None if that is not so."""
    other = {**messages[i], "content": SENTINEL}
    whole, through = (_try(template, [*messages[:i], other, *rest]) for rest in (messages[i + 1 :], ()))
    if whole is None or through is None or whole.count(SENTINEL) != 1 or through.count(SENTINEL) != 1:
        return None
    head, tail = whole.split(SENTINEL)
    ending = through.split(SENTINEL)[1].rstrip()  # the end-of-turn token, and tool calls
    end = len(text) - len(tail)
    if not (text.startswith(head) and text.endswith(tail) and len(head) <= end and tail.startswith(ending)):
        return None
    return len(head), end + len(ending)


def _cannot_tell(
    text: str, messages: Sequence[Message], i: int, template: Template, assistant_turns: str, *parts: str | None
) -> str:
    other = max((part for part in parts if part is not None), key=len, default="")
    at = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    advice = ["use a template that marks the replies with {% generation %} (--chat_template FILE)",
              "leave such lines out (--on_bad_line skip)"]  # fmt: skip
    if assistant_turns != "last" and any(message["role"] == "assistant" for message in messages[i + 1 :]):
        advice.insert(0, "count only the last reply (--assistant_turns last)")
    if template.mentions("enable_thinking") and "enable_thinking" not in template.kwargs:
        advice.insert(0, "turn thinking off (--chat_template_kwargs '{\"enable_thinking\": false}')")
    content = str(messages[i]["content"])
    return (
        f"the chat template writes message {i} (assistant: {content[:30]!r}{'...' if len(content) > 30 else ''}) in "
        "the whole conversation otherwise than where it was generated, and it cannot be told apart; they part at "
        f"...{text[:at][-40:]!r}. {'; or '.join(advice).capitalize()}"
    )


def _with_readable_calls(messages: Sequence[Message], template: Template) -> list[Message]:
    """The first spelling of the calls, and of no content beside them, in which the template shows all that is there."""
    refused = True
    for spell in (_arguments_as_objects, _arguments_as_strings):
        spelled = [spell(message) for message in messages]
        with_null, empty = ([_with_blank(message, blank) for message in spelled] for blank in (None, ""))
        texts = _try(template, with_null), _try(template, empty)
        prints_none = (
            None not in texts and texts[0] != texts[1] and len({str(x).replace("None", "") for x in texts}) == 1
        )
        for candidate, text in ((empty, texts[1]),) if prints_none else zip((with_null, empty), texts, strict=True):
            silent = [{key: value for key, value in m.items() if key != "tool_calls"} for m in candidate]
            refused = refused and text is None
            if text is not None and text != _try(template, silent):
                return candidate
    if refused:
        template.text(messages)  # says why
    raise DataError("has 'tool_calls', which the chat template does not read; give one that does (--chat_template)")


def _with_blank(message: Message, blank: str | None) -> Message:
    return message if message["content"] or "tool_calls" not in message else message | {"content": blank}


def _arguments_as_objects(message: Message) -> Message:
    return _with_arguments(message, lambda value: _parsed(value) if isinstance(value, str) else value)


def _arguments_as_strings(message: Message) -> Message:
    return _with_arguments(
        message, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def _with_arguments(message: Message, spell: Any) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        if "arguments" in inner:
            inner = inner | {"arguments": spell(inner["arguments"])}
        calls.append(call | {"function": inner} if "function" in call else inner)
    return message | {"tool_calls": calls}


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _try(template: Template, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
    try:
        return template.text(messages, add_generation_prompt)
    except DataError:
        return None
