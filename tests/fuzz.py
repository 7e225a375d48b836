"""Random calls against float64: shapes, layouts, options at the ends of their ranges, special values, hooks.

    python tests/fuzz.py [--impl cpp] [--calls 1000] [--seed 0] [--only NUMBER]

A call is drawn from its number alone, so that a failure can be had again by `--only`. Bounds are derived, not tuned:
how far a float32 product of D terms can be off, carried through the softmax, and the rounding of what is written.
A failure is shrunk to the smallest call that still fails, and printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dpo_kernels
from dpo_kernels import hidden_to_log_probs, logits_to_log_probs, reference, token_stats
from dpo_kernels.overrides import override

EPS = torch.finfo(torch.float32).eps
LARGEST = torch.finfo(torch.float32).max
LAYOUTS = ("contiguous", "strided", "transposed", "offset", "expanded")
SPECIALS = ("none", "banned", "far", "lowest label", "nan row", "inf row", "huge row")
HOOKS = ("none", "strided", "moved")


@dataclass(frozen=True)
class CallSpec:
    """One call; everything random in it follows from `seed`."""

    seed: int = 0
    level: str = "hidden"  # "hidden", "stats" or "logits"
    shape: tuple[int, ...] = (3,)
    features: int = 4
    vocab: int = 5
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # of hidden states or logits
    weight_layout: str = "contiguous"
    bias: str = "none"  # or a layout
    special: str = "none"
    magnitude: float = 1.0  # about the largest logit
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignored: float = 0.0
    ignore_index: int | None = -100
    outputs: tuple[str, ...] = ()
    grads: tuple[str, ...] = ("hidden", "weight")
    budget: float | None = None  # None: the default; else from 0, the least that works, to 1, all that is of use
    upstream: str = "random"  # or "expanded", "strided", "zero"
    autocast: bool = False
    hooks: str = "none"
    inplace: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "logit_scale": self.logit_scale, "softcap": self.softcap}


def draw(number: int, sizes: tuple[int, int, int]) -> CallSpec:
    """The call of this number; sizes: the most tokens, features and vocabulary."""
    r = random.Random(number)

    def size(most: int) -> int:
        return max(1, round(most ** r.random()) if r.random() < 0.7 else r.randint(1, most))

    tokens = size(sizes[0])
    shape = r.choice([(tokens,), (tokens,), (1, tokens), (2, max(1, tokens // 2))])
    level = r.choice(["hidden", "hidden", "stats", "logits"])
    chosen = r.choice(
        [(), ("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "weight"), ("hidden", "weight", "bias")]
    )
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    return CallSpec(
        seed=number,
        level=level,
        shape=shape,
        features=size(sizes[1]),
        vocab=size(sizes[2]),
        dtype=r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        layout=r.choice(LAYOUTS[:4] if r.random() < 0.5 else LAYOUTS[:1]),
        weight_layout=r.choice(LAYOUTS[:4] if r.random() < 0.3 else LAYOUTS[:1]),
        bias=r.choice(["none", "none", "contiguous", "strided", "expanded"]),
        special=r.choice(SPECIALS) if r.random() < 0.3 else "none",
        magnitude=r.choice([0.1, 1.0, 10.0, 10.0, 60.0, 1e3, 1e5]),
        temperature=r.choice([1.0, 1.0, 0.5, 2.0, 1e-2, 1e2]),
        logit_scale=r.choice([1.0, 1.0, 0.25, -1.0, 0.0, 3.0]),
        softcap=r.choice([None, None, None, 30.0, 1.0, 0.01, 1e4]),
        ignored=r.choice([0.0, 0.0, 0.3, 0.9, 1.0]),
        ignore_index=r.choice([-100, -100, -1, 0, None]),
        outputs=tuple(n for n in names if r.random() < 0.5) if level == "stats" else (),
        grads=chosen,
        budget=r.choice([None, None, 0.0, r.random(), 1.0]),
        upstream=r.choice(["random", "random", "expanded", "strided", "zero"]),
        autocast=level != "logits" and r.random() < 0.1,
        hooks=r.choice(HOOKS) if r.random() < 0.2 else "none",
        inplace=level == "logits" and r.random() < 0.4,
    )


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory."""
    if layout == "strided":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1]), torch.nan, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "transposed" and values.ndim > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        flat = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(values.shape)
    if layout == "expanded":
        return values.reshape(-1)[:1].expand(values.shape)
    return values.contiguous()


