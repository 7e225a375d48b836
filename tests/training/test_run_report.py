"""What a run leaves for a reader: its words, its page and its card, made by the command itself on a small model."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import EXAMPLE
from script_helpers import losses, small_run
from training_helpers import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

import train
from dpo_kernels.training import DPODataset, FusedHead
from dpo_kernels.training.answers import answers_to, chat_prompt, last_question, last_reply, prompts_of
from dpo_kernels.training.batch import PairBatch, PairCollator
from dpo_kernels.training.lesson import taught_model, teach
from dpo_kernels.training.pair_metrics import PAIR_METRICS, mean_metrics
from dpo_kernels.training.report.metrics import LONGER, SHORTER
from dpo_kernels.training.report.tokens import BROKEN, pieces
from dpo_kernels.training.scoring import score_pairs

RUN = {"max_steps": 2, "eval_size": 12, "save_strategy": "no", "eval_strategy": "no"}


def trained(model_dir, output_dir, capsys, **options):
    arguments = small_run(model_dir, output_dir, **(RUN | {"report": True} | options))
    assert train.main(arguments) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and test_report.py has them."""
    monkeypatch.setattr("dpo_kernels.training.callbacks.save_curves", lambda *_: None)
    monkeypatch.setattr("dpo_kernels.commands.train.save_lengths", lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def pairs(tokenizer, tmp_path_factory):
    return DPODataset(EXAMPLE, tokenizer, 160, cache_dir=tmp_path_factory.mktemp("cache")).select(range(12))


def snippet_of(output_dir):
    return re.search(r"```python\n(.*?)```", (output_dir / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_a_run_from_its_first_word_to_its_last_file(model_dir, tmp_path, capsys, monkeypatch):
    output_dir = tmp_path / "out"
    said = trained(model_dir, output_dir, capsys)
    assert re.search(r"^pairs: +468 trained on; held out: 12$", said, re.MULTILINE)
    assert re.search(r"^device: +CPU, \d+ threads \(", said, re.MULTILINE)
    assert re.search(r'^head: +impl "\w+", mode \w+, at most [\d.,]+ MiB for [\d,]+ counted tokens', said, re.MULTILINE)
    assert re.search(r"^loss: +sigmoid, beta 0.1$", said, re.MULTILINE)
    assert re.search(r"^steps: +2$", said, re.MULTILINE)
    assert re.search(r"held-out ranking accuracy: [\d.]+ before, [\d.]+ after \(share of pairs whose chosen", said)
    assert re.search(r"held-out reward accuracy: [\d.]+ after", said)
    assert said.count("    before  ") == said.count("    after   ") == 3
    assert "curves.png, lengths.png, README.md and report.html in" in said
    assert sorted(path.name for path in output_dir.iterdir() if path.name.startswith(".")) == []
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert page.count('class="t ') > 100
    assert page.count("<svg") == 5
    assert BROKEN not in page
    with contextlib.redirect_stdout(None):
        exec(snippet_of(output_dir), {})
    # The same run in which asking and writing fail: a warning each, the same steps, and a model.
    monkeypatch.setattr("dpo_kernels.training.report.run.write_page", full_disk)
    monkeypatch.setattr("dpo_kernels.training.report.run.answers_to", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"could not be made \((OSError|ZeroDivisionError)") as caught:
        said = trained(model_dir, tmp_path / "again", capsys)
    assert len([w for w in caught if "could not be made" in str(w.message)]) == 2  # not asked again after training
    assert "README.md in" in said
    assert losses(tmp_path / "again") == losses(output_dir)
    assert (tmp_path / "again" / "model.safetensors").exists()
    assert not (tmp_path / "again" / "report.html").exists()


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_an_adapter_and_its_card(model_dir, tmp_path, capsys):
    pytest.importorskip("peft")
    output_dir = tmp_path / "out"
    said = trained(model_dir, output_dir, capsys, use_peft=True, max_steps=1, eval_size=0, merge_adapter=True)
    assert re.search(r"^reference: +the policy as it starts; no second model$", said, re.MULTILINE)
    assert re.search(r"^trained: +[\d,]+ parameters, [\d.]+% of all \(adapter\)$", said, re.MULTILINE)
    assert re.search(r"^pairs: +480 trained on, none held out$", said, re.MULTILINE)
    assert "library_name: peft" in (output_dir / "README.md").read_text(encoding="utf-8")
    with contextlib.redirect_stdout(None):
        exec(snippet_of(output_dir), {})


class Hub:
    """Takes what is uploaded, as it is at that time."""

    def __init__(self, **_):
        pass

    uploads: ClassVar[list] = []

    def upload_folder(self, *, folder_path, commit_message, allow_patterns=None, **_):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        self.uploads.append((commit_message, allow_patterns, files))


def test_what_is_uploaded_has_the_runs_own_card_and_a_readme_that_is_there_is_left(
    model_dir, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("peft")
    monkeypatch.setattr(Hub, "uploads", [])
    monkeypatch.setattr("dpo_kernels.training.report.run.HfApi", Hub)
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/it"))
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match=r"README.md was not written by a run: it is left as it is, and the card is"):
        said = trained(model_dir, output_dir, capsys, use_peft=True, max_steps=1, eval_size=0, push_to_hub=True)
    assert "model_card.md and report.html in" in said
    assert (output_dir / "README.md").read_text() == "# Mine\n"
    assert "library_name: peft" in (output_dir / "model_card.md").read_text(encoding="utf-8")
    (_, _, model), (told, wanted, last) = Hub.uploads
    assert "adapter_model.safetensors" in model
    assert told == "Card and report"
    assert wanted == ["model_card.md", "report.html", "log.jsonl", "curves.png"]
    assert model["README.md"] == last["README.md"] == b"# Mine\n"
    assert {"model_card.md", "report.html"} <= last.keys()


@pytest.mark.parametrize(("longer", "shorter"), [(12, 10), (30, 9), (0, 0)])
def test_an_evaluation_tells_accuracies_by_which_answer_is_longer(longer, shorter):
    """Of ten pairs and more; those of equal lengths are in neither."""
    rows = [*[(1.0, 3.0)] * longer, *[(0.0, -2.0)] * shorter, (1.0, 0.0)]
    predictions = np.zeros((len(rows), 2 + len(PAIR_METRICS)))
    for row, (accuracy, more) in zip(predictions, rows, strict=True):
        row[1 + PAIR_METRICS.index("rewards/accuracies")], row[-1] = accuracy, more
    found = mean_metrics(EvalPrediction(predictions, None))
    assert found["rewards/accuracies"] == pytest.approx((longer + 1) / len(rows))
    expected = {LONGER: 1.0} if longer >= 10 else {}
    expected |= {SHORTER: 0.0} if shorter >= 10 else {}
    assert {name: found[name] for name in (LONGER, SHORTER) if name in found} == expected


def test_scores_of_tokens_add_up_to_those_of_the_answers(model_dir, pairs):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.train()
    with FusedHead(model):
        batch = PairBatch(PairCollator()([pairs[i] for i in range(5)]))
        with torch.no_grad():
            expected = batch.run(model)["log_probs"]
        scored = list(score_pairs(
            pairs, range(5), lambda b: b.run(model)["log_probs"], lambda b: b.run(model)["log_probs"] - 0.5 * b.mask,
            batch_size=2,
        ))  # fmt: skip
        none = next(score_pairs(pairs, [0], lambda b: b.run(model)["log_probs"], lambda b: None))
    chosen, rejected = batch.sides((expected * batch.mask).sum(1))
    for i, pair in enumerate(scored):
        row = pairs.rows[i]
        for side, ids, total in (
            (pair.chosen, row["chosen_ids"], chosen),
            (pair.rejected, row["rejected_ids"], rejected),
        ):
            assert ids[: len(side.ids)] == side.ids
            assert len(side.ids) == len(side.counted) == len(side.log_probs)
            assert sum(side.log_probs) == pytest.approx(total[i].item(), rel=1e-4)
            assert sum(side.rewards(0.2)) == pytest.approx(0.1 * sum(side.counted), rel=1e-4)
    assert none.chosen.rewards(0.1) is None
    assert model.training


def test_pieces_are_the_text_and_whole_characters(tokenizer):
    text = "A 水 and 🦊🦊, twice.<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    for first in (0, len(tokenizer("A 水")["input_ids"])):
        found = pieces(tokenizer, ids, first)
        assert "".join(piece for _, _, piece in found) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:first])) :]
        assert not any(BROKEN in piece for _, _, piece in found)
        assert [start for start, _, _ in found][1:] == [end for _, end, _ in found][:-1]


