"""What the options name, loaded: tokenizer, length and pairs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from dpo_kernels.commands.options import ScriptArguments, choose_dtype
from dpo_kernels.training import DPOConfig, DPODataset, ReadOptions, sources
from dpo_kernels.training.adapters import AdapterOptions, base_of
from dpo_kernels.training.engines import split_at_load
from dpo_kernels.training.loading import check_positions, load_config, load_model, load_tokenizer, max_positions
from dpo_kernels.training.report.start import same_place

INSTALLED, CHECKOUT = Path(__file__).parents[1] / "examples", Path(__file__).parents[2] / "examples"
EXAMPLE = (INSTALLED if INSTALLED.is_dir() else CHECKOUT) / "dpo.jsonl"
DEFAULT_MAX_LENGTH = 2048


def quiet() -> None:
    """For commands whose output is read: no word of the libraries, and no bars while they load."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def prepare_tokenizer(script: ScriptArguments, example: Any, with_reference: bool) -> PreTrainedTokenizerBase:
    """The policy's tokenizer (see `loading.load_tokenizer`), or the example's, with what the command line changes."""
    tokenizer: Any = example
    if script.start is not None:
        reference = script.ref_weight if with_reference or script.from_weight else None
        tokenizer = load_tokenizer(script.start, reference, script.trust_remote_code)
    if script.chat_template is not None:
        tokenizer.chat_template = Path(script.chat_template).read_text(encoding="utf-8")
    if script.pad_token is not None:
        if tokenizer.convert_tokens_to_ids(script.pad_token) in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"pad_token is {script.pad_token!r}, which the tokenizer does not know; name a token it has"
            )
        tokenizer.pad_token = script.pad_token
    return tokenizer


def choose_max_length(script: ScriptArguments, example: Any) -> int:
    """--max_length, or what the models have positions for, up to the default.

    Raises:
        ValueError: more than one of the models has positions for.
    """
    names = dict.fromkeys(filter(None, (script.from_weight, script.ref_weight)))
    configs = [example] if example is not None else [load_config(name, script.trust_remote_code) for name in names]
    if script.max_length is None:
        return min([DEFAULT_MAX_LENGTH, *filter(None, map(max_positions, configs))])
    for config in configs:
        check_positions(config, script.max_length)
    return script.max_length


