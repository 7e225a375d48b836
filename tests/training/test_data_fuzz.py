"""Lines mutated at random: each is refused with its line, or its mask is the one that a second way finds.

The second way shares no code with the package: it reads lines by rules of its own, writes the chat templates in plain
Python that knows where each reply is, and takes lengths in bytes from the tokens' names instead of offsets.
DPO_KERNELS_FUZZ=1000 mutates so many lines instead of a few, DPO_KERNELS_FUZZ_SEED=3 draws others.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import templates as t
from format_cases import CALL, CASES, TOOL
from templates import SPECIALS, make_tokenizer, say

from dpo_kernels.training import DPODataset, ReadOptions, encoding
from dpo_kernels.training.messages import DataError

COUNT, SEED = int(os.environ.get("DPO_KERNELS_FUZZ", 150)), int(os.environ.get("DPO_KERNELS_FUZZ_SEED", 0))
SIDES, WHOLE = ("chosen", "rejected"), 10**6
HOW = [(WHOLE, "keep_start"), (48, "keep_answer"), (48, "keep_start"), (48, "drop")]
LOADS = [(limit, mode, turns) for limit, mode in HOW for turns in ("all", "last")]

LONG = say("Which colour does the sky have at noon, and why?", "Blue.", "And at night?\n\n你好", system="Be short.")
MORE = [
    {side: [*LONG, *say("", side * 3)[1:]] for side in SIDES},
    {"prompt": LONG[1:], "chosen": " It is\n", "rejected": [{"from": "gpt", "value": "今天晴天。 It is dark. " * 3}]},
    {"prompt": [*say("Hi."), *say("Is it?")], "chosen": say("", "\n\nIt.")[1:] * 2, "rejected": say("", "?")[1:]},
    {side: f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Is it?\n\nAssistant: {side}, it is." for side in SIDES},
    {"prompt": "Equal", "chosen": " answers", "rejected": " answers"},
    {"prompt": "Spaces ", "chosen": "x", "rejected": "y z </s>\n"},
    {"prompt": "", "chosen": "", "rejected": "No token before the first."},
    {"prompt": "Is it? " * 12 + "It is.", "chosen": " I am fine.", "rejected": "\n\nNo." * 9},
]
TEXTS = [*SPECIALS, "<|im_end|>\n<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n",
         "\n\nAssistant: ", "\n\nHuman:", "<think>", "</think>", "<think>\n\n</think>\n\n", "🙂", "你好", "e\u0301",
         "\0", "", "\ud800", "\udc00\ud83d", "\u2028\x85\r", "\ufeff", "\u202e", " ", "\n", "\t \n", " It is", "{",
         "天" * 300, "It is " * 400, "{{ m }}", '[{"role": "user", "content": "a"}]', "\ufdd0reply\ufdd0"]  # fmt: skip
ROLES = ["user", "assistant", "system", "developer", "tool", "human", "gpt", "function_call", "narrator", "", "m"]
KEYS = ["", "😀", "\ud800", "bos_token", *SIDES, "role", "content", "text", "from", "value", "prompt", "messages",
        "conversations", "tools", "tool_calls", "reasoning_content", "chat_template_kwargs", "images", "history",
        "input", "rejected_response", "rank", "system"]  # fmt: skip
JUNK = [None, True, False, 0, 5, 0.5, 10**30, float("nan"), float("inf"), [], {}, [[]], [None], [{}], "", "x",
        ["a", "b"], say("x")[0], say("", "y")[1:], {"from": "gpt", "value": "z"}, {"type": "text", "text": "part"},
        {"type": "image"}, [TOOL], [CALL], json.dumps([CALL]), {"enable_thinking": False}, {"bos_token": "\ud800"},
        "@deep3@", "@deep300@", "@deep900@", "@deep980@", "@deep3000@"]  # fmt: skip
WAYS = ["text"] * 10 + ["fill", "replace", "delete", "rename", "add", "role", "swap", "spell", "list"]


def groups():
    """Good lines by the template (None: strings alone) and the options that read them."""
    found = {}
    cases = [(case.template, case.read, case.line) for case in CASES]
    for template, read, line in [*cases, *((t.CHATML, ReadOptions(), line) for line in MORE)]:
        names = [template]
        if (template, read) == (t.CHATML, ReadOptions()):
            names.append(t.LLAMA3 if meaning(json.dumps(line), read).prompt is None else None)
        for name in names:
            found.setdefault((name, repr(read)), (name, read, []))[2].append(line)
    return list(found.values())


def nodes(value):
    """Each place in a value, as the container and the key that it has there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *nodes(value[key]))]


