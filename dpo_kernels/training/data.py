"""Preference pairs from wherever they lie to padded tensors, memory-mapped by the `datasets` library."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training import chat, encoding
from dpo_kernels.training.batch import IGNORE_INDEX
from dpo_kernels.training.data_report import DataReport, column
from dpo_kernels.training.formats import SIDES, ReadOptions, read_line
from dpo_kernels.training.messages import DataError
from dpo_kernels.training.sources import RawLine, Source, open_source
from dpo_kernels.warn import warn

ON_BAD_LINE = ("raise", "skip")
REPEATED = 5  # by how much a mixture may be larger than its sources before it is told
FORMAT = 2  # of the cached rows: raise it when what a row holds changes


@dataclass(frozen=True)
class EncodeOptions:
    """Everything that decides what becomes of a line, but for the tokenizer; see `DPODataset`."""

    max_length: int
    assistant_turns: str = "all"
    truncation_mode: str = "keep_answer"
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}; expected at least 2 tokens, one to read and one to predict"
            )
        for name, value, known in (
            ("assistant_turns", self.assistant_turns, chat.ASSISTANT_TURNS),
            ("truncation_mode", self.truncation_mode, encoding.TRUNCATION_MODES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {known}")


class DPODataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Preference pairs as tensors of one length, so that the default DataLoader collates them.

    Item i is a dict, each tensor (max_length - 1,):
        x_chosen, x_rejected: int64, token ids without the last, then the pad token.
        y_chosen, y_rejected: int64, token ids without the first, -100 where the mask is False.
        mask_chosen, mask_rejected: bool, True where y is a token of the assistant.
        ref_chosen, ref_rejected: float32, the reference's log-probs of y, once `with_reference` has added them.
    Nothing counts after the last True of a mask, so the text ends there.

    Args:
        path: a file, a folder, or a name on the hub; or a `datasets.Dataset` (see `sources.open_source`). Each line is
            a pair in one of the formats of docs/data.md.
        tokenizer: fast, with a pad token; with a chat template if the pairs are messages.
        max_length: the longest sequence in tokens, at least 2.
        assistant_turns: "all" counts every reply of the assistant, "last" only the answer itself, as TRL does.
        truncation_mode: of longer sequences: "keep_answer", "keep_start" or "drop" (see `encoding.encode`).
        read: how lines are read: names of columns, strings as chat, tools and options for the template.
        on_bad_line: "raise", or "skip": bad lines are left out and written to `skipped_path` with their reasons.
        skipped_path: default: beside the file, as NAME.skipped.jsonl.
        num_proc: processes that tokenize.
        cache_dir: where tokenized rows are kept, under a key of content, tokenizer and options. Default: the folder
            dpo_kernels in the cache of the `datasets` library.

    Attributes:
        rows: the `datasets.Dataset` behind it, one row a pair.

    Raises:
        FileNotFoundError: no such file.
        DataError: a bad line (file, line and cause), an empty file, or no pair left.
        ValueError: the tokenizer lacks something, or an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        assistant_turns: str = "all",
        truncation_mode: str = "keep_answer",
        read: ReadOptions | None = None,
        on_bad_line: str = "raise",
        skipped_path: str | os.PathLike[str] | None = None,
        num_proc: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.options = EncodeOptions(max_length, assistant_turns, truncation_mode, read or ReadOptions())
        if on_bad_line not in ON_BAD_LINE:
            raise ValueError(f"on_bad_line is {on_bad_line!r}; expected one of {ON_BAD_LINE}")
        encoding.check_tokenizer(tokenizer)
        source = open_source(path)
        self.name, self.max_length = source.name, max_length
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.key = _key(source, tokenizer, self.options)
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
        with _written_to(self.cache_dir):
            lines = _lines_of(source, self.cache_dir)
            rows = self._encode(lines, tokenizer, num_proc)
        errors, dropped = (column(rows, name) for name in ("error", "dropped"))
        self.skipped = 0
        if any(errors):
            self.skipped = _handle_bad_lines(rows, errors, lines, source, on_bad_line, skipped_path)
        reasons = Counter(reason for reason, error in zip(dropped, errors, strict=True) if reason and not error)
        usable = [i for i, (error, reason) in enumerate(zip(errors, dropped, strict=True)) if not (error or reason)]
        self.rows, self.dropped = rows.select(usable), dict(reasons)
        if not usable:
            raise DataError(f"{self.name}: no pair is left to train on.\n{self.report}\n{self._advice()}")

    @classmethod
    def from_dataset(
        cls, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, **options: Any
    ) -> DPODataset:
        """The pairs of a `datasets.Dataset` in memory or on disk; arguments and errors as of the class.

        Raises:
            TypeError: it is no `datasets.Dataset`.
            ValueError: it is streamed, or a dict of splits.
        """
        if isinstance(dataset, str | os.PathLike) or not hasattr(dataset, "column_names"):
            raise TypeError(f"from_dataset takes a datasets.Dataset, not {type(dataset).__name__}")
        return cls(dataset, tokenizer, max_length, **options)

    @property
    def report(self) -> DataReport:
        """What became of the lines: of the pairs that this dataset holds, and of all lines that were not used."""
        return DataReport.of(self.rows, self.name, self.max_length, self.skipped, self.dropped)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        item: dict[str, Tensor] = {}
        for side in SIDES:
            item |= self._pad(side, row[f"{side}_ids"], row[f"{side}_mask"])
            if f"ref_{side}" in row:
                item[f"ref_{side}"] = self._padded(row[f"ref_{side}"], 0.0, torch.float32)
        return item

    def split(self, eval_size: float, seed: int = 0) -> tuple[DPODataset, DPODataset]:
        """Two parts, for training and evaluation, drawn by the seed.

        Args:
            eval_size: a share below 1, or a number of pairs.

        Raises:
            ValueError: one of the parts would be empty.
        """
        ((train, held_out),) = self.split_all([self], eval_size, seed)
        return train, held_out

    @staticmethod
    def split_all(parts: Sequence[DPODataset], eval_size: float, seed: int = 0) -> list[tuple[DPODataset, DPODataset]]:
        """Each of several datasets in two parts, as `split`; eval_size counts over all of them together."""
        total = sum(map(len, parts))
        count = round(eval_size * total) if eval_size < 1 else int(eval_size)
        if not 0 < count < total:
            raise ValueError(f"eval_size is {eval_size}: {count} of {total} pairs; expected at least 1 on each side")
        held_out = torch.zeros(total, dtype=torch.bool)
        held_out[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
        pieces = held_out.split([len(part) for part in parts])
        return [
            (part.select((~piece).nonzero().flatten().tolist()), part.select(piece.nonzero().flatten().tolist()))
            for part, piece in zip(parts, pieces, strict=True)
        ]

    def select(self, indices: Sequence[int]) -> DPODataset:
        """The pairs at these positions."""
        return self._with_rows(self.rows.select(indices))

    def with_reference(self, log_probs: datasets.Dataset) -> DPODataset:
        """The same pairs with the columns ref_chosen and ref_rejected, one list of len(ids) - 1 log-probs a row."""
        return self._with_rows(datasets.concatenate_datasets([self.rows, log_probs], axis=1))

    @staticmethod
    def mix(parts: Sequence[DPODataset], weights: Sequence[float] | None = None, seed: int = 0) -> DPODataset:
        """Several datasets as one.

        Args:
            parts: read with one tokenizer and one max_length.
            weights: how many of the draws are of each part, relative to the others: with [3, 1] three of four pairs
                come from the first, whatever the sizes. Drawn by the seed, a part's pairs in their order and from the
                start again, until each pair of each part has been drawn. None: every pair once, one part after the
                other.

        Raises:
            ValueError: weights of another number than the parts, or not positive; parts of different max_length.
        """
        if len({part.max_length for part in parts}) != 1:
            raise ValueError(f"datasets of different max_length: {[part.max_length for part in parts]}")
        if weights is not None and (len(weights) != len(parts) or not all(0 < weight < math.inf for weight in weights)):
            raise ValueError(
                f"data_weights is {list(weights)} for {len(parts)} datasets; expected a positive number for each"
            )
        if len(parts) == 1:
            return parts[0]
        result = parts[0]._with_rows(datasets.concatenate_datasets([part.rows for part in parts]))
        if weights is not None:
            result.rows = result.rows.select(_draws([len(part) for part in parts], weights, seed))
        result.name = " + ".join(part.name for part in parts)
        facts = [*(part.key for part in parts), weights, seed]
        result.key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        result.skipped = sum(part.skipped for part in parts)
        result.dropped = dict(sum((Counter(part.dropped) for part in parts), Counter()))
        return result

    def _with_rows(self, rows: datasets.Dataset) -> DPODataset:
        other = copy.copy(self)
        other.rows = rows
        return other

    def _pad(self, side: str, ids: list[int], mask: list[int]) -> dict[str, Tensor]:
        counts = self._padded(mask[1:], 0, torch.bool)
        y = self._padded(ids[1:], IGNORE_INDEX, torch.int64)
        return {
            f"x_{side}": self._padded(ids[:-1], self.pad_token_id, torch.int64),
            f"y_{side}": torch.where(counts, y, IGNORE_INDEX),
            f"mask_{side}": counts,
        }

    def _padded(self, values: list[Any], fill: float, dtype: torch.dtype) -> Tensor:
        result = torch.full((self.max_length - 1,), fill, dtype=dtype)
        result[: len(values)] = torch.tensor(values, dtype=dtype)
        return result

    def _encode(
        self, lines: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None
    ) -> datasets.Dataset:
        return lines.map(
            _encode_lines, batched=True, batch_size=100, features=ROW, remove_columns=lines.column_names,
            num_proc=num_proc, desc=f"Tokenizing {Path(self.name).name}", new_fingerprint=self.key,
            cache_file_name=str(self.cache_dir / f"pairs-{self.key}.arrow"),
            fn_kwargs={"tokenizer": tokenizer, "options": self.options},
        )  # fmt: skip

    def _advice(self) -> str:
        if set(self.dropped) == {encoding.EQUAL_ANSWERS}:
            return "Chosen and rejected are the same in each pair; look at the columns that were read"
        return f"Raise max_length ({self.max_length})"


def _draws(sizes: list[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Indices into datasets one after the other, drawn until each of them has come."""
    random, shares = np.random.default_rng(seed), np.asarray(weights, dtype=float) / sum(weights)
    starts = np.cumsum([0, *sizes])
    parts = np.empty(0, dtype=np.int64)
    while any(np.count_nonzero(parts == i) < size for i, size in enumerate(sizes)):
        parts = np.concatenate([parts, random.choice(len(sizes), size=sum(sizes), p=shares)])
    places = np.zeros(len(parts), dtype=np.int64)
    last = 0
    for i, size in enumerate(sizes):
        where = np.flatnonzero(parts == i)
        places[where] = starts[i] + np.arange(len(where)) % max(size, 1)
        last = max(last, int(where[size - 1]) + 1 if size else 0)
    if last > REPEATED * sum(sizes):
        warn(
            f"data_weights {list(weights)} makes {last:,} pairs of {sum(sizes):,}, so that some are seen many times; "
            "give weights nearer to the sizes of the sources"
        )
    return places[:last]


