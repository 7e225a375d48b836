"""The formats of preference data, as a table: what a line looks like, and how it becomes pairs of one kind."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_kernels.training.messages import (
    MEDIA,
    DataError,
    Message,
    check_unicode,
    from_json,
    is_conversation,
    is_message,
    kind,
    read_conversation,
    read_tools,
)

Row = dict[str, Any]  # a line: its columns, those that are null left out

SIDES = ("chosen", "rejected")
NOTHING: tuple[Any, ...] = (None, "", [], {})
STRING_FORMATS = ("plain", "chat")
RANKED_PAIRS = ("best", "all")


@dataclass(frozen=True)
class ChatPair:
    """Two conversations for a chat template; each ends with a message of the assistant."""

    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextPair:
    """A prompt and two answers that no template touches."""

    prompt: str
    chosen: str
    rejected: str


Pair = ChatPair | TextPair


@dataclass(frozen=True)
class ReadOptions:
    """How lines are read.

    columns: the line's own name of each column that it calls otherwise, such as {"prompt": "question"}.
    string_format: "plain" trains on strings as they are, "chat" makes messages of them; None: plain, but chat where
        something stands beside them that only a template can render (system, tools, chat_template_kwargs).
    ranked_pairs: of ranked completions "best" takes the first against the last, "all" each against each that is worse.
    tools, chat_template_kwargs: for the chat template, where a line brings none of its own.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    string_format: str | None = None
    ranked_pairs: str = "best"
    tools: list[Any] = field(default_factory=list)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("string_format", self.string_format, STRING_FORMATS),
            ("ranked_pairs", self.ranked_pairs, RANKED_PAIRS),
        ):
            if value not in (*known, None):
                raise ValueError(f"{name} is {value!r}; expected one of {known}")
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(f"columns names {unknown}; the names that a column can stand for are {list(COLUMNS)}")
        read_tools("tools", self.tools)


@dataclass(frozen=True)
class Format:
    """One kind of line.

    name: as reports and messages call it. required, optional: the columns that it is made of. looks_right: whether
    lines with these columns are of this kind. read: makes pairs of a line. complete: nothing that other columns hold
    can be missing from its conversations. of_strings: no template has to render it.
    """

    name: str
    required: tuple[str, ...]
    looks_right: Callable[[Row], bool]
    read: Callable[[Row, ReadOptions], list[Pair]]
    optional: tuple[str, ...] = ()
    complete: bool = False
    of_strings: bool = False

    def matches(self, row: Row) -> bool:
        return all(column in row for column in self.required) and self.looks_right(row)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((*self.required, *(f'[{column}]' for column in self.optional)))})"


@dataclass(frozen=True)
class Line:
    """What a line turned out to be: its pairs, the format's name, and the columns that nothing was read from."""

    pairs: list[Pair]
    format: str
    unused: tuple[str, ...]


