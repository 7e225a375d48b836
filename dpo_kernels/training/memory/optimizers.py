"""What an optimizer keeps for each number that it trains, by the names of `--optim`."""

from __future__ import annotations

from typing import Any

from torch import nn

# Numbers kept for each that is trained, and their bytes (None: as many as the weight's).
KEPT: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adamw_8bit": (2, 1), "adamw_bnb_8bit": (2, 1),
    "adamw_32bit": (2, 4), "ademamix": (3, 4), "ademamix_32bit": (3, 4), "ademamix_8bit": (3, 1), "lion_32bit": (1, 4),
    "lion_8bit": (1, 1), "rmsprop": (1, None), "rmsprop_bnb": (1, 4), "rmsprop_bnb_32bit": (1, 4),
    "rmsprop_bnb_8bit": (1, 1), "adagrad": (1, None), "sgd": (0, None), "sgd with momentum": (1, None),
    "stable_adamw": (2, None), "schedule_free_adamw": (2, None), "schedule_free_sgd": (1, None),
    "schedule_free_radam": (2, None),
}  # fmt: skip
PAGED = "paged_"  # before the name: kept on the host
FACTORED = "adafactor"  # a row and a column of a matrix
# Of 8 bits: numbers that share a float32 scale; tensors of fewer stay in 32 bits (bitsandbytes), as do embeddings
# (transformers).
BLOCK, LEAST = 256, 4096


def name_of(args: Any) -> str:
    """The optimizer that `TrainingArguments` name, for `kept_bytes`."""
    name = str(getattr(args.optim, "value", args.optim))
    return "sgd with momentum" if name == "sgd" and "momentum" in (args.optim_args or "") else name


def is_on_host(name: str, device: str) -> bool:
    """Whether it keeps what it keeps in the host's memory, of a run on a device of this type."""
    return name.startswith(PAGED) and device != "cpu"


def kept_bytes(name: str, model: nn.Module) -> int | None:
    """Bytes that an optimizer keeps of the parameters of a model that are trained; None: it is not known here.

    Args:
        name: as `name_of` has it.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == FACTORED:
        return sum(4 * (p.numel() // p.shape[-1] + p.shape[-1] if p.dim() > 1 else p.numel()) for p in trained)
    if (found := KEPT.get(name.removeprefix(PAGED))) is None:
        return None
    numbers, size = found
    total = 0.0
    for p in trained:
        wide = size == 1 and (id(p) in embeddings or p.numel() < LEAST)
        each = 4 if wide else size + 4 / BLOCK if size == 1 else size or p.element_size()
        total += numbers * p.numel() * each
    return int(total)
