"""The same pairs from every kind of file, folder and dataset; and what is said of those that cannot be read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import format_cases as f
import pyarrow as pa
import pyarrow.parquet
import pytest
import templates as t
from templates import make_tokenizer, say

from dpo_kernels.training import DataError, DPODataset
from dpo_kernels.training.sources import open_source

ROWS = [
    {"prompt": say("Name a colour.")[:1], "chosen": f.CHOSEN[1:], "rejected": f.REJECTED[1:], "id": 1},
    {"prompt": say('你好 "quoted",\nsecond line')[:1], "chosen": say("", "Hello\tthere.")[1:],
     "rejected": f.REJECTED[1:], "id": 2},
]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
IN_STRINGS = [
    {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in ROWS
]


def table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(IN_STRINGS)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


FILES = {
    "pairs.jsonl": LINES.encode(),
    "pairs": LINES.encode(),
    "lines.json": LINES.encode(),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "pairs.csv": table(","),
    "pairs.tsv": table("\t"),
    "INDEX.CSV": b"".join(
        (b"," if i == 0 else b"%d," % i) + line
        for i, line in enumerate(table(",").replace(b"\nsecond", b" second").splitlines(True))
    ),
    "UPPER.JSONL.GZ": gzip.compress(LINES.encode()),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "mark.csv": b"\xef\xbb\xbf" + table(","),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "pairs.jsonl.gz": gzip.compress(LINES.encode()),
    "two-members.jsonl.gz": b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(True)),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "pairs.csv.gz": gzip.compress(table(",")),
    "pairs.jsonl.bz2": bz2.compress(LINES.encode()),
    "pairs.tsv.bz2": bz2.compress(table("\t")),
    "pairs.jsonl.zst": zstd(LINES.encode()),
    "mark.csv.zst": zstd(b"\xef\xbb\xbf" + table(",")),
}


@pytest.fixture
def load(tmp_path):
    def load(path, **options):
        return DPODataset(path, make_tokenizer(), 200, cache_dir=tmp_path / "cache", **options)

    return load


@pytest.fixture
def expected(load, tmp_path):
    path = tmp_path / "expected.jsonl"
    path.write_text(LINES, encoding="utf-8")
    return tokens(load(path))


def tokens(dataset: DPODataset) -> list[list[list[int]]]:
    return [
        [row[f"{side}_{what}"] for side in ("chosen", "rejected") for what in ("ids", "mask")] for row in dataset.rows
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind(load, expected, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    dataset = load(path)
    assert tokens(dataset) == expected
    assert dataset.report.unused == (("column 1", "id") if name == "INDEX.CSV" else ("id",))


def test_parquet_and_saved_datasets_and_a_dataset_in_memory(load, expected, tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "pairs.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    tokenizer = make_tokenizer()
    for dataset in (
        load(tmp_path / "pairs.parquet"), load(tmp_path / "saved"), load(tmp_path / "splits"),
        load(f"{tmp_path / 'splits'}:train"),
        DPODataset.from_dataset(made, tokenizer, 200, cache_dir=tmp_path / "cache"),
    ):  # fmt: skip
        assert tokens(dataset) == expected
    assert len(load(f"{tmp_path / 'splits'}:test")) == 1


def test_a_table_fills_messages_with_nulls_that_mean_nothing(load, tmp_path):
    """Arrow gives every message the keys of all others, arguments of calls and tools included."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    rows = [{**f.TOLD, "tools": [f.TOOL]},
            {**f.TOLD, "prompt": [f.CALLED[0], {**f.CALLED[1], "tool_calls": [other]}, f.CALLED[2]],
             "tools": [{**f.TOOL, "strict": True}]}]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.Dataset.from_list(rows)
    assert made[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Lima", "zone": None}
    made.to_parquet(tmp_path / "pairs.parquet")
    tokenizer = make_tokenizer(t.TOOLS)
    results = [
        tokens(DPODataset(source, tokenizer, 500, cache_dir=tmp_path / "cache"))
        for source in (path, made, tmp_path / "pairs.parquet")
    ]
    assert results[0] == results[1] == results[2]


def test_what_is_no_text_is_never_trained_as_text(load, tmp_path):
    pa.parquet.write_table(pa.table({"prompt": [b"bytes"], "chosen": ["a"], "rejected": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet, row 1: .*found \['unreadable'\]"):
        load(tmp_path / "b.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    pa.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice.parquet: column names \['chosen', 'chosen'\]; expected each once"):
        load(tmp_path / "twice.parquet")


def test_the_same_content_elsewhere_is_told_by_its_own_place(load, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(LINES + "broken\n", encoding="utf-8")
        dataset = load(tmp_path / name / "x.jsonl", on_bad_line="skip")
        assert f"{tmp_path / name}" in dataset.rows[0]["where"]
        (kept,) = (tmp_path / name / "x.skipped.jsonl").read_text().splitlines()
        assert json.loads(kept)["where"] == f"{tmp_path / name / 'x.jsonl'}, line 3"


def test_a_folder_is_its_files_in_order(load, expected, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    first, second = LINES.splitlines(True)
    (folder / "a.jsonl").write_text(first, encoding="utf-8")
    (folder / "inner" / "b.jsonl.gz").write_bytes(gzip.compress(second.encode()))
    (folder / "README.md").write_text("# Pairs")
    (folder / "dataset_info.json").write_text("{}")
    (folder / ".hidden" / "c.jsonl").write_text("broken")
    dataset = load(folder)
    assert tokens(dataset) == expected
    assert [row["where"] for row in dataset.rows] == [
        f"{folder / 'a.jsonl'}, line 1", f"{folder / 'inner' / 'b.jsonl.gz'}, line 1",
    ]  # fmt: skip


def test_a_folder_of_splits_asks_which(load, tmp_path):
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "test_prefs-00000-of-00001"):
        (tmp_path / "data" / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "data" / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"holds several splits, \['test_prefs', 'train_prefs'\]: name the one"):
        load(tmp_path / "data")
    assert len(load(f"{tmp_path / 'data'}:train_prefs")) == 4
    with pytest.raises(ValueError, match=r"holds the splits \['test_prefs', 'train_prefs'\]; 'dev' is none of them"):
        load(f"{tmp_path / 'data'}:dev")
    hashed = tmp_path / "hashed"
    hashed.mkdir()
    for i in range(2):
        datasets.Dataset.from_list(ROWS).to_parquet(hashed / f"train_prefs-0000{i}-of-00002-aac53fbb337ac8e1.parquet")
    assert len(load(hashed)) == len(load(f"{hashed}:train_prefs")) == 4
    for name in ("train_1", "train_2"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{name}.jsonl").write_text(LINES, encoding="utf-8")
    assert len(load(tmp_path / "parts")) == 4


def test_a_dataset_of_the_hub(load, expected, monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        if names[0] == "org/nowhere":
            raise datasets.exceptions.DatasetNotFoundError("it is not there")
        rows = datasets.Dataset.from_list(ROWS)
        return datasets.DatasetDict({"train_prefs": rows, "test_prefs": rows.select([1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tokens(load("org/name:train_prefs")) == expected
    assert len(load("org/name/config:test_prefs")) == 1
    assert asked == [("org/name",), ("org/name", "config")]
    with pytest.raises(ValueError, match=r"org/name has the splits \['test_prefs', 'train_prefs'\]; name one, as in"):
        load("org/name")
    with pytest.raises(ValueError, match=r"'org/nowhere' is no file or folder here, and the hub gave no such dataset"):
        load("org/nowhere")


def test_what_cannot_be_opened(tmp_path):
    for name, message in (
        ("nowhere.jsonl", "no preference file .*nowhere.jsonl; give a file"),
        ("no/where.jsonl.gz", "no preference file"),
        ("pairs.xlsx", "is of a kind that is not read; known are .jsonl"),
        ("pairs.parquet.gz", "is of a kind that is not read"),
        ("pairs.7z", "is of a kind that is not read"),
    ):
        if "kind" in message:
            (tmp_path / name).write_text("x")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(tmp_path / name if "kind" in message else name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the folder .* holds no preference files"):
        open_source(tmp_path / "empty")
    streamed = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    for value, message in (
        (streamed, "a streamed dataset has no length"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"DatasetDict of the splits \['train'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DPODataset.from_dataset(value, make_tokenizer(), 100)
    with pytest.raises(TypeError, match=r"from_dataset takes a datasets.Dataset, not list"):
        DPODataset.from_dataset(ROWS, make_tokenizer(), 100)


BROKEN = {
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:-20], "cut.jsonl.gz cannot be read to its end: "),
    "plain.jsonl.gz": (LINES.encode(), "plain.jsonl.gz cannot be read to its end: "),
    "cut.jsonl.zst": (zstd(LINES.encode() * 50)[:-9], "cut.jsonl.zst cannot be read to its end: "),
    "no.parquet": (b"PAR1 or not", "no.parquet cannot be read to its end: "),
    "cut.json": (json.dumps(ROWS).encode()[:-3], "cut.json is not JSON: "),
    "bytes.json": (b'["\xff"]', "bytes.json is not JSON: "),
    "names.csv": (b"chosen,chosen\na,b\n", r"names.csv, line 1: column names \['chosen', 'chosen'\]"),
    "quote.csv": (b'prompt,chosen,rejected\na,b,"c\nd,e,f\n', r"quote.csv cannot be read to its end: unexpected end"),
    "quotes.tsv": (b'prompt\tchosen\trejected\na\t"Yes", he said.\tNo.\n', r"quotes.tsv cannot be read to its end: "),
    "wide.csv": (b"chosen,rejected\na,b,c\n", "wide.csv, line 2: has 3 cells, the first line 2 columns"),
    "narrow.csv": (b'prompt,chosen,rejected\n"a\nb",c,d\ne\n', "narrow.csv, line 4: has 1 cells"),
    "bytes.csv": (b"prompt,chosen,rejected\na,b,\xff\n", "bytes.csv, line 2: 'rejected' is no valid Unicode"),
    "blank.csv": (b"prompt,chosen,rejected\na,b,\n", "blank.csv, line 2: 'rejected' is missing"),
    "header.csv": (b"prompt,chosen,rejected\n", "header.csv: there is no pair in it"),
    "empty.json": (b"[]", "empty.json: there is no pair in it"),
    "numbers.json": (b"[1]", "numbers.json, item 1: is a number; expected an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_said_of_a_broken_file(load, tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_a_blank_cell_is_no_column_and_a_system_column_makes_messages(load, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("system,prompt,chosen,rejected\nBe short.,Name one.,Blue.,A dog.\n,Name one.,Blue.,A dog.\n")
    dataset = load(path)
    tokenizer = make_tokenizer()
    assert dataset.report.formats == {"strings made messages": 2}
    assert [tokenizer.decode(row["chosen_ids"]).count("system") for row in dataset.rows] == [1, 0]


def test_bad_lines_of_a_folder_are_kept_with_their_files(load, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES + "{broken\n", encoding="utf-8")
    (folder / "b.csv").write_text("prompt,chosen\nx,y\n")
    dataset = load(folder, on_bad_line="skip")
    assert (len(dataset), dataset.report.skipped) == (2, 2)
    kept = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(k["where"].split(",")[0]).name, k["line"]) for k in kept] == [("a.jsonl", 3), ("b.csv", 2)]
    assert kept[0]["text"] == "{broken"


def test_several_datasets_are_one_after_the_other_or_drawn_by_weights(load, tmp_path):
    parts = []
    for name, count in (("a", 40), ("b", 10)):
        path = tmp_path / f"{name}.jsonl"
        lines = ({"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad"} for i in range(count))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        parts.append(load(path))
    names = [[row["where"] for row in part.rows] for part in parts]
    both = DPODataset.mix(parts)
    assert [row["where"] for row in both.rows] == names[0] + names[1]
    assert both.report.pairs == len(both) == 50
    assert both.key not in {part.key for part in parts}
    mixed = DPODataset.mix(parts, [1, 3], seed=1)
    drawn = [row["where"] for row in mixed.rows]
    assert set(drawn) == {*names[0], *names[1]}
    few = [where for where in drawn if "b.jsonl" in where]
    assert few[:10] == names[1]  # none comes again before all others
    assert 2 < len(few) / (len(drawn) - len(few)) < 4.5
    with pytest.warns(
        UserWarning, match=r"data_weights \[1, 50\] makes .* pairs of 50, so that some are seen many times"
    ):
        DPODataset.mix(parts, [1, 50])
    (a, held_a), (b, held_b) = DPODataset.split_all(parts, 5, seed=2)
    assert (len(a) + len(b), len(held_a) + len(held_b)) == (45, 5)
    assert held_a.report.pairs == len(held_a)
    assert mixed.report.duplicates == len(drawn) - 50
    assert [row["where"] for row in DPODataset.mix(parts, [1, 3], seed=1).rows] == drawn
    assert DPODataset.mix(parts[:1]) is parts[0]
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match=r"data_weights is .* for 2 datasets; expected a positive number for each"):
            DPODataset.mix(parts, weights)
