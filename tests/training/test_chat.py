"""Which tokens are the assistant's: with every shape of template, its text and its end-of-turn token, nothing else."""

from __future__ import annotations

import pytest
import templates as t
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import make_tokenizer, say
from tokenizers import processors

from dpo_kernels.training import DataError
from dpo_kernels.training.chat import render
from dpo_kernels.training.chat_template import Template, check_template
from dpo_kernels.training.encoding import check_tokenizer
from dpo_kernels.training.encoding import encode as encode_pair
from dpo_kernels.training.formats import ChatPair

TWO_TURNS = say("Hello?", "I am fine.", "What is 2 + 2?", "It is 4.")


def encode(messages, tokenizer, **options):
    """The chosen side of a pair whose other side answers otherwise."""
    other = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}!"}]
    return encode_pair(ChatPair(messages, other), tokenizer, 10_000, **options).chosen


def counted(tokenizer, messages, **options):
    """The texts that the mask counts, a string a run."""
    encoded = encode(messages, tokenizer, **options)
    runs, before = [], 0
    for token, counts in zip(encoded.input_ids, encoded.mask, strict=True):
        if counts:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        pytest.param(t.CHATML, "<|im_end|>", id="chatml"),
        pytest.param(t.LLAMA3, "<|eot_id|>", id="llama3"),
        pytest.param(t.GEMMA, "<end_of_turn>", id="gemma"),
        pytest.param(t.MARKED, "<|im_end|>", id="generation-markers"),
        pytest.param(t.STRIPS_THINKING, "<|im_end|>", id="strips-thinking-but-there-is-none"),
        pytest.param(t.NO_GENERATION_PROMPT, "<|im_end|>", id="no-generation-prompt"),
    ],
)
def test_replies_and_their_end_of_turn_tokens(template, end):
    tokenizer = make_tokenizer(template)
    assert counted(tokenizer, TWO_TURNS) == [f"I am fine.{end}", f"It is 4.{end}"]
    (last,) = counted(tokenizer, TWO_TURNS, assistant_turns="last")
    assert last.rstrip("\n") == f"It is 4.{end}"
    assert counted(tokenizer, say("你好？", "今天晴天 😀。")) == [f"今天晴天 😀。{end}"]


def test_mistral_counts_the_reply_behind_the_instruction():
    tokenizer = make_tokenizer(t.MISTRAL)
    assert [text.strip() for text in counted(tokenizer, TWO_TURNS)] == ["I am fine.</s>", "It is 4.</s>"]


def test_mistral_moves_the_system_message_and_its_replies_are_found():
    tokenizer = make_tokenizer(t.MISTRAL)
    messages = say("Hello?", "I am fine.", "What is 2 + 2?", "It is 4.", system="Be brief.")
    assert [text.strip() for text in counted(tokenizer, messages)] == ["I am fine.</s>", "It is 4.</s>"]
    assert [text.strip() for text in counted(tokenizer, messages, assistant_turns="last")] == ["It is 4.</s>"]


def test_replies_are_found_where_thinking_was_taken_out_of_them():
    tokenizer = make_tokenizer(t.STRIPS_THINKING)
    messages = say("Hello?", "<think>hm</think>\nI am fine.", "What is 2 + 2?", "<think>2, 3</think>\nIt is 4.")
    whole = "<think>2, 3</think>\nIt is 4.<|im_end|>"
    assert counted(tokenizer, messages) == ["I am fine.<|im_end|>", whole]
    assert counted(tokenizer, messages, assistant_turns="last") == [whole + "\n"]
    assert counted(tokenizer, messages[:2]) == ["<think>hm</think>\nI am fine.<|im_end|>"]


