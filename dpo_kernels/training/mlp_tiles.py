"""The MLPs of a decoder over slices of the tokens, so that their wide intermediates exist for one slice at a time.

A decoder's MLP sees each token alone, so that it may see them one part after the other (tiled MLPs: ALST, Bekman et al.
2025, arXiv:2506.13996). With T tokens, hidden size D, gate and up of width W (SwiGLU), slices of s tokens and p trained
numbers in an MLP, it holds beside its input and its weights, in numbers of its dtype (as PyTorch's profiler counts):

    forward    T D (the result) + 3 s W                             in place of T D + 4 T W, all kept until backward
    backward   2 T D (gradients of result and input) + 6 s W + p    in place of 2 T D + 6 T W + p

Slices are written into one result, and their gradients into one gradient: nothing is joined by a copy. The price is
that each slice is computed once more in backward; twice more in a layer that gradient checkpointing computes again.

A weight's gradient is the sum of its slices' gradients, each rounded to the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dpo_kernels.training.head_check import ROUNDINGS, probe_ids, random_numbers_kept
from dpo_kernels.training.output_head import accepted, below_adapters, find_head, own_forward

Tiles = int | Literal["auto"]
LEAST = 256  # tokens of a slice that "auto" makes: fewer keep no device busy
KEPT = 3  # numbers that an MLP makes of a token, in widths, as "auto" counts them
KINDS = 4  # classes that the layers of one decoder may have
PROBED = (2, 8)  # rows and tokens that the check runs, in slices of:
SLICE = 5


class TilingError(ValueError):
    """A model has no MLP that can be run in slices; says which class, and why."""


@dataclass(frozen=True)
class Found:
    """Which modules of a model can run in slices: plain values, which processes can send to each other.

    widths: module's name -> numbers of the widest layer in it, for each token.
    classes: of these modules.
    left: class -> why it is left alone, of what else looks like an MLP.
    """

    widths: dict[str, int]
    classes: tuple[str, ...]
    left: dict[str, str]


@dataclass(frozen=True)
class Tiled:
    """A model's MLPs that run in slices.

    modules: those that do. told: in a sentence, what runs how, and what is left alone.
    """

    modules: tuple[nn.Module, ...]
    told: str

    def undo(self) -> None:
        """Gives the MLPs the forward back that they had."""
        for module in self.modules:
            _restore(module)


def tile_mlps(model: nn.Module, tiles: Tiles, found: Found | None = None) -> Tiled:
    """Makes the MLPs of a decoder run over slices of the tokens.

    Each gets a forward of its own, as an attribute of the instance: class, parameters and names of a state dict stay,
    and so do adapters inside it. Results are those of the whole MLP to rounding; two models tiled alike give the same
    bits, with gradient and without. A second call takes the place of the first.

    Args:
        model: an `AutoModelForCausalLM`, with adapters or fused or neither; not yet wrapped (DDP, FSDP).
        tiles: how many slices, >= 1, of whatever number of tokens; or "auto": slices whose intermediates (`KEPT` times
            their width) are no more numbers than the MLP's input (T, D), and at least `LEAST` tokens.
        found: what `find_mlps` gave for this model, or for its twin on another process.

    Raises:
        TilingError: nothing in the model can be run in slices.
        ValueError: tiles is out of range.
    """
    check_tiles(tiles)
    found = find_mlps(model) if found is None else found
    modules = tuple(model.get_submodule(name) for name in found.widths)
    for module, width in zip(modules, found.widths.values(), strict=True):
        _restore(module)
        vars(module)["forward"] = TiledForward(module, tiles, width, vars(module).get("forward"))
    return Tiled(modules, _told(found, tiles))


def check_tiles(tiles: Any) -> Tiles:
    """What `tile_mlps` takes, of that or of its text.

    Raises:
        ValueError: it is neither "auto" nor a whole number of at least 1.
    """
    if tiles == "auto":
        return "auto"
    if not str(tiles).isascii() or not str(tiles).isdigit() or int(tiles) < 1:
        raise ValueError(f"mlp_tiles is {tiles!r}; expected auto, or a whole number of slices, at least 1")
    return int(tiles)


def slice_size(tokens: int, hidden_size: int, width: int, tiles: Tiles) -> int:
    """Tokens of a slice; the last one of an MLP may have fewer."""
    if tiles == "auto":
        return max(LEAST, tokens * hidden_size // (KEPT * width))
    return max(1, -(-tokens // tiles))


class TiledForward:
    """A module's forward that goes over slices of its one argument (..., D)."""

    def __init__(self, module: nn.Module, tiles: Tiles, width: int, replaced: Any = None) -> None:
        self.module, self.tiles, self.width = module, tiles, width
        self.replaced = replaced  # a forward that the instance had before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = own_forward(self.module, self.replaced)
        x = _only_tensor(args, kwargs)
        if x is None or x.ndim < 2:  # a call of another form
            return own(*args, **kwargs)
        tokens = x.numel() // max(1, x.shape[-1])
        size = slice_size(tokens, x.shape[-1], self.width, self.tiles)
        if size >= tokens:
            return own(*args, **kwargs)
        # What computes a slice again lives until backward: it must not hold x, which args and kwargs do.
        name = None if args else next(iter(kwargs))
        del args, kwargs
        return in_slices(lambda piece: own(piece) if name is None else own(**{name: piece}), x, size)


