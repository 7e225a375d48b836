"""`train.py` as a person runs it: in a process of its own, from pairs to a model that loads."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import EXAMPLE, slow
from safetensors.torch import load_file
from script_helpers import PAIR, check_probe, command, losses, refusal, run, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_without_arguments_it_trains_the_example(tmp_path, environment):
    """In a folder of its own; with a short lesson to save time."""
    short = {"lesson_epochs": 2, "num_train_epochs": 1, "learning_rate": "3e-4", "beta": 0.1}
    done = run(environment, *(part for name, value in short.items() for part in (f"--{name}", value)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"held-out ranking accuracy: ([\d.]+) before, ([\d.]+) after", done.stdout)
    before, after = map(float, found.groups())
    assert 0.3 < before < 0.75
    assert done.stdout.count("    after   ") == 3
    assert "teaching both kinds of answers" in done.stderr
    assert after >= 0.9
    (output_dir,) = (tmp_path / "output").iterdir()
    model = AutoModelForCausalLM.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    prompt = tokenizer.apply_chat_template(PAIR["chosen"][:1], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 3
    assert (output_dir / "curves.png").stat().st_size > 10_000
    assert (output_dir / "model.safetensors").exists()
    assert (output_dir / "before" / "model.safetensors").exists()  # what `compare --before` wants
    assert not list(output_dir.rglob(".incomplete"))
    first = next(iter(losses(output_dir).values()))
    assert first == torch.tensor(2.0).log().item()
    assert "it/s" in done.stderr  # the progress bar


def test_sigterm_saves_and_exits(tmp_path, model_dir, environment):
    output_dir = tmp_path / "out"
    arguments = small_run(model_dir, output_dir, max_steps=2000, save_steps=10_000)
    with subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        wait_for(lambda: (output_dir / "log.jsonl").exists() and len(losses(output_dir)) >= 3, p)
        p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 143, err
    assert "SIGTERM: saving a checkpoint after this step" in err
    (folder,) = output_dir.glob("checkpoint-*")
    step = int(folder.name.removeprefix("checkpoint-"))
    assert f"stopped after step {step}; go on with --resume_from_checkpoint" in out
    assert max(losses(output_dir)) == step
    assert not (output_dir / "model.safetensors").exists()
    again = small_run(model_dir, output_dir, max_steps=step + 2, save_steps=10_000)
    done = run(environment, *again, "--resume_from_checkpoint", folder)
    assert done.returncode == 0, done.stderr
    assert max(losses(output_dir)) == step + 2


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "ended too early"
        try:
            if condition():
                return
        except (OSError, json.JSONDecodeError):
            pass
        time.sleep(0.01)
    raise TimeoutError


def test_two_processes_train_like_one(tmp_path, model_dir, environment):
    """Same pairs a step, on one process or on two: DDP and its gradient mean change nothing but rounding."""
    options = {"max_grad_norm": 0, "optim": "sgd", "save_strategy": "no", "eval_size": 7, "eval_strategy": "steps",
               "eval_steps": 3, "per_device_eval_batch_size": 2}  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for output_dir, size, launch in ((one, 4, ()), (two, 2, launcher)):
        arguments = small_run(
            model_dir, output_dir, per_device_train_batch_size=size, precompute_ref_log_probs=True, **options
        )
        done = run(environment, *arguments, launcher=launch)
        assert done.returncode == 0, done.stderr
    weights = [load_file(d / "model.safetensors") for d in (one, two)]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name
    histories = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (one, two)]
    for a, b in zip(*histories, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5 if "loss" in key else 2e-4), key


@pytest.mark.parametrize("count", [5, slow(7)])
def test_pairs_that_fill_the_last_batch_do_not_count(tmp_path, model_dir, environment, count):
    """Of 5 pairs in steps of 4, one of two processes is left with a pair and filling, the other with filling alone."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(EXAMPLE.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
    options = {"max_grad_norm": 0, "optim": "sgd", "save_strategy": "no", "data_path": data, "max_steps": 4,
               "loss_type": "sigmoid sft"}  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, size, launch in (("one", 4, ()), ("two", 2, launcher)):
        arguments = small_run(model_dir, tmp_path / name, per_device_train_batch_size=size, **options)
        at = arguments.index("sigmoid sft")
        arguments[at : at + 1] = ["sigmoid", "sft"]
        done = run(environment, *arguments, launcher=launch)
        assert done.returncode == 0, done.stderr
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-6), name
    entries = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
               for name in ("one", "two")]  # fmt: skip
    for a, b in zip(*entries, strict=True):
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-5 if key == "loss" else 2e-4), key


