"""What a model answers to prompts: by default the likeliest token each time, so that it gives the same words again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training.loading import max_positions
from dpo_kernels.training.scoring import evaluating

MAX_NEW_TOKENS = 96
LONGEST_PROMPT = 1024  # tokens
MAX_SECONDS = 20.0  # for all prompts of a call: a large model on a CPU is cut short, not waited for


@torch.no_grad()
def answers_to(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_seconds: float | None = MAX_SECONDS,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[str]:
    """The answers to prompts, one after the other: no padding, which some models read.

    Args:
        model: a causal language model; it is left in the mode that it was in.
        prompts: token ids; of messages with the chat template applied, and the assistant's turn opened
            (`chat_prompt`).
        max_new_tokens: of an answer; fewer where the model has no positions left behind the prompt.
        temperature, top_p: 0, the likeliest token; else tokens are drawn, of the likeliest of this share.
        max_seconds: for all of them together; what is not done by then stays as far as it is. None: no limit.

    Returns: of each prompt the text behind it, up to the end of the turn, without special tokens.

    Raises:
        ValueError: a prompt fills the model's positions; none is answered then.
    """
    positions = max_positions(getattr(model, "config", None))
    longest = max(map(len, prompts), default=0)
    if positions is not None and longest >= positions:
        raise ValueError(
            f"a prompt has {longest:,} tokens, and the model {positions:,} positions, which leaves none for an answer; "
            "give a shorter prompt, or a model for longer sequences"
        )
    ends = {tokenizer.eos_token_id, *_listed(getattr(model.generation_config, "eos_token_id", None))} - {None}
    device = next(model.parameters()).device
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    answers = []
    with evaluating(model):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
            limit = {} if max_seconds is None else {"max_time": max_seconds / len(prompts)}
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=1, max_new_tokens=room,
                eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id, top_k=None, **how, **limit,
            )  # fmt: skip
            answers.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[dict[str, Any]] | str) -> list[int]:
    """Token ids of messages with the chat template applied and the assistant's turn opened; without a template of what
    was said last, and of a string as it is."""
    if isinstance(prompt, str) or not tokenizer.chat_template:
        return list(tokenizer(prompt if isinstance(prompt, str) else prompt[-1]["content"])["input_ids"])
    text: Any = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def prompts_of(dataset: Any, count: int, longest: int = LONGEST_PROMPT) -> list[list[int]]:
    """Token ids of the first `count` prompts of a `DPODataset`, each another, up to where the last reply begins; those
    of more than `longest` tokens are passed over."""
    found: list[list[int]] = []
    for i in range(len(dataset)):
        row = dataset.rows[i]
        prompt = row["chosen_ids"][: last_reply(row["chosen_mask"])]
        if 0 < len(prompt) <= longest and prompt not in found:
            found.append(prompt)
        if len(found) == count:
            break
    return found


def last_question(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """What a user says last in a prompt, as the chat template writes it; the whole text of other prompts."""
    text = str(tokenizer.decode(list(prompt), skip_special_tokens=False))
    if around := _around_a_question(tokenizer):
        before, behind = around
        start = text.rfind(before)
        if start >= 0 and text.endswith(behind):
            return text[start + len(before) : len(text) - len(behind)].strip()
    return str(tokenizer.decode(list(prompt), skip_special_tokens=True)).strip()


def _around_a_question(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """What the chat template writes before and behind a user's last words; None: there is none, or it refuses."""
    if not tokenizer.chat_template:
        return None
    first, reply, second = "QUESTION-1", "REPLY-1", "QUESTION-2"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": reply},
                {"role": "user", "content": second}]  # fmt: skip
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception:  # a template may raise what it likes
        return None
    if not text.find(first) < text.find(reply) < text.find(second) or first not in text:
        return None
    opening, (between, behind) = text.split(first)[0], text.split(reply)[1].split(second)
    same = next((i for i, (a, b) in enumerate(zip(opening[::-1], between[::-1], strict=False)) if a != b),
                min(len(opening), len(between)))  # fmt: skip
    return (between[len(between) - same :], behind) if same and behind else None


def last_reply(mask: Sequence[int] | Sequence[bool]) -> int:
    """Where the last stretch of tokens that count begins."""
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    while end and mask[end - 1]:
        end -= 1
    return end
