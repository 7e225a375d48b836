"""Pairs from a file: tensors, masks, bad input, caches."""

from __future__ import annotations

import json

import pytest
import templates as t
import torch
from helpers import EXAMPLE
from templates import make_tokenizer, say
from torch.utils.data import DataLoader

from dpo_kernels.training import DataError, DPODataset, PairCollator

PAIR = {"chosen": say("Hello?", "I am fine."), "rejected": say("Hello?", "No, why do you ask?")}
LONG = {"chosen": say("Hello? " * 30, "I am fine."), "rejected": say("Hello? " * 30, "What?")}
OTHER_PROMPT = {"chosen": say("Hello?", "Good."), "rejected": say("Who?", "Bad.")}


@pytest.fixture
def load(tmp_path):
    def load(lines, max_length=64, tokenizer=None, **options):
        path = tmp_path / "pairs.jsonl"
        if isinstance(lines, bytes):
            path.write_bytes(lines)
        else:
            path.write_text(
                "".join(
                    json.dumps(x, ensure_ascii="\\ud" in json.dumps(x)) + "\n" if isinstance(x, dict) else x
                    for x in lines
                )
            )
        return DPODataset(path, tokenizer or make_tokenizer(), max_length, cache_dir=tmp_path / "cache", **options)

    return load