@pytest.mark.parametrize(
    ("pairs", "options", "step"),
    [
        # Of 7 pairs in steps of 4 the second step fills one process' batch up; the resumed run knows that too.
        slow(7, {"per_device_train_batch_size": 2, "max_steps": 2}, 1),
        # Within the second epoch, whose batches are others.
        pytest.param(14, {"tokens_per_batch": 400, "max_steps": 7}, 5, id="tokens"),
        slow(7, {"use_peft": True, "per_device_train_batch_size": 2, "max_steps": 2}, 1),
    ],
)
def test_a_resume_inside_an_epoch_of_two_processes_gives_the_same_weights(
    tmp_path, model_dir, environment, pairs, options, step
):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(EXAMPLE.read_text(encoding="utf-8").splitlines(True)[:pairs]), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {"data_path": data, "save_steps": step} | options
    for name, extra in (("straight", []), ("resumed", ["--resume_from_checkpoint", f"checkpoint-{step}"])):
        if extra:
            extra[1] = str(tmp_path / "straight" / extra[1])
        arguments = small_run(model_dir, tmp_path / name, **options)
        if "tokens_per_batch" in options:  # in place of it
            at = arguments.index("--per_device_train_batch_size")
            del arguments[at : at + 2]
        done = run(environment, *arguments, *extra, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert ("batches: " in done.stdout) == ("tokens_per_batch" in options)
    file = "adapter_model.safetensors" if "use_peft" in options else "model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("straight", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_adapter_from_nothing_to_a_merged_model(tmp_path, model_dir, environment):
    first, second = tmp_path / "first", tmp_path / "second"
    done = run(environment, *small_run(model_dir, first, max_steps=2, use_peft=True, lora_target_modules="all-linear"))
    assert done.returncode == 0, done.stderr
    assert (
        f"saved: adapter, tokenizer, log.jsonl, curves.png, lengths.png, README.md and report.html in {first}"
        in done.stdout
    )
    assert losses(first)[1] == pytest.approx(0.693147, abs=1e-6)
    assert not (first / "model.safetensors").exists()
    options = small_run(model_dir, second, max_steps=2, merge_adapter=True)
    at = options.index("--ref_weight")
    options[at : at + 2] = ["--from_weight", str(first)]  # goes on with it, and from it
    done = run(environment, *options)
    assert done.returncode == 0, done.stderr
    assert losses(second)[1] == pytest.approx(0.693147, abs=1e-6)
    assert (second / "merged" / "model.safetensors").exists()
    assert (second / "merged" / "tokenizer.json").exists()


def test_options_of_adapters_that_do_not_go_together(tmp_path, model_dir):
    alone = refusal("--data_path", EXAMPLE, "--from_weight", model_dir, "--output_dir", tmp_path / "a", "--use_cpu")
    assert "is no adapter, which would be its own reference" in alone
    assert "there is no adapter" in refusal(*small_run(model_dir, tmp_path / "b", merge_adapter=True))


def test_data_of_several_kinds_shown_and_evaluated(tmp_path, model_dir, environment):
    (tmp_path / "a.csv").write_text("q,good,bad\n" + "".join(f"Is {i} odd?,Yes.,No.\n" for i in range(6)))
    (tmp_path / "b.csv").write_text("q,good,bad\nHi?,Hello.,No.\nYou?,Me.,Us.\n")
    arguments = small_run(model_dir, tmp_path / "out", max_steps=2, eval_strategy="steps", eval_steps=1, show_pairs=1)
    at = arguments.index("--data_path")
    arguments[at : at + 2] = [
        "--data_path", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--data_weights", "1", "2",
        "--eval_data_path", str(tmp_path / "a.csv"), str(EXAMPLE), "--string_format", "chat",
        "--columns", "prompt=q", "chosen=good", "rejected=bad", "--on_bad_line", "skip",
    ]  # fmt: skip
    done = run(environment, *arguments)
    assert done.returncode == 1
    assert "has no column ['q', 'good', 'bad']" in done.stderr or "no pair is left" in done.stderr
    arguments[arguments.index(str(EXAMPLE))] = str(tmp_path / "b.csv")
    done = run(environment, *arguments)
    assert done.returncode == 0, done.stderr
    assert "a.csv + " in done.stdout
    assert "read as strings made messages" in done.stdout
    assert "held out as a: 6 pairs of" in done.stdout
    assert "held out as b: 2 pairs of" in done.stdout
    assert "⟦Yes.<|im_end|>⟧" in done.stdout or "⟦Hello.<|im_end|>⟧" in done.stdout or "⟦Me.<|im_end|>⟧" in done.stdout
    assert "held-out ranking accuracy of a: " in done.stdout
    assert "held-out ranking accuracy of b: " in done.stdout
    assert (tmp_path / "out" / "lengths.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_prompt_in_messages_trains_as_the_whole_conversations_do(tmp_path, model_dir, environment):
    """TRL's recommended format: once read without its prompt."""
    texts = [{"prompt": [{"role": "user", "content": "2+2?"}], "chosen": [{"role": "assistant", "content": "4"}],
              "rejected": [{"role": "assistant", "content": "5"}]}]  # fmt: skip
    texts.append({side: texts[0]["prompt"] + texts[0][side] for side in ("chosen", "rejected")})
    margins = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.jsonl").write_text((json.dumps(text) + "\n") * 8)
        done = run(
            environment, *small_run(model_dir, tmp_path / str(i), data_path=tmp_path / f"{i}.jsonl", show_pairs=1)
        )
        assert done.returncode == 0, done.stderr
        assert "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n" in done.stdout
        assert "⟦4<|im_end|>⟧" in done.stdout
        entries = map(json.loads, (tmp_path / str(i) / "log.jsonl").read_text().splitlines())
        margins.append([entry["rewards/margins"] for entry in entries if "loss" in entry])
    assert margins[0] == margins[1]
    assert margins[0][-1] > 0.01


def test_fused_heads_under_ddp_and_fsdp():
    check_probe("distributed_probe.py", 2)


def test_results_are_never_overwritten(tmp_path, model_dir, environment):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.index.json").write_text("mine")
    done = run(environment, *small_run(model_dir, tmp_path / "out"))
    assert done.returncode == 1
    assert (
        "holds the results of a run already; go on with it with --resume_from_checkpoint, or give another"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_path": "nowhere.jsonl"}, "no preference file nowhere.jsonl"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint is 'nowhere', which is no checkpoint"),
        ({"memory_budget": "much"}, "memory_budget is 'much'; expected a size such as 512MiB"),
        ({"memory_budget": "1KiB", "max_steps": 1}, r"memory_budget is 1,024 bytes"),
        ({"pad_token": "<nope>"}, "pad_token is '<nope>', which the tokenizer does not know"),
        ({"eval_size": 0.1, "eval_data_path": "x"}, "either by --eval_size or by --eval_data_path"),
        ({"beta": -1}, "beta is -1"),
        ({"max_length": 1026}, "max_length is 1,026, and the model has 1,024 positions"),
        ({"columns": "prompt"}, "columns holds [('prompt', '', '')]; expected name=column"),
        ({"data_weights": "1", "data_path": "pairs.xlsx"}, "no preference file pairs.xlsx"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs is '[1]'; expected an object, as in"),
        ({"chat_template_kwargs": "{a: 1}"}, "chat_template_kwargs is '{a: 1}', which is no JSON"),
        ({"columns": '{"prompt": ["a"]}'}, "columns holds [('prompt', '=', ['a'])]; expected name=column"),
        ({"tools": "nowhere.json"}, "No such file or directory: 'nowhere.json'"),
        ({"loss_type": "dpo"}, "loss_type is 'dpo'"),
    ],
)
def test_what_a_user_can_mend_is_an_error(tmp_path, model_dir, monkeypatch, options, message):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert message in refusal(*small_run(model_dir, tmp_path / "out", **options))


def test_what_a_user_can_mend_is_told_in_one_sentence(tmp_path, model_dir, environment):
    done = run(environment, *small_run(model_dir, tmp_path / "out", data_path="nowhere.jsonl"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: FileNotFoundError: no preference file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--data_path", "--ref_weight", "--from_weight", "--from-weight"])
def test_data_and_model_go_together(tmp_path, option):
    told = refusal(option, "somewhere", "--output_dir", tmp_path)
    assert "give --data_path and --ref_weight together, or neither for the example" in told


def test_abbreviated_options_are_refused(tmp_path, environment, model_dir):
    done = run(environment, "--data_p", EXAMPLE, "--ref_w", model_dir, "--output_dir", tmp_path)
    assert done.returncode != 0
    assert "--data_p" in done.stderr


@pytest.mark.slow
def test_everything_from_a_file_with_every_option_at_once(tmp_path, model_dir, environment):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(PAIR) + "\n" for _ in range(6)) + "broken\n")
    template = tmp_path / "template.jinja"
    template.write_text((model_dir / "chat_template.jinja").read_text())
    options = {
        "data_path": str(data), "ref_weight": str(model_dir), "from_weight": str(model_dir), "dpo_aggregate": "mean",
        "output_dir": str(tmp_path / "out"), "on_bad_line": "skip", "eval_data_path": str(EXAMPLE),
        "dtype": "auto", "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2,
        "precompute_ref_log_probs": True, "memory_budget": "64MiB", "impl": "torch", "assistant_turns": "last",
        "chat_template": str(template), "pad_token": "<|im_end|>", "attn_implementation": "eager", "use_cpu": True,
        "max_steps": 2, "per_device_train_batch_size": 1, "beta": 0.2, "dataset_num_proc": 1, "max_length": 80,
        "resume_from_checkpoint": "latest", "eval_steps": None,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    done = run(environment, tmp_path / "options.yaml")
    assert done.returncode == 0, done.stderr
    assert "no checkpoint in" in done.stdout
    assert "training: 6 pairs of" in done.stdout
    assert "1 bad lines" in done.stdout
    assert "held-out ranking accuracy" in done.stdout
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["line"] == 7
    assert losses(tmp_path / "out")[1] == pytest.approx(0.6931472, abs=1e-4)
