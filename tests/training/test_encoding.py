"""Truncation: what each mode leaves of a pair, and that the answer survives; where answers begin; plain strings."""

from __future__ import annotations

import pytest
import templates as t
from templates import make_tokenizer, say
from tokenizers import processors

from dpo_kernels.training import encoding
from dpo_kernels.training.encoding import encode
from dpo_kernels.training.formats import ChatPair, TextPair


def pair(*turns, chosen="Yes, it is.", rejected="No, it is not.", system=None):
    """Turns of user and assistant, the last one the user's, and two answers."""
    return ChatPair(say(*turns, chosen, system=system), say(*turns, rejected, system=system))


def texts(encoded, tokenizer):
    return [tokenizer.decode(side.input_ids) for side in (encoded.chosen, encoded.rejected)]


def counted(side, tokenizer):
    return tokenizer.decode(side.counted)


LONG = "one two three four five six seven eight nine ten " * 8


def test_what_fits_is_left_alone():
    tokenizer = make_tokenizer()
    made = pair("Hello?", "Hi.", "Is it?", system="Be short.")
    whole = encode(made, tokenizer, 1000)
    longest = max(len(side) for side in (whole.chosen, whole.rejected))
    for mode in encoding.TRUNCATION_MODES:
        again = encode(made, tokenizer, longest, truncation_mode=mode)
        assert again == whole
        assert (again.dropped, again.cut_prompt, again.cut_answer) == ("", False, False)
    assert whole.lengths[0] + whole.lengths[1] == len(whole.chosen)


def test_whole_turns_go_first_and_the_system_message_stays():
    tokenizer = make_tokenizer()
    made = pair(LONG, "Old.", "Middle?", "Still.", "Is it?", system="Be short.")
    kept = pair("Middle?", "Still.", "Is it?", system="Be short.")
    size = len(encode(kept, tokenizer, 1000).rejected)
    for max_length in (size, size + 20):
        encoded = encode(made, tokenizer, max_length)
        assert texts(encoded, tokenizer) == texts(encode(kept, tokenizer, 1000), tokenizer)
        assert (encoded.cut_prompt, encoded.cut_answer, encoded.dropped) == (True, False, "")
    last = pair("Is it?", system="Be short.")
    encoded = encode(made, tokenizer, size - 1)
    assert texts(encoded, tokenizer) == texts(encode(last, tokenizer, 1000), tokenizer)
    assert counted(encoded.chosen, tokenizer) == "Yes, it is.<|im_end|>"


