"""Runs over several processes: the recipes of examples/scale on CPUs, what is refused, and how processes end."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import scale_runs
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, ParallelismConfig
from helpers import slow
from safetensors.torch import load_file
from script_helpers import check_probe
from transformers import AutoModelForCausalLM

from dpo_kernels.training import DPOConfig
from dpo_kernels.training.engines import (
    EngineError,
    Ranks,
    asked_for,
    check_asked,
    check_split_as_asked,
    read_parallelism,
    sizes_asked_for,
    split_at_load,
)
from dpo_kernels.training.processes import together
from dpo_kernels.training.saving import gathered_once, once_each


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its head is its embedding."""
    return scale_runs.save_model(tmp_path_factory.mktemp("qwen3"), "Qwen3")


@pytest.fixture(scope="module")
def one(tmp_path_factory, model):
    """What one process makes of four steps."""
    output = tmp_path_factory.mktemp("one") / "output"
    done = scale_runs.alone(scale_runs.options(model, output, 1, 4))
    assert done.returncode == 0, done.stderr
    return output


IN_THE_SUITE = "fsdp2, sharded"
OTHERS = [
    name for name, way in scale_runs.WAYS.items()
    if way.script != "zero.sh" and way.options != scale_runs.LORA and name != IN_THE_SUITE
]  # fmt: skip


@pytest.mark.parametrize("name", [IN_THE_SUITE, *map(slow, OTHERS)])
def test_a_recipe_is_as_one_process_and_goes_on_with_others(tmp_path, model, one, name):
    way = scale_runs.WAYS[name]
    assert scale_runs.measure(way, model, one, tmp_path, steps=4).largest < 1e-5


@slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero(tmp_path, model, one, stage):
    """Where DeepSpeed is installed as one process; where it is not, a sentence says what to install."""
    way = scale_runs.WAYS[f"zero {stage}"]
    if way.can_run:
        assert scale_runs.measure(way, model, one, tmp_path, steps=4).largest < 1e-5
        return
    done = scale_runs.recipe(way.script, 2, scale_runs.options(model, tmp_path / "o", 2, 2), STAGE=stage)
    assert done.returncode != 0
    assert "DeepSpeed" in done.stderr


def test_weights_that_are_tied_are_saved_once(model):
    """As copies, which is what is gathered from parts; no other is left out, nor one that was untied."""
    tied = AutoModelForCausalLM.from_pretrained(model)
    copies = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    assert copies.keys() - once_each(copies, tied).keys() == {"lm_head.weight"}
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert once_each(copies, tied).keys() == copies.keys()
    assert once_each({}, tied) == {}


def test_a_gathered_model_is_saved_without_copies(tmp_path, model):
    tied = AutoModelForCausalLM.from_pretrained(model)
    copies = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    for inside in (True, False):
        with gathered_once(tied) if inside else nullcontext():
            tied.save_pretrained(tmp_path, state_dict=dict(copies))
        assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != inside


def test_every_recipe_is_run_by_a_way():
    names = {path.name for path in scale_runs.RECIPES.glob("*.sh")}
    assert names == {way.script for way in scale_runs.WAYS.values()}
    told = (scale_runs.RECIPES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in names)


@pytest.mark.parametrize("processes", [2, slow(4)])
def test_sequences_that_are_split_over_processes(processes):
    check_probe("sequence_probe.py", processes)


# What would run as something else


def asked(kind, **options):
    return SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=kind), **options)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
@pytest.mark.parametrize(
    ("environment", "options", "what"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP was asked for"),
        ({}, {"fsdp_plugin_args": {"fsdp_version": 2}}, "FSDP was asked for"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed was asked for"),
        ({}, {"parallelism_config": ParallelismConfig(cp_size=2)}, r"a mesh of devices \(cp_size 2\) was asked for"),
        ({}, {"tp_size": 2}, r"a mesh of devices \(tp_size 2\) was asked for"),
    ],
    ids=str,
)
def test_what_accelerate_would_run_as_something_else_is_refused(monkeypatch, kind, environment, options, what):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=what) as told:
        check_asked(asked(kind, **options))
    assert ("accelerate runs DDP in its place" in str(told.value)) == (kind == DistributedType.MULTI_CPU)


def test_what_accelerate_does_run_is_not_refused(monkeypatch):
    check_asked(asked(DistributedType.MULTI_CPU))
    check_asked(asked(DistributedType.NO))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_asked(asked(DistributedType.FSDP))
    with pytest.raises(EngineError, match="tp_size is 2, and FSDP was asked for"):
        check_asked(asked(DistributedType.FSDP, tp_size=2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(EngineError, match="Megatron-LM, which is not supported"):
        check_asked(asked(DistributedType.MEGATRON_LM))


def test_a_config_asks_for_what_its_options_say(tmp_path, monkeypatch):
    usual = DPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (asked_for(usual), sizes_asked_for(usual)) == ("", {})
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    assert sizes_asked_for(usual) == {"cp_size": 2}


def test_sizes_as_json(tmp_path):
    file = tmp_path / "mesh.json"
    file.write_text(json.dumps({"cp_size": 2}), encoding="utf-8")
    for given in ('{"cp_size": 2}', str(file), {"cp_size": 2}, ParallelismConfig(cp_size=2)):
        assert read_parallelism(given).cp_size == 2
    assert read_parallelism(None) is None
    for given, told in (
        ("{cp_size}", "which is no JSON and no file of it"),
        ("[2]", "which is no JSON and no file of it"),
        ({"size": 2}, "parallelism_config holds size; expected an object with some of dp_replicate_size"),
    ):
        with pytest.raises(ValueError, match=told):
            read_parallelism(given)


def test_a_model_that_was_not_loaded_in_parts_is_refused():
    options, whole, split = SimpleNamespace(tp_size=2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    split._tp_size = 2
    check_split_as_asked(options, split, None)
    check_split_as_asked(SimpleNamespace(tp_size=1), whole)
    for models in ((whole, None), (split, whole)):
        with pytest.raises(EngineError, match="tp_size is 2, and Linear was loaded for 1"):
            check_split_as_asked(options, *models)


def test_processes_that_are_no_multiple(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(EngineError, match="tp_size is 2, and there are 3 processes; start a multiple of 2"):
        split_at_load(2)


def test_who_reads_which_pairs():
    ranks = Ranks(4, 2)
    assert (ranks.readers, [ranks.reader(i) for i in range(4)]) == (2, [0, 0, 1, 1])
    rows = torch.arange(8)
    assert ranks.one_of_each(lambda t: t)(rows).tolist() == [0, 1, 4, 5]
    assert Ranks(4).one_of_each(len) is len


@pytest.mark.parametrize("error", [None, RuntimeError, SystemExit])
@pytest.mark.parametrize("in_group", [True, False])
def test_who_was_in_a_group_says_so_and_leaves_it(tmp_path, in_group, error):
    """However the run ends: then the process ends without the teardown that may abort it (commands/endings.py)."""
    said = []
    if in_group:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with (
        nullcontext() if error is None else pytest.raises(error),
        together(in_group=lambda: said.append(is_in_group())),
    ):
        if error is not None:
            raise error
    assert said == ([True] if in_group else [])
    assert not is_in_group()


def is_in_group() -> bool:
    return dist.is_initialized()