def test_questions_and_prompts(tokenizer, pairs):
    prompts = prompts_of(pairs, 3)
    assert len(prompts) == 3
    assert last_question(tokenizer, prompts[0]) == "Please tell me at what temperature water freezes."
    ids = chat_prompt(tokenizer, [{"role": "user", "content": "Hi there?"}])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert last_question(tokenizer, ids) == "Hi there?"
    assert tokenizer.decode(chat_prompt(tokenizer, "as it is")) == "as it is"
    assert prompts_of(pairs, 3, longest=2) == []
    assert last_question(tokenizer, tokenizer("no template in it")["input_ids"]) == "no template in it"
    assert [last_reply(mask) for mask in ([0, 1, 0, 1, 1, 0], [1, 1], [0, 0], [])] == [3, 0, 0, 0]


def test_answers_are_greedy_and_leave_the_model_as_it_is(model_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    prompts = [chat_prompt(tokenizer, text) for text in ("Hi?", "Why?")]
    random = torch.get_rng_state()
    answers = answers_to(model, tokenizer, prompts, max_new_tokens=4)
    assert answers == answers_to(model, tokenizer, prompts, max_new_tokens=4, max_seconds=None)
    assert len(answers) == 2
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert answers_to(model, tokenizer, [], max_new_tokens=4) == []


def test_an_answer_ends_where_the_models_positions_do(tokenizer):
    model = make_model("Llama", {"max_position_embeddings": 12})
    lengths = []
    model.register_forward_pre_hook(lambda _, args, given: lengths.append(given["input_ids"].shape), with_kwargs=True)
    model.generation_config.eos_token_id = None
    for length in (4, 11):
        lengths.clear()
        answers_to(model, Endless(tokenizer), [[3] * length], max_new_tokens=96, max_seconds=None)
        assert len(lengths) == 12 - length
    with pytest.raises(ValueError, match=r"a prompt has 12 tokens, and the model 12 positions.*give a shorter prompt"):
        answers_to(model, tokenizer, [[3] * 4, [3] * 12])


class Endless:
    """A tokenizer without an end of a turn."""

    def __init__(self, tokenizer):
        self.decode, self.eos_token_id, self.pad_token_id = tokenizer.decode, None, 0


def test_the_lesson_is_the_same_each_time_and_taken_up_again(model_dir, tokenizer, pairs, tmp_path):
    models = [AutoModelForCausalLM.from_pretrained(model_dir) for _ in range(2)]
    before = [p.detach().clone() for p in models[0].parameters()]
    first, second = (teach(model, pairs, 3, show=False) for model in models)
    assert first == second
    assert first < 6.3  # log 500, of a model that knows nothing, is 6.2; it has begun to learn
    assert not models[0].training
    assert any(not torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True))
    model = taught_model(models[0], tokenizer, pairs, tmp_path, 1)
    again = taught_model(models[1], tokenizer, pairs, tmp_path, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again is not models[1]
    assert taught_model(models[1], tokenizer, pairs, tmp_path / "none", 0) is models[1]
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.rglob(".incomplete"))
