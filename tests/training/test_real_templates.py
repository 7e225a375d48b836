"""Chat templates of real model families, as TRL carries them: the replies are found, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trl
from templates import make_tokenizer, say

from dpo_kernels.training import DataError
from dpo_kernels.training.encoding import encode
from dpo_kernels.training.formats import ChatPair

FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = re.compile(
    r"<\|[\w\-./ ]{1,40}\|>|<｜[^｜]{1,40}｜>|<start_of_turn>|<end_of_turn>|<turn\|>|<\|turn>|\[/?INST\]"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
CONVERSATIONS = {
    "one turn": say("Hello?", "Good."),
    "two turns": say("Hello?", "First one.", "And now?", "Good."),
    "system": say("Hello?", "Good.", system="Be short."),
    "thinking": say("Hello?", "<think>\nhm\n</think>\n\nGood."),
    "a call": [*say("Hello?"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
               {"role": "tool", "name": "weather", "content": "And now?"}, {"role": "assistant", "content": "Good."}],
}  # fmt: skip


def tokenizer_of(path):
    source = path.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(source)
    if specials := sorted(set(SPECIAL.findall(source))):
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def runs(encoded, tokenizer):
    found, before = [], 0
    for token, counts in zip(encoded.input_ids, encoded.mask, strict=True):
        if counts:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = counts
    return [tokenizer.decode(run) for run in found]


def test_there_are_templates():
    assert len(FILES) > 50


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_replies_and_nothing_else(path):
    tokenizer, understood, refused = tokenizer_of(path), 0, {}
    for name, messages in CONVERSATIONS.items():
        other = [*messages[:-1], {"role": "assistant", "content": "Bad."}]
        for turns in ("all", "last"):
            try:
                pair = encode(ChatPair(messages, other), tokenizer, 10_000, turns)
            except DataError as error:  # a template may have no place for a role, a call or for thinking
                refused[name] = str(error)
                continue
            understood += 1
            assert not pair.dropped
            found = runs(pair.chosen, tokenizer)
            assert "Good." in found[-1], (name, turns, found)
            assert not re.search(r"Hello\?|And now\?|Be short", "".join(found)), (name, turns, found)
            assert "".join(found).count("None") == 0, (name, turns, found)
            if turns == "all" and name == "two turns" and "generation" not in tokenizer.chat_template:
                assert len(found) == 2, found
                assert "First one." in found[0]
            if turns == "all" and name == "a call" and "generation" not in tokenizer.chat_template:
                assert "weather" in found[0]
                assert "Lima" in found[0]
            assert runs(pair.rejected, tokenizer)[-1].replace("Bad.", "Good.") == found[-1] or name == "thinking"
    assert understood >= 2, refused
    known = r"refuses the messages|does not read|leaves out|marks \d+ replies|cannot be told apart\. Turn thinking on"
    assert all(re.search(known, told) for told in refused.values()), refused
    assert not {"one turn", "two turns"} & set(refused), refused
