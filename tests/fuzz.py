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
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from fuzz_calls import EPS, LARGEST, CallSpec, Inputs, Result, draw, gradients, leaf_names, make_inputs, run, wanted
from torch import Tensor

from dpo_kernels import reference
from dpo_kernels.overrides import override


@dataclass
class Truth:
    """float64, with bounds of the same shapes."""

    values: dict[str, Tensor]
    grads: dict[str, Tensor]
    value_bounds: dict[str, Tensor]
    grad_bounds: dict[str, Tensor]
    undefined: Tensor  # gradients of these rows: NaN, or a logit is beyond float32
    ties: Tensor  # rows whose label and largest other logit are within rounding of each other
    left_out: Tensor  # the largest share of what a filter left out of a row, at the least


def exact(spec: CallSpec, inputs: Inputs, kept: Tensor | None = None) -> Truth:
    """What is right, and how far a float32 computation may be off.

    A product of D terms is off by at most about eps * (8 + D / 8) of the sum of its terms' sizes (blocked sums of 8
    lanes and more); a logit besides by a few eps of itself. A log-prob is off by twice the largest error of a logit
    that counts, a probability by that share of itself. dz is rounded to the compute dtype, a gradient to its own.
    kept (..., V): what a filter left in the gradients.
    """
    compute = torch.bfloat16 if spec.autocast else spec.dtype
    wide = {"hidden": inputs.rows.to(compute).double().requires_grad_()}
    if inputs.weight is not None:
        wide["weight"] = inputs.weight.to(compute).double().requires_grad_()
    if inputs.bias is not None:
        wide["bias"] = inputs.bias.to(compute).double().requires_grad_()
    labels = inputs.labels.long()
    stats = reference._stats_of
    if spec.level == "logits":
        a, size = wide["hidden"], wide["hidden"].detach().abs()
        error = torch.zeros_like(size)
    else:
        a = reference.logits(wide["hidden"], wide["weight"], wide.get("bias"))
        size = wide["hidden"].detach().abs() @ wide["weight"].detach().abs().T
        error = EPS * (8 + spec.features / 8) * size
        if inputs.low_rank is not None:
            wide["low_rank_a"], wide["low_rank_b"] = (t.double().requires_grad_() for t in inputs.low_rank[:2])
            h, m_a, m_b = wide["hidden"], wide["low_rank_a"], wide["low_rank_b"]
            a = a + inputs.low_rank.scale * (h @ m_a.T) @ m_b.T
            more = abs(inputs.low_rank.scale) * (h.detach().abs() @ m_a.detach().abs().T) @ m_b.detach().abs().T
            # Both factors of it are rounded to the operand's dtype.
            error = error + (EPS * (16 + spec.features / 8) + 2 * torch.finfo(compute).eps) * more
            size = size + more
        if "bias" in wide:
            bias = torch.where(wide["bias"].isinf(), 0, wide["bias"]).detach().abs()
            size = size + bias
            error = error + EPS * size
    t = spec
    if kept is not None and a.requires_grad:
        at_labels = torch.zeros_like(kept).scatter_(-1, labels.clamp(0, spec.vocab - 1).unsqueeze(-1), True)
        a.register_hook(lambda dz: torch.where(kept | at_labels, dz, 0))
    u = t.logit_scale * a
    z = (u if t.softcap is None else t.softcap * torch.tanh(u / t.softcap)) / t.temperature
    beyond = (z.detach().abs() > LARGEST) & z.detach().isfinite()
    z = torch.where(beyond, z.sign() * torch.inf, z)  # float32 ends there
    slope = abs(t.logit_scale / t.temperature)
    zs = z.detach()
    finite = torch.where(zs.isfinite(), zs, 0).abs()
    delta = slope * error + 4 * EPS * finite
    # The cap's derivative is 1 - tanh^2, which changes by no more than its argument does.
    cap = 0 * error if t.softcap is None else (abs(t.logit_scale) * error / t.softcap).clamp(max=1)
    asked = tuple(name for name in spec.outputs if name != "dropped_mass")
    made = stats(z, labels, spec.ignore_index, asked)
    values = {k: v for k, v in made._asdict().items() if v is not None and k != "dropped_mass"}
    names = leaf_names(wanted(spec, inputs))
    if spec.level == "losses":
        mask = labels != spec.ignore_index
        ref = inputs.ref_log_probs.double()
        values["loss"] = reference.dpo_loss(ref, values["log_probs"], mask, spec.beta, spec.aggregate)[0]
    results = {k: v for k, v in values.items() if k != "log_probs"} if spec.level == "losses" else values
    upstream = dict(inputs.upstream)
    if spec.level == "losses":
        upstream["log_probs"] = torch.autograd.grad(values["loss"], values["log_probs"], retain_graph=True)[0]
    grads = gradients(results, inputs, [wide[n] for n in names], names)
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
        upstream_error = torch.zeros_like(off)
        if spec.level == "losses":
            bounds["loss"], upstream_error = bound_loss(spec, inputs, lp, off, upstream["log_probs"])
        softmax = Softmax(p, log_p, off, cap, moment, counted)
        scale = 0.0 if inputs.low_rank is None else abs(inputs.low_rank.scale)
        grad_bounds = bound_gradients(spec, labels, wide, names, softmax, upstream, upstream_error, grads, scale)
        tail = Tail.of(spec, softmax, inputs, kept, derivative(spec, u.detach()))
        values["dropped_mass"], bounds["dropped_mass"] = tail.mass, tail.off
        tail.give_back(spec, wide, upstream["log_probs"].double() * -t.logit_scale / t.temperature, grads, grad_bounds)
    undefined = beyond.any(-1) | values["log_probs"].isnan()
    others = zs.scatter(-1, label, -torch.inf).amax(-1)
    ties = ~((zs.gather(-1, label).squeeze(-1) - others).abs() > 2 * (spread + at_label))
    return Truth(values, grads, bounds, grad_bounds, undefined, ties, tail.largest)