@dataclass
class Inputs:
    rows: Tensor  # hidden states (..., D) or logits (..., V)
    weight: Tensor | None
    bias: Tensor | None
    labels: Tensor
    upstream: dict[str, Tensor]


def make_inputs(spec: CallSpec) -> Inputs:
    g = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(spec.vocab, spec.shape, generator=g)
    if spec.ignore_index is not None:
        # A stand-in that may be a token too: then it counts nowhere.
        labels[torch.rand(spec.shape, generator=g) < spec.ignored] = spec.ignore_index
    scale = spec.magnitude * abs(spec.temperature / (spec.logit_scale or 1.0)) / 3
    scale = min(scale, 3e3 if spec.dtype == torch.float16 else 1e30)
    weight = bias = None
    if spec.level == "logits":
        rows = randn(*spec.shape, spec.vocab) * scale
    else:
        rows = randn(*spec.shape, spec.features) * scale**0.5
        weight = lay_out(
            (randn(spec.vocab, spec.features) * scale**0.5 / spec.features**0.5).to(spec.dtype), spec.weight_layout
        )
        if spec.bias != "none":
            bias = (randn(spec.vocab) * scale / 3).to(spec.dtype)
    flat = rows.view(-1, rows.shape[-1])
    if spec.special == "nan row":
        flat[0] = torch.nan
    elif spec.special == "inf row":
        flat[0, 0] = torch.inf
    elif spec.special == "huge row":
        flat[0] *= 1e4
    elif spec.special == "banned" and spec.level == "logits":
        flat[torch.rand(flat.shape, generator=g) < 0.3] = -torch.inf
    elif spec.special == "far":
        flat[0] += 1e5 if spec.dtype == torch.float32 else 0.0
    elif spec.special == "lowest label" and spec.level == "logits" and spec.dtype == torch.float32:
        flat[0, int(labels.view(-1)[0].clamp(0, spec.vocab - 1))] = -LARGEST
    if bias is not None:
        if spec.special == "banned":
            bias[torch.rand(spec.vocab, generator=g) < 0.3] = -torch.inf
        bias = lay_out(bias, spec.bias)
    upstream = {}
    for name in ("log_probs", "entropy"):
        values = torch.randn(spec.shape, generator=g)
        if spec.upstream == "zero":
            values = torch.zeros(spec.shape)
        elif spec.upstream in ("expanded", "strided"):
            values = lay_out(values, spec.upstream)
        upstream[name] = values
    return Inputs(lay_out(rows.to(spec.dtype), spec.layout), weight, bias, labels, upstream)


@dataclass
class Result:
    values: dict[str, Tensor]
    grads: dict[str, Tensor]


def wanted(spec: CallSpec, inputs: Inputs) -> tuple[str, ...]:
    if spec.level == "logits":
        return ("hidden",) if spec.grads else ()
    return tuple(n for n in spec.grads if n != "bias" or inputs.bias is not None)


def budget_of(spec: CallSpec, inputs: Inputs, impl: str) -> int | None:
    if spec.budget is None or spec.level == "logits":
        return None
    assert inputs.weight is not None
    counted = inputs.labels.numel() if spec.ignore_index is None else int((inputs.labels != spec.ignore_index).sum())

    def of(budget: int) -> int:
        return dpo_kernels.plan(
            counted, spec.features, spec.vocab, spec.dtype, grads=wanted(spec, inputs), outputs=spec.outputs,
            softcap=spec.softcap, compute_dtype=torch.bfloat16 if spec.autocast else None, memory_budget=budget,
            impl=impl, labels=inputs.labels.numel(),
        ).bytes  # fmt: skip

    most = of(2**50)
    try:
        of(1)
        least = 1
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(" ")[0].replace(",", ""))
    return max(least, round(least + spec.budget * (most - least)))


@contextlib.contextmanager
def hooked(kind: str) -> Iterator[None]:
    def unpack(saved: Tensor) -> Tensor:
        if kind == "moved" or saved.ndim == 0:
            return saved.clone(memory_format=torch.contiguous_format)
        wide = torch.stack([saved, saved], -1)
        return wide[..., 0]

    if kind == "none":
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            yield


