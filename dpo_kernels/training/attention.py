"""Attention over rows that hold several answers: what a token may attend to, told to the models of transformers.

Two ways. `branches` is an attention function of transformers' AttentionInterface: it computes an answer over its own
tokens and its prompt's, without a mask of all tokens by all tokens. `mask` gives any model that takes one a mask.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CHUNK = 256  # queries at a time, where a mask is needed
MASK_COSTS = 1.75  # sdpa with a mask on a CPU, relative to its causal path (3,072 tokens of a Llama kind)
# The implementation that a model has -> the name of `branches` in its place; calls without spans go on as before.
NAMES = {"sdpa": "dpo_branches", "eager": "dpo_branches_over_eager"}
FLEX = "flex_attention"  # is given blocks of a mask, and leaves out the empty ones


class Tree(NamedTuple):
    """Tokens of a row: a prompt, then its branches. A token attends to the prompt and to its own branch, up to itself.

    A sequence of its own is a prompt without branches.
    """

    start: int
    prompt: int  # tokens
    branches: tuple[int, ...]  # tokens of each

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.branches)

    def pieces(self) -> Iterator[tuple[range, range]]:
        """Places of queries that are the last ones of their keys, and of keys that lie apart, before the others.

        The first branch lies behind the prompt, as in a sequence of its own; of the others the prompt lies apart.
        """
        stem = range(self.start, self.start + self.prompt)
        end = stem.stop + (self.branches[0] if self.branches else 0)
        if end > stem.start:
            yield range(stem.start, end), range(0)
        for tokens in self.branches[1:]:
            if tokens:
                yield range(end, end + tokens), stem
            end += tokens


@dataclass(frozen=True)
class Spans:
    """Where the trees of each row lie, in the order of the row; what is behind the last is padding."""

    rows: tuple[tuple[Tree, ...], ...]
    length: int  # of every row


def branches(
    module: nn.Module,
    query: Tensor,  # (R, H, L, E)
    key: Tensor,  # (R, H', L, E)
    value: Tensor,  # (R, H', L, E')
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,)
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within the trees of `spans`; (R, L, H, E'). What is no `Spans` brings an attention of its own.

    Raises:
        ValueError: the model wants something of its attention that is not known here.
    """
    unknown = {"position_bias": others.get("position_bias"), "a mask of its own": attention_mask}
    if found := [name for name, given in unknown.items() if given is not None]:
        raise ValueError(f"{type(module).__name__} gives its attention {' and '.join(found)}")
    assert spans is not None
    told = Attention(scaling, dropout, sliding_window, softcap, s_aux)
    if not isinstance(spans, Spans):
        return spans.attend(query, key, value, told), None
    if told.is_one_call(query, value) and (varlen := one_call()) is not None:
        return _in_one_call(query, key, value, spans, told, varlen), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    each = zip(query.split(1), key.split(1), value.split(1), spans.rows, strict=True)
    rows = [_row(q, k, v, trees, told) for q, k, v, trees in each]
    return (torch.cat(rows) if len(rows) > 1 else rows[0]), None


def _row(query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...], told: Attention) -> Tensor:
    """Of one row; (1, L, H, E')."""
    pieces = [piece for tree in trees for piece in tree.pieces()]
    end = max((own.stop for own, _ in pieces), default=0)
    places = [place for piece in pieces for place in piece if place]
    places += [range(end, query.shape[2])] if end < query.shape[2] else []  # padding
    cut = zip(*(_Cut.apply(t, places) for t in (query, key, value)), strict=True)
    made = []
    for own, apart in pieces:
        q, k, v = next(cut)
        if apart:
            before, *of = next(cut)
            k, v = (torch.cat(both, 2) for both in zip(of, (k, v), strict=True))
            if told.is_plain(k) and not q.is_cuda and len(apart) + len(own) <= 2 * MASK_COSTS * len(own):
                q = torch.cat([before, q], 2)  # cheaper than a mask: the causal path, once more
        made.append(told(q, k, v)[:, :, -len(own) :].transpose(1, 2))
    made += [v.transpose(1, 2) for *_, v in cut]
    return torch.cat(made, 1)