def default_cache_dir() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_kernels"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    part.replace(path)


LINE = datasets.Features({
    "number": datasets.Value("int64"), "where": datasets.Value("string"), "text": datasets.Value("large_binary"),
    "error": datasets.Value("string"),
})  # fmt: skip
ROW = datasets.Features({
    "line": datasets.Value("int64"), "where": datasets.Value("string"), "error": datasets.Value("string"),
    "dropped": datasets.Value("string"), "format": datasets.Value("string"),
    "unused": datasets.List(datasets.Value("string")), "cut_prompt": datasets.Value("bool"),
    "cut_answer": datasets.Value("bool"), "prompts_differ": datasets.Value("bool"),
    "empty_reply": datasets.Value("bool"), "rewritten": datasets.Value("bool"),
    "lengths": datasets.List(datasets.Value("int32")),
    "counted": datasets.Value("int32"), "tokens": datasets.Value("int32"), "digest": datasets.Value("string"),
    **{f"{side}_ids": datasets.List(datasets.Value("int32")) for side in SIDES},
    **{f"{side}_mask": datasets.List(datasets.Value("int8")) for side in SIDES},
})  # fmt: skip
BLANK: dict[str, Any] = {
    "error": "", "dropped": "", "format": "", "unused": [], "cut_prompt": False, "cut_answer": False,
    "prompts_differ": False, "empty_reply": False,
    "rewritten": False, "lengths": [0, 0, 0], "counted": 0, "tokens": 0,
    "digest": "",
    **{f"{side}_{what}": [] for side in SIDES for what in ("ids", "mask")},
}  # fmt: skip


