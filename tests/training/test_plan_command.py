"""`train --plan`, `--fit`, and what a run is told of its memory before its first step."""

from __future__ import annotations

import json
import re

import pytest
from training_helpers import logs
from transformers import LlamaConfig

from dpo_kernels.commands.main import main
from dpo_kernels.training.memory import optimizers
from dpo_kernels.training.memory.step_memory import PARTS

CONFIG = {"vocab_size": 8000, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
PAIR = ("--plan_pair", 64, 1900, 1500, "--per_device_train_batch_size", 1)


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory):
    """A folder with a config and no weights."""
    path = tmp_path_factory.mktemp("config")
    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(path)
    return path


def ran(capsys, *argv, status=0):
    assert main(["train", *map(str, argv)]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if status else out


def test_a_plan_needs_a_config_alone(capsys, tmp_path):
    config_dir = tmp_path / "config"  # of a model whose weights count beside what libraries hold
    wide = CONFIG | {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3072}
    LlamaConfig(**wide, architectures=["LlamaForCausalLM"]).save_pretrained(config_dir)
    text = ran(
        capsys, "--plan", "--ref_weight", config_dir, *PAIR, "--run_memory_budget", "20GiB", "--use_cpu", "true",
        "--output_dir", tmp_path / "plan",
    )  # fmt: skip
    for part in (
        "64 tokens of prompt, answers of 1,900 and 1,500", "in all", "optimizer", "20.0 GiB  --run_memory_budget",
        "--gradient_checkpointing buys", "with other numbers, each alone:", "--use_peft buys", "--dtype bfloat16 buys",
        "the longest pairs of this kind that fit:", "as long as the model has positions (4,096)",
    ):  # fmt: skip
        assert part in text, part
    saved = json.loads((tmp_path / "plan/plan.json").read_text())
    assert set(saved["memory"]["parts"]) <= set(PARTS)
    assert saved["memory"]["bytes"] == sum(saved["memory"]["parts"].values())
    assert {one["option"] for one in saved["others"]} >= {"--use_peft", "--dtype bfloat16"}
    assert (tmp_path / "plan/plan.png").stat().st_size > 10_000


def test_a_plan_for_a_gpu_needs_none(capsys, config_dir, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = ran(
        capsys, "--plan", "--ref_weight", config_dir, *PAIR, "--plan_device", "cuda", "--bf16", "true", "--impl",
        "triton", "--run_memory_budget", "20GiB",
    )  # fmt: skip
    assert "rows, cuda" in text
    assert "--activation_offloading buys" in text
    assert "gaps in the allocator" not in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--optim", "lomo"), "what the optimizer 'lomo' keeps is not known here; known are adafactor, adagrad"),
        (("--plan_device", "cuda", "--fit"), "--fit has to know what there is"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_said(capsys, config_dir, options, told, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert told in ran(capsys, "--plan", "--ref_weight", config_dir, *PAIR, *options, status=1)


@pytest.mark.parametrize("quantised", ["bitsandbytes", "gptq"])
def test_a_checkpoint_that_is_quantised(capsys, tmp_path, quantised):
    of_model = {"quant_method": quantised, "load_in_4bit": True, "bits": 4}
    if quantised == "gptq":
        del of_model["load_in_4bit"]
    LlamaConfig(**CONFIG, quantization_config=of_model, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    options = ("--plan", "--ref_weight", tmp_path, "--use_peft", *PAIR, "--run_memory_budget", "20GiB")
    if quantised == "gptq":
        assert "weights are quantised (gptq)" in ran(capsys, *options, status=1)
        return
    weights = next(line for line in ran(capsys, *options).splitlines() if line.endswith("    weights"))
    whole = 2 * 4 * 8000 * 64 + 4 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # tables and layers, in float32
    assert "MiB" in weights
    assert float(weights.split()[0]) * 2**20 < 0.95 * whole


def test_a_run_that_does_not_fit_is_told_before_it_loads_and_fit_finds_what_does(capsys, model_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Count.", "chosen": "one two three " * 200, "rejected": "four five six " * 150}
    pairs.write_text("\n".join(json.dumps(row) for _ in range(4)) + "\n")
    options = (
        "--ref_weight", model_dir, "--data_path", pairs, "--use_cpu", "true", "--max_length", 512, "--max_steps", 1,
        "--per_device_train_batch_size", 4, "--memory_budget", "32MiB", "--report", "false", "--logging_steps", 1,
        "--save_strategy", "no",
    )  # fmt: skip
    ran(capsys, "--plan", *options, "--output_dir", tmp_path / "plan")
    needs = json.loads((tmp_path / "plan/plan.json").read_text())["memory"]["bytes"]
    budget = str(needs - 6 * 2**20)
    told = ran(capsys, *options, "--output_dir", tmp_path / "no", "--run_memory_budget", "100MiB", status=1)
    for part in (
        "a step of the longest batch needs",
        "(by the plan)",
        "--fit chooses among them",
        "Nothing was trained",
    ):
        assert part in told, part
    text = ran(capsys, *options, "--output_dir", tmp_path / "fits", "--run_memory_budget", budget, "--fit")
    assert "--fit chose --" in text
    assert "memory: the longest batch holds " in text
    assert len(logs(tmp_path / "fits")) == 1


def test_the_least_budget_that_is_named_works(capsys, model_dir, tmp_path):
    """For all batches, also where a plan is told before: nobody is sent from one number to the next."""
    rows = [
        {"prompt": "Count.", "chosen": "one two three " * (3 + i), "rejected": "four five six " * (9 - i)}
        for i in range(7)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = ("--ref_weight", model_dir, "--data_path", pairs, "--use_cpu", "true", "--max_steps", 2, "--eval_size", 2,
               "--per_device_train_batch_size", 3, "--report", "false", "--save_strategy", "no")  # fmt: skip
    told = ran(capsys, *options, "--output_dir", tmp_path / "no", "--memory_budget", "1MiB", status=1)
    least = re.search(r"give --memory_budget (\d+) ", told)[1]
    ran(capsys, *options, "--output_dir", tmp_path / "yes", "--memory_budget", least)
    assert (tmp_path / "yes/model.safetensors").exists()


def test_what_optimizers_keep():
    import torch

    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 128, bias=True))
    embedding, linear, bias = 64_000, 8192, 128
    whole = embedding + linear + bias
    assert optimizers.kept_bytes("adamw_torch", model) == 8 * whole
    assert optimizers.kept_bytes("sgd", model) == 0
    assert optimizers.kept_bytes("sgd with momentum", model) == 4 * whole
    # Embeddings, and what is smaller than 4,096 numbers, stay in 32 bits.
    eight = 8 * (embedding + bias) + 2 * linear + 2 * linear * 4 // 256
    assert optimizers.kept_bytes("adamw_bnb_8bit", model) == optimizers.kept_bytes("paged_adamw_8bit", model) == eight
    assert optimizers.kept_bytes("adafactor", model) == 4 * (1000 + 64 + 128 + 64 + 128)
    assert optimizers.kept_bytes("lomo", model) is None
    model[0].weight.requires_grad = False
    assert optimizers.kept_bytes("adamw_torch", model) == 8 * (linear + bias)
    assert optimizers.is_on_host("paged_adamw_8bit", "cuda")
    assert not optimizers.is_on_host("paged_adamw_8bit", "cpu")


def test_the_names_are_those_that_transformers_has():
    from transformers.training_args import OptimizerNames

    known = {name.value for name in OptimizerNames} | {"adamw_32bit", "ademamix_32bit", "sgd with momentum"}
    assert {*optimizers.KEPT, optimizers.FACTORED} <= known
