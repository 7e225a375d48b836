"""Which tokenizer a run uses, and that policy and reference read the same text."""

from __future__ import annotations

import pytest
from templates import make_tokenizer

from dpo_kernels.training.loading import load_tokenizer


@pytest.fixture
def save(tmp_path):
    def save(name, change=None):
        folder = tmp_path / name
        folder.mkdir()
        if change is not None:
            tokenizer = make_tokenizer()
            change(tokenizer)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def test_the_policys_comes_first(save):
    def chatty(tokenizer):
        tokenizer.chat_template = "{{ 'policy' }}"

    policy, reference, none = save("policy", chatty), save("reference", lambda _: None), save("none")
    assert load_tokenizer(policy, reference).chat_template == "{{ 'policy' }}"
    assert load_tokenizer(none, policy).chat_template == "{{ 'policy' }}"
    assert load_tokenizer(policy).chat_template == load_tokenizer(policy, policy).chat_template == "{{ 'policy' }}"
    for names, message in (((none,), "none holds no tokenizer"), ((none, none), "none holds no tokenizer")):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(*names)
    with pytest.raises(ValueError, match=r"neither .*none nor the reference .*other holds a tokenizer"):
        load_tokenizer(none, save("other"))


def test_another_vocabulary_is_refused(save):
    policy, reference = save("policy", lambda _: None), save("reference", lambda tok: tok.add_tokens(["new"]))
    for names, message in (
        (
            (policy, reference),
            r"differ in 1 of 375 and 376 tokens \('new' is None for .*policy and 375 for .*reference\)",
        ),
        ((reference, policy), r"differ in 1 of 376 and 375 tokens \('new' is 375 for"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(*names)


def test_other_special_tokens_are_told(save):
    def ends(tokenizer):
        tokenizer.eos_token = "<|im_end|>"

    policy, reference = save("policy", ends), save("reference", lambda _: None)
    with pytest.warns(UserWarning, match=r"other special tokens \(eos_token '<\|im_end\|>' / '</s>'\)"):
        assert load_tokenizer(policy, reference).eos_token == "<|im_end|>"
