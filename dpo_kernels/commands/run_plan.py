"""The memory of a run before it starts: `train.py --plan`, and what a run that starts is told, or --fit chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.commands.inputs import has_second_model, model_options, weights_dtype
from dpo_kernels.commands.options import ScriptArguments
from dpo_kernels.training import DPOConfig, DPOTrainer, layout_check
from dpo_kernels.training.adapters import AdapterOptions, base_of, peft_config_of
from dpo_kernels.training.budget import COMPUTE, check_budget
from dpo_kernels.training.config import WITH_ANSWERS_AT_ONCE
from dpo_kernels.training.engines import asked_for, sizes_asked_for
from dpo_kernels.training.layouts import PairTokens, most_tokens
from dpo_kernels.training.loading import load_config, max_positions
from dpo_kernels.training.memory import optimizers
from dpo_kernels.training.memory.device_memory import CPU_LIBRARIES, GPU_LIBRARIES, Limit, held, keep_compact, limit_of
from dpo_kernels.training.memory.fake_models import fake_mode, make_fake, quantised_bytes
from dpo_kernels.training.memory.lower import WORTH, Chosen
from dpo_kernels.training.memory.pairs import longest_pairs, made_pairs, pair_sizes
from dpo_kernels.training.memory.rehearsal import rehearse
from dpo_kernels.training.memory.run_plan import RunPlan, longest_pair, make_plan, save_picture, too_little
from dpo_kernels.training.memory.step_memory import LIBRARIES, FakeRun, PlanError, StepMemory, StepOptions
from dpo_kernels.training.mlp_tiles import TilingError, find_mlps
from dpo_kernels.training.token_batches import token_batches
from dpo_kernels.units import in_words, parse_bytes

# Of what there is: from there on time is spent on keeping memory compact. Where it is not, malloc's heaps have held up
# to a quarter more than is live.
SHORT = 0.75
HELP = (
    "--fit chooses what lowers it at the same numbers; by hand: --memory_budget 256MiB, --gradient_checkpointing true, "
    "--mlp_tiles auto, --answers_at_once 1"
)
SURELY = 1.1  # a plan is off by less (benchmarks/run_memory.py)
PAIR = (512, 512, 512)  # tokens of prompt and answers, where no data and no lengths are given


def show_plan(
    script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, dataset: Any, writes: bool, example: Any
) -> int:
    """Prints the plan of a run; returns the exit status.

    Args:
        dataset: pairs, whose longest batch counts; None: pairs of --plan_pair.
        writes: whether plan.json and plan.png are saved in the output folder.
        example: config of the example's model, where none is named.

    Raises:
        PlanError: it cannot be told.
    """
    device = torch.device(script.plan_device or config.device)
    run = fake_run(script, adapter, config, device, dataset, example)
    if dataset is not None:
        check_budget(config, run.policy, run.reference, dataset, None, device)
    shape, pairs = _pairs(script, config, run, dataset)
    limit = _limit(config, device)
    if script.fit and limit is None:
        raise PlanError(
            "--fit has to know what there is, and this machine has no such device; give --run_memory_budget"
        )
    options = StepOptions.of(config)
    plan = make_plan(run, pairs, _title(script, config, run, shape, dataset), options, limit, fits=script.fit)
    plan = replace(plan, others=_others(plan, run, pairs, (script, adapter, config, dataset, example)))
    now = plan.options if plan.chosen is None else plan.chosen.options
    count, positions = len(pairs["x_chosen"]), max_positions(run.policy.config)
    longest = None if limit is None else longest_pair(run, shape, now, limit.bytes, positions, count)
    plan = replace(plan, longest=longest, positions=positions)
    print(plan, flush=True)
    if writes:
        folder = Path(str(config.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")
        save_picture(run, shape, options, plan, folder / "plan.png", count)
        print(f"saved: plan.json and plan.png in {folder}", flush=True)
    return 0


def told_plan(
    script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, dataset: Any, held_out: Any, example: Any
) -> RunPlan | None:
    """The plan of a run that is about to start, of the longest batch of its data; changes the config as --fit chooses,
    and says so. None, where it cannot be told, and --fit was not asked for.

    Raises:
        PlanError: it cannot be told, and --fit was asked for.
        ValueError: it surely does not fit; says by how much, and what would help. Or the head's budget is too small for
            a batch; names the least that works for all of them.
    """
    if not (script.fit or script.rehearsal):
        return None
    if config.world_size > 1:
        if script.fit:
            raise PlanError(
                "--fit chooses for one process, and several would have to choose alike; run it with --plan --fit, and "
                "give what it chooses by name"
            )
        return None
    try:
        run = fake_run(script, adapter, config, config.device, dataset, example)
        check_budget(config, run.policy, run.reference, dataset, held_out, config.device)
        shape, pairs = _pairs(script, config, run, dataset)
        limit = _limit(config, config.device)
        title = _title(script, config, run, shape, dataset)
        plan = make_plan(run, pairs, title, StepOptions.of(config), limit, fits=script.fit, compares=False)
    except PlanError:
        if script.fit:
            raise
        return None
    if limit is not None and plan.memory.bytes > SHORT * limit.bytes and config.device.type == "cpu":
        keep_compact()
    if plan.chosen is not None:
        if config.process_index == 0:
            print("\n".join(plan.told_of_choice), flush=True)
        take(plan.chosen, config, run)
        before = plan.memory.flops
        plan = replace(plan, options=plan.chosen.options, memory=plan.chosen.memory, flops_before=before)
    if limit is not None and plan.memory.bytes > SURELY * limit.bytes:
        raise ValueError(too_little(_compared(plan, script, adapter, config, dataset, example)))
    return plan


def rehearsed(
    trainer: DPOTrainer,
    plan: RunPlan | None,
    script: ScriptArguments,
    adapter: AdapterOptions,
    dataset: Any,
    example: Any,
) -> str:
    """What the longest batch really holds, beside its plan, in a sentence.

    Raises:
        ValueError: more than the run may hold; says by how much, and what would help.
    """
    found = rehearse(trainer) if trainer.args.world_size == 1 else None
    if found is None:
        return "memory: not tried beforehand (several processes, or a compiled model)"
    limit = _limit(trainer.args, trainer.args.device) if plan is None else plan.limit
    by_plan = f"; {in_words(plan.memory.bytes)} by the plan" if plan is not None else ""
    if found.bytes is None:
        there = "" if limit is None else f" of {in_words(limit.bytes)} ({limit.why})"
        raise ValueError(
            f"memory{there} ran out while the longest batch was tried ({found.why}){by_plan}. {HELP}. Nothing was "
            "trained, nothing is lost"
        )
    if limit is not None and found.bytes > limit.bytes:
        if plan is None:
            raise ValueError(
                f"a step of the longest batch needs {in_words(found.bytes)}, and there is {in_words(limit.bytes)} "
                f"({limit.why}). {HELP}. Nothing was trained, nothing is lost"
            )
        raise ValueError(too_little(_compared(plan, script, adapter, trainer.args, dataset, example), found.bytes))
    left = f", of {in_words(limit.bytes)} ({limit.why})" if limit is not None else ""
    more = f" and what {optimizers.name_of(trainer.args)} keeps, which is not known here" if found.unknown else ""
    return (
        f"memory: the longest batch holds {in_words(found.bytes)}{more}{by_plan}{left}; its step takes "
        f"{found.seconds:.1f} s"
    )


def _compared(
    plan: RunPlan, script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig, dataset: Any, example: Any
) -> RunPlan:
    """The same plan with what each other thing to do about memory would leave."""
    run = fake_run(script, adapter, config, config.device, dataset, example)
    run.libraries = plan.memory.parts.get(LIBRARIES, 0)  # now there are weights in this process
    _, pairs = _pairs(script, config, run, dataset)
    found = make_plan(run, pairs, plan.title, StepOptions.of(config), plan.limit)
    return replace(found, others=_others(found, run, pairs, (script, adapter, config, dataset, example)))


def _others(
    plan: RunPlan, run: FakeRun, pairs: Mapping[str, Tensor], given: tuple[Any, ...]
) -> list[tuple[str, StepMemory]]:
    """What options would leave that change numbers, each alone, of those that buy something; the best first.

    Args:
        given: script, adapter, config, dataset and example, as of `fake_run`.
    """
    script, adapter, config, dataset, example = given
    device, runs = run.device, {}

    def changed(script: ScriptArguments, adapter: AdapterOptions) -> FakeRun:
        made = fake_run(script, adapter, config, device, dataset, example)
        return replace(made, libraries=run.libraries)

    if run.optimizer.startswith("adamw_torch"):
        runs["--optim adamw_bnb_8bit"] = lambda: replace(run, optimizer="adamw_bnb_8bit")
        if device.type != "cpu":
            runs["--optim paged_adamw_8bit"] = lambda: replace(run, optimizer="paged_adamw_8bit")
    is_quantised = adapter.load_in_4bit or adapter.load_in_8bit
    if weights_dtype(script, adapter, device) == torch.float32 and not is_quantised and not model_options(script):
        runs["--dtype bfloat16"] = lambda: changed(replace(script, dtype="bfloat16"), adapter)
    has_adapter = adapter.use_peft or base_of(script.start or "") is not None
    if not has_adapter:
        runs["--use_peft"] = lambda: changed(script, replace(adapter, use_peft=True))
    if not is_quantised and script.start is not None:
        with_peft = adapter if has_adapter else replace(adapter, use_peft=True)
        name = "--load_in_4bit true" if has_adapter else "--use_peft --load_in_4bit true"
        runs[name] = lambda: changed(script, replace(with_peft, load_in_4bit=True))
    found = []
    for name, make in runs.items():
        try:
            other = make().step(pairs, plan.options)
        except ValueError:  # not of this model
            continue
        if other.bytes < (1 - WORTH) * plan.memory.bytes:
            found.append((name, other))
    return sorted(found, key=lambda one: one[1].bytes)


def take(chosen: Chosen, config: DPOConfig, run: FakeRun) -> None:
    """Sets a run's options to those that were chosen."""
    options = chosen.options
    layout: str = config.layout
    if options.answers_at_once is not None and options.answers_at_once != config.answers_at_once:
        layout = "bucketed" if options.bucketed else run.layout.name
    budget = options.memory_budget
    config.set_memory(
        gradient_checkpointing=options.gradient_checkpointing, mlp_tiles=options.mlp_tiles, layout=layout,
        activation_offloading=options.activation_offloading, answers_at_once=options.answers_at_once,
        precompute_ref_log_probs=options.precompute_ref_log_probs,
        memory_budget=None if budget is None else str(budget),
    )  # fmt: skip


