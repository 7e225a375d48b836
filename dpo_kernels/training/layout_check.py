"""Which layout a run uses: the one with the fewest tokens that its models compute rightly, checked at start.

Two random pairs, longer than any window that the data can reach, go through a model in the layout and padded. Their
log-probs and gradients have to be the same to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.training import attention, caches
from dpo_kernels.training.batch import PairBatch, PairCollator, pair_tokens
from dpo_kernels.training.formats import SIDES
from dpo_kernels.training.head_check import ROUNDINGS, narrowest, random_numbers_kept
from dpo_kernels.training.layouts import PADDED, Layout, PairTokens, most_tokens
from dpo_kernels.training.loading import is_of_its_own_kind, max_positions
from dpo_kernels.training.memory import checkpointing
from dpo_kernels.training.output_head import below_adapters, find_head, parameters_of
from dpo_kernels.training.sequence_parallel import Split

LAYER_TYPES = {"full_attention", "sliding_attention"}
REACH = re.compile(r".*(window|chunk_size|local_attention|index_(topk|budget)).*")  # what configs call how far one sees
PARAMETERS = 2**24  # numbers whose gradients are compared, small parameters first
PAIRS = 64  # of the data, to count tokens by
# What a layout has to save of the tokens of a simpler one, to be taken in its place.
SAVES = 0.9
MASK_SAVES = 0.7  # with a mask; at 0.8 of bucketed's tokens a step takes 0.93 of its time
# Tokens a pair that a cache has to save besides, on a CPU: a forward costs what some 20 do, and a pair has three.
CACHE_SAVES = 64
ROPES_BY_LENGTH = {"dynamic", "longrope"}  # whose frequencies depend on how many tokens a forward has


class LayoutError(ValueError):
    """The layout that was asked for would train a model wrong; says which class, and why."""


@dataclass(frozen=True)
class Choice:
    """layout: of a run. told: in a sentence, what was chosen and why."""

    layout: Layout
    told: str


def choose(
    model: nn.Module,
    wanted: str,
    dataset: Any,
    batch_size: int,
    *,
    tokens_per_batch: int | None = None,
    balances: bool = False,
    gives_mask: bool = False,
    is_sharded: bool = False,
    is_checkpointed: bool = False,
    in_parts: bool = False,
    answers_at_once: int | None = None,
    device: torch.device | None = None,
) -> Choice:
    """The layout of a run. Where it goes in parts, auto is bucketed: there a part can be a single answer.

    Args:
        model: the policy, fused, not yet wrapped.
        wanted: a name, or "auto".
        dataset: pairs, whose lengths decide.
        batch_size: pairs that go through the model together.
        tokens_per_batch: tokens that do, instead.
        balances: whether a load-balancing loss is asked for.
        gives_mask: whether models are given an attention mask where rows are padded.
        is_sharded: whether the run uses FSDP.
        is_checkpointed: whether layers are run again in backward, so that they keep nothing.
        in_parts: whether the model's weights are in parts (ZeRO-3), so that it cannot be compared.
        answers_at_once: as of `Layout`.
        device: that it will run on; None: where it is.

    Raises:
        LayoutError: a layout is asked for by name, and the model would be trained wrong in it.
    """
    padded = replace(PADDED, gives_mask=gives_mask, answers_at_once=answers_at_once)
    if in_parts and wanted not in ("auto", "padded"):
        raise LayoutError(
            f"--layout {wanted}: {type(model).__name__} has its weights in parts (ZeRO-3), and no gradients to compare "
            "before the run; leave it out, or use ZeRO-2 or FSDP2"
        )
    if wanted == "padded" or in_parts:
        return Choice(padded, "" if answers_at_once is None else f"layout: {padded.told}")
    if wanted == "auto" and answers_at_once is not None:
        wanted = "bucketed"
    tokens, longest = count_tokens(dataset, batch_size, tokens_per_batch)
    refused: list[str] = []
    is_checkpointed = is_checkpointed or checkpointing.is_on(below_adapters(model))
    for candidate in _candidates(wanted, tokens, model, device):
        in_groups = candidate.goes_in_groups
        layout = replace(candidate, gives_mask=gives_mask if candidate.name == "bucketed" else balances)
        if balances and (in_groups or is_of_its_own_kind(model)):
            reason = f"the load-balancing loss of {type(model).__name__} is over all rows of the batch, padded ones"
        elif is_checkpointed and layout.attention == "cache":
            reason = (
                _known_reason(model, layout) or f"with gradient checkpointing {type(model).__name__} gives no cache"
            )
        else:
            reason = refusal(model, layout, longest, is_sharded)
        if not reason:
            layout = replace(layout, answers_at_once=answers_at_once)
            return Choice(layout, _told(layout, tokens, refused))
        if reason not in refused:
            refused.append(reason)
    if wanted != "auto":
        raise LayoutError(f"--layout {wanted}: {'; '.join(refused)}")
    return Choice(padded, _told(padded, tokens, refused))


def expected(
    model: nn.Module,
    wanted: str,
    pairs: Sequence[PairTokens],
    batch_size: int,
    *,
    answers_at_once: int | None = None,
    is_checkpointed: bool = False,
    device: torch.device | None = None,
) -> Layout:
    """The layout that `choose` will come to, as far as that is known of a model without numbers.

    Args:
        pairs: how long each pair of the data is. The others are those of `choose`.
    """
    if wanted == "auto" and answers_at_once is not None:
        wanted = "bucketed"
    padded = replace(PADDED, answers_at_once=answers_at_once)
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: max(PAIRS, batch_size)].tolist()
    parts = [[pairs[i] for i in drawn[first : first + batch_size]] for first in range(0, len(drawn), batch_size)]
    tokens = {
        name: sum(most_tokens(Layout(name, "branches"), part) for part in parts) / len(drawn)
        for name in ("padded", "bucketed", "packed", "shared")
    }  # fmt: skip
    if wanted == "padded":
        return padded
    for candidate in _candidates(wanted, tokens, model, device):
        if candidate.attention == "cache" and (wanted == "auto" or is_checkpointed):
            continue  # whether auto comes to it, only a run of the model tells
        if candidate.attention is None or not _known_reason(model, candidate):
            return replace(candidate, answers_at_once=answers_at_once)
    return padded


def check_split(split: Split, model: Any, layout: Layout, balances: bool) -> None:
    """
    Raises:
        LayoutError: a model cannot compute rows that are split over processes (cp_size); says why.
    """
    known = _known_reason(model, replace(layout, attention="branches"))
    if layout.name != "padded" or layout.answers_at_once is not None:
        known = f"rows are split in layout padded alone, whole batches at once, not in {layout.told}"
    if balances:
        known = f"the load-balancing loss of {type(model).__name__} is over all tokens"
    if known:
        raise LayoutError(f"cp_size is {split.parts}, which {type(model).__name__} cannot be trained with: {known}")


def of_reference(model: Any, policy: Any, layout: Layout) -> Layout:
    """The layout of a fused reference: the policy's, unless it is of another kind that would compute it wrong."""
    same = type(model) is type(policy) and _facts(model) == _facts(policy)
    goes = same or not refusal(model, layout.whole)
    return layout if goes else replace(PADDED, answers_at_once=layout.answers_at_once)


