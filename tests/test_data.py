"""Pairs from a file: tensors, masks, bad input, caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import templates as t
import torch
from templates import make_tokenizer, say
from torch.utils.data import DataLoader

from dpo_kernels.training import DataError, DPODataset, PairCollator, TemplateError
from dpo_kernels.training.data import attention_mask

PAIR = {"chosen": say("Hello?", "I am fine."), "rejected": say("Hello?", "What do you want from me?")}
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


def test_attention_reaches_the_last_token_that_counts():
    mask = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert attention_mask(mask).tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_what_became_of_the_lines_is_reported(load):
    dataset = load([PAIR, LONG, OTHER_PROMPT, "\n", "  \n"], max_length=40)
    assert len(dataset) == 2
    report = dataset.report
    assert (report.pairs, report.skipped, report.without_reply, report.truncated, report.prompts_differ) == (
        2,
        0,
        1,
        0,
        1,
    )
    assert "2 pairs, 1 dropped, since truncation left an answer without a token, 1 of them with prompts" in str(report)
    length = int(load([PAIR])[0]["mask_rejected"].nonzero().max()) + 2
    assert load([PAIR], max_length=length).report.truncated == 0
    assert load([PAIR], max_length=length - 1).report.truncated == 1


BAD = [
    pytest.param('{"chosen": [', "not JSON: Expecting value at character 12", id="broken"),
    pytest.param("[1, 2]\n", "is a list; expected an object with 'chosen' and 'rejected'", id="a-list"),
    pytest.param({"chosen": PAIR["chosen"]}, r"'rejected' is missing; found \['chosen'\]", id="missing-key"),
    pytest.param(PAIR | {"chosen": "Hi"}, "'chosen' is a string; expected a list of messages", id="no-list"),
    pytest.param(PAIR | {"chosen": []}, "'chosen' is an empty list", id="empty-list"),
    pytest.param(PAIR | {"chosen": ["Hi"]}, r"chosen\[0\] is a string; expected an object", id="message-a-string"),
    pytest.param(PAIR | {"rejected": [{"from": "human", "value": "Hi"}]},
                 r"rejected\[0\] has no 'role'; found \['from', 'value'\]", id="sharegpt"),
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
    assert kept[0]["reason"].startswith("not JSON")
    load(lines, on_bad_line="skip")
    assert len((tmp_path / "pairs.skipped.jsonl").read_text().splitlines()) == 2


def test_files_without_pairs(load, tmp_path):
    with pytest.raises(DataError, match=r"the file is empty; expected one pair a line"):
        load(["\n"])
    with pytest.raises(DataError, match=r"no pair is left to train on .*raise max_length \(5\)"):
        load([PAIR], max_length=5)
    with pytest.raises(FileNotFoundError, match=r"no preference file .*nowhere.jsonl"):
        DPODataset(tmp_path / "nowhere.jsonl", make_tokenizer(), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
        ({"assistant_turns": "first"}, r"assistant_turns is 'first'; expected one of \('all', 'last'\)"),
        ({"on_bad_line": "ignore"}, "on_bad_line is 'ignore'"),
        ({"tokenizer": make_tokenizer(None)}, "no single chat template"),
    ],
)
def test_bad_arguments(load, options, message):
    with pytest.raises(ValueError, match=message):
        load([PAIR], **options)


def test_a_template_that_rewrites_turns_names_file_and_line(load):
    messages = say("a", "<think>b</think>c", "d", "e")
    with pytest.raises(TemplateError, match=r"pairs.jsonl, line 2: the chat template rewrites earlier turns"):
        load([PAIR, {"chosen": messages, "rejected": messages}], tokenizer=make_tokenizer(t.STRIPS_THINKING))
    dataset = load(
        [{"chosen": messages, "rejected": messages}],
        tokenizer=make_tokenizer(t.STRIPS_THINKING),
        assistant_turns="last",
    )
    assert len(dataset) == 1


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
    path = Path(__file__).parent.parent / "examples" / "dpo.jsonl"
    dataset = DPODataset(path, make_tokenizer(), 512, cache_dir=tmp_path)
    assert len(dataset) >= 300
    assert dataset.report.prompts_differ == 0