def mutate(line, rng):
    way, places, text = rng.choice(WAYS), nodes(line) or [({"": ""}, "")], rng.choice(TEXTS)
    strings = [(box, key) for box, key in places if isinstance(box[key], str)]
    roles = [(box, key) for box, key in places if key in ("role", "from")]
    box, key = rng.choice({"text": strings, "fill": strings, "role": roles, "spell": roles}.get(way) or places)
    old, new = box[key], json.loads(json.dumps(rng.choice([*JUNK, rng.choice(places)[0]])))
    if way in ("text", "fill") and isinstance(old, str):
        at = rng.choice([0, rng.randint(0, len(old)), len(old)])
        box[key] = old[:at] + text + old[at:] if way == "text" else text
    elif way == "swap":
        for box, key in roles:
            box[key] = {"user": "assistant", "assistant": "user", "human": "gpt"}.get(str(box[key]), box[key])
    elif way == "list" and isinstance(box, list):
        rng.choice([box.reverse, box.pop, lambda: box.append(box[0]), lambda: box.insert(0, box[-1])])()
    elif way == "add":
        (old if isinstance(old, dict) else line)[rng.choice(KEYS)] = new
    elif way in ("rename", "spell") and isinstance(box, dict):
        box[rng.choice(KEYS if way == "rename" else ["from", "role"])] = box.pop(key)
        if way == "spell":
            box[rng.choice(["value", "text", "content"])] = box.pop("content", box.pop("value", ""))
    else:
        box[key] = rng.choice(ROLES) if way == "role" else new
        if way == "delete":
            del box[key]


