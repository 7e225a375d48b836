"""A line of each format, and the pair of conversations or strings that it means."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import templates as t
from templates import say

from dpo_kernels.training import ReadOptions

ASKED, GOOD, BAD = "Name a colour.", "Blue.", "A dog."
CHOSEN, REJECTED = say(ASKED, GOOD), say(ASKED, BAD)
PAIR = {"chosen": CHOSEN, "rejected": REJECTED}
SYSTEM = {"role": "system", "content": "Be short."}
ANSWERS = {"chosen": GOOD, "rejected": BAD}
REPLIES = {"chosen": CHOSEN[1:], "rejected": REJECTED[1:]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}},
}
CALLED = [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]},
          {"role": "tool", "name": "weather", "content": "24"}]  # fmt: skip
TOLD = {"prompt": CALLED, "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No idea."}]}  # fmt: skip
CALL_ALONE = {"prompt": CALLED[:1], "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
              "rejected": [{"role": "assistant", "content": "No idea."}]}  # fmt: skip
THOUGHTLESS = {side: [asked, {**reply, "content": f"<think>\n\n</think>\n\n{reply['content']}"}]
               for side, (asked, reply) in PAIR.items()}  # fmt: skip
EARLIER = say("Hi.", "Hello.")


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]


@dataclass(frozen=True)
class Case:
    """line: as it stands in a file. means: as TRL would have it, prompt apart; itself where TRL reads it."""

    name: str
    line: dict[str, Any]
    means: dict[str, Any] | None = None
    format: str = "whole conversations"
    read: ReadOptions = field(default_factory=ReadOptions)
    template: str = t.CHATML
    unused: tuple[str, ...] = ()

    @property
    def for_trl(self) -> dict[str, Any]:
        return self.line if self.means is None else self.means


CASES = [
    Case("whole conversations", PAIR),
    Case("with a system message", {side: [SYSTEM, *messages] for side, messages in PAIR.items()}),
    Case("prompt repeats the first message", {"prompt": ASKED, **PAIR, "score_chosen": 8.0}, PAIR,
         unused=("score_chosen",)),
    Case("prompt repeats the beginning", {"prompt": CHOSEN[:1], **PAIR}, PAIR),
    Case("messages repeats chosen", {"prompt": ASKED, "messages": CHOSEN, **PAIR}, PAIR),
    Case("prompt and replies as messages", {"prompt": CHOSEN[:1], **REPLIES}, format="prompt and answers as messages"),
    Case("prompt as messages, one message each", {"prompt": CHOSEN[:1], "chosen": CHOSEN[1], "rejected": REJECTED[1]},
         {"prompt": CHOSEN[:1], **REPLIES}, "prompt and answers as messages"),
    Case("prompt as a string, replies as messages", {"prompt": ASKED, **REPLIES}, PAIR,
         "prompt and answers as messages"),
    Case("strings", {"prompt": "The sky is", "chosen": " blue.", "rejected": " loud."}, format="strings"),
    Case("strings as chat", {"prompt": ASKED, **ANSWERS}, PAIR, "strings made messages",
         ReadOptions(string_format="chat")),
    Case("strings with a system column", {"system": "Be short.", "prompt": ASKED, **ANSWERS},
         {side: [SYSTEM, *messages] for side, messages in PAIR.items()}, "strings made messages"),
    Case("columns of one's own", {"question": ASKED, "good": GOOD, "bad": BAD, "id": 7},
         {"prompt": ASKED, **ANSWERS}, "strings",
         ReadOptions(columns={"prompt": "question", "chosen": "good", "rejected": "bad"}), unused=("id",)),
    Case("whole strings", {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
                           "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"}, format="whole strings"),
    Case("whole strings as chat", {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
                                   "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"}, PAIR,
         "whole strings made messages", ReadOptions(string_format="chat")),
    Case("ShareGPT", {"conversations": sharegpt(CHOSEN[:1]), "chosen": sharegpt(CHOSEN[1:])[0],
                      "rejected": sharegpt(REJECTED[1:])[0]}, PAIR, "ShareGPT"),
    Case("ShareGPT, whole", {side: sharegpt(messages) for side, messages in PAIR.items()}, PAIR),
    Case("messages and a rejected response", {"messages": CHOSEN, "rejected_response": BAD}, PAIR,
         "messages and a rejected response"),
    Case("messages and rejected messages", {"messages": CHOSEN, "rejected_messages": REJECTED}, PAIR,
         "messages and rejected messages"),
    Case("messages and answers as strings", {"messages": CHOSEN[:1], **ANSWERS}, PAIR, "messages and answers"),
    Case("messages and one message each", {"messages": CHOSEN[:1], "chosen": CHOSEN[1], "rejected": REJECTED[1]}, PAIR,
         "messages and answers"),
    Case("instruction", {"instruction": "Name", "input": "a colour.", "history": [["Hi.", "Hello."]],
                         "system": "Be short.", **ANSWERS},
         {"chosen": [SYSTEM, *EARLIER, *say("Name\na colour.", GOOD)],
          "rejected": [SYSTEM, *EARLIER, *say("Name\na colour.", BAD)]}, "instruction"),
    Case("ranked completions", {"context": CHOSEN[:1], "completions": [
        {"rank": 2, "completion": REJECTED[1:]}, {"rank": 0, "completion": CHOSEN[1:]},
        {"rank": 1, "completion": say("", "Warm.")[1:]}]}, PAIR, "ranked completions"),
    Case("torchtune", {"chosen_conversations": CHOSEN, "rejected_conversations": REJECTED}, PAIR, "torchtune"),
    Case("role and text", {side: [{"role": m["role"], "text": m["content"]} for m in messages]
                           for side, messages in PAIR.items()}, PAIR),
    Case("parts of text", {side: [{"role": m["role"], "content": [{"type": "text", "text": m["content"][:3]},
                                                                  {"type": "text", "text": m["content"][3:]}]}
                                  for m in messages] for side, messages in PAIR.items()}, PAIR),
    Case("conversations as JSON in strings", {side: json.dumps(messages) for side, messages in PAIR.items()}, PAIR),
    Case("tools and calls", {"tools": [TOOL], **TOLD}, format="prompt and answers as messages", template=t.TOOLS),
    Case("tools and calls as JSON in strings", {
        "tools": json.dumps([TOOL]), **TOLD,
        "prompt": [CALLED[0], {**CALLED[1], "tool_calls": json.dumps([CALL])}, CALLED[2]]},
        {"tools": [TOOL], **TOLD}, "prompt and answers as messages", template=t.TOOLS),
    Case("tools in the system message", {
        side: [{**SYSTEM, "tools": json.dumps([TOOL])}, *messages] for side, messages in PAIR.items()},
        {"tools": [TOOL], "chosen": [SYSTEM, *CHOSEN], "rejected": [SYSTEM, *REJECTED]}, template=t.TOOLS),
    Case("tools from an option", PAIR, {"tools": [TOOL], **PAIR}, read=ReadOptions(tools=[TOOL]), template=t.TOOLS),
    Case("a call without content", {
        "chosen": [CALLED[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [CALLED[0], {"role": "assistant", "content": "No idea."}]}, CALL_ALONE, template=t.TOOLS),
    Case("a function call, ShareGPT's", {
        "conversations": [{"from": "human", "value": "Warm?"}],
        "chosen": {"from": "function_call", "value": json.dumps(CALL["function"])},
        "rejected": {"from": "gpt", "value": "No idea."}}, CALL_ALONE, "ShareGPT", template=t.TOOLS),
    Case("reasoning", {"chosen": [CHOSEN[0], {**CHOSEN[1], "reasoning_content": "Sky."}], "rejected": REJECTED},
         {"prompt": CHOSEN[:1], "chosen": [{**CHOSEN[1], "reasoning_content": "Sky."}], "rejected": REJECTED[1:]},
         template=t.TOOLS),
    Case("chat_template_kwargs of a line", {"chat_template_kwargs": {"enable_thinking": False}, **THOUGHTLESS},
         template=t.TOOLS),
    Case("chat_template_kwargs of the command line", THOUGHTLESS,
         {"chat_template_kwargs": {"enable_thinking": False}, **THOUGHTLESS},
        read=ReadOptions(chat_template_kwargs={"enable_thinking": False}), template=t.TOOLS),
    Case("a developer's message", {side: [{"role": "developer", "content": "Be short."}, *messages]
                                   for side, messages in PAIR.items()}),
    Case("keys that are null", {side: [{**m, "name": None, "tool_calls": None} for m in messages]
                                for side, messages in PAIR.items()} | {"tools": None, "images": None}, PAIR),
    Case("a prompt that opens thinking", {"chosen": say(ASKED, f"<think>sky</think>{GOOD}"), "rejected": REJECTED},
         template=t.OPENS_THINKING),
    Case("a prompt that opens thinking, no thoughts", PAIR, template=t.OPENS_THINKING),
]  # fmt: skip