def read_line(value: Any, options: ReadOptions) -> Line:
    """The pairs of a line in any of the formats.

    Args:
        value: the line, as JSON gave it.

    Raises:
        DataError: it fits no format, or two; or something in it is wrong. Says what, and where in the line.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {kind(value)}; expected an object with 'chosen' and 'rejected'")
    row = _renamed(value, options.columns)
    for column in row:
        check_unicode("the name of a column", column)
    for column in MEDIA:
        if row.get(column):
            raise DataError(f"{column!r} is there, and only text can be trained on: leave such lines out")
    row = {name: value for name, value in row.items() if value is not None}
    known = {name: value for name, value in row.items() if name in STRUCTURE}
    known = {name: from_json(repr(name), value) if name in PACKED else value for name, value in known.items()}
    known = {name: value for name, value in known.items() if name in SAID or value not in NOTHING}
    _unpack_answers(known)
    matching = [form for form in FORMATS if form.matches(known)]
    if len(matching) != 1:
        raise DataError(_fits(matching, known))
    (form,) = matching
    left = sorted(set(known) - {*form.required, *form.optional})
    if left and not form.complete:
        raise DataError(
            f"looks like {form}, but has {left} too, which that does not read: remove it, or rename columns"
        )
    settings = {name: row[name] if name == "system" else from_json(repr(name), row[name])
                for name in SETTINGS if name in row}  # fmt: skip
    settings = {name: value for name, value in settings.items() if value not in NOTHING}
    if options.string_format is None:
        as_chat = options.tools or options.chat_template_kwargs or not {*value, *options.columns}.isdisjoint(SETTINGS)
        options = replace(options, string_format="chat" if as_chat else "plain")
    pairs = [_with_settings(pair, settings, options) for pair in form.read(known, options)]
    used = {*form.required, *form.optional, *settings}
    replaced = [name for name in options.columns if name in value and name not in options.columns.values()]
    name = f"{form.name} made messages" if form.of_strings and isinstance(pairs[0], ChatPair) else form.name
    unused = [name for name in row if name not in used and row[name] not in NOTHING]
    return Line(pairs, name, tuple(sorted([*unused, *(f"{name} (another was given for it)" for name in replaced)])))


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    missing = sorted(column for column in columns.values() if column not in row)
    if missing:
        raise DataError(f"has no column {missing}, which --columns names; found {sorted(row)}")
    taken = {*columns.values(), *columns}
    return {**{name: value for name, value in row.items() if name not in taken},
            **{name: row[column] for name, column in columns.items()}}  # fmt: skip


def _unpack_answers(row: Row) -> None:
    """Messages that a table had to write as strings of JSON; an answer that merely looks like JSON stays a string."""
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(x, str) and x.startswith("{") for x in value):
            row[name] = [from_json(f"{name}[{i}]", message) for i, message in enumerate(value)]
    for names in (SIDES, ("prompt",)):
        values = []
        for name in names:
            text = row.get(name)
            if not isinstance(text, str) or text.lstrip()[:1] not in ("[", "{"):
                break
            try:
                value = from_json(name, text)
            except DataError:
                break
            if not (is_conversation(value) or is_message(value)):
                break
            values.append(value)
        else:
            row.update(zip(names, values, strict=True))


def _fits(matching: list[Format], row: Row) -> str:
    found = ", ".join(f"{name} ({kind(value)})" for name, value in sorted(row.items())) or "none of their columns"
    if matching:
        return f"fits two formats, {' and '.join(map(str, matching))}: found {found}; remove or rename columns"
    known = "; ".join(map(str, FORMATS))
    missing = [name for name in SIDES if name not in row]
    what = f"{' and '.join(map(repr, missing))} {'is' if len(missing) == 1 else 'are'} missing; " if missing else ""
    return (
        f"{what}fits none of the known formats: found {found}. Known: {known}. Columns of other names are read with "
        "--columns, as in --columns prompt=question"
    )


# Conversations, and the answers to them.


def _whole(row: Row, options: ReadOptions) -> list[Pair]:
    """Chosen and rejected as whole conversations; what stands beside them may only repeat a part of them."""
    chosen, rejected, tools = _sides(row)
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        if not any(message["role"] == "user" for message in messages):
            raise DataError(
                f"{side!r} is a conversation in which the user says nothing: the prompt is missing; name the column "
                "that holds it with --columns prompt=NAME"
            )
    shared = _common(chosen, rejected)
    if isinstance(prompt := row.get("prompt"), str):
        asked = [str(message["content"]).strip() for message in chosen[:shared] if message["role"] == "user"]
        if prompt.strip() and prompt.strip() not in asked:
            raise DataError(
                "'prompt' is a string that repeats none of the user's messages that chosen and rejected share; "
                "remove it, or make it part of both"
            )
    elif prompt is not None:
        messages, _ = read_conversation("prompt", prompt)
        if any(side[: len(messages)] != messages for side in (chosen, rejected)):
            raise DataError("'prompt' is not how chosen and rejected begin, though they are whole conversations")
    for name in ("messages", "conversations"):
        if name in row:
            messages, _ = read_conversation(name, row[name])
            if messages not in (chosen, rejected) and messages != chosen[:shared][: len(messages)]:
                raise DataError(f"{name!r} is neither chosen nor rejected nor how both begin; remove it")
    return [ChatPair(chosen, rejected, tools)]


def _answered(prompt: str) -> Callable[[Row, ReadOptions], list[Pair]]:
    """A conversation in the column `prompt` (or one message of the user, as a string), and two answers to it."""

    def read(row: Row, options: ReadOptions) -> list[Pair]:
        asked = row[prompt]
        asked = {"role": "user", "content": asked} if isinstance(asked, str) else asked
        messages, tools = read_conversation(prompt, asked)
        answers = {side: _reply(side, row[side]) for side in SIDES}
        return [ChatPair(messages + answers["chosen"], messages + answers["rejected"], tools)]

    return read


def _swift(row: Row, options: ReadOptions) -> list[Pair]:
    """ms-swift's: the conversation with the chosen reply as its last message, and what is rejected in its place."""
    chosen, tools = read_conversation("messages", row["messages"])
    if "rejected_response" in row:
        return [ChatPair(chosen, chosen[:-1] + _reply("rejected_response", row["rejected_response"]), tools)]
    rejected, _ = read_conversation("rejected_messages", row["rejected_messages"])
    if all(message["role"] not in ("user", "system") for message in rejected):  # the reply alone
        rejected = chosen[:-1] + rejected
    return [ChatPair(chosen, rejected, tools)]


