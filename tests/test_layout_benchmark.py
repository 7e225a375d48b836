"""benchmarks.layouts: systems in processes of their own, the same tokens in turn."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import ROOT

from benchmarks import layouts
from benchmarks.layout_worker import _whole_sequences


def test_systems_train_on_the_same_pairs_in_turn(tmp_path, capsys):
    made = tmp_path / "figures.json"
    options = ["--made", "40", "6", "9", "--pairs", "1", "--steps", "2", "--systems", "shared", "plain"]
    assert layouts.main([*options, "--before", str(ROOT), "--json", str(made)]) == 0
    before, shared, plain = json.loads(made.read_text())
    assert [row["system"] for row in (before, shared, plain)] == ["before", "shared", "plain"]
    for name in ("losses", "norms"):
        assert shared[name] == pytest.approx(plain[name], rel=1e-4)
        assert before[name] == pytest.approx(plain[name], rel=1e-4)
    assert abs(plain["losses"][0] - 0.6931) > 1e-3
    assert before["tokens"] == [96, 96]
    assert shared["tokens"] == [53, 53]
    assert plain["tokens"] == [98, 98]
    assert all(
        len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["bytes"] > 0 for row in (before, shared, plain)
    )
    printed = capsys.readouterr().out
    assert "step 2: before " in printed
    assert "| | s a step | x before |" in printed


def test_a_system_that_ends_says_its_last_words():
    worker = layouts.Worker("padded", ["--model", "/nowhere", "--items", "x", "--pairs", "1"], ROOT)
    with pytest.raises(RuntimeError, match=r"padded ended with status 1: [\s\S]*Error"):
        worker.hear()


def test_whole_sequences_are_those_of_the_items():
    mask = torch.tensor([False, True, True, False])
    item = {"x_chosen": torch.tensor([5, 6, 7, 0]), "y_chosen": torch.tensor([-100, 7, 8, -100]), "mask_chosen": mask}
    item |= {"x_rejected": torch.tensor([5, 9, 0, 0]), "y_rejected": torch.tensor([-100, 3, -100, -100]),
             "mask_rejected": torch.tensor([False, True, False, False])}  # fmt: skip
    found = _whole_sequences([item])
    assert found["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 3, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert found["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
