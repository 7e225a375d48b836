"""The help of `train`: its options in groups, ours first; with --help-all transformers' as well."""

from __future__ import annotations

import re
import textwrap

from transformers import TrainingArguments

from dpo_kernels.commands.arguments import Arguments
from dpo_kernels.losses import LOSSES
from dpo_kernels.training.config import RESTRICTED

WIDTH, NAMES_WIDTH = 116, 38
USAGE = """usage: {program} [options]            without any: a small example on the CPU, made on the spot
       {program} options.yaml         the same options from a file (also --config, as TRL has it)
       torchrun --nproc_per_node 8 train.py ...   or accelerate launch train.py ...

Aligns a Hugging Face causal language model with preference pairs (DPO)."""
# Group -> its lines: the options that a line is about, and what it says; none of it: the option's own help.
GROUPS: dict[str, list[tuple[str, str]]] = {
    "models": [
        ("ref_weight", "reference, and where the policy starts: a model folder or hub name"),
        ("from_weight", "where the policy starts instead; an adapter goes on being trained"),
        ("dtype, attn_implementation", "of the weights: float32, bfloat16 below an adapter on a GPU; sdpa, ..."),
        ("model_revision, model_init_kwargs", "branch, tag or commit on the hub; JSON for from_pretrained"),
        ("trust_remote_code", ""),
        ("chat_template, pad_token", "for tokenizers that have none: a file with Jinja, a token"),
    ],
    "data": [
        ("data_path, data_weights", "pairs: files, folders, org/name:split on the hub; shares of the draws"),
        ("eval_size, eval_data_path", "held-out pairs: a share below 1 or a number; or sources of their own"),
        ("max_length, truncation_mode", "tokens, 2048 or what the model has; keep_answer, keep_start or drop"),
        ("assistant_turns, on_bad_line", "replies that count, all or last (TRL's); raise, or skip into skipped.jsonl"),
        ("columns, string_format, pairs", "prompt=question chosen=best ...; plain or chat; best or all"),
        ("tools, chat_template_kwargs", "for the chat template: a JSON file; '{\"enable_thinking\": false}'"),
        ("dataset_num_proc, show_pairs", "processes that tokenize; print so many pairs as the model sees them"),
    ],
    "loss": [
        ("beta, dpo_aggregate", "0.1, how strongly the reference holds; sum or mean over an answer's tokens"),
        ("loss_type, loss_weights", "of several the weighted sum; names: {losses}"),
        ("label_smoothing, ld_alpha, use_weighting", "share of flipped labels; LD-DPO's alpha; WPO"),
        ("f_divergence_type, f_alpha_divergence_coef", "reverse_kl, forward_kl, js_divergence, alpha_divergence"),
        ("discopop_tau, simpo_gamma, cpo_alpha", "of the losses of these names: 0.05, 0.5, 1.0"),
        ("router_aux_loss_coef", "of a mixture of experts' load-balancing loss; the model's"),
    ],
    "reference": [
        ("precompute_ref_log_probs, precompute_ref_batch_size", "one pass before training, cached; so many pairs"),
        ("adapter_reference", "of an adapter, where none is given: start, or base (the model without it)"),
        ("sync_ref_model", ""),
        ("ref_model_mixup_alpha, ref_model_sync_steps", "by that share, 0.6; after so many steps, 512"),
    ],
    "memory and speed": [
        ("memory_budget, impl, gradient_filter", "what the head may hold; triton, cpp or torch; a probability"),
        ("layout, pad_to_multiple_of", "auto, shared, packed, bucketed, padded; rows of so many tokens"),
        ("tokens_per_batch", "instead of --per_device_train_batch_size: as many pairs as fill so many tokens"),
        ("answers_at_once", "a batch in parts of so many: same gradients, less memory, one forward more"),
        ("bf16, fp16, gradient_checkpointing", "mixed precision; activations made again"),
        ("mlp_tiles, activation_offloading", "MLPs over slices of the tokens, a number or auto; saved on the host"),
        ("run_memory_budget, fit, rehearsal", "default: what there is; choose until it fits; try the longest batch"),
        ("plan, plan_pair, plan_device", "only say what a step would hold, without weights; of P C R tokens; cuda"),
    ],
    "adapters": [
        ("use_peft, lora_r, lora_alpha", "train a LoRA adapter, the model without it is the reference; 16, 32"),
        ("lora_dropout, use_rslora, use_dora", "0.05, off unless --disable_dropout false; kinds of LoRA"),
        ("lora_target_modules, lora_target_parameters, lora_modules_to_save", "names of layers, or all-linear"),
        ("load_in_4bit, load_in_8bit", "quantised weights below the adapter"),
        ("bnb_4bit_quant_type, use_bnb_nested_quant, bnb_4bit_compute_dtype", "nf4, fp4"),
        ("merge_adapter", ""),
    ],
    "run": [
        ("output_dir", "model, log, curves, report; default: a new folder in output/"),
        ("learning_rate, num_train_epochs, max_steps", "1e-6; passes over the pairs, 3; or so many steps"),
        ("per_device_train_batch_size, gradient_accumulation_steps", "pairs at once; times so many a step"),
        ("eval_strategy, save_strategy, logging_steps", "no, steps or epoch; log every so many steps"),
        ("resume_from_checkpoint, allow_changed_data", "alone: the newest; with other pairs all the same"),
        ("seed, disable_dropout, use_cpu, tp_size", "42, true, false; processes that share each layer, 1"),
        ("report, lesson_epochs", "answers for report.html, true; of the example, before it is aligned: 14"),
    ],
}  # fmt: skip