def _torchtune(row: Row, options: ReadOptions) -> list[Pair]:
    renamed = {side: row[f"{side}_conversations"] for side in SIDES}
    return _whole(renamed, options)


def _alpaca(row: Row, options: ReadOptions) -> list[Pair]:
    """LLaMA-Factory's: instruction and input are one message, history comes before them."""
    prompt = "\n".join(_string(name, row[name]) for name in ("instruction", "input") if row.get(name))
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' is {kind(history)}; expected a list of pairs of strings")
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"history[{i}] is {kind(turn)}; expected two strings, what the user and the assistant said")
        messages += _say(_string(f"history[{i}][0]", turn[0]), _string(f"history[{i}][1]", turn[1]))
    chosen, rejected = (_string(side, row[side]) for side in SIDES)
    return [ChatPair(messages + _say(prompt, chosen), messages + _say(prompt, rejected))]


def _ranked(row: Row, options: ReadOptions) -> list[Pair]:
    """NeMo-RL's: a conversation and completions with ranks, 0 the best."""
    context, tools = read_conversation("context", row["context"])
    ranked = []
    if not isinstance(row["completions"], list):
        raise DataError(f"'completions' is {kind(row['completions'])}; expected a list of completions with ranks")
    for i, completion in enumerate(row["completions"]):
        if not isinstance(completion, dict) or not {"rank", "completion"} <= set(completion):
            raise DataError(f"completions[{i}] is {kind(completion)}; expected an object with 'rank' and 'completion'")
        rank = completion["rank"]
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
            found = f"{rank}" if isinstance(rank, float) else kind(rank)
            raise DataError(f"completions[{i}]['rank'] is {found}; expected a number")
        ranked.append((rank, _reply(f"completions[{i}]['completion']", completion["completion"])))
    ranked.sort(key=lambda entry: entry[0])  # of equal ranks the first comes first
    couples = list(itertools.combinations(ranked, 2))
    if options.ranked_pairs == "best":
        couples = [(ranked[0], ranked[-1])] if ranked else []
    pairs: list[Pair] = [ChatPair(context + a, context + b, tools) for (r, a), (s, b) in couples if r < s]
    if not pairs:
        found = f"completions have one rank, {ranked[0][0]}" if ranked else "there are no completions"
        raise DataError(f"{found}: none is better than another")
    return pairs


# Strings.


def _strings(row: Row, options: ReadOptions) -> list[Pair]:
    prompt, chosen, rejected = (_string(name, row[name]) for name in ("prompt", *SIDES))
    if options.string_format == "chat":
        return [ChatPair(_say(prompt, chosen), _say(prompt, rejected))]
    return [TextPair(prompt, chosen, rejected)]


