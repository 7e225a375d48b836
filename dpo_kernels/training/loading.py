"""Tokenizers from model folders and hub names, for a policy and its reference."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

# One of these is there wherever a tokenizer is.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(policy: str, reference: str | None = None) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, or the reference's where the policy has none.

    Args:
        policy, reference: folders or hub names; None: there is no reference.

    Raises:
        ValueError: neither has a tokenizer; or the reference's gives other ids to the same text, so that it would score
            other text than the policy.
    """
    found = {name: _load(name) for name in dict.fromkeys(filter(None, (policy, reference))) if _has_tokenizer(name)}
    if not found:
        raise ValueError(
            f"neither {policy} nor the reference {reference} holds a tokenizer"
            if reference not in (None, policy) else f"{policy} holds no tokenizer"
        )  # fmt: skip
    tokenizer = found.get(policy) or next(iter(found.values()))
    if len(found) == 2:
        assert reference is not None
        _compare(policy, tokenizer, reference, found[reference])
    return tokenizer


def _load(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name)


def _has_tokenizer(name: str) -> bool:
    missing: dict[str, bool] = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    return any(cached_file(name, file, **missing) for file in FILES)


def _compare(policy: str, own: Any, reference: str, other: Any) -> None:
    ids, other_ids = own.get_vocab(), other.get_vocab()
    differing = [token for token in ids if ids[token] != other_ids.get(token)]
    differing += [token for token in other_ids if token not in ids]
    if differing:
        token = differing[0]
        raise ValueError(
            f"the tokenizers of policy and reference differ in {len(differing):,} of {len(ids):,} and "
            f"{len(other_ids):,} tokens ({token!r} is {ids.get(token)} for {policy} and {other_ids.get(token)} for "
            f"{reference}): the reference would read other text than the policy; give a reference with the policy's "
            "vocabulary"
        )
    names = {name for name, token in own.special_tokens_map.items() if other.special_tokens_map.get(name) != token}
    if names:
        listed = ", ".join(
            f"{name} {own.special_tokens_map[name]!r} / {other.special_tokens_map.get(name)!r}"
            for name in sorted(names)
        )
        warnings.warn(
            f"policy and reference have other special tokens ({listed}); both are given text with the policy's",
            stacklevel=3,
        )