@contextmanager
def _written_to(cache_dir: Path) -> Iterator[None]:
    """
    Raises:
        OSError: it cannot be written to; the library's own errors do not say where.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(
            f"the cache of pairs, {cache_dir}, cannot be written to ({error}); make room there, or set "
            "HF_DATASETS_CACHE to another folder"
        ) from error


def _lines_of(source: Source, cache_dir: Path) -> datasets.Dataset:
    """All lines of a source as they are, in a file that memory can be mapped to."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    named = hashlib.sha256(f"{FORMAT} {source.name} {source.content}".encode()).hexdigest()[:32]
    try:
        return datasets.Dataset.from_generator(
            _generate, features=LINE, cache_dir=str(cache_dir), fingerprint=named, gen_kwargs={"source": source}
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError | OSError):
            raise error.__cause__ from error
        raise
    except ValueError as error:  # the library's way to say that nothing came
        if next(source.lines(), None) is None:
            raise DataError(f"{source.name}: there is no pair in it; expected one a line") from error
        raise


def _generate(source: Source) -> Iterator[dict[str, Any]]:
    for line in source.lines():
        yield line._asdict()


def _encode_lines(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions
) -> dict[str, list[Any]]:
    lines = (RawLine(*values) for values in zip(*(batch[name] for name in RawLine._fields), strict=True))
    rows = [row for line in lines for row in _encode_line(line, tokenizer, options)]
    return {name: [row[name] for row in rows] for name in ROW}


