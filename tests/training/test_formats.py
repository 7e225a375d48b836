"""Every format of a line: what is read of it, TRL's tokens and loss on the same pair, and what is refused."""

from __future__ import annotations

import copy
import json

import format_cases as f
import pytest
import templates as t
import trl
from datasets import Dataset
from format_cases import CASES
from helpers import EXAMPLE, slow
from templates import make_tokenizer, say

from dpo_kernels.training import DataError, DPOConfig, DPODataset, DPOTrainer, ReadOptions
from dpo_kernels.training.formats import FORMATS, ChatPair, TextPair, read_line
from dpo_kernels.training.small_model import make_small_model

SMALL = {"vocab_size": 500, "hidden_size": 64, "layers": 1}


@pytest.fixture(scope="module")
def small():
    """A policy, a reference that differs, so that a wrong token shows in the loss, and their tokenizer."""
    policy, tokenizer = make_small_model(EXAMPLE, seed=1, **SMALL)
    return policy, make_small_model(EXAMPLE, seed=2, **SMALL)[0], tokenizer


# A trainer of TRL's takes four seconds a case: here one of each kind, the others by `make thorough`.
SOME = (
    "whole conversations", "prompt and replies as messages", "strings", "instruction", "a function call, ShareGPT's",
    "ranked completions",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case if case.name in SOME else slow(case) for case in CASES], ids=lambda case: case.name
)
def test_trl_counts_the_same_tokens_and_gets_the_same_loss(case, small, tmp_path):
    policy, ref, tokenizer = small
    tokenizer.chat_template = case.template
    path = tmp_path / "pairs.jsonl"
    path.write_text((json.dumps(case.line) + "\n") * 2)
    dataset = DPODataset(
        path, tokenizer, 1000, assistant_turns="last", read=case.read, cache_dir=tmp_path / "cache"
    )  # fmt: skip
    assert list(dataset.report.formats) == [case.format]
    assert dataset.report.unused == case.unused
    common = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True,
              "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}  # fmt: skip
    theirs = trl.DPOTrainer(
        copy.deepcopy(policy), copy.deepcopy(ref), trl.DPOConfig(**common, bf16=False, max_length=None),
        train_dataset=Dataset.from_list([case.for_trl] * 2), processing_class=tokenizer,
    )  # fmt: skip
    ours = DPOTrainer(copy.deepcopy(policy), copy.deepcopy(ref), DPOConfig(**common), dataset)
    (item, row), losses = (dataset[0], theirs.train_dataset[0]), []
    for side in ("chosen", "rejected"):
        y = item[f"y_{side}"]
        assert tokenizer.decode(y[item[f"mask_{side}"]]) == tokenizer.decode(row[f"{side}_ids"])
        assert y[item[f"mask_{side}"]].tolist() == row[f"{side}_ids"]
    for trainer in (theirs, ours):
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - 0.6931472) > 1e-4


def test_every_format_has_a_case():
    made = {case.format.removesuffix(" made messages") for case in CASES}
    assert made == {form.name for form in FORMATS}


def test_ranked_completions_make_one_pair_or_all():
    ranked = next(case for case in CASES if case.name == "ranked completions").line
    (pair,) = read_line(ranked, ReadOptions()).pairs
    assert (pair.chosen[-1]["content"], pair.rejected[-1]["content"]) == (f.GOOD, f.BAD)
    pairs = read_line(ranked, ReadOptions(ranked_pairs="all")).pairs
    assert [(p.chosen[-1]["content"], p.rejected[-1]["content"]) for p in pairs] == [
        (f.GOOD, "Warm."), (f.GOOD, f.BAD), ("Warm.", f.BAD),
    ]  # fmt: skip
    tied = {**ranked, "completions": [{**c, "rank": min(c["rank"], 1)} for c in ranked["completions"]]}
    assert len(read_line(tied, ReadOptions(ranked_pairs="all")).pairs) == 2