def test_a_token_that_crosses_into_the_reply_counts_and_shifts_nothing():
    """Without special tokens ': I' may be one token; everything else stays where it is."""
    tokenizer = make_tokenizer(t.PLAIN)
    text, spans, _ = render(TWO_TURNS, Template(tokenizer))
    assert [text[a:b] for a, b in spans] == ["I am fine.", "It is 4."]
    merged = tokenizer.tokenize("assistant: It")
    assert not any(token == "It" for token in merged), merged  # this tokenizer does merge across the boundary
    first, second = counted(tokenizer, TWO_TURNS)
    assert first.endswith("I am fine.") or first.rstrip("\n").endswith("I am fine.")
    assert second.rstrip("\n").endswith("It is 4.")
    assert "2 + 2" not in first + second


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=2
    ),
    template=st.sampled_from([t.CHATML, t.LLAMA3, t.MARKED, t.PLAIN]),
)
def test_any_text_is_found(turns, template):
    """What is counted, decoded, holds each reply, and every token outside holds no character of one."""
    turns = [" ".join(turn.split()) or "x" for turn in turns[: len(turns) // 2 * 2]]
    if any(special in turn for turn in turns for special in t.SPECIALS):
        return
    messages = say(*turns)
    tokenizer = TOKENIZERS.setdefault(template, make_tokenizer(template))
    text, spans, _ = render(messages, Template(tokenizer))
    assert len(spans) == len(turns) // 2
    for (a, b), reply in zip(spans, turns[1::2], strict=True):
        assert text[a:b].startswith(reply)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    encoded = encode(messages, tokenizer)
    inside = {k for a, b in spans for k in range(a, b)}
    for (a, b), counts in zip(offsets, encoded.mask, strict=False):
        assert bool(counts) == bool(inside & set(range(a, b)))


TOKENIZERS: dict = {}


def test_a_template_that_refuses_the_messages():
    tokenizer = make_tokenizer(t.GEMMA)
    with pytest.raises(DataError, match=r"the chat template refuses the messages: .*No system role here"):
        encode(say("Hi", "Hello", system="Be kind."), tokenizer)


@pytest.mark.parametrize("reply", ["assistant", "s", "", "<|im"])
def test_a_reply_that_reads_like_its_header(reply):
    assert counted(make_tokenizer(t.NO_GENERATION_PROMPT), say("Hello?", reply)) == [f"{reply}<|im_end|>"]


@pytest.mark.parametrize("template", [t.CHATML, t.PLAIN])
def test_white_space_counts_with_tokenizers_that_trim_offsets(template):
    """Such a tokenizer gives a token of white space no width."""
    messages = say("Code?", "if x:\n        return   1\n  # done", "More?", "  a\n\n\nb")
    plain, trimming = make_tokenizer(template), make_tokenizer(template)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = trimming("a   b\n\n  c", return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)
    one, other = encode(messages, plain), encode(messages, trimming)
    assert one == other


def test_a_reply_marked_in_pieces():
    template = t.MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else",
        "{{ m['content'] }}{% endgeneration %}!{% generation %}<|im_end|>{% endgeneration %}{% else",
    )
    tokenizer = make_tokenizer(template)
    assert counted(tokenizer, TWO_TURNS, assistant_turns="last") == ["It is 4.", "<|im_end|>"]
    assert len(counted(tokenizer, TWO_TURNS)) == 4


def test_markers_that_miss_a_reply_are_refused():
    template = t.MARKED.replace("m['role'] == 'assistant' %}{% generation", "m['role'] == 'robot' %}{% generation")
    with pytest.raises(DataError, match=r"marks 0 replies .* the conversation has 2"):
        encode(TWO_TURNS, make_tokenizer(template))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, r"no single chat template \(found none\); give one with --chat_template"),
        ({"chat_template": {"a": t.CHATML, "b": t.CHATML}}, r"found several: \['a', 'b'\]"),
        ({"pad_token": None}, r"no pad token; name one with --pad_token TOKEN .*'</s>'"),
        ({"is_fast": False}, r"gives no character offsets; load a fast tokenizer"),
    ],
)
def test_what_a_tokenizer_must_have(change, message, monkeypatch):
    tokenizer = make_tokenizer()
    for name, value in change.items():
        if name == "is_fast":
            monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
        else:
            setattr(tokenizer, name, value)
    check = check_template if "chat_template" in change else check_tokenizer
    with pytest.raises(ValueError, match=message):
        check(tokenizer)