def in_slices(compute: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """`compute` over slices of so many tokens, each computed again in backward.

    Args:
        compute: (..., t, D) -> (..., t, D), of each token alone; is given one row of t tokens.
        x: (..., D), at least one token.
        size: tokens of a slice, >= 1; the last one may have fewer.

    Returns: (..., D), of the dtype that compute gives.
    """
    rows = x.reshape(-1, x.shape[-1])  # (T, D)
    one_row = (1,) * (x.ndim - 2)
    out: Any = None
    for start in range(0, len(rows), size):
        if torch.is_grad_enabled():
            rows, piece = _Read.apply(rows, start, size)
            made = checkpoint(compute, piece.view(*one_row, *piece.shape), use_reentrant=False)
        else:
            made = compute(rows[start : start + size].view(*one_row, -1, rows.shape[-1]))
        made = made.reshape(-1, made.shape[-1])
        out = made.new_empty(len(rows), made.shape[-1]) if out is None else out
        if torch.is_grad_enabled():
            out = _Write.apply(out, made, start)
        else:
            out[start : start + size] = made
        del made  # before the next slice is computed
    return out.view(*x.shape[:-1], -1)


class _Read(torch.autograd.Function):
    """(rows, a slice of them), both views; in backward the slices' gradients are written into one tensor, which goes
    from the last slice to the first."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.own = rows.shape, slice(start, min(start + size, len(rows)))
        return rows.view_as(rows), rows[ctx.own]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor | None, grad_piece: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_rows is None and grad_piece is not None:
            grad_rows = grad_piece.new_empty(ctx.shape)
            grad_rows[ctx.own.stop :] = 0  # slices behind that have no gradient
        if grad_rows is not None:
            grad_rows[ctx.own] = 0 if grad_piece is None else grad_piece
        return grad_rows, None, None


class _Write(torch.autograd.Function):
    """Writes a slice into the result, in place; in backward the slice's gradient is a view of the result's."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, made: Tensor, start: int) -> Tensor:
        ctx.mark_dirty(out)
        ctx.start, ctx.stop = start, start + len(made)
        out[ctx.start : ctx.stop] = made
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad[ctx.start : ctx.stop], None


def find_mlps(model: nn.Module) -> Found:
    """The direct children of a decoder's layers that can run in slices.

    The layers are the `nn.ModuleList` with the most parameters of those that run on a few tokens. A child can if it is
    given one tensor (..., D) and nothing else, gives one of the same shape, is wider inside, and gives the same for
    slices of the tokens as for all of them, to rounding. What keeps something of its tokens (a router's logits for a
    load-balancing loss) is left alone. Mode, random numbers and weights are left as they were.

    Raises:
        TilingError: nothing can.
    """
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), random_numbers_kept(), _plain(model):
            model.eval()
            return _find(model)
    finally:
        for module, mode in training.items():
            module.training = mode


def _find(model: Any) -> Found:
    names = {id(module): name for name, module in model.named_modules()}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and 0 < len({type(one) for one in m}) <= KINDS]
    calls = _calls(model, [child for layers in lists for layer in layers for child in layer.children()])
    ran = [layers for layers in lists if any(child in calls for layer in layers for child in layer.children())]
    layers = max(ran, key=lambda m: sum(p.numel() for p in m.parameters()), default=nn.ModuleList())
    recorded = _recorded(below_adapters(model))
    widths: dict[str, int] = {}
    classes: dict[str, None] = {}
    left: dict[str, str] = {}
    others: dict[str, str] = {}  # what nobody takes for an MLP, should there be none at all
    for child in dict.fromkeys(child for layer in layers for child in layer.children() if child in calls):
        kind, call = type(child).__name__, calls[child]
        if len({id(p) for p in child.parameters() if p.ndim > 1}) < 2:
            others[kind] = "has less than two matrices"
        elif call is None:
            others[kind] = "is given more than one tensor"
        elif isinstance(judged := _width(child, call, recorded), int):
            widths[names[id(child)]] = judged
            classes[kind] = None
        else:
            left[kind] = judged
    if not widths:
        why = "; ".join(f"{kind} {reason}" for kind, reason in (left or others).items())
        raise TilingError(
            f"mlp_tiles: no MLP of {type(below_adapters(model)).__name__} can be run over slices of the tokens"
            f"{': ' if why else ''}{why}; leave it out, --gradient_checkpointing true holds less of any layer"
        )
    return Found(widths, tuple(classes), left)


Call = tuple[list[Any], dict[str, Any]]


