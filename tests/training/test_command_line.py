"""The command line of `train`: help, mistakes told in one sentence, and TRL's options."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch
import yaml
from helpers import EXAMPLE, ROOT
from script_helpers import refusal
from trl import DPOConfig as TrlConfig
from trl import ModelConfig
from trl import ScriptArguments as TrlScript

from dpo_kernels.commands import help, inputs, trl_options
from dpo_kernels.commands.arguments import as_argv, as_given
from dpo_kernels.commands.options import EXAMPLE_DEFAULTS, ScriptArguments, choose_dtype, make_parser, parse
from dpo_kernels.losses import LOSSES
from dpo_kernels.training import DPOConfig
from dpo_kernels.training.adapters import AdapterOptions
from dpo_kernels.training.config import RESTRICTED

PARSER = make_parser()
DATA = ("--data_path", str(EXAMPLE))


def names_in(text):
    return re.findall(r"(?<![\w-])--(\w+)", text.partition("\n\n")[2])


def test_the_help_fits_a_screen_and_has_each_option_of_ours_once():
    text = help.short(PARSER, "train.py")
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= help.WIDTH
    found = names_in("\n".join(line for line in text.splitlines() if line.startswith("  --") or not line))
    listed = [name for rows in help.GROUPS.values() for names, _ in rows for name in names.split(", ")]
    assert len(listed) == len(set(listed))
    own = {field.name for kind in (ScriptArguments, AdapterOptions) for field in dataclasses.fields(kind)}
    inherited = {field.name for field in dataclasses.fields(DPOConfig.__base__)}
    own |= {field.name for field in dataclasses.fields(DPOConfig)} - inherited
    assert own <= set(listed) <= set(PARSER.names)
    assert set(listed) <= set(re.findall(r"--(\w+)", text))
    assert all(name in text for name in LOSSES)
    assert not set(RESTRICTED) & set(found)


def test_the_full_help_has_all_options_once_and_none_that_is_refused():
    text = help.full(PARSER, "train.py")
    heads = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert sorted(heads) == sorted(PARSER.names)
    assert not set(heads) & set(RESTRICTED)
    assert "Learning Rate & Scheduler:" in text


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--learning_rat", "1"], "--learning_rat: no such option; did you mean --learning_rate?"),
        (["--resume"], "--resume: no such option; did you mean --resume_from_checkpoint?"),
        (["--learning-rat=1"], "--learning_rat: no such option; did you mean --learning_rate?"),
        (["--wholly_other", "1"], "--wholly_other: no such option; see --help"),
        (["--learning_rate=abc"], "--learning_rate is 'abc'; expected a number"),
        (["--max_steps", "1.5"], "--max_steps is '1.5'; expected a whole number"),
        (["--bf16", "maybe"], "--bf16 is 'maybe'; expected true or false"),
        (["--dtype", "int8"], "--dtype is 'int8'; expected one of auto, float32, bfloat16, float16"),
        (["--eval_strategy", "weekly"], "--eval_strategy is 'weekly'; expected one of no, steps, epoch"),
        (["--beta"], "--beta: a value has to follow"),
        (["pairs.jsonl"], "pairs.jsonl: a value without an option; options begin with --"),
        (["--impl", "triton8"], "--impl is 'triton8'; expected one of triton, cpp, torch"),
        (["--label_smoothing_factor", "0.1"], "the share of flipped preferences is --label_smoothing"),
        (["--use_liger_kernel", "true"], "the head is fused here already"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, argv, told):
    said = refusal("--use_cpu", "--output_dir", tmp_path, *argv) if argv[0][0] == "-" else refusal(*argv)
    assert told in said
    assert "\n" not in said


def test_what_can_be_checked_is_checked_before_a_model_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = ("--ref_weight", "./nomodel", "--output_dir", tmp_path, "--use_cpu")
    assert "no preference file nowhere.jsonl" in refusal("--data_path", "nowhere.jsonl", *model)
    assert "there is no model folder ./nomodel" in refusal(*DATA, *model)
    told = "--eval_strategy is 'epoch', and there are no held-out pairs to evaluate; give --eval_size 0.1"
    assert told in refusal(*DATA, *model, "--eval_strategy", "epoch")
    assert "--load_in_4bit needs the package bitsandbytes" in refusal(*DATA, *model, "--load_in_4bit")
    assert "model_init_kwargs is '{', which is no JSON" in refusal(*DATA, *model, "--model_init_kwargs", "{")
    assert "activation_offloading moves what backward needs" in refusal(*DATA, *model, "--activation_offloading")
    assert "mlp_tiles is 'few'; expected auto, or a whole" in refusal(*DATA, *model, "--mlp_tiles", "few")
    (tmp_path / "empty").mkdir()
    model = ("--ref_weight", tmp_path / "empty", *model[2:])
    assert "holds no tokenizer, none of tokenizer.json" in refusal(*DATA, *model)
    assert "is a folder, which has no revisions" in refusal(*DATA, *model, "--model_revision", "v2")


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "has_adapter", "device", "has_bfloat16", "dtype"),
    [
        pytest.param(None, True, GPU, True, "bfloat16", id="an adapter on a GPU"),
        pytest.param(None, False, GPU, True, "float32", id="all weights on a GPU"),
        pytest.param(None, True, GPU, False, "float32", id="a GPU without bfloat16"),
        pytest.param(None, True, CPU, True, "float32", id="a CPU beside a GPU"),
        pytest.param("float32", True, GPU, True, "float32", id="asked for float32"),
        pytest.param("auto", False, CPU, False, "auto", id="asked for auto"),
        pytest.param("bfloat16", False, CPU, False, "bfloat16", id="asked for bfloat16"),
    ],
)
def test_the_dtype_goes_by_what_is_trained(asked, has_adapter, device, has_bfloat16, dtype):
    assert choose_dtype(asked, has_adapter, device, has_bfloat16) == dtype


@pytest.mark.parametrize(
    ("options", "device", "dtype"),
    [
        ({}, GPU, "float32"), ({"dtype": "auto"}, GPU, "auto"), ({"use_peft": True}, GPU, "bfloat16"),
        ({"use_peft": True}, CPU, "float32"), ({"use_peft": True, "dtype": "float32"}, GPU, "float32"),
        ({"use_peft": True, "model_init_kwargs": '{"dtype": "float16"}'}, GPU, "float16"),
        ({"from_weight": "adapter"}, GPU, "bfloat16"), ({"from_weight": "model"}, GPU, "float32"),
    ],
    ids=str,
)  # fmt: skip
def test_models_are_loaded_in_that_dtype(monkeypatch, options, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(inputs, "base_of", lambda name: "base" if name == "adapter" else None)
    monkeypatch.setattr(inputs, "load_model", lambda *_, dtype, **__: dtype)
    adapter = AdapterOptions(use_peft=options.pop("use_peft", False))
    loaded = inputs.load(ScriptArguments(ref_weight="base", **options), adapter, "base", device)
    assert loaded == (dtype if dtype == "auto" else getattr(torch, dtype))


def test_triton_on_a_cpu_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_kernels.commands.options.available_impls", lambda device: {"triton": "no GPU"})
    told = refusal(*DATA, "--ref_weight", "x", "--output_dir", tmp_path, "--impl", "triton", "--use_cpu")
    assert told == "--impl triton cannot run on cpu: no GPU; leave it out for the fastest that can"


def test_a_revision_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    told = refusal(*DATA, "--ref_weight", "org/name", "--output_dir", tmp_path / "o", "--use_cpu",
                   "--model_revision", "v2")  # fmt: skip
    assert "holds no tokenizer" in told
    assert asked == [(("org/name",), {"revision": "v2"})]


def test_names_and_values_come_back_as_they_were():
    argv = ["--a", "1", "2", "--b=-1", "--c", "--d=x=y"]
    given = as_given(argv)
    assert given == {"a": ["1", "2"], "b": ["-1"], "c": [], "d": ["x=y"]}
    assert as_given(as_argv(given)) == given
    assert as_given(["--a-b", "1", "--a_b", "2"]) == {"a_b": ["2"]}


# A file as TRL's documentation has them.
TRL_FILE = {
    "model_name_or_path": "org/model", "model_revision": "main", "dtype": "bfloat16",
    "model_init_kwargs": {"low_cpu_mem_usage": True}, "dataset_name": "org/pairs", "dataset_config": "small",
    "dataset_train_split": "train_prefs", "dataset_test_split": "test_prefs", "eval_strategy": "steps",
    "learning_rate": 5.0e-7, "per_device_train_batch_size": 2, "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.2], "max_length": None, "pad_to_multiple_of": 8, "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 4, "use_peft": True, "lora_task_type": "CAUSAL_LM", "use_cpu": True, "bf16": False,
    "activation_offloading": False, "dataset_streaming": False, "env": {"SOMETHING_OF_MINE": "1"},
}  # fmt: skip


def test_a_file_of_trl_goes_through(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMETHING_OF_MINE", "0")
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(TRL_FILE | {"output_dir": str(tmp_path / "out")}))
    script, adapter, config = parse(["--config", str(tmp_path / "trl.yaml"), "--learning_rate", "1e-6"])
    assert script.ref_weight == script.start == "org/model"
    assert script.data_path == ["org/pairs/small:train_prefs"]
    assert script.eval_data_path == ["org/pairs/small:test_prefs"]
    assert (script.max_length, script.truncation_mode, script.assistant_turns) == (1024, "keep_start", "last")
    assert script.model_init_kwargs == '{"low_cpu_mem_usage": true}'
    assert adapter.use_peft
    assert (config.learning_rate, config.logging_steps, config.gradient_checkpointing) == (1e-6, 10, True)
    assert (config.pad_to_multiple_of, config.layout, config.precompute_ref_batch_size) == (8, "padded", 4)
    assert config.loss_type == ["sigmoid", "sft"]
    assert os.environ["SOMETHING_OF_MINE"] == "1"
    assert script.dtype == "bfloat16"
    assert parse(["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu",
                  "--bf16", "false"])[0].dtype == "float32"  # fmt: skip


def test_a_mixture_of_trl_goes_through(tmp_path):
    (tmp_path / "test.jsonl").write_text("{}")
    values = {
        "datasets": [{"path": "org/a", "split": "train"}, {"path": str(tmp_path), "data_files": "x.jsonl"},
                     {"path": str(tmp_path)}, {"path": str(tmp_path), "split": "test"}],
        "test_split_size": 0.1, "model_name_or_path": "m", "use_cpu": True, "padding_free": True, "bf16": False,
        "output_dir": str(tmp_path / "o"),
    }  # fmt: skip
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(values))
    script, _, config = parse([str(tmp_path / "trl.yaml")])
    assert script.data_path == ["org/a:train", "x.jsonl", str(tmp_path), f"{tmp_path}:test"]
    assert (script.eval_size, config.layout) == (0.1, "packed")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--dataset_streaming", "true"], "--dataset_streaming true is refused: a streamed dataset has no length"),
        (["--lora_task_type", "SEQ_CLS"], "--lora_task_type SEQ_CLS is refused: DPO trains causal"),
        (["--model_name_or_path", "m", "--ref_weight", "m"], "give one of --ref_weight and --model_name_or_path"),
        (["--pad_to_multiple_of", "8", "--layout", "shared", "--output_dir", "o"], "pad_to_multiple_of is 8, which is"),
        (["--precompute_ref_batch_size", "8", "--output_dir", "o"], "does nothing without precompute_ref_log_probs"),
    ],
)
def test_what_trl_has_and_we_have_not_is_refused_by_name(argv, told):
    assert told in refusal("--use_cpu", *argv)


def trl_fields():
    return {field.name: field for kind in (TrlScript, ModelConfig, TrlConfig) for field in dataclasses.fields(kind)}


def test_trls_defaults_are_those_of_its_fields():
    """Where TRL's default is another than ours, a command line of TRL's gets TRL's; but for a filter that hides NaN."""
    ours = {name: PARSER.action(name).default for name in PARSER.names}
    other = {}
    for name, field in trl_fields().items():
        if name in ours and name not in {*RESTRICTED, "logging_nan_inf_filter", "debug"}:
            made = field.default_factory() if field.default is dataclasses.MISSING else field.default
            if made != ours[name] and (made, ours[name]) not in ((None, False), ("main", None), ("auto", None)):
                other[name] = str(made).lower()
    assert other | {"assistant_turns": "last", "bf16": "true"} == trl_options.DEFAULTS


def test_the_table_of_trls_options_is_made_of_its_fields():
    page = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    table = trl_options.table(trl_fields(), PARSER.names)
    assert table in page, f"docs/coming-from.md lacks this table:\n{table}"
    assert table.count("\n") == len(trl_fields()) + 1


def test_the_example_is_ordinary_options():
    assert set(EXAMPLE_DEFAULTS) <= set(PARSER.names)