class _Cut(torch.autograd.Function):
    """Pieces of a row, which may overlap, as views. Backward adds their gradients up in one tensor: a slice's own would
    make one as long as the row for each piece."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, places: list[range]) -> tuple[Tensor, ...]:  # (1, H, L, E)
        ctx.places, ctx.length = places, row.shape[2]
        ctx.set_materialize_grads(False)
        return tuple(row[:, :, place.start : place.stop] for place in places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        found = [(place, grad) for place, grad in zip(ctx.places, grads, strict=True) if grad is not None]
        if not found:
            return None, None
        _, heads, _, features = found[0][1].shape
        total = found[0][1].new_zeros(1, ctx.length, heads, features).transpose(1, 2)  # as attention has them
        for place, grad in found:
            total[:, :, place.start : place.stop] += grad
        return total, None


class Pieces(NamedTuple):
    """Sequences of queries, each with the keys that it ends with: every query once, a prompt's keys once a branch."""

    queries: Tensor  # int64, places in the rows, one row behind the other
    keys: Tensor  # int64
    ends: tuple[Tensor, Tensor]  # int32, where the pieces of queries and of keys begin and end
    longest: tuple[int, int]


@functools.lru_cache(maxsize=4)  # the layers of a step ask for the same
def _pieces(spans: Spans, device: torch.device) -> Pieces:
    kept = [
        (_moved(own, r * spans.length), [_moved(place, r * spans.length) for place in (apart, own)])
        for r, trees in enumerate(spans.rows)
        for tree in trees
        for own, apart in tree.pieces()
    ]
    counts = [[len(q) for q, _ in kept], [len(apart) + len(own) for _, (apart, own) in kept]]
    ends = tuple(torch.tensor([0, *c], device=device).cumsum(0).int() for c in counts)
    places = ([i for q, _ in kept for i in q], [i for _, parts in kept for part in parts for i in part])
    at, of = (torch.tensor(found, device=device) for found in places)
    return Pieces(at, of, (ends[0], ends[1]), (max(counts[0]), max(counts[1])))


def _moved(place: range, by: int) -> range:
    return range(place.start + by, place.stop + by)


def _in_one_call(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, told: Attention, varlen: Callable[..., Any]
) -> Tensor:
    """`branches` as one call of sequences of any length; 0 where padding is."""
    pieces = _pieces(spans, query.device)
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # (R L, H, E)
    made = varlen(
        rows[0][pieces.queries], rows[1][pieces.keys], rows[2][pieces.keys], *pieces.ends, *pieces.longest,
        scale=told.scaling, window_size=(-1 if told.window is None else told.window - 1, 0), enable_gqa=True,
    )  # fmt: skip
    out = made.new_zeros(len(rows[0]), *made.shape[1:]).index_copy(0, pieces.queries, made)
    return out.view(query.shape[0], query.shape[2], *made.shape[1:])


@functools.cache
def one_call() -> Callable[..., Any] | None:
    """PyTorch's attention over sequences of any length, where it knows windows and grouped keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys() >= {"window_size", "enable_gqa", "scale"}
    return varlen_attn if known else None


@dataclass(frozen=True)
class Attention:
    """Of queries that are the last ones of the keys: causal, lower right. The options as transformers gives them."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def is_one_call(self, query: Tensor, value: Tensor) -> bool:
        """Whether a GPU's attention over sequences of any length computes it."""
        plain = self.softcap is None and self.sinks is None and not self.dropout
        fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
        return plain and fits and query.shape[3] == value.shape[3] <= 256

    def is_plain(self, key: Tensor) -> bool:
        """Whether nothing but causality is asked for."""
        return self.softcap is None and self.sinks is None and not self._is_cut(key)

    def _is_cut(self, key: Tensor) -> bool:
        return self.window is not None and self.window < key.shape[2]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own, keys = query.shape[2], key.shape[2]
        if self.is_plain(key) and (own == keys or query.is_cuda):
            bias = None if own == keys else causal_lower_right(own, keys)
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, dropout_p=self.dropout, is_causal=bias is None, scale=self.scaling
            )
        size, made = max(CHUNK, self.window or 0), []
        for begin in range(0, own, size):
            end = min(own, begin + size)
            first = max(0, keys - own + begin - self.window + 1) if self.window is not None else 0
            last = keys - own + end
            at = torch.arange(last - (end - begin), last, device=query.device)[:, None]
            of = torch.arange(first, last, device=query.device)
            seen = of <= at
            if self.window is not None:
                seen = seen & (of > at - self.window)
            made.append(self._masked(query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], seen))
        return torch.cat(made, 2)

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        if self.softcap is None and self.sinks is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, dropout_p=self.dropout, scale=self.scaling
            )
        scaling = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = (query @ key.transpose(2, 3) * scaling).float()
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], 3)
        weights = scores.softmax(3)[..., : key.shape[2]].to(value.dtype)
        return F.dropout(weights, self.dropout, self.dropout > 0) @ value


def _over_sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    run = branches if _has_spans(module, kwargs) else ALL_ATTENTION_FUNCTIONS["sdpa"]
    return run(module, *args, **kwargs)