def _facts(model: Any) -> Any:
    config = getattr(model, "config", None)
    return attention.implementation(model), None if config is None else config.to_json_string(use_diff=False)


def _candidates(wanted: str, tokens: dict[str, float], model: Any, device: torch.device | None) -> Iterator[Layout]:
    """From the best on. A simpler layout is taken where another saves little, and where a mask would cost more, as it
    does unless empty blocks of it are left out. Through a cache each answer has a forward of its own, which a GPU would
    wait for: there it is by name alone, and what is left."""
    if wanted == "bucketed":
        yield Layout("bucketed")
        return
    has_blocks = attention.implementation(model) == attention.FLEX
    is_on_cpu = (device or next(model.parameters()).device).type == "cpu"
    ways = ["mask"] if has_blocks else ["branches", "cache", "mask"] if is_on_cpu else ["branches", "mask"]
    ways += ["cache"] if "cache" not in ways and wanted != "auto" else []
    for way in ways:
        for name in [wanted] if wanted != "auto" else ["shared", "packed"]:
            if way == "cache" and name != "shared":
                continue
            if wanted == name or not tokens or tokens[name] <= _worth(name, way, has_blocks, tokens):
                yield Layout(name, way)
    if wanted == "auto" and tokens and tokens["bucketed"] <= SAVES * tokens["padded"]:
        yield Layout("bucketed")


def _worth(name: str, way: str, has_blocks: bool, tokens: dict[str, float]) -> float:
    """The tokens from which on a simpler layout is as good."""
    if way == "cache":
        return SAVES * tokens["bucketed"] - CACHE_SAVES
    if way == "mask" and not has_blocks:  # of all tokens by all tokens
        return MASK_SAVES * tokens["bucketed"]
    return SAVES * tokens["packed" if name == "shared" else "padded"]


def _told(layout: Layout, tokens: dict[str, float], refused: list[str]) -> str:
    counts = ", ".join(f"{name} {count:,.0f}" for name, count in tokens.items())
    told = f"layout: {layout.told}" + (f" (tokens a pair: {counts})" if counts else "")
    return told + "".join(f"; {reason}" for reason in refused)