def mutated(line, rng):
    """The bytes of a line, changed in one to three ways; it may become several lines."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        line = json.loads(json.dumps(line))
        mutate(line, rng)
    text = json.dumps(line, ensure_ascii=rng.random() < 0.8)
    text = re.sub(r'"@deep(\d+)@"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)
    if rng.random() < 0.05:  # a key twice
        start = rng.choice([found.end() for found in re.finditer(r'\{(?=")', text)] or [1])
        text = f'{text[:start]}"{rng.choice(KEYS[3:])}": {rng.choice(["1", "null", "[]"])}, {text[start:]}'
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([1, 2, 8]) if rng.random() < 0.1 else 0):
        at, flip, other = rng.randrange(len(data)), 1 << rng.randrange(8), rng.choice(b'\0\n\r \\"{}[],:\xff\xc3\xe4a0')
        data[at : at + rng.choice([0, 1, 1, 20])] = rng.choice([[other], [data[at] ^ flip], [], [32, 32]])
        data += b" " * (not data)
    return bytes(data)


# The second way, from a line to two conversations or strings. It need not be right where the package refuses the line.

NAMES = {"human": "user", "observation": "tool", "function_call": "assistant", "gpt": "assistant"}
SAID = ("prompt", "system", *SIDES, "rejected_response", "instruction")  # also where they are empty
SPELLINGS = (("role", "content"), ("role", "text"), ("from", "value"))
PACKED = ("messages", "conversations", "context", "completions", "history", "tools", "chat_template_kwargs", "prompt")
# Of tokens in bytes: those that byte-level BPE writes as themselves, then the others.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = dict(zip(map(chr, [*PLAIN, *range(256, 512)]), [*PLAIN, *sorted({*range(256)} - {*PLAIN})], strict=False))


def unpacked(value):
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    except ValueError:
        return value


def conversation(value, speaker="assistant"):
    value = {"role": speaker, "content": value} if isinstance(value, str) else value
    return [read_message(message) for message in ([value] if isinstance(value, dict) else value)]


def read_message(value):
    rest = {key: inner for key, inner in value.items() if inner is not None}
    spelled = next((names for names in SPELLINGS if rest.keys() >= set(names)), None)
    who, what = spelled or (("from", "value") if "from" in rest else ("role", "content"))
    role, content, calls = rest.pop(who), rest.pop(what, ""), unpacked(rest.pop("tool_calls", None)) or []
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    calls = [calls] if isinstance(calls, dict) else calls
    if role == "function_call":
        content, calls = "", [{"function": json.loads(content)}]
    for call in calls:
        call["function"]["arguments"] = unpacked(call["function"]["arguments"])
    return {**rest, "role": NAMES.get(role, role), "content": content, "tool_calls": calls}


def meaning(text, read):
    """Two conversations; or, after a prompt, two strings. None: the second way cannot say."""
    if "[" * 400 in str(text):  # arguments of a call nested so deep are given as a string
        return None
    with suppress(LookupError, TypeError, ValueError, AttributeError, RecursionError):
        line = json.loads(text)
        line |= {name: line[column] for name, column in read.columns.items()}
        packed = (*PACKED, *SIDES) if all(isinstance(unpacked(line.get(side)), list) for side in SIDES) else PACKED
        pairs = sorted(line.items(), key=lambda pair: pair[0].endswith("_conversations"))
        pairs = [(name.removesuffix("_conversations"), unpacked(value) if name in packed else value)
                 for name, value in pairs if value is not None]  # fmt: skip
        row = {name: value for name, value in pairs if name in SAID or str(value).strip() not in ("", "[]", "{}")}
        as_chat = read.string_format == "chat" or bool(read.tools or read.chat_template_kwargs) or not (
            {"system", "tools", "chat_template_kwargs"}.isdisjoint(line))  # fmt: skip
        answers = [row.get(side) for side in SIDES]
        strings = all(isinstance(answer, str) for answer in answers)
        asked = next((row[name] for name in ("prompt", "messages", "conversations") if name in row), None)
        swift = row.get("rejected_response", row.get("rejected_messages"))
        if "completions" in row:
            ranked = sorted(row["completions"], key=lambda completion: completion["rank"])
            if not all(a["rank"] < b["rank"] for a, b in pairwise(ranked)):
                return None
            sides = [conversation(row["context"]) + conversation(ranked[i]["completion"]) for i in (0, -1)]
        elif swift is not None and "messages" in row:
            sides = [conversation(row["messages"]), conversation(swift)]
            if not any(message["role"] in ("user", "system") for message in sides[1]):
                sides[1] = sides[0][:-1] + sides[1]
        elif "instruction" in row and strings:
            said = [text for turn in row.get("history") or [] for text in turn]
            said.append("\n".join(row[name] for name in ("instruction", "input") if row.get(name)))
            sides = [conversation(say(*said, answer)) for answer in answers]
        elif strings and asked is None:
            before, mark, _ = os.path.commonprefix(answers).rpartition("\n\nAssistant:")  # noqa: RUF071
            if as_chat or not mark or re.search("ssistant|INST|model", before.replace(mark, "")):
                return None
            answers = [answer.removeprefix(before + mark) for answer in answers]
            return SimpleNamespace(sides=answers, prompt=before + mark)
        elif strings and isinstance(asked, str) and not as_chat:
            return SimpleNamespace(sides=answers, prompt=asked)
        else:
            sides = [conversation(answer) for answer in answers]
            roles = {side[0]["role"] for side, answer in zip(sides, answers, strict=True) if isinstance(answer, list)}
            if asked is not None and roles.isdisjoint(("user", "system", "developer")):
                sides = [conversation(asked, "user") + side for side in sides]
        inner = [unpacked(one.pop("tools", None)) for side in sides for one in side if one["role"] == "system"]
        if row.get("system") and sides[0][0]["role"] != "system":
            sides = [conversation(row["system"], "system") + side for side in sides]
        tools = next((some for some in (row.get("tools"), *inner) if some and isinstance(some, list)), read.tools)
        kwargs = {**read.chat_template_kwargs, **(row.get("chat_template_kwargs") or {})}
        return SimpleNamespace(sides=sides, prompt=None, tools=tools, kwargs=kwargs)
    return None


def layout(template, messages, means):
    """The text; and of each message who speaks, where in the text its header and its words begin, and its turn ends."""
    if means.prompt is not None:
        answer = messages.rstrip() if messages.rstrip().endswith("</s>") else messages + "</s>"
        text, at = means.prompt + answer, len(means.prompt)
        return text, [("assistant", at, at, len(text))]
    unthinking = "" if means.kwargs.get("enable_thinking", True) else "<think>\n\n</think>\n\n"
    opened = {t.OPENS_THINKING: "<think>", t.TOOLS: unthinking}.get(template, "")  # the end of the prompt to generate
    text, places = "<s>" if template == t.LLAMA3 else "", []
    if template == t.TOOLS and means.tools:
        tools = "".join(json.dumps(tool, ensure_ascii=False) for tool in means.tools)
        text = f"<|im_start|>system\nTools:{tools}<|im_end|>\n"
    for message in messages:
        role, start, thought = message["role"], len(text), message.get("reasoning_content")
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n" if template == t.LLAMA3 else f"<|im_start|>{role}\n"
        thinking = f"<think>{thought}</think>" if template == t.TOOLS and thought else ""
        said = thinking + (message["content"].strip() if template == t.LLAMA3 else message["content"])
        for call in (call["function"] for call in message["tool_calls"]):
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            said += f"<tool_call>{call.get('name', '')} {arguments}</tool_call>"
        words = len(text) + (len(opened) if said.startswith(opened) else 0)
        text += said + ("<|eot_id|>" if template == t.LLAMA3 else "<|im_end|>\n")
        places.append((role, start, words, len(text.rstrip("\n"))))
    return text, places


def encoded(template, tokenizer, means, turns):
    """Of each side all tokens with whether they count, up to the last that does; where in them the last reply and its
    header begin; how many come before the first question; whether both sides have the same prompt.
    """
    found = []
    befores = [side[:-1] for side in means.sides] if means.prompt is None else ["", ""]
    shared, same = [a == b for a, b in zip(*befores, strict=False)], befores[0] == befores[1]
    first = ([*shared, False] if turns == "last" else [False]).index(False)  # the first message that may count
    for side in means.sides:
        text, places = layout(template, side, means)
        asked = next((place for place in places[:-1] if place[0] not in ("system", "developer")), ("user", 0, 0))
        header = places[-1][1] if asked[0] == "user" else 0  # 0: it is not said what may be kept
        spans = [place[2:] for place in places[first:] if place[0] == "assistant"]
        spans[-1] = (spans[-1][0], len(text) if turns == "last" else spans[-1][1])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        names = tokenizer.convert_ids_to_tokens(ids)
        data = [name.encode() if name in SPECIALS else bytes(BYTES[letter] for letter in name) for name in names]
        assert b"".join(data) == text.encode()
        ends = list(accumulate(map(len, data)))
        marks, *spans = ([len(text[:at].encode()) for at in pair] for pair in ((header, asked[2]), *spans))
        placed = zip([0, *ends], ends, strict=False)
        counts = [int(any(start < b and a < end for a, b in spans)) for start, end in placed]
        answer, header, keep = (sum(end <= at for end in ends) for at in (spans[-1][0], *marks))
        tokens = list(zip(ids, counts, strict=True))
        found.append(SimpleNamespace(tokens=tokens, answer=answer, header=header, keep=keep))
    first = min(side.answer for side in found)
    same = same and len({tuple(token for token, _ in side.tokens[:first]) for side in found}) == 1
    for side in found:
        side.same_prompt = same
        if same:
            side.tokens[first : side.answer] = [(token, 1) for token, _ in side.tokens[first : side.answer]]
            side.answer = first
        side.tokens = trimmed(side.tokens)
    return found


def trimmed(tokens):  # after the last that counts
    return tokens[: max((i for i, (_, counts) in enumerate(tokens, start=1) if counts), default=0)]


def is_dropped(sides, limit, mode):
    """Whether a pair is not used, where truncation takes nothing or the end."""

    def counted(stop, own):
        starts = [max(side.answer * own, 1) for side in sides]
        cuts = [side.tokens[start:stop] for side, start in zip(sides, starts, strict=True)]
        return [[token for token, counts in cut if counts] for cut in cuts]

    all_of_it, replies, whole = counted(limit, False), counted(limit, True), counted(WHOLE, True)
    equal = all_of_it[0] == all_of_it[1] or (replies[0] == replies[1] and whole[0] != whole[1])
    return equal or not all(replies) or (mode == "drop" and any(len(side.tokens) > limit for side in sides))


def check_kept(found, sides, limit, mode):
    assert all(0 < len(tokens) <= limit for tokens in found)
    if mode != "keep_answer" or all(len(side.tokens) <= limit for side in sides):
        assert not is_dropped(sides, limit, mode), "should have been dropped"
        assert found == [trimmed(side.tokens[:limit]) for side in sides]
        return
    keep = max(
        1, *(side.keep for side in sides if side.keep <= limit // 2), *(side.header == side.answer for side in sides)
    )
    spared = 0 if sides[0].same_prompt else limit // 4
    fit = all(len(side.tokens) - side.header + keep + spared <= limit for side in sides)
    if fit and all(side.header == side.answer for side in sides):  # strings, of which tokens go alone
        assert max(map(len, found)) == limit, "more is cut than has to be"
    begins = []  # where in each side the last reply may begin
    for tokens, side in zip(found, sides, strict=True):
        prompt, reply = side.tokens[: side.answer], side.tokens[side.answer :]
        whole = len(tokens) - len(reply)
        begins.append({i for i in ([whole] if fit or len(tokens) < limit else range(limit))
                       if tokens[i:] == reply[: len(tokens) - i] and (tokens[i - 1 : i] == prompt[-1:] or i == 1)
                       and all(token in rest for rest in [iter(prompt)] for token in tokens[:i])})  # fmt: skip
        assert begins[-1], "not a part of the prompt and the start of the reply, or not all of a reply that fits"
    assert not sides[0].same_prompt or any(found[0][:i] == found[1][:i] for i in begins[0] & begins[1]), "two prompts"


# Words of Python's exceptions; those of a template's are its own.
OURS = re.compile(r"(?<!the chat template refuses the messages: )\b\w+Error\b|Traceback|NoneType|object has no attr")


def load(path, lines, tokenizer, read, limit, mode, turns):
    """The rows by their lines, and the lines that were skipped."""
    path.write_bytes(b"\n".join(lines))
    skipped = path.with_suffix(".skipped")
    skipped.write_text("")
    try:
        dataset = DPODataset(path, tokenizer, limit, assistant_turns=turns, truncation_mode=mode, read=read,
                             on_bad_line="skip", skipped_path=skipped, cache_dir=path.parent)  # fmt: skip
    except DataError:  # no pair is left
        dataset = None
    told = {entry["line"]: entry for entry in map(json.loads, skipped.read_text("utf-8").split("\n")[:-1])}
    filled = {at for at, line in enumerate(lines, start=1) if line.strip()}
    rows = {row["line"]: row for row in dataset.rows} if dataset else {}
    if dataset:
        assert (len(rows), len(told)) == (len(dataset), dataset.report.skipped)
        assert len(filled) == len(rows) + len(told) + sum(dataset.report.dropped.values())
    assert sorted([*rows, *told]) == sorted({*rows, *told} & filled)
    return rows, told


def escaping(path, lines, *options):
    """Lines whose loading raises something else than that none is left."""
    try:
        load(path, lines, *options)
    except Exception:
        halves = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        return [line for half in halves for line in escaping(path, half, *options)] if len(lines) > 1 else lines
    return []


def check_line(at, line, means, loads, template, tokenizer):
    """What became of a line."""
    (rows, (told, *others)) = [kept for kept, _ in loads], [skipped.get(at) for _, skipped in loads]
    assert all(entry == told for entry in others)
    if told:
        assert told["text"] == line.decode("utf-8", "replace").rstrip("\r")
        assert told["where"].endswith(f", line {at}")
        assert " " in told["reason"].strip()
        assert not OURS.search(told["reason"]), told["reason"]
        return "refused"
    for (limit, mode, turns), row in zip(LOADS, (kept.get(at) for kept in rows), strict=True):
        sides = encoded(template, tokenizer, means, turns) if means else []
        if means and row:
            found = [list(zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True)) for side in SIDES]
            check_kept(found, sides, limit, mode)
        elif means and (mode != "keep_answer" or all(len(side.tokens) <= limit for side in sides)):
            assert is_dropped(sides, limit, mode), f"dropped with {limit, mode, turns}"
    return "dropped" if at not in rows[0] else "kept" if means else "unclear"


def fuzz(folder, count, seed=0, some=slice(None)):
    """How many lines became what; and what is wrong."""
    became, wrong, rng = Counter(), [], random.Random(seed)
    total = sum(len(good) for _, _, good in groups())
    for i, (template, read, good) in enumerate(groups()[some]):
        bad = [mutated(rng.choice(good), rng) for _ in range(-(-count * len(good) // total))]
        lines = b"\n".join([*(json.dumps(line).encode() for line in good), *bad]).split(b"\n")
        if template is None:  # without one no conversation can be read
            lines = [line for line in lines if getattr(meaning(line, read), "prompt", "") is not None]
            lines = [line for line in lines if not re.search(b"system|tools|chat_template_kwargs", line)]
        path, tokenizer = folder / f"{i}.jsonl", make_tokenizer(template)
        raising = escaping(path, lines, tokenizer, read, *LOADS[0])
        wrong += [f"{line!r} raises" for line in raising]
        lines = [line for line in lines if line not in raising]
        loads = [load(path, lines, tokenizer, read, *how) for how in LOADS]
        for at, line in ((at, line) for at, line in enumerate(lines, start=1) if line.strip()):
            try:
                now = check_line(at, line, meaning(line, read), loads, template, tokenizer)
                assert now != "refused" or at > len(good), f"a good line is refused: {loads[0][1][at]['reason']}"
                became[now] += 1
            except (AssertionError, LookupError) as error:
                wrong.append(f"{line!r} ({i}): {error}")
    return became, wrong


def test_each_line_is_refused_or_counts_what_a_second_way_counts(tmp_path):
    became, wrong = fuzz(tmp_path, COUNT, SEED)
    print(dict(became))
    assert not wrong, f"{len(wrong)} lines, among them " + "\n".join(wrong[:5])
    assert became["unclear"] < 0.1 * became["kept"]


@pytest.mark.parametrize(("how", "wrong"), [
    (HOW[0], lambda ids, mask: (ids, [*mask[1:], 1])), (HOW[0], lambda ids, mask: (ids, [1] * len(ids))),
    (HOW[1], lambda ids, mask: (ids[:-1], mask[:-1])), (HOW[1], lambda ids, mask: (ids[1:], mask[1:])),
    (HOW[2], lambda ids, mask: (ids[1:], mask[1:])), (HOW[3], lambda ids, mask: (ids[:-1], mask[:-1])),
])  # fmt: skip
def test_a_wrong_mask_is_noticed(tmp_path, monkeypatch, how, wrong):
    def broken(pair, tokenizer, *options):
        made = right(pair, tokenizer, *options)
        ids, mask = wrong(made.rejected.input_ids, made.rejected.mask)
        changed = replace(made, rejected=replace(made.rejected, input_ids=ids, mask=mask))
        return changed if (options[0], options[2]) == how else made

    right = encoding.encode
    monkeypatch.setattr(encoding, "encode", broken)
    assert fuzz(tmp_path, 0, some=slice(2, 3))[1]
