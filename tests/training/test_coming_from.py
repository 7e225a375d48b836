"""docs/coming-from.md as it stands: each block runs, before and after give the same loss."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import EXAMPLE, ROOT
from script_helpers import PAIR
from trl import DPOConfig

from dpo_kernels import hidden_to_log_probs
from dpo_kernels.training.small_model import make_small_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}


def tensors():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 9, 16, requires_grad=True), torch.randn(200, 16, requires_grad=True)
    labels = torch.randint(200, (4, 9))
    labels[:, :3] = -100
    ref_hidden, ref_weight = torch.randn(4, 9, 16), torch.randn(200, 16)
    ref_log_probs = hidden_to_log_probs(ref_hidden, ref_weight, labels)
    return {
        "hidden": hidden, "weight": weight, "labels": labels, "ref_hidden": ref_hidden, "ref_weight": ref_weight,
        "ref_log_probs": ref_log_probs, "F": F,
    }  # fmt: skip


def test_every_section_has_a_before_and_an_after_of_three_lines():
    assert list(SECTIONS) == ["TRL", "Liger", "Plain PyTorch", "A notebook, or a loop of your own"]
    for blocks in SECTIONS.values():
        assert [len([line for line in block.splitlines() if line.strip()]) for block in blocks] == [3, 3]


def test_the_imports_of_the_readme_work_and_its_three_lines_run():
    blocks = re.findall(r"```python\n(from dpo_kernels.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names = tensors() | {"A": torch.randn(3, 16), "B": torch.randn(200, 3), "scale": 2.0}
        names["lm_head"] = SimpleNamespace(weight=names["weight"])
        exec(block, names)
        assert {"loss", "enable", "LowRank"} & names.keys()
    for line in re.findall(r"from dpo_kernels[\w.]* import [\w, ]+", README):
        exec(line)


@pytest.mark.parametrize("section", ["Liger", "Plain PyTorch", "A notebook, or a loop of your own"])
def test_functions(section):
    results = []
    for block in SECTIONS[section]:
        names = tensors()
        exec(block, names)
        names["loss"].backward()
        results.append((names["loss"].detach(), names["hidden"].grad, names["weight"].grad))
    for before, after in zip(*results, strict=True):
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-6)
        assert before.abs().max() > 0


def test_trl(tmp_path):
    model, tokenizer = make_small_model(EXAMPLE, vocab_size=500, hidden_size=64, layers=1)
    before, after = SECTIONS["TRL"]
    histories = []
    for _ in range(2):
        config = DPOConfig(
            str(tmp_path), max_steps=2, logging_steps=1, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        names = {
            "model": copy.deepcopy(model), "ref_model": copy.deepcopy(model), "config": config, "tokenizer": tokenizer,
            "pairs": Dataset.from_list([PAIR] * 16),
        }  # fmt: skip
        if histories:
            exec(before.replace("trainer.train()\n", ""), names)
            exec(after, names)
        else:
            exec(before, names)
        histories.append([entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry])
    assert histories[0] == pytest.approx(histories[1], abs=1e-4)
    assert histories[0][1] < histories[0][0]
