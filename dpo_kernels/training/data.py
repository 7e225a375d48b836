"""Preference pairs from a JSONL file to padded tensors, memory-mapped by the `datasets` library.

Each line is {"chosen": [messages], "rejected": [messages]}; a message has a "role" and a "content".
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training import chat

SIDES = ("chosen", "rejected")
ON_BAD_LINE = ("raise", "skip")
IGNORE_INDEX = -100
FORMAT = 1  # of the cached rows: raise it when what a row holds changes


class DataError(ValueError):
    """The preference file cannot be trained on; names the file, the line and the cause."""


@dataclass(frozen=True)
class DataReport:
    """What became of the lines of a file.

    pairs: lines that training uses. skipped: bad lines, left out on request. without_reply: pairs dropped since
    truncation left one of their answers without a token that counts. truncated: pairs cut to max_length.
    prompts_differ: pairs whose messages before the last are not the same; they are used all the same.
    """

    pairs: int
    skipped: int
    without_reply: int
    truncated: int
    prompts_differ: int

    def __str__(self) -> str:
        parts = [f"{self.pairs:,} pairs"]
        for count, what in (
            (self.skipped, "bad lines skipped"),
            (self.without_reply, "dropped, since truncation left an answer without a token"),
            (self.truncated, "of them cut to max_length"),
            (self.prompts_differ, "of them with prompts that differ"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return ", ".join(parts)


class DPODataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Preference pairs as tensors of one length, so that the default DataLoader collates them.

    Item i is a dict, each tensor (max_length - 1,):
        x_chosen, x_rejected: int64, token ids without the last, then the pad token.
        y_chosen, y_rejected: int64, token ids without the first, -100 where the mask is False.
        mask_chosen, mask_rejected: bool, True where y is a token of the assistant.
        ref_chosen, ref_rejected: float32, the reference's log-probs of y, once `with_reference` has added them.
    Nothing counts after the last True of a mask, so the text ends there.

    Args:
        path: the JSONL file. Blank lines are passed over.
        tokenizer: fast, with a chat template and a pad token.
        max_length: the longest conversation in tokens; longer ones are cut on the right. At least 2.
        assistant_turns: "all" counts every reply of the assistant, "last" only the answer itself.
        on_bad_line: "raise", or "skip": bad lines are left out and written to `skipped_path` with their reasons.
        skipped_path: default: beside the file, as NAME.skipped.jsonl.
        num_proc: processes that tokenize.
        cache_dir: where tokenized rows are kept, under a key of file content, tokenizer and options. Default: the
            folder dpo_kernels in the cache of the `datasets` library.

    Raises:
        FileNotFoundError: no such file.
        DataError: a bad line (file, line and cause), an empty file, or no pair left.
        TemplateError: the template rewrites earlier turns; says what to do.
        ValueError: the tokenizer lacks something, or an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        assistant_turns: str = "all",
        on_bad_line: str = "raise",
        skipped_path: str | os.PathLike[str] | None = None,
        num_proc: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; expected at least 2 tokens, one to read and one to predict")
        for name, value, known in (
            ("assistant_turns", assistant_turns, chat.ASSISTANT_TURNS),
            ("on_bad_line", on_bad_line, ON_BAD_LINE),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {known}")
        chat.check_tokenizer(tokenizer)
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no preference file {self.path}; give a JSONL file")
        self.max_length = max_length
        self.pad_token_id = int(tokenizer.pad_token_id)
        content = _content_hash(self.path)
        self.key = _key(content, tokenizer, max_length, assistant_turns)
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
        rows = self._tokenize(content, tokenizer, assistant_turns, num_proc)
        bad = [(i, reason) for i, reason in enumerate(rows["error"]) if reason]
        if bad:
            self._handle_bad_lines(rows, bad, on_bad_line, skipped_path)
        usable = [i for i, (error, reply) in enumerate(zip(rows["error"], rows["has_reply"], strict=True))
                  if reply and not error]  # fmt: skip
        self.rows = rows.select(usable)
        self.report = DataReport(
            len(usable), len(bad), len(rows) - len(bad) - len(usable),
            sum(self.rows["truncated"]), sum(self.rows["prompts_differ"]),
        )  # fmt: skip
        if not usable:
            raise DataError(
                f"{self.path}: no pair is left to train on ({self.report}); raise max_length ({max_length})"
            )

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
        count = round(eval_size * len(self)) if eval_size < 1 else int(eval_size)
        if not 0 < count < len(self):
            raise ValueError(
                f"eval_size is {eval_size}: {count} of {len(self)} pairs; expected at least 1 on each side"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def select(self, indices: Sequence[int]) -> DPODataset:
        """The pairs at these positions; the report stays that of the whole file."""
        return self._with_rows(self.rows.select(indices))

    def with_reference(self, log_probs: datasets.Dataset) -> DPODataset:
        """The same pairs with the columns ref_chosen and ref_rejected, one list of len(ids) - 1 log-probs a row."""
        return self._with_rows(datasets.concatenate_datasets([self.rows, log_probs], axis=1))

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

    def _tokenize(
        self, content: str, tokenizer: PreTrainedTokenizerBase, assistant_turns: str, num_proc: int | None
    ) -> datasets.Dataset:
        if next(_lines(str(self.path), content), None) is None:
            raise DataError(f"{self.path}: the file is empty; expected one pair a line")
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        lines = datasets.Dataset.from_generator(
            _lines, features=LINE, cache_dir=str(self.cache_dir),
            gen_kwargs={"path": str(self.path.resolve()), "content": content},
        )  # fmt: skip
        try:
            return lines.map(
                _encode_line, features=ROW, remove_columns=["text"], num_proc=num_proc,
                desc=f"Tokenizing {self.path.name}", new_fingerprint=self.key,
                cache_file_name=str(self.cache_dir / f"pairs-{self.key}.arrow"),
                fn_kwargs={"tokenizer": tokenizer, "max_length": self.max_length, "assistant_turns": assistant_turns},
            )  # fmt: skip
        except chat.TemplateError as error:
            raise chat.TemplateError(f"{self.path}, {error}") from error

    def _handle_bad_lines(
        self, rows: datasets.Dataset, bad: list[tuple[int, str]], on_bad_line: str, skipped_path: Any
    ) -> None:
        numbers = rows["line"]
        if on_bad_line == "raise":
            first, reason = bad[0]
            more = f" ({len(bad) - 1:,} more lines are bad)" if len(bad) > 1 else ""
            raise DataError(
                f"{self.path}, line {numbers[first]}: {reason}{more}; mend it, or leave bad lines out with "
                "--on_bad_line skip"
            )
        reasons = {numbers[i]: reason for i, reason in bad}
        target = Path(skipped_path) if skipped_path else self.path.with_suffix(".skipped.jsonl")
        write_whole(target, "".join(
            json.dumps({"line": number, "reason": reasons[number], "text": text}, ensure_ascii=False) + "\n"
            for number, text in _texts(self.path) if number in reasons
        ))  # fmt: skip


@dataclass(frozen=True)
class PairCollator:
    """Stacks items and cuts what no sequence of the batch needs: everything after the last token that counts."""

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        counted = batch["mask_chosen"] | batch["mask_rejected"]
        length = int(counted.any(0).nonzero().max()) + 1 if counted.any() else 1
        return {name: tensor[:, :length].contiguous() for name, tensor in batch.items()}


def attention_mask(mask: Tensor) -> Tensor:
    """1 up to the last token that counts, (R, S) int64: what comes after it, padding or not, changes nothing before."""
    return mask.flip(1).long().cummax(1).values.flip(1)


def default_cache_dir() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_kernels"


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


LINE = datasets.Features({"line": datasets.Value("int64"), "text": datasets.Value("large_binary")})
ROW = datasets.Features({
    "line": datasets.Value("int64"), "error": datasets.Value("string"), "has_reply": datasets.Value("bool"),
    "truncated": datasets.Value("bool"), "prompts_differ": datasets.Value("bool"),
    **{f"{side}_ids": datasets.List(datasets.Value("int32")) for side in SIDES},
    **{f"{side}_mask": datasets.List(datasets.Value("int8")) for side in SIDES},
})  # fmt: skip


def _lines(path: str, content: str) -> Iterator[dict[str, Any]]:
    """content: the file's hash, so that the library's cache follows the file."""
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield {"line": number, "text": text}


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            yield number, text.decode("utf-8", errors="replace").rstrip("\r\n")


def _encode_line(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, assistant_turns: str
) -> dict[str, Any]:
    result: dict[str, Any] = {"error": "", "has_reply": False, "truncated": False, "prompts_differ": False}
    result |= {f"{side}_{what}": [] for side in SIDES for what in ("ids", "mask")}
    try:
        pair = parse_pair(row["text"])
        encoded = {side: chat.encode(pair[side], tokenizer, max_length, assistant_turns) for side in SIDES}
    except (DataError, chat.MessageError) as error:
        return result | {"error": str(error)}
    except chat.TemplateError as error:
        raise chat.TemplateError(f"line {row['line']}: {error}") from error
    for side in SIDES:
        result |= {f"{side}_ids": encoded[side].input_ids, f"{side}_mask": encoded[side].mask}
    return result | {
        "has_reply": all(any(encoded[side].mask[1:]) for side in SIDES),
        "truncated": any(encoded[side].truncated for side in SIDES),
        "prompts_differ": pair["chosen"][:-1] != pair["rejected"][:-1],
    }


def parse_pair(text: bytes) -> dict[str, list[chat.Message]]:
    """One line of the file as {"chosen": messages, "rejected": messages}.

    Raises:
        DataError: says what is wrong, where in the line.
    """
    try:
        pair = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"not JSON that can be read: {error}") from error
    if not isinstance(pair, dict):
        raise DataError(f"is {_kind(pair)}; expected an object with 'chosen' and 'rejected'")
    for side in SIDES:
        if side not in pair:
            raise DataError(f"{side!r} is missing; found {sorted(pair)}")
        messages = pair[side]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{side!r} is {_kind(messages)}; expected a list of messages")
        for i, message in enumerate(messages):
            _check_message(f"{side}[{i}]", message)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the last message of {side!r} is from {messages[-1]['role']!r}; expected 'assistant'")
    return pair


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind(message)}; expected an object with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in message:
            raise DataError(f"{where} has no {key!r}; found {sorted(message)}")
        if not isinstance(message[key], str):
            raise DataError(f"{where}[{key!r}] is {_kind(message[key])}; expected a string")
        try:
            message[key].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}[{key!r}] is no valid Unicode: {error.reason} at {error.start}") from error
    if not message["role"]:
        raise DataError(f"{where}['role'] is empty")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _key(content: str, tokenizer: PreTrainedTokenizerBase, max_length: int, assistant_turns: str) -> str:
    facts = [
        FORMAT, content, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        sorted(tokenizer.special_tokens_map.items()), max_length, assistant_turns,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