def _over_eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    if _has_spans(module, kwargs):
        return branches(module, *args, **kwargs)
    own: Any = sys.modules[type(module).__module__]
    return own.eager_attention_forward(module, *args, **kwargs)


def _has_spans(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    if (spans := kwargs.get("spans")) is None and getattr(_now, "spans", False):
        # As where a layer is checkpointed in a way that drops its arguments.
        raise ValueError(f"{type(module).__name__} was not told where answers lie in a row: the model keeps it back")
    return spans is not None


_now = threading.local()


@contextmanager
def without_masks() -> Iterator[None]:
    """No mask is made in a forward whose attention has spans. (Masks are made before the layers, never in backward.)"""
    before, _now.spans = getattr(_now, "spans", False), True
    try:
        yield
    finally:
        _now.spans = before


@contextmanager
def rows_are_sequences() -> Iterator[None]:
    """Rows hold one sequence each, and transformers need not ask their numbers: without numbers it cannot. A mask
    is made where a window cuts."""
    before, _now.rows = getattr(_now, "rows", False), True
    try:
        yield
    finally:
        _now.rows = before


def _mask_over_sdpa(*args: Any, **kwargs: Any) -> Any:
    if getattr(_now, "rows", False):
        window, keys = kwargs.get("local_size"), kwargs.get("kv_length")
        if window is None or keys is None or keys <= window:
            return None
    return None if getattr(_now, "spans", False) else sdpa_mask(*args, **kwargs)


def _mask_over_eager(*args: Any, **kwargs: Any) -> Any:
    return None if getattr(_now, "spans", False) else eager_mask(*args, **kwargs)


for _kind, _function, _mask in (("sdpa", _over_sdpa, _mask_over_sdpa), ("eager", _over_eager, _mask_over_eager)):
    ALL_ATTENTION_FUNCTIONS.register(NAMES[_kind], _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES[_kind], _mask)


def implementation(model: Any) -> str | None:
    """The attention of a model as it was before `use_branches`."""
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return next((plain for plain, name in NAMES.items() if name == own), own)


def use_branches(model: nn.Module, on: bool) -> None:
    """Puts `branches` in the place of a model's attention, or takes it out; calls without spans stay what they are."""
    names = NAMES if on else {name: plain for plain, name in NAMES.items()}
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        if (own := getattr(config, "_attn_implementation", None)) in names:
            config._attn_implementation_internal = names[own]


def uses_branches(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) in NAMES.values()


def without_eager(model: nn.Module) -> str:
    """The name of an attention class whose module has no `eager_attention_forward`; "" if all have."""
    classes = {type(module) for module in model.modules() if "Attention" in type(module).__name__}
    found = (c.__name__ for c in classes if not hasattr(sys.modules.get(c.__module__), "eager_attention_forward"))
    return min(found, default="")


def text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def masks(model: Any, spans: Spans, position_ids: Tensor) -> Any:
    """What `attention_mask` has to be so that a model attends within trees: (R, 1, L, L), or such by attention type."""
    device, config = position_ids.device, text_config(model)
    tree, branch = (torch.tensor(_numbers(spans, kind), device=device) for kind in ("tree", "branch"))  # (R, L)
    place = torch.arange(spans.length, device=device)
    same = (branch[:, None] == branch[:, :, None]) | (branch[:, None] == 0)
    seen = (tree[:, None] == tree[:, :, None]) & same & (place <= place[:, None])
    seen &= (tree[:, None] >= 0) | (place == place[:, None])  # padding sees itself: no row without a key
    types, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (position_ids[:, :, None] - position_ids[:, None] < window)

    def given(allowed: Tensor) -> Any:
        if implementation(model) == FLEX:
            return create_block_mask(
                lambda r, h, q, k: allowed[r, q, k], len(allowed), None, spans.length, spans.length, device=device
            )
        allowed = allowed[:, None]
        if implementation(model) != "eager":
            return allowed
        dtype = next(model.parameters()).dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)

    if "sliding_attention" in types:
        return {"full_attention": given(seen), "sliding_attention": given(near)}
    return given(seen if types else near)


def _numbers(spans: Spans, kind: str) -> list[list[int]]:
    """Of every token its tree's number, or its branch's, 0 for the prompt; -1 for padding."""
    found = []
    for trees in spans.rows:
        row: list[int] = []
        for number, tree in enumerate(trees):
            if kind == "tree":
                row += [number] * tree.tokens
            else:
                row += [0] * tree.prompt
                for i, tokens in enumerate(tree.branches):
                    row += [i + 1] * tokens
        found.append(row + [-1] * (spans.length - len(row)))
    return found
