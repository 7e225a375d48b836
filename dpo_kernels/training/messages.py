"""Messages, in every spelling that people have on disk, as the ones that chat templates read."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

# Who speaks, as ShareGPT and its relatives write it, in the words of chat templates.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "ai": "assistant", "model": "assistant", "observation": "tool", "function_call": "assistant",
    "tool_call": "assistant", "tool_response": "tool",
}  # fmt: skip
STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")
# How a message says who speaks, and what.
SPELLINGS = (("role", "content"), ("role", "text"), ("from", "value"))
DEEPEST = 100
MEDIA = ("image", "image_url", "images", "video", "video_url", "videos", "audio", "audio_url", "audios", "input_audio")


class DataError(ValueError):
    """The preference data cannot be trained on; names the place (file and line) and the cause."""


def is_message(value: Any) -> bool:
    """Whether it looks like one message: it says who speaks, and what (or which tools the speaker calls)."""
    return isinstance(value, dict) and any(
        who in value and (what in value or "tool_calls" in value) for who, what in SPELLINGS
    )


def is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_message(message) for message in value)


def read_conversation(where: str, value: Any) -> tuple[list[Message], list[Any]]:
    """A list of messages (or a single one) in any known spelling, and the tools that a system message may carry.

    Returns:
        Messages with "role", "content" (a string; None beside "tool_calls" where it was null or absent) and whatever
        other keys they had that are not null.

    Raises:
        DataError: says what is wrong, and where in the line.
    """
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where!r} is {kind(value)}; expected a list of messages")
    messages, tools = [], []
    for i, message in enumerate(value):
        read = _read_message(f"{where}[{i}]", message)
        if read["role"] in ("system", "developer") and "tools" in read:
            tools = read_tools(f"{where}[{i}]['tools']", read.pop("tools"))
        messages.append(read)
    return messages, tools


def read_tools(where: str, value: Any) -> list[Any]:
    """Schemas of tools, as a list or as JSON in a string; nothing, null and an empty list are no tools.

    Raises:
        DataError: it is neither.
    """
    value = from_json(where, value)
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where} is {kind(value)}; expected a list of tools, each an object")
    check_unicode(where, value)
    return value


def from_json(where: str, value: Any) -> Any:
    """What a string holds as JSON; anything else, and a blank string as None, as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is a string that is not JSON: {error}") from error


def check_unicode(where: str, value: Any, depth: int = 0) -> None:
    """Refuses halves of surrogate pairs, which no tokenizer takes, wherever they are; and what is nested beyond what
    templates can write."""
    if depth > DEEPEST:
        raise DataError(f"{where[:60]}... is nested more than {DEEPEST} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} is no valid Unicode: {error.reason} at {error.start}") from error
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_unicode(f"a key of {where}", key)
            check_unicode(f"{where}[{key!r}]", inner, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_unicode(f"{where}[{i}]", inner, depth + 1)


def kind(value: Any) -> str:
    """What a value of JSON is, in a word for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _read_message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {kind(message)}; expected an object with 'role' and 'content'")
    given = {key for key, value in message.items() if value is not None}
    found = [pair for pair in SPELLINGS if given.issuperset(pair)]
    who, what = found[0] if found else (("from", "value") if "from" in message else ("role", "content"))
    others = sorted(given & ({"role", "from", "content", "value", "text"} - {who, what}))
    if found and others:
        raise DataError(
            f"{where} says twice who speaks or what: it has {others} beside {who!r} and {what!r}; keep those"
        )
    if who not in message:
        raise DataError(f"{where} has no {who!r}; found {sorted(message)}")
    read = {key: value for key, value in message.items() if key not in (who, what) and value is not None}
    role, content = message[who], message.get(what)
    if not isinstance(role, str):
        raise DataError(f"{where}[{who!r}] is {kind(role)}; expected a string")
    if not role:
        raise DataError(f"{where}[{who!r}] is empty")
    if role in ("function_call", "tool_call"):  # ShareGPT's, ms-swift's: the value is one call or several, as JSON
        read["tool_calls"] = [
            call if "function" in call else {"type": "function", "function": call}
            for call in _read_tool_calls(f"{where}[{what!r}]", content)
        ]
        content = None
    for key in (*MEDIA, "function_call"):
        if read.get(key):
            raise DataError(f"{where} has {key!r}, which is not trained on" + (
                ": write it as 'tool_calls'" if key == "function_call" else "; only text can be"
            ))  # fmt: skip
    if "tool_calls" in read:
        read["tool_calls"] = _read_tool_calls(f"{where}['tool_calls']", read["tool_calls"])
        if not read["tool_calls"]:
            del read["tool_calls"]
    if what not in message and "tool_calls" not in read:
        raise DataError(f"{where} has no {what!r}; found {sorted(message)}")
    text = _read_content(f"{where}[{what!r}]", content, optional="tool_calls" in read)
    read = {"role": ROLES.get(role, role), "content": text, **read}
    check_unicode(where, read)
    return read


def _read_content(where: str, content: Any, optional: bool) -> str | None:
    if content is None and optional:
        return None
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise DataError(f"{where} is {kind(content)}; expected a string")
        return content
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise DataError(f"{where}[{i}] is {kind(part)}; expected a part of text")
        part = {key: value for key, value in part.items() if value is not None}
        media = [str(part.get("type"))] if part.get("type") in MEDIA else [key for key in MEDIA if key in part]
        if media:
            raise DataError(f"{where}[{i}] is a part of type {media[0]!r}; only text can be trained on")
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}[{i}] is no part of text: found {sorted(part)}, type {part.get('type')!r}")
        texts.append(part["text"])
    return "".join(texts)


def _read_tool_calls(where: str, calls: Any) -> list[Any]:
    calls = from_json(where, calls)
    calls = [calls] if isinstance(calls, dict) else calls or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where} is {kind(calls)}; expected a list of calls, each an object")
    return calls