def _encode_line(line: RawLine, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> Iterator[dict[str, Any]]:
    """A row for each pair of the line; one with the reason in it if the line is bad."""
    found = BLANK | {"line": line.number, "where": line.where}
    rows = []
    try:
        if line.error:
            raise DataError(line.error)
        read = read_line(parse_json(line.text), options.read)
        for pair in read.pairs:
            encoded = encoding.encode(
                pair, tokenizer, options.max_length, options.assistant_turns, options.truncation_mode
            )
            sides = {side: getattr(encoded, side) for side in SIDES}
            ids = {name: side.input_ids for name, side in sides.items()}
            rows.append(found | {
                "format": read.format, "unused": list(read.unused), "dropped": encoded.dropped,
                "cut_prompt": encoded.cut_prompt, "cut_answer": encoded.cut_answer, "lengths": list(encoded.lengths),
                "prompts_differ": encoding.prompts_differ(pair), "empty_reply": encoding.has_empty_reply(pair),
                "rewritten": encoded.rewritten,
                "counted": sum(len(side.counted) for side in sides.values()), "tokens": sum(map(len, ids.values())),
                "digest": hashlib.blake2b(json.dumps(ids).encode(), digest_size=12).hexdigest(),
                **{f"{name}_ids": ids[name] for name in SIDES},
                **{f"{name}_mask": side.mask for name, side in sides.items()},
            })  # fmt: skip
    except (DataError, RecursionError) as error:
        reason = str(error) if isinstance(error, DataError) else "is nested too deep to be read"
        rows = [found | {"error": reason}]
    yield from rows


def parse_json(text: bytes) -> Any:
    """
    Raises:
        DataError: it is no JSON in UTF-8; says where.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"not JSON that can be read: {error}") from error


def _handle_bad_lines(
    rows: datasets.Dataset,
    errors: list[str],
    lines: datasets.Dataset,
    source: Source,
    on_bad_line: str,
    skipped_path: Any,
) -> int:
    """Raises, or writes the bad lines with their reasons; returns how many there are."""
    reasons = {where: reason for where, reason in zip(column(rows, "where"), errors, strict=True) if reason}
    if on_bad_line == "raise":
        where, reason = next(iter(reasons.items()))
        more = f" ({len(reasons) - 1:,} more lines are bad)" if len(reasons) > 1 else ""
        raise DataError(f"{where}: {reason}{more}; mend it, or leave bad lines out with --on_bad_line skip")
    target = Path(skipped_path) if skipped_path else _beside(source)
    kept = (
        {"line": line["number"], "where": line["where"], "reason": reasons[line["where"]],
         "text": line["text"].decode("utf-8", errors="replace").rstrip("\r\n")}
        for line in lines if line["where"] in reasons
    )  # fmt: skip
    write_whole(target, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
    return len(reasons)


def _beside(source: Source) -> Path:
    if len(source.files) == 1:
        return source.files[0].with_suffix(".skipped.jsonl")
    return Path("skipped.jsonl") if source.table is not None else source.files[0].parent / "skipped.jsonl"


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> str:
    facts = [
        FORMAT, source.name, source.content, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()), asdict(options),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