def test_items_are_shifted_masked_and_padded(load):
    tokenizer = make_tokenizer()
    item = load([PAIR], tokenizer=tokenizer)[0]
    assert set(item) == {f"{n}_{s}" for n in ("x", "y", "mask") for s in ("chosen", "rejected")}
    ids = tokenizer(tokenizer.apply_chat_template(PAIR["chosen"], tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    x, y, mask = item["x_chosen"], item["y_chosen"], item["mask_chosen"]
    assert x.shape == y.shape == mask.shape == (63,)
    assert (x.dtype, y.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
    length = int(mask.nonzero().max()) + 1
    assert x[:length].tolist() == ids[:length]
    assert x[length:].eq(tokenizer.pad_token_id).all()
    assert y[mask].tolist() == ids[int(mask.nonzero()[0]) + 1 : length + 1]
    assert tokenizer.decode(y[mask]) == "I am fine.<|im_end|>"
    assert y[~mask].eq(-100).all()


def test_the_default_collate_works_and_ours_pads_to_the_longest(load):
    dataset = load([PAIR, OTHER_PROMPT, PAIR])
    whole = next(iter(DataLoader(dataset, batch_size=3)))
    assert whole["x_chosen"].shape == (3, 63)
    cut = PairCollator()([dataset[i] for i in range(3)])
    longest = max(int(whole[f"mask_{s}"].nonzero()[:, 1].max()) + 1 for s in ("chosen", "rejected"))
    assert cut["x_chosen"].shape == cut["mask_rejected"].shape == (3, longest)
    for name, tensor in cut.items():
        assert torch.equal(tensor, whole[name][:, :longest])


def test_what_became_of_the_lines_is_reported(load):
    same = PAIR | {"rejected": PAIR["chosen"]}
    empty = {"chosen": say("Hello?", "Hi."), "rejected": say("Hello?", ""), "score": 3}
    lines = [PAIR, LONG, OTHER_PROMPT, "\n", same, "  \n", PAIR, empty]
    report = load(lines, max_length=40, truncation_mode="keep_start").report
    assert (report.pairs, report.skipped, report.dropped) == (4, 0, {"without_reply": 1, "equal_answers": 1})
    assert (report.prompts_differ, report.duplicates, report.empty_replies, report.cut_answer) == (1, 1, 1, 0)
    assert report.formats == {"whole conversations": 4}
    assert report.unused == ("score",)
    text = str(report)
    for part in ("4 pairs of", "pairs.jsonl, read as whole conversations", "1 with equal answers", "1 seen before",
                 "1 with an answer of which truncation left no token", "1 with prompts that differ", "columns score",
                 "1 with an empty answer", "(median / 90% / 99% / longest, before cutting)"):  # fmt: skip
        assert part in text, text
    dataset = load([PAIR, OTHER_PROMPT])
    counted = sum(int(item[f"mask_{side}"].sum()) for item in dataset for side in ("chosen", "rejected"))
    assert (dataset.report.counted, dataset.report.tokens) == (
        counted, sum(len(row[f"{side}_ids"]) for row in dataset.rows for side in ("chosen", "rejected")),
    )  # fmt: skip
    assert f"counted       {counted / dataset.report.tokens:.0%} of" in str(dataset.report)


BAD = [
    pytest.param('{"chosen": [', "not JSON: Expecting value at character 12", id="broken"),
    pytest.param("[1, 2]\n", "is a list; expected an object with 'chosen' and 'rejected'", id="a-list"),
    pytest.param({"chosen": PAIR["chosen"]},
                 r"'rejected' is missing; fits none of the known formats: found chosen \(a list\)", id="missing-key"),
    pytest.param(PAIR | {"chosen": "Hi"}, "'chosen' is a string; expected a list of messages", id="no-list"),
    pytest.param(PAIR | {"chosen": []}, "'chosen' is an empty list", id="empty-list"),
    pytest.param(PAIR | {"chosen": ["Hi"]}, r"chosen\[0\] is a string; expected an object", id="message-a-string"),
    pytest.param(PAIR | {"rejected": [{"by": "human", "value": "Hi"}]},
                 r"rejected\[0\] has no 'role'; found \['by', 'value'\]", id="no-role"),
    pytest.param(PAIR | {"rejected": [{"role": "user", "content": 3}]},
                 r"rejected\[0\]\['content'\] is a number; expected a string", id="content-a-number"),
    pytest.param(PAIR | {"rejected": [{"role": None, "content": "x"}]},
                 r"rejected\[0\]\['role'\] is null; expected a string", id="role-null"),
    pytest.param(PAIR | {"rejected": [{"role": "", "content": "x"}]}, r"rejected\[0\]\['role'\] is empty",
                 id="role-empty"),
    pytest.param(PAIR | {"chosen": say("Hi", "\ud83d")}, r"chosen\[1\]\['content'\] is no valid Unicode: surrogates",
                 id="lone-surrogate"),
    pytest.param("[" * 100_000 + "\n", "not JSON that can be read: maximum recursion", id="nested"),
    pytest.param('{"chosen": ' + "9" * 5000 + "}\n", "not JSON that can be read: Exceeds the limit", id="digits"),
    pytest.param(PAIR | {"rejected": say("Hi")}, "the last message of 'rejected' is from 'user'; expected 'assistant'",
                 id="last-is-the-users"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named(load, line, message):
    with pytest.raises(DataError, match=r"pairs.jsonl, line 3: " + message):
        load([PAIR, "\n", line])


def test_bytes_that_are_no_text(load):
    with pytest.raises(DataError, match=r"line 1: not UTF-8: invalid start byte at byte 3"):
        load(b'{"a\xff')


def test_bad_lines_can_be_skipped_and_are_kept(load, tmp_path):
    lines = [PAIR, "{broken\n", PAIR | {"chosen": []}, OTHER_PROMPT]
    with pytest.raises(DataError, match=r"line 2: not JSON.*\(1 more lines are bad\).*--on_bad_line skip"):
        load(lines)
    dataset = load(lines, on_bad_line="skip", skipped_path=tmp_path / "out" / "skipped.jsonl")
    assert (len(dataset), dataset.report.skipped) == (2, 2)
    kept = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(k["line"], k["text"]) for k in kept] == [(2, "{broken"), (3, json.dumps(lines[2]))]
    assert kept[1]["where"].endswith("pairs.jsonl, line 3")
    assert kept[0]["reason"].startswith("not JSON")
    load(lines, on_bad_line="skip")
    assert len((tmp_path / "pairs.skipped.jsonl").read_text().splitlines()) == 2


def test_files_without_pairs(load, tmp_path):
    with pytest.raises(DataError, match=r"there is no pair in it; expected one a line"):
        load(["\n"])
    with pytest.raises(
        DataError, match=r"(?s)no pair is left to train on.*1 longer than max_length.*Raise max_length \(5\)"
    ):
        load([PAIR], max_length=5, truncation_mode="drop")
    with pytest.raises(DataError, match=r"(?s)1 with equal answers.*the same in each pair; look at the columns"):
        load([PAIR | {"rejected": PAIR["chosen"]}])
    with pytest.raises(FileNotFoundError, match=r"no preference file .*nowhere.jsonl"):
        DPODataset(tmp_path / "nowhere.jsonl", make_tokenizer(), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
        ({"assistant_turns": "first"}, r"assistant_turns is 'first'; expected one of \('all', 'last'\)"),
        ({"on_bad_line": "ignore"}, "on_bad_line is 'ignore'"),
        ({"truncation_mode": "middle"}, r"truncation_mode is 'middle'; expected one of \('keep_answer', 'keep_start'"),
        ({"tokenizer": make_tokenizer(None)}, "no single chat template"),
    ],
)
def test_bad_arguments(load, options, message):
    with pytest.raises(ValueError, match=message):
        load([PAIR], **options)


def test_a_template_that_hides_a_reply_names_file_and_line_and_can_be_skipped(load):
    """It writes earlier replies in capitals."""
    shouts = t.CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
    messages = say("a", "b", "c", "d")
    lines = [PAIR, {"chosen": messages, "rejected": [*messages[:-1], {"role": "assistant", "content": "e"}]}]
    told = (
        r"pairs.jsonl, line 2: the chat template writes message 1 \(assistant: 'b'\) in the whole conversation "
        r"otherwise than .* Count only the last reply \(--assistant_turns last\); or use a template that marks"
    )
    with pytest.raises(DataError, match=told):
        load(lines, tokenizer=make_tokenizer(shouts))
    assert len(load(lines, tokenizer=make_tokenizer(shouts), on_bad_line="skip")) == 1
    assert len(load(lines, tokenizer=make_tokenizer(shouts), assistant_turns="last")) == 2


def test_the_cache_follows_content_and_options(load, tmp_path):
    first = load([PAIR])
    assert len(load([PAIR, OTHER_PROMPT])) == 2
    assert load([PAIR]).key == first.key
    assert load([PAIR], max_length=32).key != first.key
    assert load([PAIR], tokenizer=make_tokenizer(t.LLAMA3))[0]["x_chosen"].tolist() != first[0]["x_chosen"].tolist()
    assert list((tmp_path / "cache").glob(f"pairs-{first.key}*"))


def test_tokenizing_in_two_processes_gives_the_same(load):
    lines = [PAIR, OTHER_PROMPT, PAIR, OTHER_PROMPT]
    alone = load(lines)
    two = load(lines, num_proc=2, max_length=63)
    assert [r["chosen_ids"] for r in two.rows] == [r["chosen_ids"] for r in alone.rows]


def test_split_holds_pairs_out(load):
    dataset = load([PAIR, OTHER_PROMPT] * 10)
    train, held_out = dataset.split(0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    again = dataset.split(5, seed=3)[1]
    lines = [sorted(part.rows["line"]) for part in (train, held_out)]
    assert sorted(again.rows["line"]) == lines[1]
    assert sorted(lines[0] + lines[1]) == list(range(1, 21))
    for bad in (20, 0.001):
        with pytest.raises(ValueError, match=rf"eval_size is {bad}: .* expected at least 1 on each side"):
            dataset.split(bad)


def test_the_projects_own_example_loads(tmp_path):
    path = EXAMPLE
    dataset = DPODataset(path, make_tokenizer(), 512, cache_dir=tmp_path)
    assert len(dataset) >= 300
    assert dataset.report.prompts_differ == 0