def run(spec: CallSpec, inputs: Inputs, impl: str) -> Result:
    leaves = {"hidden": inputs.rows, "weight": inputs.weight, "bias": inputs.bias}
    names = wanted(spec, inputs)
    leaves = {k: None if t is None else t.detach().requires_grad_(k in names) for k, t in leaves.items()}
    options: dict[str, Any] = {**spec.options, "ignore_index": spec.ignore_index, "impl": impl}
    cast = torch.autocast("cpu", torch.bfloat16) if spec.autocast else contextlib.nullcontext()
    with hooked(spec.hooks), cast:
        if spec.level == "logits":
            rows = leaves["hidden"]
            given = rows * 1 if spec.inplace and rows.requires_grad else rows
            values = {"log_probs": logits_to_log_probs(given, inputs.labels, inplace_backward=spec.inplace, **options)}
        else:
            arguments = (leaves["hidden"], leaves["weight"], inputs.labels, leaves["bias"])
            options["memory_budget"] = budget_of(spec, inputs, impl)
            if spec.level == "stats":
                made = token_stats(*arguments, outputs=spec.outputs, **options)
                values = {k: v for k, v in made._asdict().items() if v is not None}
            else:
                values = {"log_probs": hidden_to_log_probs(*arguments, **options)}
    return Result(values, gradients(values, inputs, [leaves[n] for n in names], names))


def gradients(
    values: dict[str, Tensor], inputs: Inputs, leaves: list[Any], names: tuple[str, ...]
) -> dict[str, Tensor]:
    outs = [n for n in ("log_probs", "entropy") if n in values and values[n].requires_grad]
    if not leaves or not outs:
        return {}
    upstream = [inputs.upstream[n].to(values[n].dtype) for n in outs]
    found = torch.autograd.grad([values[n] for n in outs], leaves, upstream)
    return dict(zip(names, found, strict=True))


