"""Prompts and what a model answers to them, for `sample` and `compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_kernels.commands.inputs import EXAMPLE
from dpo_kernels.commands.options import check_device
from dpo_kernels.commands.simple import Parser
from dpo_kernels.training.answers import answers_to, chat_prompt
from dpo_kernels.training.data import parse_json
from dpo_kernels.training.formats import ChatPair, ReadOptions, read_line
from dpo_kernels.training.loading import load_model, load_tokenizer
from dpo_kernels.training.messages import DataError, is_conversation
from dpo_kernels.training.sources import open_source

Prompt = str | list[dict[str, Any]]  # as it is, or messages for the chat template
FROM_EXAMPLE = 3  # prompts, where none are given


def add_options(parser: Parser) -> None:
    """What both commands take."""
    parser.add_argument("--prompts", metavar="FILE", help="lines of text; or pairs, or lines of JSON with a prompt or "
                        "messages, as .jsonl and what else train reads")  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", nargs="+", help="prompts; default: three of the example's pairs")
    parser.add_argument("--count", type=int, help="so many of the prompts; default: all of --prompt, 8 of --prompts")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of an answer; default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: the likeliest token each time")
    parser.add_argument("--top_p", type=float, default=1.0, help="with a temperature: the likeliest of this share")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code run that a model brings")


def prompts_of(options: Any) -> list[Prompt]:
    """
    Raises:
        ValueError: a number out of range, prompts in two ways, or none in the file.
        OSError: the file is not there.
    """
    for name, least in (("max_new_tokens", 1), ("count", 1), ("temperature", 0), ("top_p", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}")
    check_device(options.device)
    if options.prompt and options.prompts:
        raise ValueError("give prompts either by --prompt or by --prompts")
    if options.prompt:
        return [as_message(text) for text in options.prompt][: options.count]
    count = options.count or (8 if options.prompts else FROM_EXAMPLE)
    return read_prompts(options.prompts or str(EXAMPLE), count)


def read_prompts(path: str, count: int) -> list[Prompt]:
    """The first prompts of a file, each once.

    Raises:
        OSError: it cannot be read.
        DataError: a line holds no prompt, or there is none.
    """
    if Path(path).suffix in (".txt", ".md"):
        texts = Path(path).read_text(encoding="utf-8").splitlines()
        found: list[Prompt] = [as_message(text) for text in dict.fromkeys(map(str.strip, texts)) if text]
    else:
        found = []
        for line in open_source(path).lines():
            try:
                prompt = _prompt_of(parse_json(line.text))
            except DataError as error:
                raise DataError(f"{line.where}: {error}") from error
            if prompt not in found:
                found.append(prompt)
            if len(found) == count:
                break
    if not found:
        raise DataError(f"{path}: there is no prompt in it; expected one a line")
    return found[:count]


def as_message(text: str) -> Prompt:
    """What a user says."""
    return [{"role": "user", "content": text}]


def text_of(prompt: Prompt) -> str:
    """To be read by people: what was said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")


def answers(name: str, prompts: Sequence[Prompt], options: Any) -> list[str]:
    """What a model answers; it is loaded, and freed.

    Args:
        name: a model folder or hub name, an adapter's too.
        options: those of `add_options`.
    """
    tokenizer = load_tokenizer(name, None, options.trust_remote_code)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_model(name, trust_remote_code=options.trust_remote_code, dtype=dtype)
    model = model.to(check_device(options.device)).eval()
    torch.manual_seed(options.seed)
    ids = [chat_prompt(tokenizer, prompt) for prompt in prompts]
    return answers_to(
        model, tokenizer, ids, max_new_tokens=options.max_new_tokens, max_seconds=None,
        temperature=options.temperature, top_p=options.top_p,
    )  # fmt: skip


def _prompt_of(value: Any) -> Prompt:
    """Of a pair what stands before its answers; else the line's prompt or messages."""
    if isinstance(value, dict) and not {"chosen", "rejected"} & value.keys():
        for key in ("prompt", "messages"):
            found: Any = value.get(key)
            if is_conversation(found):
                return found[:-1] if found[-1].get("role") == "assistant" and len(found) > 1 else list(found)
            if isinstance(found, str) and found.strip():
                return as_message(found)
        raise DataError(f"holds {json.dumps(sorted(value))}; expected a prompt, messages, or a pair")
    pair = read_line(value, ReadOptions()).pairs[0]
    return pair.chosen[:-1] if isinstance(pair, ChatPair) else pair.prompt