def test_the_lines_settings_come_before_the_command_lines():
    line = {"tools": [f.TOOL], "chat_template_kwargs": {"enable_thinking": True}, **f.PAIR}
    options = ReadOptions(tools=[{"name": "other"}], chat_template_kwargs={"enable_thinking": False, "style": "a"})
    (pair,) = read_line(line, options).pairs
    assert pair.tools == [f.TOOL]
    assert pair.template_kwargs == {"enable_thinking": True, "style": "a"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("\n\nHuman: a\n\nAssistant:", " The sky", " The sea"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e"),
        ("\n\nHuman: a\n\nAssistant:", " d\n\nHuman: x\n\nAssistant: y", " e\n\nHuman: x\n\nAssistant: y"),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b", "c"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "b", "c"),
        ("[INST] a [/INST]", " b", " c"),
        ("### Instruction:\na\n### Response:", "\nb", "\nc"),
        ("问：你好\n回答：", "好", "不"),
        ("\n\nHuman: a\n\nAssistant:", " Note: b", " Note: c"),
    ],
)
def test_whole_strings_part_at_the_last_turn_that_they_share(prompt, chosen, rejected):
    (pair,) = read_line({"chosen": prompt + chosen, "rejected": prompt + rejected}, ReadOptions()).pairs
    assert pair == TextPair(prompt, chosen, rejected)


def test_a_transcript_becomes_messages():
    text = "\n\nHuman: Hi: there\nfriend\n\nAssistant: Hello.\n\nHuman: A colour?\n\nAssistant: "
    (pair,) = read_line({"chosen": text + f.GOOD, "rejected": text + f.BAD}, ReadOptions(string_format="chat")).pairs
    assert pair == ChatPair(
        say("Hi: there\nfriend", "Hello.", "A colour?", f.GOOD), say("Hi: there\nfriend", "Hello.", "A colour?", f.BAD)
    )


def test_an_answer_that_is_json_stays_a_string():
    line = {"prompt": "As JSON?", "chosen": '[{"role": "admin"}]', "rejected": '{"a": 1}'}
    assert read_line(line, ReadOptions()).pairs == [TextPair(line["prompt"], line["chosen"], line["rejected"])]


