"""`dpo-kernels`: each of its commands, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import EXAMPLE, ROOT
from training_helpers import LOG2

import dpo_kernels
from dpo_kernels.commands import endings, prompts
from dpo_kernels.commands.main import COMMANDS, main
from dpo_kernels.training import DPOConfig, DPODataset, DPOTrainer
from dpo_kernels.training.loading import load_model, load_tokenizer
from dpo_kernels.training.scoring import score_dataset, with_rewards


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """A command sets handlers and formats for its process, which is not ours to leave so."""
    monkeypatch.setattr("dpo_kernels.commands.endings.listen", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("dpo_kernels.commands.inputs.quiet", lambda: None)


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(EXAMPLE.read_text(encoding="utf-8").splitlines(True)[:6]), encoding="utf-8")
    return path


def said(capsys, *argv, status=0):
    assert main([str(part) for part in argv]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return (err if status else out).strip()


def test_the_list_of_commands(capsys):
    for argv in ([], ["--help"]):
        text = said(capsys, *argv)
        assert all(f"  {name} " in text for name in COMMANDS)
    assert dpo_kernels.__version__ in said(capsys, "--version")
    assert "plann: no such command; did you mean plan?" in said(capsys, "plann", status=2)


def test_help_comes_without_torch():
    code = (
        "import sys\nfrom dpo_kernels.commands.main import main\nassert main([]) == 0\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_env_says_what_a_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "on")
    lines = dict(line.split(maxsplit=1) for line in said(capsys, "env").splitlines())
    assert torch.__version__.split("+")[0] == lines["torch"].split("+")[0]
    assert lines["dpo_kernels"].startswith(dpo_kernels.__version__)
    assert lines["DPO_KERNELS_VALIDATE"] == "on"
    text = said(capsys, "env")
    for name in dpo_kernels.available_impls():
        assert f"impl {name} on cpu" in text
    assert "None" not in text.replace(f"CUDA {torch.version.cuda}", "")
    assert "C++ kernels" in text
    assert "bfloat16 on cpu" in text


def test_plan_is_that_of_the_function(capsys, model_dir):
    sizes = ("--hidden_size", 512, "--vocab_size", 151936, "--memory_budget", "256MiB")
    own = dpo_kernels.plan(8192, 512, 151936, memory_budget=256 * 2**20)
    assert said(capsys, "plan", *sizes) == str(own)
    of_model = said(capsys, "plan", model_dir, "--tokens", 100, "--dtype", "float32", "--grads")
    assert of_model.startswith("score: 100 tokens x 64 features x 500 vocabulary, float32")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["plan"], "plan: give a model, or --hidden_size and --vocab_size"),
        (["plan", "m", "--hidden_size", "3"], "plan: give a model, or --hidden_size and --vocab_size"),
        (["plan", "--token", "3"], "--token: no such option; did you mean --tokens?"),
        (["plan", "--tokens", "x"], "--tokens is 'x'; expected a whole number"),
        (["plan", "--dtype", "int8"], "--dtype is 'int8'; expected one of bfloat16"),
        (["show", "x.jsonl"], "show: give DATA and --model, as in dpo-kernels show pairs.jsonl --model MODEL"),
        (["score", "x.jsonl", "--model", "m", "--refs", "r"], "--refs: no such option; did you mean --ref?"),
        (["score", "x.jsonl", "--model", "m", "--eval_size", "1"], "--eval_size: no such option"),
        (["score", "x.jsonl", "--model", "m"], "no preference file x.jsonl"),
        (["score", str(EXAMPLE), "--model", "m", "--batch_size", "0"], "--batch_size is 0; expected at least 1"),
        (["sample"], "sample: give model; see dpo-kernels sample --help"),
        (["sample", "m", "--prompt", "a", "--prompts", "b"], "give prompts either by --prompt or by --prompts"),
        (["sample", "m", "--temperature", "-1"], "--temperature is -1.0; expected at least 0"),
        (["compare", "--before", "m"], "give --after"),
        (["train", "--resume"], "--resume: no such option; did you mean --resume_from_checkpoint?"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, argv, told):
    text = said(capsys, *argv, status=1)
    assert told in text
    assert "\n" not in text


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    def without(name):
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        monkeypatch.setattr("dpo_kernels.commands.main.importlib", SimpleNamespace(import_module=raises(error)))

    without("transformers.utils")
    told = said(capsys, "show", "x", status=1)
    assert told == "dpo-kernels show: needs the package transformers: pip install 'dpo-kernels[train]'"
    without("no_such_module")
    with pytest.raises(ModuleNotFoundError):  # no extra brings it: a mistake of ours
        main(["show", "x"])


def raises(error):
    def call(*_):
        raise error

    return call


def test_a_warning_is_a_sentence_of_the_command():
    formatted = endings.as_sentence("dpo-kernels score")
    assert formatted("so it is", UserWarning, "file.py", 3) == "dpo-kernels score: warning: so it is\n"
    assert "file.py" in formatted("old", FutureWarning, "file.py", 3)


@pytest.mark.parametrize(
    ("does", "status", "says"),
    [
        ("return 3", 3, ""),
        ("raise ValueError('no')", 1, "p: ValueError: no"),
        ("raise SystemExit(143)", 143, ""),
        ("raise SystemExit", 0, ""),
        ("raise RuntimeError('a mistake of ours')", 1, "RuntimeError: a mistake of ours"),
    ],
)
def test_a_process_of_a_group_ends_without_teardown(does, status, says):
    """Where that would abort it: with its own status, behind all functions of atexit, nothing of its output lost."""
    code = f"""