def bound_loss(
    spec: CallSpec, inputs: Inputs, log_probs: Tensor, off: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much the loss, and its gradient of each log-prob, may be off.

    The margin of a pair is off by what its tokens are together; -log sigmoid changes by at most as much, its derivative
    by at most that power of e.
    """
    weights = (inputs.labels != spec.ignore_index).double()
    if spec.aggregate == "mean":
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-8)
    pairs, length = len(weights) // 2, weights.shape[1]
    rounding = EPS * (8 + length) * (log_probs.abs() + inputs.ref_log_probs.abs())
    answers = spec.beta * (weights * (2 * off + rounding)).sum(1)
    margin = sum(answers.chunk(2))
    most = spec.beta * weights / pairs
    share = torch.expm1(margin.clamp(max=30.0) + 16 * EPS).repeat(2).unsqueeze(1)
    return margin.mean() + 16 * EPS * (1 + length), torch.minimum(gradient.abs() * share, most)


@dataclass
class Softmax:
    """p, log_p (..., V): probabilities. off (...): by how much a log-prob may be off; cap (..., V): and the cap's
    derivative. moment: sum of p |log p|."""

    p: Tensor
    log_p: Tensor
    off: Tensor
    cap: Tensor
    moment: Tensor
    counted: Tensor


def derivative(spec: CallSpec, u: Tensor) -> Tensor:
    """The cap's."""
    return torch.ones_like(u) if spec.softcap is None else 1 - torch.tanh(u / spec.softcap) ** 2


@dataclass
class Tail:
    """What a filter leaves out of rows, (...): its sum, by how much that may be off, and its largest entry, less that.

    adapter: the scale and the mean row of b of a low-rank adapter.
    """

    mass: Tensor
    off: Tensor
    largest: Tensor
    adapter: tuple[float, Tensor] | None

    @classmethod
    def of(cls, spec: CallSpec, softmax: Softmax, inputs: Inputs, kept: Tensor | None, cap: Tensor) -> Tail:
        labels = inputs.labels.long().clamp(0, spec.vocab - 1).unsqueeze(-1)
        left = torch.zeros_like(softmax.p, dtype=torch.bool) if kept is None else ~kept
        left = left.scatter(-1, labels, False) & softmax.counted.unsqueeze(-1) & ~softmax.off.isnan().unsqueeze(-1)
        share = torch.where(left, softmax.p * cap, 0).nan_to_num(0, 0, 0)
        compute = torch.bfloat16 if spec.autocast else spec.dtype
        relative = (4 * softmax.off.unsqueeze(-1).nan_to_num(0, 0, 0)).clamp(max=40).expm1()
        relative = relative + 2 * torch.finfo(compute).eps + 64 * EPS
        off = share * relative + torch.where(left, softmax.p * (softmax.cap + 64 * EPS), 0).nan_to_num(0, 0, 0)
        if compute == torch.float16:  # an exponential that is too small for it
            off = off + 2.0**-24 * left
        low_rank = inputs.low_rank
        adapter = None if low_rank is None else (low_rank.scale, low_rank.b.double().mean(0))
        off = off + 2.0**-94 * left
        return cls(share.sum(-1), off.sum(-1), (share - off).amax(-1), adapter)

    def give_back(
        self, spec: CallSpec, wide: dict[str, Tensor], upstream: Tensor, grads: dict[str, Tensor],
        bounds: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """What the hidden states get back evenly, and an adapter's first matrix through them."""
        if spec.level == "logits":
            return
        back, off = (self.mass * upstream).unsqueeze(-1), (self.off * upstream.abs()).unsqueeze(-1)
        off = off + back.abs() * EPS * (16 + spec.vocab / 8)
        means = [(1.0, wide["weight"].detach().mean(0), wide["weight"].detach().abs().mean(0))]
        if self.adapter is not None:
            scale, mean = self.adapter
            a = wide["low_rank_a"].detach()
            means.append((scale, mean @ a, mean.abs() @ a.abs()))
            if "low_rank_a" in grads:
                rows = wide["hidden"].detach().reshape(-1, spec.features).nan_to_num(0, 0, 0)
                grads["low_rank_a"] = grads["low_rank_a"] + scale * torch.outer(mean, back.reshape(-1) @ rows)
                more = abs(scale) * torch.outer(mean.abs(), off.reshape(-1) @ rows.abs())
                bounds["low_rank_a"] = bounds["low_rank_a"] + more
        if "hidden" in grads:
            for scale, mean, size in means:
                grads["hidden"] = grads["hidden"] + scale * back * mean
                rounded = 4 * torch.finfo(spec.dtype).eps * back.abs() * size
                bounds["hidden"] = bounds["hidden"] + abs(scale) * (off * size + rounded)


def bound_gradients(
    spec: CallSpec,
    labels: Tensor,
    wide: dict[str, Tensor],
    names: tuple[str, ...],
    softmax: Softmax,
    upstream: dict[str, Tensor],
    upstream_error: Tensor,
    grads: dict[str, Tensor],
    adapter_scale: float,
) -> dict[str, Tensor]:
    p, log_p, off, moment, counted = softmax.p, softmax.log_p, softmax.off, softmax.moment, softmax.counted
    g = upstream["log_probs"].double().abs() * counted
    slope = abs(spec.logit_scale / spec.temperature)
    at_label = torch.zeros_like(p).scatter_(-1, torch.where(counted, labels, 0).unsqueeze(-1), 1.0)
    size = g.unsqueeze(-1) * (p + at_label * -torch.expm1(torch.where(at_label > 0, log_p, 0)))
    if "entropy" in spec.outputs and spec.upstream is not None:
        h = upstream["entropy"].double().abs() * counted
        size = size + h.unsqueeze(-1) * p * (torch.where(p > 0, log_p, 0).abs() + moment.unsqueeze(-1))
    size = slope * size
    compute = torch.bfloat16 if spec.autocast else spec.dtype
    rounding = torch.finfo(compute).eps if spec.level != "logits" else 0.0
    relative = (4 * off.unsqueeze(-1) + softmax.cap + rounding + 64 * EPS).clamp(max=4.0)
    error = size * relative + 64 * torch.finfo(torch.float32).tiny * (1 + slope) * (1 + g.unsqueeze(-1))
    # Where logits are off by more than that, all that is known of a probability is that power of e, and 1.
    most = (p * torch.exp((4 * off).clamp(max=500.0)).unsqueeze(-1)).clamp(max=1.0)
    moved = g.unsqueeze(-1) * (most + at_label)
    if "entropy" in spec.outputs and spec.upstream is not None:  # p |log p + H| is at most 1 + log V
        moved = moved + h.unsqueeze(-1) * (most * 2 * (1 + math.log(spec.vocab)))
    error = torch.where(off.unsqueeze(-1) > 0.25, torch.maximum(error, slope * 2 * moved), error)
    error = error + slope * upstream_error.unsqueeze(-1) * (p + at_label)
    if compute == torch.float16:  # what is too small for it
        error = error + slope * 6e-8 * (g.unsqueeze(-1) > 0)
    if spec.softcap is not None:  # 1 - tanh^2 loses its digits where the cap holds
        error = error + slope * (g.unsqueeze(-1) * (p + at_label)) * 64 * EPS
    # What is 2^-94 times smaller than the largest may be 0, of probabilities and of the terms of sums over tokens.
    error = error + slope * 2.0**-94 * g.unsqueeze(-1)
    lost = slope * 2.0**-94 * (g.amax() * g.numel() if g.numel() else 0.0)
    bounds = {}
    vocab = error.shape[-1]
    flat, sizes = (t.reshape(-1, vocab).nan_to_num(0, 0, 0) for t in (error, size))
    flat = flat + 8 * EPS * sizes  # the sum over tokens or vocabulary
    # A low-rank adapter's factors are rounded to the operand's dtype.
    through = flat + 4 * (EPS * len(flat) / 8 + torch.finfo(compute).eps) * sizes
    rows = wide["hidden"].abs().reshape(-1, wide["hidden"].shape[-1]).nan_to_num(0, 0, 0)
    for name in names:
        truth = grads[name].abs().nan_to_num(0, 0, 0)
        out = torch.finfo(spec.dtype)
        if name.startswith("low_rank"):
            out = torch.finfo(spec.adapter_dtype)
        own = 2 * out.eps * truth + out.smallest_normal * out.eps
        if spec.level == "logits":
            found = flat.view(error.shape)
        elif name == "hidden":
            found = flat @ wide["weight"].abs()
            if adapter_scale:
                found = found + adapter_scale * through @ wide["low_rank_b"].abs() @ wide["low_rank_a"].abs()
            found = found.view(wide["hidden"].shape)
        elif name == "weight":
            found = flat.T @ rows + lost
        elif name == "low_rank_a":
            found = adapter_scale * (through @ wide["low_rank_b"].abs()).T @ rows
        elif name == "low_rank_b":
            found = adapter_scale * through.T @ (rows @ wide["low_rank_a"].abs().T) + lost
        else:
            found = flat.sum(0)
        bounds[name] = 4 * found + own
    return bounds


def compare(spec: CallSpec, impl: str) -> str | None:
    """What is wrong with this call; None if nothing is."""
    inputs = make_inputs(spec)
    got = run(spec, inputs, impl)
    if spec.filter == 0 and (said := differs_in_bits(spec, inputs, impl, got)):
        return said
    truth = exact(spec, inputs, got.kept)
    if spec.filter is not None and not bool((truth.left_out < max(spec.filter, 1e-300)).all()):
        return f"{truth.left_out.max():.3g} is left out; the filter is {spec.filter}"
    for name, value in got.values.items():
        right = truth.values[name]
        if name == "is_top1":
            wrong = (value != right) & ~truth.ties
            if bool(wrong.any()):
                return f"is_top1 at {int(wrong.reshape(-1).int().argmax())} is not right: {right.tolist()}"
            continue
        said = differs(name, value, right.detach(), truth.value_bounds[name])
        if said:
            return said
    lost = bool(truth.undefined.any())
    for name, value in got.grads.items():
        if lost and (name != "hidden" or spec.level == "losses"):
            continue  # each row counts in it
        if lost:
            value = torch.where(truth.undefined.unsqueeze(-1), truth.grads[name].to(value.dtype), value)
        said = differs(f"gradient of {name}", value, truth.grads[name], truth.grad_bounds[name])
        if said:
            return said
    return None


def differs_in_bits(spec: CallSpec, inputs: Inputs, impl: str, got: Result) -> str | None:
    """Of a filter of 0 from no filter."""
    outputs = tuple(name for name in spec.outputs if name != "dropped_mass")
    other = run(dataclasses.replace(spec, filter=None, outputs=outputs), inputs, impl)
    for name, right in [*other.values.items(), *other.grads.items()]:
        found = got.values.get(name, got.grads.get(name))
        if found is None or not torch.equal(found.nan_to_num(-7.0), right.nan_to_num(-7.0)):
            return f"{name} with a filter of 0 is not what it is without"
    return "something is left out by a filter of 0" if got.kept is not None else None


def differs(name: str, got: Tensor, right: Tensor, bound: Tensor) -> str | None:
    limit = torch.finfo(got.dtype).max
    got = got.detach().double()
    bound = bound.nan_to_num(0.0)  # of a row that is NaN; one that is ignored has to be 0
    if bool((right.isinf() & (got != right)).any()):
        where = int((right.isinf() & (got != right)).reshape(-1).int().argmax())
        return f"{name} at {where}: {got.reshape(-1)[where].item():.8g}, right is {right.reshape(-1)[where].item()}"
    nan = right.isnan() | (right.abs() > limit)
    if bool((got.isnan() & ~right.isnan()).any()):
        where = int((got.isnan() & ~right.isnan()).reshape(-1).int().argmax())
        return f"{name} is NaN at {where}; right is {right.reshape(-1)[where].item():.6g}"
    if bool((right.isnan() & ~got.isnan()).any()) and not name.startswith("gradient"):
        return f"{name} is a number where it has to be NaN"
    error = torch.where(nan | got.isnan(), 0, (got - right).abs())
    error = torch.where(got == right, 0, error)
    # What the bound lets be larger than the dtype holds is written as infinity.
    error = torch.where((got == right.sign() * torch.inf) & (right.abs() + bound > limit), 0, error)
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

    of_pairs = spec.level == "losses"
    if len(spec.shape) > 1 + of_pairs or (of_pairs and spec.shape[0] > 2):
        yield dataclasses.replace(spec, shape=(2, spec.shape[-1]) if of_pairs else spec.shape[-1:])
    for n in less(spec.shape[-1]):
        yield dataclasses.replace(spec, shape=(*spec.shape[:-1], n) if of_pairs else (n,))
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


def failure(spec: CallSpec, impl: str) -> tuple[str, str] | None:
    """Its kind, a wrong number or an error's type, and what is wrong."""
    try:
        said = compare(spec, impl)
    except Exception as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    return None if said is None else ("number", said)


def fuzz(impl: str, numbers: Iterable[int], sizes: tuple[int, int, int]) -> tuple[int, CallSpec, str] | None:
    """The first call that fails: its number, shrunk, and what is wrong with it."""
    for number in numbers:
        spec = draw(number, sizes)
        found = failure(spec, impl)
        if found is not None:
            small = shrink(spec, lambda s, kind=found[0]: (failure(s, impl) or ("", ""))[0] == kind)  # type: ignore[misc]
            return number, small, (failure(small, impl) or found)[1]
    return None


def as_script(spec: CallSpec, impl: str) -> str:
    changed = [f for f in dataclasses.fields(CallSpec) if getattr(spec, f.name) != f.default]
    arguments = ", ".join(f"{f.name}={getattr(spec, f.name)!r}" for f in changed)
    imports = "import torch\nfrom fuzz import compare\nfrom fuzz_calls import CallSpec\n"
    return f"{imports}print(compare(CallSpec({arguments}), {impl!r}))"


SIZES = {"cpp": (150, 96, 2300), "torch": (150, 96, 2300), "triton": (80, 48, 400)}
# Of several blocks, and smaller than the calls.
TRITON = {"tiles": ((64, 256), (64, 64), (32, 64)), "scratch": 0}


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
        small = override(capabilities=TRITON)
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