REFUSED = [
    pytest.param({**f.PAIR, "images": ["cat.png"]}, "'images' is there, and only text", id="images"),
    pytest.param({**f.PAIR, "video": "cat.mp4"}, "'video' is there, and only text", id="video"),
    pytest.param({**f.PAIR, "chosen": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                                       f.CHOSEN[1]]},
                 r"chosen\[0\]\['content'\]\[0\] is a part of type 'image_url'; only text", id="image-part"),
    pytest.param({**f.PAIR, "chosen": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}, f.CHOSEN[1]]},
                 r"is no part of text: found \['txt', 'type'\], type 'text'", id="part-without-text"),
    pytest.param({**f.PAIR, "prompt": "Another"}, "'prompt' is a string that repeats none of", id="other-prompt"),
    pytest.param({**f.PAIR, "prompt": say("Another")}, "'prompt' is not how chosen and rejected begin",
                 id="other-prompt-messages"),
    pytest.param({**f.PAIR, "messages": say("Another", "Yes.")}, "'messages' is neither chosen nor rejected",
                 id="other-messages"),
    pytest.param({"question": "a", **f.REPLIES}, r"fits none of the known formats: found chosen \(a list\), rejected",
                 id="answers-without-a-prompt"),
    pytest.param({"context": f.CHOSEN[:1], **f.REPLIES}, "fits none of the known formats",
                 id="answers-beside-a-context"),
    pytest.param({"chosen_conversations": f.CHOSEN[1:], "rejected_conversations": f.REJECTED[1:]},
                 "'chosen' is a conversation in which the user says nothing: the prompt is missing",
                 id="torchtune-alone"),
    pytest.param({"prompt": f.CHOSEN[:1], "chosen": f.CHOSEN, "rejected": f.REJECTED[1:]},
                 "'rejected' is a conversation in which the user says nothing", id="one-side-without-its-prompt"),
    pytest.param({"prompt": "q", **{side: [{"role": None, "content": "b"}] for side in f.PAIR}},
                 r"chosen\[0\]\['role'\] is null", id="replies-without-a-role"),
    pytest.param({"chosen": [{**f.CHOSEN[0], "images": ["cat.png"]}, f.CHOSEN[1]], "rejected": f.REJECTED},
                 r"chosen\[0\] has 'images', which is not trained on; only text", id="images-in-a-message"),
    pytest.param({"chosen": [f.CHOSEN[0], {"role": "assistant", "content": "", "function_call": {"name": "x"}}],
                  "rejected": f.REJECTED}, r"chosen\[1\] has 'function_call', .* write it as 'tool_calls'",
                 id="function-call-key"),
    pytest.param({"question": "a", **f.ANSWERS}, r"no turn of the assistant .* --columns prompt=NAME", id="no-prompt"),
    pytest.param({"messages": f.CHOSEN}, r"'chosen' and 'rejected' are missing; fits none of the known formats: found "
                 r"messages \(a list\)\. Known: whole conversations \(chosen, rejected, \[prompt\]", id="sft"),
    pytest.param({"a": 1}, "found none of their columns", id="none-of-the-columns"),
    pytest.param({"prompt": "a", "instruction": "b", **f.ANSWERS},
                 r"fits two formats, strings \(prompt, chosen, rejected\) and instruction", id="two-formats"),
    pytest.param({"prompt": "a", "history": [["b", "c"]], "context": "[1]", **f.ANSWERS},
                 r"looks like strings .* but has "
                 r"\['context', 'history'\] too", id="more-than-the-format-reads"),
    pytest.param({"prompt": 3, **f.ANSWERS}, "'prompt' is a number; expected a list of messages", id="prompt-a-number"),
    pytest.param({"instruction": "a", "history": ["b"], **f.ANSWERS}, r"history\[0\] is a string; expected two strings",
                 id="history"),
    pytest.param({"context": say("a"), "completions": [{"rank": 0, "completion": "b"}]}, "completions have one rank, 0",
                 id="one-completion"),
    pytest.param({"context": say("a"), "completions": [{"rank": float("nan"), "completion": "b"}]},
                 r"completions\[0\]\['rank'\] is nan; expected a number", id="rank-nan"),
    pytest.param({"instruction": "a", "history": 5, **f.ANSWERS}, "'history' is a number; expected a list",
                 id="history-a-number"),
    pytest.param({"prompt": "a", **f.ANSWERS, "\ud800": 1}, "the name of a column is no valid Unicode",
                 id="column-name"),
    pytest.param({**f.PAIR, "chat_template_kwargs": {"a": "\ud800"}}, "'chat_template_kwargs'.* is no valid Unicode",
                 id="kwargs-half-a-character"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"from": "gpt", "value": "hi", "content": "y"}]},
                 r"chosen\[1\] says twice who speaks or what: it has \['content'\] beside 'from' and 'value'",
                 id="left-over"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"role": "user", "from": "gpt", "value": "hi"}]},
                 r"chosen\[1\] says twice who speaks", id="two-speakers"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {**f.CHOSEN[1], "extra": json.loads("[" * 150 + "]" * 150)}]},
                 "is nested more than 100 deep", id="deep"),
    pytest.param({"context": say("a"), "completions": []}, "no completions", id="no-completions"),
    pytest.param({"context": say("a"), "completions": {"rank": 0}}, "'completions' is an object; expected a list",
                 id="completions-an-object"),
    pytest.param({"context": say("a"), "completions": [{"rank": "0", "completion": "b"}]},
                 r"completions\[0\]\['rank'\] is a string; expected a number", id="rank-a-string"),
    pytest.param({"context": say("a"), "completions": ["b"]}, r"completions\[0\] is a string; expected an object",
                 id="completion-a-string"),
    pytest.param({"messages": "[{", "rejected_response": "b"}, "'messages' is a string that is not JSON", id="no-json"),
    pytest.param({**f.PAIR, "tools": "[{"}, "'tools' is a string that is not JSON", id="tools-no-json"),
    pytest.param({**f.PAIR, "tools": {"name": "x"}}, "'tools' is an object; expected a list", id="tools-object"),
    pytest.param({**f.PAIR, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list; expected an object",
                 id="kwargs-a-list"),
    pytest.param({"chosen": [f.SYSTEM, *f.CHOSEN], "rejected": [f.SYSTEM, *f.REJECTED], "system": "Be long."},
                 "has a 'system' column and another system message", id="two-systems"),
    pytest.param({"chosen": [{**f.SYSTEM, "tools": [f.TOOL]}, *f.CHOSEN], "rejected": [f.SYSTEM, *f.REJECTED]},
                 "chosen and rejected bring different tools", id="tools-on-one-side"),
    pytest.param({"chosen": [{**f.SYSTEM, "tools": [f.TOOL]}, *f.CHOSEN],
                  "rejected": [{**f.SYSTEM, "tools": [f.TOOL]}, *f.REJECTED], "tools": [{"name": "x"}]},
                 "has 'tools' of its own and others in its system message", id="tools-twice"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"role": "assistant", "content": None}]},
                 r"chosen\[1\]\['content'\] is null; expected a string", id="null-content"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"role": "assistant"}]}, r"chosen\[1\] has no 'content'",
                 id="no-content"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"role": "assistant", "content": "a", "text": "b"}]},
                 r"chosen\[1\] says twice who speaks or what", id="said-twice"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {"role": "assistant", "content": "a", "tool_calls": "{"}]},
                 r"chosen\[1\]\['tool_calls'\] is a string that is not JSON", id="calls-no-json"),
    pytest.param({"messages": say("a"), "rejected_response": "b"}, "the last message of 'chosen' is from 'user'",
                 id="swift-without-a-reply"),
    pytest.param({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: \ud83d"},
                 "'rejected' is no valid Unicode", id="half-a-character"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_what_is_refused_and_what_is_said(line, message):
    with pytest.raises(DataError, match=message):
        read_line(line, ReadOptions())


def test_blank_columns_are_none_and_replaced_ones_are_told():
    blank = {"input": "", "history": [], "messages": None, "tools": "[]", "system": ""}
    assert read_line({"prompt": "a", **f.ANSWERS, **blank}, ReadOptions(string_format="plain")).format == "strings"
    read = read_line({"prompt": "a", "question": "b", **f.ANSWERS}, ReadOptions(columns={"prompt": "question"}))
    assert read.pairs == [TextPair("b", f.GOOD, f.BAD)]
    assert read.unused == ("prompt (another was given for it)",)


def test_an_explicit_prompt_may_be_answered_by_several_messages():
    answer = say("", "Which?", "Any.", "Blue.")[1:]
    (pair,) = read_line(
        {"prompt": say("A colour?")[:1], "chosen": answer, "rejected": f.REPLIES["rejected"]}, ReadOptions()
    ).pairs
    assert pair.chosen == [*say("A colour?")[:1], *answer]


def test_calls_and_their_results_as_ms_swift_writes_them():
    call = {"name": "weather", "arguments": {"city": "Lima"}}
    messages = [{"role": "user", "content": "Warm?"}, {"role": "tool_call", "content": json.dumps(call)},
                {"role": "tool_response", "content": "24"}, {"role": "assistant", "content": "Yes."}]  # fmt: skip
    (pair,) = read_line({"messages": messages, "rejected_response": "No."}, ReadOptions()).pairs
    assert [m["role"] for m in pair.chosen] == ["user", "assistant", "tool", "assistant"]
    assert pair.chosen[1]["tool_calls"] == [{"type": "function", "function": call}]


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        (
            {"prompt": "a", **f.ANSWERS},
            {"string_format": "plain", "tools": [f.TOOL]},
            r"has \['tools'\] beside strings",
        ),
        ({"prompt": "a", "system": "b", **f.ANSWERS}, {"string_format": "plain"}, r"has \['system'\] beside strings"),
        ({"chosen": "Hi", "rejected": "Ho"}, {"string_format": "chat"}, "chosen is no transcript of lines"),
        (f.PAIR, {"columns": {"prompt": "question"}}, r"has no column \['question'\], which --columns names; found"),
    ],
)
def test_lines_that_the_options_do_not_fit(line, options, message):
    with pytest.raises(DataError, match=message):
        read_line(line, ReadOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"answer": "a"}}, r"columns names \['answer'\]; the names that a column can stand for are"),
        ({"string_format": "raw"}, r"string_format is 'raw'; expected one of \('plain', 'chat'\)"),
        ({"ranked_pairs": "none"}, r"ranked_pairs is 'none'; expected one of \('best', 'all'\)"),
        ({"tools": {"a": 1}}, "tools is an object; expected a list of tools"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReadOptions(**options)


IGNORED = [
    pytest.param({side: [{"role": "developer", "content": "x"}, *m] for side, m in f.PAIR.items()},
                 t.CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'developer' %}"),
                 "the chat template leaves out a message from 'developer' \\('x'\\)", id="developer"),
    pytest.param({**f.PAIR, "chosen": [f.CHOSEN[0], {**f.CHOSEN[1], "reasoning_content": "hm"}]}, t.CHATML,
                 "the answer has 'reasoning_content', which the chat template does not read", id="reasoning"),
    pytest.param({"chat_template_kwargs": {"content": "x"}, **f.PAIR}, t.CHATML,
                 "chat_template_kwargs sets 'content', which the chat template does not read",
                 id="a-name-of-another-kind"),
    pytest.param({"tools": [f.TOOL], **f.PAIR}, t.CHATML, "has 'tools', which the chat template does not", id="tools"),
    pytest.param({"chosen": [f.CALLED[0], f.CALLED[1]], "rejected": say("Warm?", "No.")}, t.CHATML,
                 "has 'tool_calls', which the chat template does not read", id="tool-calls"),
    pytest.param({"chat_template_kwargs": {"enable_thinking": False}, **f.PAIR}, t.CHATML,
                 "chat_template_kwargs sets 'enable_thinking', which the chat template does not read", id="kwargs"),
    pytest.param({"chat_template_kwargs": {"add_generation_prompt": True}, **f.PAIR}, t.CHATML,
                 "chat_template_kwargs sets 'add_generation_prompt', which has a column or an option", id="reserved"),
    pytest.param({side: [{"role": "narrator", "content": "x"}, *m] for side, m in f.PAIR.items()}, t.CHATML,
                 "a message is from 'narrator', which neither this package nor the chat template knows", id="role"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "template", "message"), IGNORED)