# How a text says that the assistant speaks from here on. The last place is where an answer begins.
SPEAKER = re.compile(
    r"(?:^|\n)[^\S\n]*(?:#+[^\S\n]*)?(?:Assistant|ASSISTANT|assistant|AI|Bot|GPT|Model|Response|Answer|助手|助理|回答)"
    r"[^\S\n]*[:：]"
    r"|<\|(?:im_start|start_header_id|start)\|>(?:assistant|model)(?:<\|end_header_id\|>|<\|message\|>)?\n{0,2}"
    r"|<\|assistant\|>\n?|<｜Assistant｜>|<start_of_turn>model\n|\[/INST\]"
)
# A transcript: a line begins with who speaks.
TURN = re.compile(r"(?:^|\n)[^\S\n]*(Human|User|Assistant|System)[^\S\n]*:[^\S\n]*", re.IGNORECASE)


def _whole_strings(row: Row, options: ReadOptions) -> list[Pair]:
    """HH-RLHF's: both texts are whole dialogues, and their common beginning, to the last turn in it, is the prompt."""
    chosen, rejected = (_string(side, row[side]) for side in SIDES)
    if options.string_format == "chat":
        return [ChatPair(_transcript("chosen", chosen), _transcript("rejected", rejected))]
    shared = _common(chosen, rejected)
    turns = list(SPEAKER.finditer(chosen, 0, shared))
    # By whatever opened the first turn: 'Answer:' within an answer opens none of a dialogue of 'Assistant:'.
    starts = [turn.end() for turn in turns if turn[0].strip() == turns[0][0].strip()]
    if not starts:
        raise DataError(
            "chosen and rejected are strings without a 'prompt', and no turn of the assistant (such as "
            f"'\\n\\nAssistant:') begins in what both begin with, {chosen[:shared][-60:]!r}; give the prompt in a "
            "column, or name the one that holds it with --columns prompt=NAME"
        )
    return [TextPair(chosen[: starts[-1]], chosen[starts[-1] :], rejected[starts[-1] :])]


def _transcript(where: str, text: str) -> list[Message]:
    turns = list(TURN.finditer(text))
    if not turns or text[: turns[0].start()].strip():
        raise DataError(f"{where} is no transcript of lines that begin with 'Human:' and 'Assistant:': {text[:60]!r}")
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    return [
        {"role": {"human": "user"}.get(turn[1].lower(), turn[1].lower()), "content": text[turn.end() : end].strip()}
        for turn, end in zip(turns, ends, strict=True)
    ]


# Parts that several formats share.


def _sides(row: Row) -> tuple[list[Message], list[Message], list[Any]]:
    (chosen, tools), (rejected, other) = (read_conversation(side, row[side]) for side in SIDES)
    if tools != other:
        raise DataError("chosen and rejected bring different tools; the template can take only one list of them")
    return chosen, rejected, tools


def _reply(where: str, value: Any) -> list[Message]:
    if isinstance(value, str):
        check_unicode(repr(where), value)
        return [{"role": "assistant", "content": value}]
    messages, _ = read_conversation(where, value)
    return messages


def _say(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where!r} is {kind(value)}; expected a string")
    check_unicode(repr(where), value)
    return value


