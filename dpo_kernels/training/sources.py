"""Where preference data lies, and its lines one by one: files of any kind, folders, saved datasets, the hub."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from dpo_kernels.training.messages import DataError

# Files that lie beside data and describe it.
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "metadata.json")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class RawLine(NamedTuple):
    """One line of a source, before anything is read from it.

    number: counted from 1. where: the place in words, as in "pairs.jsonl, line 3". text: JSON, or what should have
    been. error: why the source could not even be taken apart here; empty if it could.
    """

    number: int
    where: str
    text: bytes
    error: str = ""


@dataclass(frozen=True)
class Source:
    """Something that holds lines.

    name: for messages. content: a hash of all that it holds. files: read in this order; or table.
    """

    name: str
    content: str
    files: tuple[Path, ...] = ()
    table: datasets.Dataset | None = field(default=None, repr=False)

    def lines(self) -> Iterator[RawLine]:
        """
        Raises:
            DataError: a file cannot be taken apart beyond some place.
        """
        if self.table is not None:
            for number, row in enumerate(self.table, start=1):
                yield RawLine(number, f"{self.name}, row {number}", _as_json(_table_row(row)))
            return
        for path in self.files:
            read = READERS[_kind_of(path)]
            try:
                for number, word, text, error in read(path):
                    yield RawLine(number, f"{path}, {word} {number}", text, error)
            except (OSError, EOFError, pyarrow.ArrowException, csv.Error) as error:
                raise DataError(f"{path} cannot be read to its end: {error}") from error


def open_source(spec: str | os.PathLike[str] | datasets.Dataset) -> Source:
    """
    Args:
        spec: a file (.jsonl, .json, .csv, .tsv, .parquet; but for the last also .gz, .zst, .bz2), a folder of such
            files, a folder of `datasets.Dataset.save_to_disk`, the name of a dataset on the hub, or a
            `datasets.Dataset`. A folder or name that holds several splits is followed by the wanted one, as in
            "org/name:train_prefs" or "org/name/config:train".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a kind of file that is not known, a split that is missing or has to be named.
    """
    if isinstance(spec, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"this is a DatasetDict of the splits {sorted(spec)}; give one of them")
    if isinstance(spec, datasets.IterableDataset):
        raise ValueError(
            "a streamed dataset has no length, and its pairs no fixed order to draw, cache and resume by; load it "
            "without streaming=True"
        )
    if isinstance(spec, datasets.Dataset):
        return Source("the dataset", spec._fingerprint, table=spec)
    text = os.fspath(spec)
    path, split = Path(text), ""
    if not path.exists() and ":" in text:
        head, _, split = text.rpartition(":")
        path = Path(head)
    if path.is_file() and not split:
        _kind_of(path)
        return Source(str(path), _content_hash((path,)), (path,))
    if path.is_dir():
        return _saved(path, split) or _folder(path, split)
    if HUB_NAME.fullmatch(str(path)) and not _known(path):
        return _from_hub(str(path), split)
    raise _not_found(text)


def check_exists(spec: str) -> None:
    """
    Raises:
        FileNotFoundError: `open_source` would find nothing here, and no hub has a name like this.
    """
    head = spec.rpartition(":")[0] if ":" in spec and not Path(spec).exists() else spec
    path = Path(head)
    if not (path.exists() or (HUB_NAME.fullmatch(str(path)) and not _known(path))):
        raise _not_found(spec)


def _not_found(spec: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no preference file {spec}; give a file ({', '.join(READERS)}), a folder, or a dataset's name on the hub as "
        "in org/name:split"
    )


def splits_of(folder: Path) -> list[str]:
    """The splits that a folder tells apart, by the names of its files or as `datasets` saved them."""
    if (listed := folder / "dataset_dict.json").is_file():
        return list(json.loads(listed.read_text(encoding="utf-8"))["splits"])
    return sorted(filter(None, {_split_of(file) for file in folder.rglob("*") if file.is_file() and _known(file)}))


def _saved(path: Path, split: str) -> Source | None:
    """A folder that `save_to_disk` wrote; None if it is none."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    return _table(str(path), datasets.load_from_disk(str(path)), split)


def _from_hub(name: str, split: str) -> Source:
    owner, dataset, *rest = name.split("/")
    try:
        loaded = datasets.load_dataset(f"{owner}/{dataset}", *rest)
    except Exception as error:  # of the network, the hub, or the repository's own files: the library has many
        raise ValueError(
            f"{name!r} is no file or folder here, and the hub gave no such dataset: {type(error).__name__}: {error}"
        ) from error
    return _table(name, loaded, split)


def _table(name: str, loaded: Any, split: str) -> Source:
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
        if wanted not in loaded:
            raise ValueError(f"{name} has the splits {sorted(loaded)}; name one, as in {name}:{sorted(loaded)[-1]}")
        loaded, split = loaded[wanted], wanted
    elif split:
        raise ValueError(f"{name} has no splits; leave :{split} away")
    return Source(f"{name}:{split}" if split else name, loaded._fingerprint, table=loaded)