def test_nothing_that_belongs_to_a_line_is_ignored(line, template, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        DPODataset(path, make_tokenizer(template), 500, cache_dir=tmp_path)


@pytest.mark.parametrize("arguments", [{"city": "Lima"}, '{"city": "Lima"}'], ids=["object", "string"])
@pytest.mark.parametrize("content", [None, ""], ids=["null", "empty"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (t.TOOLS, '<tool_call>weather {"city": "Lima"}</tool_call><|im_end|>'),
        (t.STRING_CALLS, 'weather {"city": "Lima"}<|im_end|>'),
        (t.PRINTS_NONE, '{"name": "weather", "arguments": {"city": "Lima"}}<|im_end|>'),
    ],
    ids=["objects", "strings-and-null", "prints-none"],
)
def test_calls_are_spelled_as_the_template_takes_them(template, expected, arguments, content, tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": [f.CALLED[0], answer], "rejected": say("Warm?", "No.")}))
    tokenizer = make_tokenizer(template)
    item = DPODataset(path, tokenizer, 500, cache_dir=tmp_path)[0]
    assert tokenizer.decode(item["y_chosen"][item["mask_chosen"]]) == expected


def test_no_thinking_by_the_command_line(tmp_path):
    """The prompt to generate closes the thinking, and the answers, which do not repeat it, are found all the same."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(f.PAIR))
    tokenizer = make_tokenizer(t.TOOLS)
    read = ReadOptions(chat_template_kwargs={"enable_thinking": False})
    item = DPODataset(path, tokenizer, 500, cache_dir=tmp_path, read=read)[0]
    assert tokenizer.decode(item["y_chosen"][item["mask_chosen"]]) == "Blue.<|im_end|>"


def test_all_turns_differ_from_trl_only_by_the_earlier_replies(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = {side: [*f.EARLIER, *messages] for side, messages in f.PAIR.items()}
    path.write_text(json.dumps(line))
    tokenizer = make_tokenizer()
    texts = {}
    for turns in ("all", "last"):
        item = DPODataset(path, tokenizer, 500, cache_dir=tmp_path, assistant_turns=turns)[0]
        texts[turns] = tokenizer.decode(item["y_chosen"][item["mask_chosen"]])
    assert texts == {"all": "Hello.<|im_end|>Blue.<|im_end|>", "last": "Blue.<|im_end|>\n"}