def test_then_the_oldest_tokens_of_the_question_go_on_both_sides_alike():
    tokenizer = make_tokenizer()
    made = pair(LONG + "Is it?", rejected="No. " * 9, system="Be short.")
    encoded = encode(made, tokenizer, 110)
    chosen, rejected = texts(encoded, tokenizer)
    start = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n"
    assert chosen.startswith(start)
    question = chosen[len(start) :].split("<|im_end|>")[0]
    assert (LONG + "Is it?").endswith(question)
    assert 0 < len(question) < len(LONG)
    assert rejected.startswith(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n")
    assert len(encoded.rejected) == 110
    assert (encoded.cut_prompt, encoded.cut_answer, encoded.dropped) == (True, False, "")


def test_an_answer_too_long_by_itself_is_cut_at_its_end_beside_a_quarter_of_prompt():
    tokenizer = make_tokenizer()
    made = pair("Old?", "Old.", LONG + "Is it?", chosen="Yes. " * 100)
    encoded = encode(made, tokenizer, 80)
    assert len(encoded.chosen) == 80
    assert (encoded.cut_prompt, encoded.cut_answer, encoded.dropped) == (True, True, "")
    prompt = encoded.chosen.input_ids[: encoded.chosen.answer]
    assert encoded.rejected.input_ids[: encoded.rejected.answer] == prompt
    text = tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("Is it?<|im_end|>\n<|im_start|>assistant\n")
    assert len(prompt) > 20
    assert ("Yes. " * 100).startswith(tokenizer.decode(encoded.chosen.reply))
    assert counted(encoded.rejected, tokenizer) == "No, it is not.<|im_end|>"


def test_a_system_message_that_leaves_no_room_goes_too():
    tokenizer = make_tokenizer()
    encoded = encode(pair("Is it?", system=LONG), tokenizer, 60)
    assert counted(encoded.chosen, tokenizer) == "Yes, it is.<|im_end|>"
    assert encoded.cut_prompt
    assert "Is it?" in texts(encoded, tokenizer)[0]


def test_earlier_turns_that_the_template_needs_are_cut_by_tokens():
    """It refuses the conversation that whole turns would leave."""
    refuses = "{% if messages[0]['content'] == 'Is it?' %}{{ raise_exception('no') }}{% endif %}" + t.CHATML
    tokenizer = make_tokenizer(refuses)
    encoded = encode(pair("Hello " + LONG, "Hi.", "Is it?"), tokenizer, 90)
    chosen, _ = texts(encoded, tokenizer)
    assert chosen.startswith("<|im_start|>user\n")
    assert chosen.endswith(
        "Hi.<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nYes, it is.<|im_end|>"
    )
    assert encoded.cut_prompt


def test_a_longer_answer_of_several_messages_loses_its_oldest_tokens_before_its_reply():
    """Chosen calls a tool on its way, so that both sides share the question alone."""
    tokenizer = make_tokenizer(t.TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    asked = say("Warm?")
    chosen = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": LONG},
              {"role": "assistant", "content": "Yes."}]  # fmt: skip
    encoded = encode(ChatPair(chosen, [*asked, {"role": "assistant", "content": "No."}]), tokenizer, 90)
    assert encoded.dropped == ""
    assert len(encoded.chosen) <= 90
    assert tokenizer.decode(encoded.chosen.reply) == "Yes.<|im_end|>"
    assert texts(encoded, tokenizer)[1].endswith("No.<|im_end|>")


@pytest.mark.parametrize("mode", ["keep_answer", "keep_start"])
@pytest.mark.parametrize("max_length", range(4, 60, 5))
def test_a_pair_is_used_only_if_its_last_replies_are_there_and_differ(mode, max_length):
    tokenizer = make_tokenizer()
    made = pair("Hello?", "Hi there.", "Is it? " * 4, chosen="It is what it is, yes.", rejected="It is what it is, no.")
    encoded = encode(made, tokenizer, max_length, truncation_mode=mode)
    sides = (encoded.chosen, encoded.rejected)
    assert all(len(side) <= max_length for side in sides)
    if not encoded.dropped:
        assert all(side.reply for side in sides)
        assert sides[0].reply != sides[1].reply
    else:
        expected = encoding.EQUAL_ANSWERS if all(side.reply for side in sides) else encoding.WITHOUT_REPLY
        assert encoded.dropped == expected
    if mode == "keep_start":
        whole = encode(made, tokenizer, 1000)
        assert sides[0].input_ids == whole.chosen.input_ids[: len(sides[0])]


def test_replies_that_have_become_equal_are_dropped_whatever_else_differs():
    tokenizer = make_tokenizer()
    start = "The same beginning of a long answer. " * 3
    chosen, rejected = say("a", "One.", "b", start + "Yes."), say("a", "Two.", "b", start + "No.")
    limit = len(encode(ChatPair(chosen, rejected), tokenizer, 1000).chosen) - 6
    assert encode(ChatPair(chosen, rejected), tokenizer, limit, truncation_mode="keep_start").dropped == "equal_answers"
    same = [*rejected[:-1], chosen[-1]]
    assert encode(ChatPair(chosen, same), tokenizer, 1000).dropped == ""  # earlier replies differ and count
    assert encode(ChatPair(chosen, same), tokenizer, 1000, "last").dropped == ""  # all behind what both share


def test_drop_leaves_out_what_is_too_long():
    tokenizer = make_tokenizer()
    encoded = encode(pair(LONG), tokenizer, 50, truncation_mode="drop")
    assert encoded.dropped == "too_long"
    assert encode(pair("Is it?"), tokenizer, 50, truncation_mode="drop").dropped == ""


def test_keep_start_drops_a_pair_whose_last_reply_is_gone_though_an_earlier_one_is_not():
    encoded = encode(pair("Hi?", "Hello there.", LONG), make_tokenizer(), 60, truncation_mode="keep_start")
    assert encoded.dropped == "without_reply"
    assert encoded.chosen.counted  # the earlier reply


def test_answers_begin_at_the_same_token_where_one_alone_merges_with_the_prompt():
    """': It' is one token of the plain template, ': No' is not."""
    tokenizer = make_tokenizer(t.PLAIN)
    encoded = encode(pair("Is it?", chosen="It is 4.", rejected="Zebra."), tokenizer, 1000)
    first = encoded.chosen.answer
    assert encoded.rejected.answer == first
    assert encoded.chosen.input_ids[:first] == encoded.rejected.input_ids[:first]
    assert tokenizer.decode(encoded.chosen.counted).strip() == "It is 4."
    assert tokenizer.decode(encoded.rejected.counted).strip() == "Zebra."
    assert encoded.rejected.mask[first] == encoded.chosen.mask[first] == 1
    assert tokenizer.decode(encoded.rejected.input_ids[first]) == " "


@pytest.mark.parametrize("adds", ["nothing", "bos", "bos-and-eos"])
def test_plain_strings_end_with_the_end_of_sequence_token_once(adds):
    tokenizer = make_tokenizer(None)
    if adds != "nothing":
        single = "<s> $A </s>" if adds == "bos-and-eos" else "<s> $A"
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    start = "" if adds == "nothing" else "<s>"
    for chosen in (" blue.", " blue.</s>"):
        encoded = encode(TextPair("The sky is", chosen, " loud."), tokenizer, 100)
        assert texts(encoded, tokenizer) == [f"{start}The sky is blue.</s>", f"{start}The sky is loud.</s>"]
        assert tokenizer.decode(encoded.chosen.counted) == " blue.</s>"
    cut = encode(TextPair(LONG, " blue.", " loud."), tokenizer, 30)
    assert tokenizer.decode(cut.chosen.counted) == " blue.</s>"
    assert texts(cut, tokenizer)[0].startswith(start)
    assert LONG.endswith(texts(cut, tokenizer)[0].removeprefix(start).removesuffix(" blue.</s>"))
    assert cut.cut_prompt
    none = encode(TextPair("", "blue", "loud"), tokenizer, 100)
    assert none.dropped == ""


def test_at_least_one_token_stands_before_an_answer_that_fills_everything():
    tokenizer = make_tokenizer(None)
    answer = encode(TextPair("", " blue sky" * 5, ""), tokenizer, 1000).lengths[1]
    encoded = encode(TextPair(LONG, " blue sky" * 5, " red"), tokenizer, answer)
    assert encoded.chosen.answer >= 1
    assert len(encoded.chosen) == answer


def test_strings_need_an_end_of_sequence_token():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end-of-sequence token.*--string_format chat"):
        encode(TextPair("a", "b", "c"), tokenizer, 100)


def test_lengths_are_those_before_truncation():
    tokenizer = make_tokenizer()
    made = pair(LONG + "Is it?")
    assert encode(made, tokenizer, 60).lengths == encode(made, tokenizer, 1000).lengths


@pytest.mark.parametrize("max_length", [60, 90, 120, 231])
@pytest.mark.parametrize("template", [t.CHATML, t.LLAMA3, t.TOOLS], ids=["chatml", "llama3", "tools"])
def test_both_sides_keep_the_same_prompt_whatever_does_not_fit(template, max_length):
    tokenizer = make_tokenizer(template)
    for chosen, rejected in (("Yes. " * 10, "No. " * 150), ("Yes. " * 150, "No."), ("Yes.", "No. " * 20)):
        encoded = encode(pair(LONG, chosen=chosen, rejected=rejected, system="Be short."), tokenizer, max_length)
        assert not encoded.dropped
        prompts = [side.input_ids[: side.answer] for side in (encoded.chosen, encoded.rejected)]
        assert prompts[0] == prompts[1]
        assert len(prompts[0]) > 5
        start = "<s>" if template == t.LLAMA3 else "<|im_start|>"
        assert tokenizer.decode(prompts[0]).startswith(start)


def test_the_beginning_of_sequence_stays_where_a_system_message_goes():
    tokenizer = make_tokenizer(t.LLAMA3)
    encoded = encode(pair("Is it? " * 30, system=LONG), tokenizer, 200)
    assert texts(encoded, tokenizer)[0].startswith("<s>")
    assert encoded.cut_prompt


def test_a_rendered_prompt_gets_no_second_beginning_and_an_answer_no_second_end():
    tokenizer = make_tokenizer(None)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>",)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    encoded = encode(TextPair("<s>The sky is", " blue.</s>\n", " loud."), tokenizer, 100)
    assert texts(encoded, tokenizer) == ["<s>The sky is blue.</s>", "<s>The sky is loud.</s>"]


def test_last_counts_what_the_assistant_says_behind_what_both_share():
    tokenizer = make_tokenizer(t.TOOLS)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    asked = say("Old?", "Old.", "Warm?")
    chosen = [*asked, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "24"},
              {"role": "assistant", "content": "Yes."}]  # fmt: skip
    encoded = encode(ChatPair(chosen, [*asked, {"role": "assistant", "content": "No."}]), tokenizer, 1000, "last")
    assert (
        counted(encoded.chosen, tokenizer)
        == '<tool_call>weather {"city": "Lima"}</tool_call><|im_end|>Yes.<|im_end|>\n'
    )
    assert counted(encoded.rejected, tokenizer) == "No.<|im_end|>\n"


def test_an_answer_whose_thinking_the_template_takes_out_is_told():
    strips = t.CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    encoded = encode(pair("Is it?", chosen="<think>hm</think>Yes."), make_tokenizer(strips), 1000)
    assert encoded.rewritten
    assert not encode(pair("Is it?", chosen=" <think>hm</think>Yes. "), make_tokenizer(), 1000).rewritten