def load_pairs(
    script: ScriptArguments, config: DPOConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[DPODataset, DPODataset | dict[str, DPODataset] | None]:
    """Pairs to train on, and held-out ones if asked for: one dataset, or several by their names."""
    folder = Path(str(config.output_dir))

    def load(path: str, skipped: str, i: int) -> DPODataset:
        return read_pairs(script, path, tokenizer, max_length, folder / f"{skipped}{f'.{i}' if i else ''}.jsonl")

    parts = [load(path, "skipped", i) for i, path in enumerate(script.data_path or [str(EXAMPLE)])]
    held_out: Any = None
    if script.eval_data_path:
        loaded = [load(path, "skipped.eval", i) for i, path in enumerate(script.eval_data_path)]
        held_out = loaded[0] if len(loaded) == 1 else dict(zip(_names(script.eval_data_path), loaded, strict=True))
    elif script.eval_size:  # before pairs are drawn more than once: none is on both sides
        shares = DPODataset.split_all(parts, script.eval_size, config.seed)
        parts, held_out = [train for train, _ in shares], DPODataset.mix([kept for _, kept in shares])
    return DPODataset.mix(parts, script.data_weights, config.seed), held_out


def read_pairs(
    script: ScriptArguments, path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, skipped: Path | None = None
) -> DPODataset:
    """The pairs of one source, read as the options say.

    Args:
        skipped: where bad lines go with --on_bad_line skip; default: beside the file.
    """
    tools = Path(script.tools).read_text(encoding="utf-8") if script.tools else None
    read = ReadOptions(
        _columns(script.columns or []), script.string_format, script.pairs, _json("tools", tools, list) or [],
        _json("chat_template_kwargs", script.chat_template_kwargs, dict) or {},
    )  # fmt: skip
    return DPODataset(
        path, tokenizer, max_length, assistant_turns=script.assistant_turns, truncation_mode=script.truncation_mode,
        read=read, on_bad_line=script.on_bad_line, skipped_path=skipped, num_proc=script.dataset_num_proc,
    )  # fmt: skip


def check_sources(script: ScriptArguments) -> None:
    """
    Raises:
        FileNotFoundError: a file of pairs or options is not there; what only the hub can tell is left to it.
    """
    for path in (*(script.data_path or ()), *(script.eval_data_path or ())):
        sources.check_exists(path)
    for name in filter(None, (script.tools, script.chat_template)):
        Path(name).stat()


def find_models(script: ScriptArguments) -> None:
    """Puts folders in the place of hub names where a revision is asked for, so that all that is loaded is of it.

    Raises:
        ValueError: a revision of a folder, which has none.
        OSError: the hub has no such model or revision, or cannot be asked.
    """
    revision = model_options(script).pop("revision", None) or script.model_revision
    if revision in (None, "main"):
        return
    from huggingface_hub import snapshot_download

    for option in ("ref_weight", "from_weight"):
        if (name := getattr(script, option)) is None:
            continue
        if Path(name).exists():
            raise ValueError(f"--model_revision is {revision!r}, and {name} is a folder, which has no revisions")
        setattr(script, option, snapshot_download(name, revision=revision))


def has_second_model(script: ScriptArguments, adapter: AdapterOptions, config: DPOConfig) -> bool:
    """Whether the reference is a model of its own: not where the loss has none, and not where the policy has an adapter
    and starts from it. Sets the config's `adapter_reference` to "base" where it starts from a trained one, and the
    reference is what that was trained on."""
    name = script.start
    base = base_of(name) if name else None
    of_itself = adapter.use_peft or base is not None
    if base is not None and same_place(script.ref_weight, base):
        config.adapter_reference = "base"
    elif script.ref_weight is not None and not same_place(script.ref_weight, name):
        of_itself = False
    return config.loss_options.needs_reference and not of_itself


def load(
    script: ScriptArguments,
    adapter: AdapterOptions,
    path: str,
    device: torch.device,
    is_trainable: bool = False,
    tp_size: int = 1,
) -> Any:
    """A model as the options say; see `loading.load_model`.

    Args:
        device: where it will run; the dtype of its weights goes by it (`choose_dtype`).
        tp_size: how many processes share each layer.
    """
    more = model_options(script)
    for taken in ("revision", "dtype", "torch_dtype"):
        more.pop(taken, None)
    dtype = weights_dtype(script, adapter, device)
    trust = more.pop("trust_remote_code", script.trust_remote_code)
    options: dict[str, Any] = adapter.quantization(dtype)
    if tp_size > 1:
        options["distributed_config"] = split_at_load(tp_size)
    if script.attn_implementation:
        options["attn_implementation"] = script.attn_implementation
    return load_model(path, trust_remote_code=trust, dtype=dtype, is_trainable=is_trainable, **options | more)


def weights_dtype(script: ScriptArguments, adapter: AdapterOptions, device: torch.device) -> Any:
    """The dtype of the models' weights, or "auto" for the checkpoint's.

    Raises:
        ValueError: model_init_kwargs asks for one that does not exist.
    """
    more = model_options(script)
    asked = more.get("dtype", more.get("torch_dtype"))
    if asked is None:
        has_adapter = adapter.use_peft or base_of(script.start or "") is not None
        is_there = torch.cuda.is_available()
        has_bfloat16 = not is_there or torch.cuda.is_bf16_supported(including_emulation=False)
        asked = choose_dtype(script.dtype, has_adapter, device, has_bfloat16)
    dtype = asked if asked == "auto" else getattr(torch, str(asked), None)
    if dtype != "auto" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"model_init_kwargs asks for the dtype {asked!r}; expected one as in float32, bfloat16")
    return dtype


def model_options(script: ScriptArguments) -> dict[str, Any]:
    """What --model_init_kwargs holds."""
    return dict(_json("model_init_kwargs", script.model_init_kwargs, dict) or {})


def _json(option: str, text: str | None, kind: type) -> Any:
    """What an option holds as JSON, None where it is not given.

    Raises:
        ValueError: it is no JSON, or of another kind.
    """
    if text is None:
        return None
    expected = "a list, as in [{...}]" if kind is list else 'an object, as in {"enable_thinking": false}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} is {text[:80]!r}, which is no JSON ({error}); expected {expected}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{option} is {text[:80]!r}; expected {expected}")
    return value


def _columns(parts: list[str]) -> dict[str, str]:
    """name=column, one or several; or one JSON object, as a file of options gives it."""
    if len(parts) == 1 and parts[0].startswith("{"):
        split = [(name, "=", column) for name, column in _json("columns", parts[0], dict).items()]
    else:
        split = [part.partition("=") for part in parts]
    if wrong := [found for found in split if not all(isinstance(x, str) and x for x in found)]:
        raise ValueError(f"columns holds {wrong}; expected name=column, as in prompt=question")
    return {name: column for name, _, column in split}


def _names(paths: list[str]) -> list[str]:
    """Short names for several evaluation sets, each another."""
    names: list[str] = []
    for path in paths:
        short = re.sub(r"(\.(jsonl|ndjson|json|csv|tsv|parquet))?(\.(gz|zst|bz2))?$", "", Path(path).name)
        short = short.replace(":", "_")
        numbered = (f"{short}_{i}" for i in itertools.count(2))
        name = next(name for name in itertools.chain([short], numbered) if name not in names)
        names.append(name)
    return names