def short(parser: Arguments, program: str) -> str:
    """The help that fits a screen: each option of ours once."""
    lines = [USAGE.format(program=program)]
    for title, rows in GROUPS.items():
        lines.append(f"{title}:")
        for names, text in rows:
            said = text.format(losses=", ".join(LOSSES)) if "{losses}" in text else text
            if not said and "," not in names:
                said = parser.action(names).help or ""
            lines += row(", ".join(f"--{name}" for name in names.split(", ")), said)
    lines.append(f"{program} --help-all also lists the options of transformers.TrainingArguments.")
    return "\n".join(lines)


def full(parser: Arguments, program: str) -> str:
    """Every option with its own help, ours first, then transformers' in its own groups."""
    ours = {title: [name for names, _ in rows for name in names.split(", ")] for title, rows in GROUPS.items()}
    listed = {name for names in ours.values() for name in names}
    theirs = {title: [n for n in names if n not in listed] for title, names in _groups_of_transformers().items()}
    known = listed.union(*theirs.values())
    rest = {"others": [name for name in parser.names if name not in known]}
    lines = [USAGE.format(program=program)]
    for title, names in (ours | theirs | rest).items():
        there = [name for name in names if name in parser.names]
        if there:
            lines += ["", f"{title}:"]
        for name in there:
            lines += row(f"--{name}", parser.said(name))
    return "\n".join(lines)


def row(names: str, text: str) -> list[str]:
    """Names, and text beside them, or in lines of its own where they are long."""
    left = f"  {names}"
    wrapped = textwrap.wrap(text, WIDTH - NAMES_WIDTH, break_long_words=False, break_on_hyphens=False)
    if not wrapped:
        return [left]
    if len(left) + 2 <= NAMES_WIDTH:
        return [f"{left:<{NAMES_WIDTH}}{wrapped[0]}", *(" " * NAMES_WIDTH + line for line in wrapped[1:])]
    if len(left) + 2 + len(text) <= WIDTH:
        return [f"{left}  {text}"]
    return [left, *(" " * NAMES_WIDTH + line for line in wrapped)]


def _groups_of_transformers() -> dict[str, list[str]]:
    """As the documentation of `TrainingArguments` has them."""
    groups: dict[str, list[str]] = {}
    title = ""
    for line in (TrainingArguments.__doc__ or "").splitlines():
        if found := re.match(r"\s*> ([A-Z][\w&() /,-]+)$", line):
            title = found[1]
        elif (found := re.match(r"\s*(\w+) \(", line)) and title and found[1] not in RESTRICTED:
            groups.setdefault(title, []).append(found[1])
    return groups