def count_tokens(dataset: Any, batch_size: int, tokens_per_batch: int | None = None) -> tuple[dict[str, float], int]:
    """Tokens a pair that a model is given, by layout, of some pairs drawn from the dataset; and how long one can be.
    Nothing, where the dataset has no pairs to look at."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    try:
        count = len(dataset)
    except TypeError:
        return {}, 0
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: max(PAIRS, batch_size)].tolist()
    if not drawn:
        return {}, 0
    items = [dataset[i] for i in drawn]
    names = [name for name in items[0] if name.startswith(("x_", "y_", "mask_"))]
    items = [{name: item[name] for name in names} for item in items]
    if tokens_per_batch is not None:
        mean = sum(sum(pair_tokens(item)) for item in items) / len(items)
        batch_size = max(1, min(len(items), round(tokens_per_batch / max(1, mean))))
    parts = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < batch_size else parts
    found = {}
    for name in ("padded", "bucketed", "packed", "shared"):
        layout = Layout(name, "branches" if name in ("packed", "shared") else None)
        positions = sum(PairBatch(PairCollator()(part), layout).positions for part in parts)
        found[name] = positions / sum(len(part) for part in parts)
    return found, len(items[0]["x_chosen"])


def refusal(model: Any, layout: Layout, longest: int = 0, is_sharded: bool = False) -> str:
    """Why a model cannot be trained in a layout, in a sentence that names its class; "" if it can.

    Args:
        longest: tokens of the longest sequence of the data; 0: not known.
    """
    name = type(below_adapters(model)).__name__
    if layout.goes_in_groups and is_sharded:
        return f"with FSDP the groups of {layout.told} would differ between processes"
    if layout.attention is None:  # an answer a row: right for every causal model
        return ""
    if known := _known_reason(model, layout):
        return known
    uses = attention.uses_branches(model)
    training = {module: module.training for module in model.modules()}
    try:
        with random_numbers_kept():
            model.eval()
            found = _compared(model, layout, longest)
            trains = any(p.requires_grad for p in model.parameters())
            if layout.attention == "cache" and trains and not found:  # some give one in evaluation alone
                model.train()
                found = _compared(model, layout, longest, deterministic=False)
            return found
    except Exception as error:  # a model's code may raise anything on what it was not made for
        lines = str(error).strip().splitlines() or [""]
        return f"{name} does not run {layout.name} rows: {type(error).__name__}: {lines[0]}"
    finally:
        attention.use_branches(model, uses)
        for module, mode in training.items():
            module.training = mode


def _known_reason(model: Any, layout: Layout) -> str:
    """What is refused without running it."""
    base = below_adapters(model)
    name, config = type(base).__name__, attention.text_config(model)
    if layout.attention == "cache":
        if not caches.name_in(parameters_of(model)):
            return f"the forward of {name} takes no cache, so answers cannot go on from a prompt"
        if ropes := sorted(_rope_types(config) & ROPES_BY_LENGTH):
            return (
                f"the rotary embedding of {name} ({', '.join(ropes)}) is another one in a prompt than in what goes on"
            )
        return ""
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES):
        return f"{name} has layers of other kinds than full and sliding attention: {', '.join(others)}"
    if "position_ids" not in parameters_of(model):
        return f"the forward of {name} takes no position_ids, so tokens cannot be told where they stand"
    own = attention.implementation(model)
    ways = [*attention.NAMES] if layout.attention == "branches" else [*attention.NAMES, attention.FLEX]
    if own not in ways:
        return f"the attention of {name} is {own}; rows of several answers run with {', '.join(ways)}"
    if layout.attention == "mask" and layout.gives_mask:
        return f"the load-balancing loss of {name} wants a mask of real tokens, where a mask of trees is given"
    # On the class: a fused model is one of its own class still.
    if layout.attention == "branches" and not getattr(type(base), "_can_set_attn_implementation", lambda: False)():
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if layout.attention == "branches" and own == "eager" and (missing := attention.without_eager(model)):
        return f"{missing} has no eager_attention_forward beside it, for calls that are not of pairs"
    return ""


def _rope_types(config: Any) -> set[str]:
    """All that a config, or the entry of a type of layers, names."""
    found, left = set(), [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found |= {str(one[key]) for key in ("rope_type", "type") if key in one}
            left += one.values()
    return found


def _compared(model: Any, layout: Layout, longest: int, deterministic: bool = True) -> str:
    """deterministic: whether a model surely gives the same twice; one that does not, as with dropout, is only run."""
    inputs = _probe(model, longest)
    parameters: list[nn.Parameter] = []
    size = 0
    for p in sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel()):
        size += p.numel()
        if size <= PARAMETERS or not parameters:
            parameters.append(p)
    more: dict[str, Any] = {"output_router_logits": True} if layout.gives_mask else {}
    found = []
    for one in (replace(PADDED, gives_mask=layout.gives_mask), layout):
        attention.use_branches(model, one.attention == "branches")
        # All in one row, however attention is told.
        batch = PairBatch(inputs, replace(one, attention="branches") if one.attention == "mask" else one)
        with torch.set_grad_enabled(bool(parameters)):
            output = batch.run(model, **more)
            log_probs, aux = output["log_probs"], output.get("aux_loss")
            upstream = torch.linspace(-1, 1, log_probs.numel(), device=log_probs.device).view_as(log_probs)
            total = (log_probs * upstream * batch.mask).sum()
            total = total if aux is None else total + 10 * aux
            grads = torch.autograd.grad(total, parameters, allow_unused=True) if parameters else ()
        shown = log_probs.detach()
        found.append((shown if aux is None else torch.cat([shown.flatten(), aux.detach().reshape(1)]), grads))
    if not deterministic:
        with torch.no_grad():
            again = PairBatch(inputs, PADDED).run(model)["log_probs"]
        if not torch.allclose(again, found[0][0], atol=1e-4):
            return ""
    return _difference(type(model).__name__, layout, narrowest(model), *found)


def _probe(model: Any, longest: int) -> dict[str, Tensor]:
    head: Any = find_head(model)
    return probe_pairs(head.weight.shape[0], _reach(model, longest), max_positions(model.config), head.weight.device)


def _difference(
    name: str, layout: Layout, dtype: torch.dtype, padded: tuple[Tensor, Any], own: tuple[Tensor, Any]
) -> str:
    eps = torch.finfo(dtype).eps
    allowed = max(ROUNDINGS * eps * padded[0].abs().max().clamp_min(1).item(), 1e-3)
    error = (padded[0] - own[0]).abs().max().item()
    why = (
        "what goes on from its cache is not what goes on from the prompt" if layout.attention == "cache"
        else "something in it goes by places in a row, not by positions"
    )  # fmt: skip
    if not error <= allowed:
        return (
            f"{name} gives other log-probs in {layout.name} rows: they differ by {error:.1e}, where rounding explains "
            f"{allowed:.1e}; {why}"
        )
    grads = [(a, b) for a, b in zip(padded[1], own[1], strict=True) if a is not None or b is not None]
    if any(a is None or b is None for a, b in grads):
        return f"{name} trains other parameters in {layout.name} rows"
    largest = max((a.abs().max().item() for a, _ in grads), default=0.0)
    bound = max(8 * ROUNDINGS * eps, 1e-3)
    for a, b in grads:
        error, scale = (a - b).abs().max().item(), a.abs().max().item() + 1e-2 * largest
        if not error <= bound * scale:
            return (
                f"{name} gives other gradients in {layout.name} rows: one differs by {error / scale:.1e} of its "
                f"largest value, where rounding explains {bound:.1e}; {why}"
            )
    return ""


def _reach(model: Any, longest: int) -> int:
    """The largest number of tokens that an attention may be limited to, of those that the data can go beyond."""
    config = attention.text_config(model)
    numbers = [
        value for key, value in vars(config).items()
        if REACH.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool)
    ]  # fmt: skip
    return max((n for n in numbers if not longest or n < longest), default=0)


def probe_pairs(vocab_size: int, reach: int, limit: int | None, device: torch.device) -> dict[str, Tensor]:
    """Two random pairs, such that both prompts with their answers, and the answers of one, go beyond `reach`."""
    most = limit or 2 * reach + 64
    stem = min(max(6, reach // 2), most // 2)
    rest = most - stem
    sizes = ((stem, min(rest, reach - reach // 2 + 9), min(rest, reach + 14)), (min(most - 9, reach + 7), 5, 9))
    draw = torch.Generator().manual_seed(0)
    width = max(prompt + max(answers) for prompt, *answers in sizes)
    inputs = {f"{kind}_{side}": torch.zeros(2, width, dtype=torch.long) for kind in "xy" for side in SIDES}
    masks = {f"mask_{side}": torch.zeros(2, width, dtype=torch.bool) for side in SIDES}
    low = vocab_size // 4
    for row, (prompt, *answers) in enumerate(sizes):
        begin = torch.randint(low, max(low + 2, vocab_size * 3 // 4), (prompt,), generator=draw)
        for side, count in zip(SIDES, answers, strict=True):
            rest_ids = torch.randint(low, max(low + 2, vocab_size * 3 // 4), (count + 1,), generator=draw)
            ids = torch.cat([begin, rest_ids])
            inputs[f"x_{side}"][row, : len(ids) - 1] = ids[:-1]
            masks[f"mask_{side}"][row, prompt - 1 : len(ids) - 1] = True
            inputs[f"y_{side}"][row] = torch.nn.functional.pad(ids[1:], (0, width - len(ids) + 1))
        for side in SIDES:
            inputs[f"y_{side}"][row].masked_fill_(~masks[f"mask_{side}"][row], -100)
    return {name: tensor.to(device) for name, tensor in (inputs | masks).items()}