@dataclass
class Truth:
    """float64, with bounds of the same shapes."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    value_bounds: dict[str, Tensor]
    grad_bounds: dict[str, Tensor]
    undefined: bool  # gradients: a row is NaN, or a logit is beyond float32


def exact(spec: CallSpec, inputs: Inputs) -> Truth:
    """What is right, and how far a float32 computation may be off.

    A product of D terms is off by at most about eps * (8 + D / 8) of the sum of its terms' sizes (blocked sums of 8
    lanes and more); a logit besides by a few eps of itself. A log-prob is off by twice the largest error of a logit
    that counts, a probability by that share of itself. dz is rounded to the compute dtype, a gradient to its own.
    """
    compute = torch.bfloat16 if spec.autocast else spec.dtype
    wide = {"hidden": inputs.rows.to(compute).double().requires_grad_()}
    if inputs.weight is not None:
        wide["weight"] = inputs.weight.to(compute).double().requires_grad_()
    if inputs.bias is not None:
        wide["bias"] = inputs.bias.to(compute).double().requires_grad_()
    labels = inputs.labels
    stats = reference._stats_of
    if spec.level == "logits":
        a, size = wide["hidden"], wide["hidden"].detach().abs()
        error = torch.zeros_like(size)
    else:
        a = reference.logits(wide["hidden"], wide["weight"], wide.get("bias"))
        size = wide["hidden"].detach().abs() @ wide["weight"].detach().abs().T
        error = EPS * (8 + spec.features / 8) * size
        if "bias" in wide:
            bias = torch.where(wide["bias"].isinf(), 0, wide["bias"]).detach().abs()
            size = size + bias
            error = error + EPS * size
    t = spec
    u = t.logit_scale * a
    z = (u if t.softcap is None else t.softcap * torch.tanh(u / t.softcap)) / t.temperature
    beyond = (z.detach().abs() > LARGEST) & z.detach().isfinite()
    z = torch.where(beyond, z.sign() * torch.inf, z)  # float32 ends there
    slope = abs(t.logit_scale / t.temperature)
    zs = z.detach()
    finite = torch.where(zs.isfinite(), zs, 0).abs()
    delta = slope * error + 4 * EPS * finite + (4 * EPS * t.softcap / t.temperature if t.softcap else 0.0)
    made = stats(z, labels, spec.ignore_index, spec.outputs)
    values = {k: v for k, v in made._asdict().items() if v is not None}
    names = wanted(spec, inputs)
    grads = gradients(values, inputs, [wide[n] for n in names], names)
    with torch.no_grad():
        p = torch.softmax(zs, -1)
        top = torch.where(zs.isfinite(), delta, 0)
        # Logits far below the largest do not count.
        near = zs >= zs.amax(-1, keepdim=True) - 40
        spread = torch.where(near, top, 0).amax(-1)
        counted = ~reference.ignored(labels, spec.ignore_index)
        label = torch.where(counted, labels, 0).unsqueeze(-1)
        at_label = top.gather(-1, label).squeeze(-1)
        lp = values["log_probs"].detach()
        off = spread + at_label + EPS * (16 + 4 * lp.abs().nan_to_num(0, 0, 0)) + 1e-30
        bounds = {"log_probs": 2 * off}
        log_p = torch.log_softmax(zs, -1)
        moment = (p * torch.where(p > 0, log_p, 0).abs()).sum(-1)
        bounds["entropy"] = 4 * (spread * (1 + moment) * 4 + EPS * 64 * (1 + moment)) + 1e-6
        bounds["log_sum_sq_probs"] = 8 * (spread + EPS * 16) + EPS * 8 * values.get(
            "log_sum_sq_probs", lp
        ).abs().nan_to_num(0, 0, 0)
        bounds["mean_logits"] = 2 * top.mean(-1) + EPS * (8 + spec.vocab / 8) * finite.mean(-1)
        grad_bounds = bound_gradients(spec, inputs, wide, names, p, log_p, off, moment, counted, grads)
    undefined = bool(beyond.any() or values["log_probs"].isnan().any())
    return Truth(values, grads, bounds, grad_bounds, undefined)


def bound_gradients(
    spec: CallSpec,
    inputs: Inputs,
    wide: dict[str, Tensor],
    names: tuple[str, ...],
    p: Tensor,
    log_p: Tensor,
    off: Tensor,
    moment: Tensor,
    counted: Tensor,
    grads: dict[str, Tensor],
) -> dict[str, Tensor]:
    """p, log_p (..., V): probabilities. off (...): by how much a log-prob may be off. moment: sum of p |log p|."""
    labels = inputs.labels
    g = inputs.upstream["log_probs"].double().abs() * counted
    slope = abs(spec.logit_scale / spec.temperature)
    at_label = torch.zeros_like(p).scatter_(-1, torch.where(counted, labels, 0).unsqueeze(-1), 1.0)
    size = g.unsqueeze(-1) * (p + at_label * -torch.expm1(torch.where(at_label > 0, log_p, 0)))
    if "entropy" in spec.outputs and spec.upstream is not None:
        h = inputs.upstream["entropy"].double().abs() * counted
        size = size + h.unsqueeze(-1) * p * (torch.where(p > 0, log_p, 0).abs() + moment.unsqueeze(-1))
    size = slope * size
    compute = torch.bfloat16 if spec.autocast else spec.dtype
    rounding = torch.finfo(compute).eps if spec.level != "logits" else 0.0
    relative = (4 * off.unsqueeze(-1) + rounding + 64 * EPS).clamp(max=4.0)
    error = size * relative + 64 * torch.finfo(torch.float32).tiny * (1 + slope) * (1 + g.unsqueeze(-1))
    if compute == torch.float16:  # what is too small for it
        error = error + slope * 6e-8 * (g.unsqueeze(-1) > 0)
    if spec.softcap is not None:  # 1 - tanh^2 loses its digits where the cap holds
        error = error + slope * (g.unsqueeze(-1) * (p + at_label)) * 64 * EPS
    bounds = {}
    vocab = error.shape[-1]
    flat, sizes = (t.reshape(-1, vocab).nan_to_num(0, 0, 0) for t in (error, size))
    flat = flat + 8 * EPS * sizes  # the sum over tokens or vocabulary
    for name in names:
        truth = grads[name].abs().nan_to_num(0, 0, 0)
        out = torch.finfo(spec.dtype)
        own = 2 * out.eps * truth + out.smallest_normal * out.eps
        if spec.level == "logits":
            found = flat.view(error.shape)
        elif name == "hidden":
            found = (flat @ wide["weight"].abs()).view(wide["hidden"].shape)
        elif name == "weight":
            found = flat.T @ wide["hidden"].abs().reshape(-1, spec.features).nan_to_num(0, 0, 0)
        else:
            found = flat.sum(0)
        bounds[name] = 2 * found + own
    return bounds


def compare(spec: CallSpec, impl: str) -> str | None:
    """What is wrong with this call; None if nothing is."""
    inputs = make_inputs(spec)
    got = run(spec, inputs, impl)
    truth = exact(spec, inputs)
    for name, value in got.values.items():
        right = truth.values[name]
        if name == "is_top1":
            continue  # two logits within rounding of each other may change places
        said = differs(name, value, right.detach(), truth.value_bounds[name])
        if said:
            return said
    for name, value in got.grads.items():
        if truth.undefined:
            continue
        said = differs(f"gradient of {name}", value, truth.grads[name], truth.grad_bounds[name])
        if said:
            return said
    return None


def differs(name: str, got: Tensor, right: Tensor, bound: Tensor) -> str | None:
    limit = torch.finfo(got.dtype).max
    got = got.detach().double()
    bound = bound.nan_to_num(0.0)  # of a row that is NaN; one that is ignored has to be 0
    nan = right.isnan() | (right.abs() > limit)
    if bool((got.isnan() & ~right.isnan()).any()):
        where = int((got.isnan() & ~right.isnan()).reshape(-1).int().argmax())
        return f"{name} is NaN at {where}; right is {right.reshape(-1)[where].item():.6g}"
    if bool((right.isnan() & ~got.isnan()).any()) and not name.startswith("gradient"):
        return f"{name} is a number where it has to be NaN"
    error = torch.where(nan | got.isnan(), 0, (got - right).abs())
    error = torch.where(got == right, 0, error)
    over = ~(error <= bound) & ~nan
    if bool(over.any()):
        where = int(torch.where(over, error / bound.clamp(min=1e-300), 0).reshape(-1).argmax())
        value, truth, off, most = (t.reshape(-1)[where].item() for t in (got, right, error, bound.expand_as(right)))
        return f"{name} at {where}: {value:.8g}, right is {truth:.8g}, off by {off:.2e}, allowed {most:.2e}"
    return None


SIZED = ("shape", "features", "vocab")
SIMPLER = {f.name: f.default for f in dataclasses.fields(CallSpec) if f.name not in ("seed", "level", *SIZED)}


def smaller(spec: CallSpec) -> Iterator[CallSpec]:
    """Calls that are a little simpler."""
    for name, value in SIMPLER.items():
        yield dataclasses.replace(spec, **{name: value})

    def less(size: int) -> list[int]:
        return sorted({n for n in (1, 2, 3, size // 2, size - 1) if 0 < n < size})

    if len(spec.shape) > 1:
        yield dataclasses.replace(spec, shape=spec.shape[-1:])
    for n in less(spec.shape[-1]):
        yield dataclasses.replace(spec, shape=(n,))
    for name in ("features", "vocab"):
        for n in less(getattr(spec, name)):
            yield dataclasses.replace(spec, **{name: n})


def shrink(spec: CallSpec, fails: Callable[[CallSpec], bool]) -> CallSpec:
    """The smallest call found that still fails."""
    while True:
        simpler = next((s for s in smaller(spec) if s != spec and fails(s)), None)
        if simpler is None:
            return spec
        spec = simpler


def failure(spec: CallSpec, impl: str) -> str | None:
    try:
        return compare(spec, impl)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fuzz(impl: str, numbers: range, sizes: tuple[int, int, int]) -> tuple[int, CallSpec, str] | None:
    """The first call that fails: its number, shrunk, and what is wrong with it."""
    for number in numbers:
        spec = draw(number, sizes)
        if failure(spec, impl) is not None:
            small = shrink(spec, lambda s: failure(s, impl) is not None)
            return number, small, str(failure(small, impl))
    return None


def as_script(spec: CallSpec, impl: str) -> str:
    changed = [f for f in dataclasses.fields(CallSpec) if getattr(spec, f.name) != f.default]
    arguments = ", ".join(f"{f.name}={getattr(spec, f.name)!r}" for f in changed)
    return f"import torch\nfrom fuzz import CallSpec, compare\nprint(compare(CallSpec({arguments}), {impl!r}))"


SIZES = {"cpp": (150, 96, 2300), "torch": (150, 96, 2300), "triton": (40, 48, 200)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="cpp", choices=SIZES)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    first = options.seed * 10**9
    numbers = range(first, first + options.calls) if options.only is None else range(options.only, options.only + 1)
    small = contextlib.nullcontext()
    if options.impl == "triton":
        small = override(capabilities={"tiles": ((64, 64), (32, 64)), "scratch": 0})
    with small:
        found = fuzz(options.impl, numbers, SIZES[options.impl])
    if found is None:
        print(f"{len(numbers):,} calls of {options.impl}: no wrong number")
        return 0
    number, spec, said = found
    print(f"call {number}: {said}\n\n{as_script(spec, options.impl)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