def _calls(model: Any, children: list[nn.Module]) -> dict[nn.Module, Call | None]:
    """What each child is called with on a few tokens, where it runs; None: not one tensor alone."""
    found: dict[nn.Module, Call | None] = {}

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_one = _only_tensor(args, kwargs) is not None
        found[child] = ([a.clone() for a in args], {name: a.clone() for name, a in kwargs.items()}) if is_one else None

    hooks = [child.register_forward_pre_hook(note, with_kwargs=True) for child in dict.fromkeys(children)]
    try:
        weight: Any = find_head(model).weight
        rows, tokens = PROBED
        ids = probe_ids(weight.shape[0], weight.device, rows * tokens).view(rows, tokens)
        model(input_ids=ids, **accepted(model, {"use_cache": False}))
    except Exception as error:  # a model's code may raise anything on what it was not made for
        name = type(below_adapters(model)).__name__
        raise TilingError(
            f"mlp_tiles: {name} does not run on tokens alone: {type(error).__name__}: {error}; leave it out"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _width(child: nn.Module, call: Call, recorded: tuple[type, ...]) -> int | str:
    """Numbers of the widest layer in a child, for each token; or why it is left alone."""
    args, kwargs = call
    x: Any = _only_tensor(args, kwargs)
    if any(isinstance(module, recorded) for module in child.modules()):
        return "holds what the model records, such as a router's logits"
    tokens, widths = x[..., 0].numel(), [0]

    def measure(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            widths.append(output.numel() // tokens)

    def run(piece: Tensor) -> Any:
        return child(piece) if args else child(**dict.fromkeys(kwargs, piece))

    hooks = [module.register_forward_hook(measure) for module in child.modules()]
    before, given = _state(child), x.clone()
    try:
        whole = run(x)
        child.train()
        run(x)
        child.eval()
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(whole, Tensor):
        return f"gives a {type(whole).__name__}, not one tensor"
    if whole.shape != x.shape:
        return f"makes {tuple(whole.shape)} of {tuple(x.shape)}"
    has_numbers = not isinstance(x, FakeTensor)  # without them sizes decide
    if has_numbers and not torch.equal(x, given):
        return "changes its input in place"
    if has_numbers and not _is_as_before(_state(child), before):
        return "keeps something of the tokens that it has seen"
    width = max(widths + [max(p.shape) for p in child.parameters() if p.ndim == 2 and p.is_floating_point()])
    if width <= x.shape[-1]:
        return f"is {width} wide inside, and its input is {x.shape[-1]} wide"
    try:
        sliced = in_slices(run, x, SLICE)
    except Exception as error:  # a model's code may raise anything on what it was not made for
        return f"does not run on slices: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not has_numbers:
        return width
    allowed = max(ROUNDINGS * torch.finfo(whole.dtype).eps, 1e-3) * whole.abs().max().item()
    differs = (sliced - whole).abs().max().item() if sliced.shape == whole.shape else float("inf")
    if not differs <= allowed:
        return f"does not see each token alone: in slices it differs by {differs:.1e}, rounding explains {allowed:.1e}"
    return width


State = list[tuple[Any, int]]


def _state(child: nn.Module) -> State:
    """What modules hold, and how often each tensor of it was written."""
    held = [value for m in child.modules() for name, value in sorted(vars(m).items()) if name != "training"]
    tensors = (*child.parameters(), *child.buffers())
    return [*((value, 0) for value in held), *((t, t._version) for t in tensors)]


def _is_as_before(now: State, before: State) -> bool:
    return len(now) == len(before) and all(
        a is b and version == was for (a, version), (b, was) in zip(now, before, strict=True)
    )


def _recorded(model: Any) -> tuple[type, ...]:
    """Classes whose outputs a model of transformers records while it runs."""
    found = set()
    for part in model.modules():
        for wanted in (getattr(part, "_can_record_outputs", None) or {}).values():
            for one in wanted if isinstance(wanted, list | tuple) else [wanted]:
                kind = getattr(one, "target_class", one)
                found |= {kind} if isinstance(kind, type) else set()
    return tuple(found)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The model as it is without slices, while it is looked at."""
    tiled = {m: vars(m)["forward"] for m in model.modules() if isinstance(vars(m).get("forward"), TiledForward)}
    try:
        for module in tiled:
            _restore(module)
        yield
    finally:
        for module, forward in tiled.items():
            vars(module)["forward"] = forward


def _restore(module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, TiledForward):
        del vars(module)["forward"]
        if forward.replaced is not None:
            vars(module)["forward"] = forward.replaced


def _only_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a call is of, where it has no other argument."""
    given = (*args, *kwargs.values())
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def _told(found: Found, tiles: Tiles) -> str:
    how = f"slices of at least {LEAST} tokens" if tiles == "auto" else f"{tiles} slices of the tokens"
    left = "".join(f"; {kind} is left alone: it {reason}" for kind, reason in found.left.items())
    return f"MLPs: {len(found.widths)} {' and '.join(found.classes)} run over {how}{left}"
