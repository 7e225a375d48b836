"""What a person sees of the data before training: pairs on the screen, the picture of their lengths."""

from __future__ import annotations

import io
import json

import numpy as np
from rich.console import Console
from templates import make_tokenizer, say

from dpo_kernels.training import DPODataset
from dpo_kernels.training.data_report import lengths
from dpo_kernels.training.report import save_curves, save_lengths
from dpo_kernels.training.show import show_pairs


def shown(tmp_path, lines, count=1, colour=False, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = make_tokenizer()
    dataset = DPODataset(path, tokenizer, 2000, cache_dir=tmp_path / "cache", **options)
    text = io.StringIO()
    console = Console(file=text, force_terminal=colour, color_system="standard" if colour else None, soft_wrap=True,
                      highlight=False, legacy_windows=False)  # fmt: skip
    show_pairs(dataset, tokenizer, count, console)
    return text.getvalue()


PAIR = {"chosen": say("Hi?", "Hello [bold]you[/bold]."), "rejected": say("Hi?", "No.")}


def test_tokens_that_count_are_marked(tmp_path):
    text = shown(tmp_path, [PAIR])
    assert f"pair 1 of 1 ({tmp_path / 'pairs.jsonl'}, line 1): both " in text
    assert "\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n" in text
    assert "⟦Hello [bold]you[/bold].<|im_end|>⟧" in text
    assert "⟦No.<|im_end|>⟧" in text
    assert text.count("Hi?") == 1
    assert "Tokens between ⟦ and ⟧ count in the loss" in text


def test_colours_on_a_terminal(tmp_path):
    text = shown(tmp_path, [PAIR], colour=True)
    assert "⟦" not in text
    assert "\x1b[1;32mHello [bold]you[/bold].<|im_end|>\x1b[0m" in text
    assert "\x1b[1;35mNo.<|im_end|>\x1b[0m" in text


def test_earlier_replies_are_marked_where_they_count_and_long_prompts_are_shortened(tmp_path):
    line = {"chosen": say("a" * 900, "Once.", "b", "Yes."), "rejected": say("a" * 900, "Once.", "b", "No.")}
    text = shown(tmp_path, [line])
    assert "⟦Once.<|im_end|>⟧" in text
    assert "[... " in text
    assert len(text) < 1100
    assert "⟦Once" not in shown(tmp_path, [line], assistant_turns="last")


def test_prompts_that_differ_are_shown_on_both_sides(tmp_path):
    text = shown(tmp_path, [{"chosen": say("Hi?", "Yes."), "rejected": say("Ho?", "No.")}])
    assert "Hi?" in text
    assert "Ho?" in text


def test_control_characters_of_the_data_do_not_reach_the_terminal(tmp_path):
    text = shown(tmp_path, [{"chosen": say("Hi\x1b[31m?", "Yes\x07."), "rejected": say("Hi\x1b[31m?", "No.")}])
    assert "\x1b" not in text
    assert "\x07" not in text


def test_answers_with_a_common_beginning_are_whole(tmp_path):
    text = shown(tmp_path, [{"chosen": say("Hi?", "It is so."), "rejected": say("Hi?", "It is not.")}])
    assert "⟦It is so.<|im_end|>⟧" in text
    assert "⟦It is not.<|im_end|>⟧" in text


def test_no_more_pairs_than_there_are(tmp_path):
    assert shown(tmp_path, [PAIR, PAIR], count=9).count("pair ") == 2
    assert shown(tmp_path, [PAIR], count=0) == ""


def test_the_picture_of_lengths(tmp_path):
    path = save_lengths(np.array([[10, 20, 30], [100, 5, 1], [1, 1, 1]]), 40, tmp_path / "new")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.name == "lengths.png"
    save_lengths(np.array([[0, 1, 1]]), 40, tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR))
    dataset = DPODataset(tmp_path / "pairs.jsonl", make_tokenizer(), 2000, cache_dir=tmp_path / "cache")
    found = lengths(dataset.rows)
    assert found.shape == (1, 3)
    assert found[0].tolist() == dataset.rows[0]["lengths"]


def test_curves_of_several_evaluation_sets(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, label="", **k: drawn.append(label) or plot(self, *a, label=label, **k)
    )
    log = [{"step": 1, "loss": 0.7, "eval_a_loss": 0.6, "eval_b_loss": 0.8, "eval_a_logps/accuracies": 0.5}]
    save_curves(log, tmp_path)
    assert drawn == ["loss", "loss, held out a", "loss, held out b", "ranking accuracy, held out a"]
    drawn.clear()
    save_curves([{"step": 1, "loss": 0.7, "eval_loss": 0.6, "eval_runtime": 3.0}], tmp_path)
    assert drawn == ["loss", "loss, held out"]