def _common(a: Any, b: Any) -> int:
    """How many elements, or characters, two sequences share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_settings(pair: Pair, settings: Row, options: ReadOptions) -> Pair:
    """The pair with what stands beside it in its line (system, tools, template options), or in the command line."""
    if isinstance(pair, TextPair):
        given = {"tools": options.tools, "chat_template_kwargs": options.chat_template_kwargs}
        settings = settings | {name: value for name, value in given.items() if value}
        if settings:
            raise DataError(
                f"has {sorted(settings)} beside strings that no template renders; make messages of them with "
                "--string_format chat"
            )
        return pair
    tools = read_tools("'tools'", settings.get("tools"))
    if tools and pair.tools and tools != pair.tools:
        raise DataError("has 'tools' of its own and others in its system message; keep one of them")
    kwargs = settings.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise DataError(f"'chat_template_kwargs' is {kind(kwargs)}; expected an object")
    check_unicode("'chat_template_kwargs'", kwargs)
    sides = {side: _with_system(getattr(pair, side), settings.get("system")) for side in SIDES}
    for side, messages in sides.items():
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the last message of {side!r} is from {messages[-1]['role']!r}; expected 'assistant'")
    return ChatPair(
        **sides, tools=tools or pair.tools or list(options.tools),
        template_kwargs={**options.chat_template_kwargs, **kwargs},
    )  # fmt: skip


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if system is None:
        return messages
    _string("system", system)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise DataError("has a 'system' column and another system message in its conversation; keep one of them")
    return messages


def _is_answer(value: Any) -> bool:
    """A string, one message, or messages of which the first is not a question: the assistant's, or a tool's."""
    if isinstance(value, str) or is_message(value):
        return True
    return is_conversation(value) and _speaker(value[0]) not in ("user", "human", "system", "developer")


def _speaker(message: Row) -> Any:
    return message.get("role") or message.get("from")


def _asks(value: Any) -> bool:
    return isinstance(value, list) and any(is_message(m) and _speaker(m) in ("user", "human") for m in value)


def _strings_alone(row: Row) -> bool:
    return all(isinstance(row[side], str) for side in SIDES)


def _answers_alone(row: Row) -> bool:
    return all(_is_answer(row[side]) for side in SIDES)


def _answers_to_prompt(row: Row) -> bool:
    return _answers_alone(row) and not (isinstance(row["prompt"], str) and _strings_alone(row))


def _conversations(row: Row) -> bool:
    """Each side holds what was asked; the assistant may open it only where no prompt stands beside."""
    if _strings_alone(row):
        return False
    return not _answers_alone(row) or (not _has_prompt(row) and all(_asks(row[side]) for side in SIDES))


def _has_prompt(row: Row) -> bool:
    return not {"prompt", "messages", "conversations", "instruction"}.isdisjoint(row)


FORMATS = (
    Format("whole conversations", SIDES, _conversations, _whole, ("prompt", "messages", "conversations"),
           complete=True),
    Format("prompt and answers as messages", ("prompt", *SIDES), _answers_to_prompt, _answered("prompt")),
    Format("strings", ("prompt", *SIDES), lambda row: isinstance(row["prompt"], str) and _strings_alone(row), _strings,
           of_strings=True),
    Format("whole strings", SIDES, lambda row: _strings_alone(row) and not _has_prompt(row), _whole_strings,
           of_strings=True),
    Format("ShareGPT", ("conversations", *SIDES), _answers_alone, _answered("conversations")),
    Format("messages and answers", ("messages", *SIDES), _answers_alone, _answered("messages")),
    Format("messages and a rejected response", ("messages", "rejected_response"), lambda row: True, _swift),
    Format("messages and rejected messages", ("messages", "rejected_messages"), lambda row: True, _swift),
    Format("instruction", ("instruction", *SIDES), _strings_alone, _alpaca, ("input", "history")),
    Format("ranked completions", ("context", "completions"), lambda row: True, _ranked),
    Format("torchtune", ("chosen_conversations", "rejected_conversations"), lambda row: True, _torchtune,
           complete=True),
)  # fmt: skip

STRUCTURE = tuple(dict.fromkeys(name for form in FORMATS for name in (*form.required, *form.optional)))
SETTINGS = ("system", "tools", "chat_template_kwargs")
# Columns that say something even where they are empty.
SAID = ("prompt", "chosen", "rejected", "rejected_response", "instruction", "completions")
COLUMNS = (*STRUCTURE, *SETTINGS)
# Columns that hold lists, also where a table had to write them as strings of JSON.
PACKED = ("messages", "conversations", "rejected_messages", "history", "context", "completions",
          "chosen_conversations", "rejected_conversations")  # fmt: skip