def _folder(path: Path, split: str) -> Source:
    """All files of a kind that is known, in the order of their names; of one split, where names tell splits apart."""
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and _known(file) and not _hidden(file, path)
        and file.name not in DESCRIPTIONS
    )  # fmt: skip
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no preference files ({', '.join(READERS)})")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if split:
        if split not in splits:
            raise ValueError(f"{path} holds the splits {sorted(filter(None, splits))}; {split!r} is none of them")
        files = splits[split]
    elif len(splits) > 1 and any(splits):
        raise ValueError(
            f"{path} holds several splits, {sorted(name or 'others' for name in splits)}: name the one to train on, "
            f"as in {path}:{max(splits)}"
        )
    return Source(f"{path}:{split}" if split else str(path), _content_hash(tuple(files)), tuple(files))


def _split_of(path: Path) -> str:
    """train_prefs of train_prefs-00000-of-00002.parquet, test of test.jsonl; "" of names that tell none."""
    stem = path.name.split(".")[0]
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?", stem)
    if shard:
        return shard[1]
    is_split = re.match(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", stem)
    return re.sub(r"[-_]?\d+$", "", stem) if is_split else ""


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known(path: Path) -> bool:
    return _suffix(path) in READERS


def _suffix(path: Path) -> str:
    """What says how to read a file, below what says how it is compressed."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def _kind_of(path: Path) -> str:
    """The suffix that says how to read a file; a name without any is read as lines of JSON."""
    kind = _suffix(path) or ".jsonl"
    if kind not in READERS or (kind == ".parquet" and path.suffix.lower() in COMPRESSED):
        raise ValueError(
            f"{path} is of a kind that is not read; known are {', '.join(READERS)}, and all but the last "
            f"also compressed as {', '.join(COMPRESSED)}"
        )
    return kind


def _content_hash(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# Readers: a number, what it counts, the text, and an error.

Read = Iterator[tuple[int, str, bytes, str]]


def _open(path: Path) -> io.BufferedReader:
    """The bytes of a file, unpacked, as UTF-8 without a byte-order mark."""
    raw: Any = pyarrow.input_stream(str(path), compression=COMPRESSED.get(path.suffix.lower()))
    stream = io.BufferedReader(raw)
    mark = stream.peek(4)[:4]
    if mark.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
    elif mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return io.BufferedReader(_Recoded(io.TextIOWrapper(stream, "utf-16", errors="surrogatepass", newline="")))
    return stream


class _Recoded(io.RawIOBase):
    """UTF-8 from a stream of text."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.rest = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.rest:
            self.rest = self.text.read(2**16).encode("utf-8", errors="surrogatepass")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def _json_lines(path: Path) -> Read:
    with _open(path) as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, "line", text, ""


def _json(path: Path) -> Read:
    """One array of pairs, or one pair a line."""
    with _open(path) as file:
        if not file.peek(2**16).lstrip().startswith(b"["):
            yield from _json_lines(path)
            return
        try:
            items = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    for number, item in enumerate(items, start=1):
        yield number, "item", _as_json(item), ""


def _table_of_text(delimiter: str) -> Callable[[Path], Read]:
    def read(path: Path) -> Read:
        csv.field_size_limit(2**31 - 1)  # an answer may be longer than the 128 KiB that are the default
        with _open(path) as file, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="") as text:
            rows = csv.reader(text, delimiter=delimiter, strict=True)  # an open quote swallows the lines after it
            names = [name or f"column {i}" for i, name in enumerate(next(rows, []), start=1)]  # pandas' index has none
            if len(set(names)) < len(names):
                raise DataError(f"{path}, line 1: column names {names}; expected each once")
            first = rows.line_num + 1
            for row in rows:
                number, first = first, rows.line_num + 1  # a quoted field may hold line breaks
                if not row:
                    continue
                cells = {name: cell or None for name, cell in zip(names, row, strict=False)}
                error = "" if len(row) == len(names) else f"has {len(row)} cells, the first line {len(names)} columns"
                yield number, "line", _as_json(cells), error

    return read


def _parquet(path: Path) -> Read:
    number, file = 0, pyarrow.parquet.ParquetFile(path)
    if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
        raise DataError(f"{path}: column names {file.schema_arrow.names}; expected each once")
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield number, "row", _as_json(_table_row(row)), ""


READERS: dict[str, Callable[[Path], Read]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _table_of_text(","),
    ".tsv": _table_of_text("\t"), ".parquet": _parquet,
}  # fmt: skip


def _as_json(value: Any) -> bytes:
    """What JSON cannot hold, such as the bytes of an image, becomes an object that no format reads."""
    return json.dumps(value, default=lambda other: {"unreadable": type(other).__name__}).encode()


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Tables give every message the keys of all others, as nulls: what is null in them was not there."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
