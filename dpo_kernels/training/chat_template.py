"""A tokenizer's chat template: conversations to text, in the spelling that it takes, with nothing of them ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import meta
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from dpo_kernels.training.messages import STANDARD_ROLES, DataError, Message

Span = tuple[int, int]  # first character, one past the last

SENTINEL = "\ufdd0{}\ufdd0"  # noncharacters: no conversation holds them
# What a template is given anyway, and no line may set.
RESERVED = ("messages", "conversations", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
            "return_assistant_tokens_mask")  # fmt: skip
# One text under any of these names: transformers gives a template all of them.
REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Template:
    """A chat template and what it reads beside the messages.

    Raises:
        DataError: by each method, if the template refuses the messages.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def try_text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        """The text, or None where the template refuses the messages."""
        try:
            return self.text(messages, add_generation_prompt)
        except DataError:
            return None

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and what stands in it between {% generation %} and {% endgeneration %}."""
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(int(a), int(b)) for a, b in spans[0]]

    @property
    def source(self) -> str:
        return str(self.tokenizer.chat_template)

    @property
    def has_markers(self) -> bool:
        """Whether it says itself what the assistant generates, with {% generation %} ... {% endgeneration %}."""
        return "endgeneration" in self.source

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable of this name."""
        environment = chat_template_utils._compile_jinja_template(self.source).environment
        return variable in meta.find_undeclared_variables(environment.parse(self.source))

    def _render(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            given: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.kwargs, **options}
            result: Any = chat_template_utils.render_jinja_template(
                conversations=[list(messages)], tools=self.tools or None, chat_template=self.source, **given
            )
            (text,), spans = result
        except Exception as error:  # a template is a program of its own and may raise anything
            raise DataError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from error
        return text, spans


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


def prepared(messages: Sequence[Message], template: Template) -> list[Message]:
    """The messages in the spelling that the template takes, once it is sure that it reads all that they hold.

    Templates differ in what they take for tool calls: arguments as an object or as JSON in a string, no content as null
    or as an empty string.

    Raises:
        DataError: the template ignores something that belongs to the conversation: a message, tools, tool calls, the
            reasoning of the answer, an option.
    """
    for name in template.kwargs:
        if name in RESERVED:
            raise DataError(f"chat_template_kwargs sets {name!r}, which has a column or an option of its own")
        if not template.reads(name):
            raise DataError(f"chat_template_kwargs sets {name!r}, which the chat template does not read: remove it")
    for message in messages:
        role = message["role"]
        if role not in STANDARD_ROLES and not re.search(rf"\b{re.escape(role)}\b", template.source):
            raise DataError(
                f"a message is from {role!r}, which neither this package nor the chat template knows; the roles are "
                f"{', '.join(STANDARD_ROLES)}"
            )
    if any("tool_calls" in message for message in messages):
        messages = _with_readable_calls(messages, template)
    parts = [message | {"content": as_content(message["content"], in_parts=True)} for message in messages]
    if template.try_text(messages) is None and template.try_text(parts) is not None:
        messages = parts
    text = template.text(messages)
    if template.tools and text == Template(template.tokenizer, [], template.kwargs).try_text(messages):
        raise DataError("has 'tools', which the chat template does not read; give one that does (--chat_template)")
    reasoning = [name for name in REASONING if messages[-1].get(name)]
    if reasoning and text == template.try_text([*messages[:-1], _without(messages[-1], *REASONING)]):
        raise DataError(
            f"the answer has {reasoning[0]!r}, which the chat template does not read; give one that does "
            "(--chat_template), or write it into the content"
        )
    left_out = _left_out(messages, template)
    if left_out is not None:  # templates of images and text take contents as lists of parts alone
        if _left_out(parts, template) is None:
            return parts
        raise DataError(
            f"the chat template leaves out a message from {left_out['role']!r} ({str(left_out['content'])[:40]!r}): "
            "give one that reads it (--chat_template), or take the message out"
        )
    return list(messages)


def as_content(text: Any, in_parts: bool) -> Any:
    """A text as a message's content: as it is, or as the one part of a list."""
    return [{"type": "text", "text": text}] if in_parts and isinstance(text, str) else text


def has_parts(messages: Sequence[Message]) -> bool:
    return any(isinstance(message["content"], list) for message in messages)


def _left_out(messages: Sequence[Message], template: Template) -> Message | None:
    """The first message whose content is not in the text: templates pass over roles that they do not know without a
    word."""
    marks = [SENTINEL.format(i) for i in range(len(messages))]
    in_parts = has_parts(messages)
    marked = [
        m if m["content"] is None else m | {"content": as_content(mark, in_parts)}
        for m, mark in zip(messages, marks, strict=True)
    ]
    text = template.try_text(marked)
    if text is None:  # it looks at what contents are; then the messages as they are have to do
        return None
    for message, mark in zip(messages, marks, strict=True):
        said = message["content"] or (message["content"] == "" and "tool_calls" not in message)
        if said and mark not in text:
            return message
    return None


def _without(message: Message, *keys: str) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def _with_readable_calls(messages: Sequence[Message], template: Template) -> list[Message]:
    """The first spelling of the calls, and of no content beside them, in which the template shows all that is there."""
    refused = True
    for spell in (_arguments_as_objects, _arguments_as_strings):
        spelled = [spell(message) for message in messages]
        with_null, empty = ([_with_blank(message, blank) for message in spelled] for blank in (None, ""))
        texts = template.try_text(with_null), template.try_text(empty)
        prints_none = all(texts) and str(texts[0]).count("None") > str(texts[1]).count("None")
        for candidate, text in ((empty, texts[1]),) if prints_none else zip((with_null, empty), texts, strict=True):
            silent = [_without(message, "tool_calls") for message in candidate]
            refused = refused and text is None
            if text is not None and text != template.try_text(silent):
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