def fake_run(
    script: ScriptArguments,
    adapter: AdapterOptions,
    config: DPOConfig,
    device: torch.device,
    dataset: Any,
    example: Any = None,
) -> FakeRun:
    """The models of a run without their weights.

    Args:
        example: config of the example's model, where none is named.
    """
    shared = asked_for(config) or ", ".join(sizes_asked_for(config))
    if config.world_size > 1 and shared:
        raise PlanError(f"weights are shared among processes ({shared}), which the plan does not count yet")
    trust = bool(model_options(script).get("trust_remote_code", script.trust_remote_code))
    dtype: Any = weights_dtype(script, adapter, device)
    name = script.start
    of_model = example if name is None else load_config(name, trust)
    dtype = (getattr(of_model, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    mode = fake_mode()
    told: dict[str, Any] = {
        "trust_remote_code": trust, "attn_implementation": script.attn_implementation,
        "memory_budget": config.memory_budget_bytes, "impl": config.impl,
        "gradient_filter": config.gradient_filter,
    }  # fmt: skip
    trained = adapter.peft_config()
    if trained is None and name is not None and base_of(name) is not None:
        trained = peft_config_of(name)
        trained.inference_mode = False  # as it is saved
    policy = make_fake(mode, of_model, dtype, peft_config=trained, has_dropout=not config.disable_dropout, **told)
    reference = None
    if has_second_model(script, adapter, config):
        of_reference = of_model if name is None or script.ref_weight is None else load_config(script.ref_weight, trust)
        reference = make_fake(mode, of_reference, dtype, **told)
        reference.requires_grad_(False)
    run = FakeRun(
        mode, policy, reference, _layout(config, policy, script, dataset, device),
        scores=config.loss_options.needs_reference, device=device,
        mixed_precision=COMPUTE.get("bf16" if config.bf16 else "fp16" if config.fp16 else "no"),
        optimizer=optimizers.name_of(config),
        accumulates=config.gradient_accumulation_steps > 1,
        libraries=held(torch.device("cpu")) + CPU_LIBRARIES if device.type == "cpu" else GPU_LIBRARIES,
        can_precompute=not config.sync_ref_model, can_bucket=config.layout in ("auto", "bucketed", "padded"),
        can_split=_can_split(config, policy),
        can_tile=config.disable_dropout and not config.torch_compile and _can_tile(mode, policy),
    )  # fmt: skip
    option, nested = _quantisation(adapter, of_model)
    if option is not None:
        run.quantised = quantised_bytes(policy, option, nested, dtype.itemsize)
    return run


def _quantisation(adapter: AdapterOptions, config: Any) -> tuple[str | None, bool]:
    """How the weights are quantised, by the options or by the checkpoint itself, and whether its scales are too.

    Raises:
        PlanError: in a way whose bytes are not known here.
    """
    of_model = getattr(config, "quantization_config", None)
    of_model = of_model if isinstance(of_model, dict) or of_model is None else of_model.to_dict()
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(adapter, option):
            return option, adapter.use_bnb_nested_quant
        if (of_model or {}).get(option):
            return option, bool((of_model or {}).get("bnb_4bit_use_double_quant"))
    if of_model is not None:
        raise PlanError(
            f"the checkpoint's weights are quantised ({of_model.get('quant_method', 'of an unknown kind')}), and the "
            "plan knows those of bitsandbytes alone"
        )
    return None, False


def _can_split(config: DPOConfig, policy: Any) -> bool:
    """Whether a step can go in parts as far as the config tells; with dropout its random numbers would be others."""
    text = policy.config.get_text_config()
    balances = config.router_aux_loss_coef != 0 and bool(getattr(text, "router_aux_loss_coef", 0))
    refused = balances or config.fsdp or config.deepspeed or not config.disable_dropout
    return not refused and config.pad_to_multiple_of is None and not any(
        getattr(config, name, None) for name in WITH_ANSWERS_AT_ONCE)  # fmt: skip


def _can_tile(mode: Any, policy: Any) -> bool:
    try:
        with mode:
            find_mlps(policy)
    except TilingError:
        return False
    return True


def _layout(config: DPOConfig, policy: Any, script: ScriptArguments, dataset: Any, device: torch.device) -> Any:
    layout = "padded" if config.layout == "auto" and config.torch_compile else config.layout
    sizes = _drawn(script, dataset)
    return layout_check.expected(
        policy, layout, sizes, config.per_device_train_batch_size, answers_at_once=config.answers_at_once,
        is_checkpointed=bool(config.gradient_checkpointing), device=device,
    )  # fmt: skip


def _drawn(script: ScriptArguments, dataset: Any) -> list[PairTokens]:
    if dataset is None:
        return [PairTokens(*(script.plan_pair or PAIR))]
    return pair_sizes(dataset)


def _pairs(
    script: ScriptArguments, config: DPOConfig, run: FakeRun, dataset: Any
) -> tuple[PairTokens, Mapping[str, Tensor]]:
    """The longest pair, and the longest batch."""
    count = config.per_device_train_batch_size
    if dataset is None:
        shape = PairTokens(*(script.plan_pair or PAIR))
        return shape, made_pairs(*shape, _count(config, run, shape))
    batches = token_batches(dataset, run.layout, config) if config.tokens_per_batch is not None else None
    pairs = longest_pairs(dataset, run.layout, count, config.pad_to_multiple_of, batches)
    return max(pair_sizes(dataset), key=lambda size: most_tokens(run.layout, [size])), pairs


def _count(config: DPOConfig, run: FakeRun, shape: PairTokens) -> int:
    """Pairs of a batch, where all are of one length."""
    if config.tokens_per_batch is None:
        return config.per_device_train_batch_size
    return max(1, config.tokens_per_batch // most_tokens(run.layout, [shape]))


def _limit(config: DPOConfig, device: torch.device) -> Limit | None:
    budget = parse_bytes(config.run_memory_budget, "run_memory_budget")
    if budget is not None:
        return Limit(budget, "--run_memory_budget")
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return limit_of(device)


def _title(script: ScriptArguments, config: DPOConfig, run: FakeRun, shape: PairTokens, dataset: Any) -> str:
    name = Path(script.start).name if script.start else "the example's model"
    prompt, chosen, rejected = shape
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    numbers = sum(p.numel() for p in run.policy.parameters())
    what = f"{trained:,} of {numbers:,} parameters trained" if trained < numbers else f"{numbers:,} parameters"
    count = config.per_device_train_batch_size if dataset is not None else _count(config, run, shape)
    pairs = f"{count:,} pairs, the longest" if dataset is not None else f"{count:,} pairs of"
    if config.tokens_per_batch is not None and dataset is not None:
        pairs = f"a batch of at most {config.tokens_per_batch:,} tokens, its longest pair"
    return (
        f"{name}, {what}, {pairs} {prompt:,} tokens of prompt, answers of {chosen:,} and {rejected:,}; "
        f"{run.layout.told} rows, {run.device.type}"
    )