import atexit, os, sys
from dpo_kernels.commands import endings
class Aborts:
    def __del__(self):
        os.abort()
keep = Aborts()
def command():
    atexit.register(print, "exit function", end="")
    endings.ENDING.skip_teardown()
    print("output", end="; ")
    {does}
endings.last_act(lambda: endings.ended("p", command))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (status, "output; exit function")
    assert says in done.stderr


def test_show_prints_pairs_as_the_model_sees_them(capsys, few, model_dir):
    text = said(capsys, "show", few, "--model", model_dir, "--count", 2)
    assert "pair 2 of 6" in text
    assert "pair 3 of 6" not in text
    assert "<|im_start|>user" in text
    assert "6 pairs of" in text


def test_scores_are_those_of_training(capsys, few, model_dir, tmp_path):
    """Log-probs as the log of a run's first step, and rewards beta (log pi - log pi_ref)."""
    other = tmp_path / "other"
    model = load_model(str(model_dir))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    model.save_pretrained(other)
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.save_pretrained(other)
    output = tmp_path / "scores.jsonl"
    text = said(capsys, "score", few, "--model", other, "--ref", model_dir, "--output", output, "--beta", 0.2,
                "--batch_size", 4)  # fmt: skip
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["pair"] for row in rows] == list(range(6))
    assert "rewards/accuracies" in text
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, beta=0.2, disable_tqdm=True, report_to="none",
                     per_device_eval_batch_size=4)  # fmt: skip
    data = DPODataset(few, tokenizer, 1024)
    trainer = DPOTrainer(load_model(str(other)), load_model(str(model_dir)), args, data, data)
    found = trainer.evaluate()
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins", "rewards/accuracies",
                 "logps/accuracies"):  # fmt: skip
        mean = sum(row[name] for row in rows) / len(rows)
        assert mean == pytest.approx(found[f"eval_{name}"], rel=1e-5, abs=1e-6), name
    assert all(row["rewards/margins"] == row["rewards/chosen"] - row["rewards/rejected"] for row in rows)
    assert rows[0]["tokens/chosen"] == int(data[0]["mask_chosen"].sum())


def test_scoring_leaves_a_model_as_it_was(few, model_dir):
    model = load_model(str(model_dir)).train()
    data = DPODataset(few, load_tokenizer(str(model_dir)), 192)
    scores = score_dataset(model, data, batch_size=4)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 500)
    same = with_rewards(scores, scores, 0.1)
    assert same["rewards/margins"] == [0.0] * 6
    assert -torch.nn.functional.logsigmoid(torch.tensor(same["rewards/margins"])).mean().item() == LOG2


def test_an_output_that_cannot_be_written_is_told_before_the_models_run(capsys, few, model_dir, tmp_path):
    (tmp_path / "file").write_text("")
    told = said(capsys, "score", few, "--model", "nowhere/x", "--output", tmp_path / "file" / "x", status=1)
    assert "Not a directory" in told or "File exists" in told


def test_answers_before_and_after(capsys, model_dir, tmp_path):
    (tmp_path / "ask.txt").write_text("Hi there\n\nHi there\nHow warm is ice?\n")
    text = said(capsys, "compare", "--before", model_dir, "--after", model_dir, "--prompts", tmp_path / "ask.txt",
                "--max_new_tokens", 3)  # fmt: skip
    assert "before" in text
    assert "0 of 2 answers differ" in text
    text = said(capsys, "sample", model_dir, "--prompt", "Hi there", "--max_new_tokens", 3, "--temperature", 0.5)
    assert text.startswith("Hi there\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Hi"}, [{"role": "user", "content": "Hi"}]),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, [{"role": "user", "content": "Hi"}]),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]},
         [{"role": "user", "content": "Hi"}]),
        ({"prompt": "Q: ", "chosen": "a", "rejected": "b"}, "Q: "),
    ],
)  # fmt: skip
def test_prompts_of_lines(tmp_path, line, expected):
    path = tmp_path / "asked.jsonl"
    path.write_text((json.dumps(line) + "\n") * 2)
    assert prompts.read_prompts(str(path), 5) == [expected]


def test_prompts_of_the_example():
    found = prompts.read_prompts(str(EXAMPLE), 3)
    assert len(found) == 3
    assert all(prompt[-1]["role"] == "user" for prompt in found)
    assert prompts.text_of(found[0])


def test_the_example_lies_beside_the_package():
    assert prompts.EXAMPLE.samefile(EXAMPLE)
