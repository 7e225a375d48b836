"""What a model answers to prompts: greedy, so that the same model gives the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpo_kernels.training.scoring import evaluating

MAX_NEW_TOKENS = 96
MAX_SECONDS = 20.0  # for all prompts of a call: a large model on a CPU is cut short, not waited for


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_seconds: float | None = MAX_SECONDS,
) -> list[str]:
    """The answers to prompts, one after the other: no padding, which some models read.

    Args:
        model: a causal language model; it is left in the mode that it was in.
        prompts: token ids; of messages with the chat template applied, and the assistant's turn opened
            (`chat_prompt`).
        max_seconds: for all of them together; what is not done by then stays as far as it is. None: no limit.

    Returns: of each prompt the text behind it, up to the end of the turn, without special tokens.
    """
    ends = {tokenizer.eos_token_id, *_listed(getattr(model.generation_config, "eos_token_id", None))} - {None}
    device = next(model.parameters()).device
    answers = []
    with evaluating(model):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            limit = {} if max_seconds is None else {"max_time": max_seconds / len(prompts)}
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                max_new_tokens=max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id,
                temperature=None, top_p=None, top_k=None, **limit,
            )  # fmt: skip
            answers.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]] | str) -> list[int]:
    """Token ids of messages with the chat template applied and the assistant's turn opened; of a string as it is, or as
    the one message of a user where there is a template."""
    if isinstance(messages, str):
        if not tokenizer.chat_template:
            return list(tokenizer(messages)["input_ids"])
        messages = [{"role": "user", "content": messages}]
    text: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
