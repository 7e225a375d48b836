"""Inputs like a trained model's, the exact answer in float64, and tolerances that NaN cannot pass."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_kernels import TokenStats, hidden_to_log_probs, plan, reference, token_stats
from dpo_kernels.planner import Plan

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dpo.jsonl"


def slow(*values):
    """A case for `make thorough`; the suite has others like it."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Transforms of logits that the tests go through.
PLAIN: dict = {}
ALL = {"softcap": 9.0, "temperature": 1.5, "logit_scale": 0.7}


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None


def make_head(
    tokens: int | tuple[int, ...],
    features: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.3,
    grads: str = "hidden,weight,bias",
) -> Head:
    """Hidden states that point at their label, so that the softmax is peaked in places, as a trained model's is."""
    shape = (tokens,) if isinstance(tokens, int) else tokens
    weight = torch.randn(vocab, features, dtype=torch.float64)
    labels = torch.randint(vocab, shape)
    sharpness = torch.rand(shape, dtype=torch.float64).unsqueeze(-1) * 12 / features
    hidden = torch.randn(*shape, features, dtype=torch.float64) * 2 / features**0.5 + sharpness * weight[labels]
    labels[torch.rand(shape) < ignored] = -100
    wanted = grads.split(",")
    return Head(
        hidden.to(dtype).requires_grad_("hidden" in wanted),
        weight.to(dtype).requires_grad_("weight" in wanted),
        labels,
        torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_("bias" in wanted) if bias else None,
    )


def head_on(device: torch.device, *shape, **options) -> Head:
    """As `make_head`, on a device."""
    head = make_head(*shape, **options)

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)

    return Head(leaf(head.hidden), leaf(head.weight), head.labels.to(device), leaf(head.bias))


def detached(head: Head, dtype: torch.dtype | None = None) -> Head:
    """The same numbers as leaves of their own, in another dtype if given."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)

    hidden, weight, bias = leaf(head.hidden), leaf(head.weight), leaf(head.bias)
    assert hidden is not None
    assert weight is not None
    return Head(hidden, weight, head.labels, bias)


def loss_of(stats: TokenStats, seed: int = 1) -> Tensor:
    """A weighted sum of the differentiable outputs, with weights of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def weighted(values: Tensor) -> Tensor:
        return (values * torch.randn(values.shape, generator=generator).to(values.device)).sum()

    total = weighted(stats.log_probs)
    return total if stats.entropy is None else total + weighted(stats.entropy)


def run(module_or_function, head: Head, **options) -> tuple[TokenStats, list[Tensor | None]]:
    """Statistics and the gradients of hidden, weight and bias."""
    stats = module_or_function(head.hidden, head.weight, head.labels, head.bias, **options)
    inputs = (head.hidden, head.weight, head.bias)
    if any(t is not None and t.requires_grad for t in inputs):
        loss_of(stats).backward()
    return stats, [None if t is None else t.grad for t in inputs]


def inputs_of(head: Head) -> list[Tensor]:
    """Those that want a gradient."""
    return [t for t in (head.hidden, head.weight, head.bias) if t is not None and t.requires_grad]


class Result(NamedTuple):
    log_probs: Tensor
    grads: tuple[Tensor, ...]


def step(head: Head, cotangent: Tensor | None, budget: int | None = None, **options) -> Result:
    """Log-probs, and the gradients of what wants one."""
    log_probs = hidden_to_log_probs(head.hidden, head.weight, head.labels, head.bias, memory_budget=budget, **options)
    leaves = inputs_of(head)
    return Result(log_probs.detach(), torch.autograd.grad(log_probs, leaves, cotangent) if leaves else ())


# The gradients that lead to a mode, given the budget of `planned`.
MODES = {
    "score": "none",
    "frozen": "hidden",
    "keep": "hidden,weight",
    "mixed": "hidden,weight",
    "recompute": "hidden,weight",
}


def planned(head: Head, mode: str, outer: str | None = None, *, impl: str | None = None, steps: int = 200) -> Plan:
    """A plan of a call on this head in this mode, with these outer loops ("vocab", "tokens,vocab") if given; its bytes,
    as a budget, lead to it. The middle one of those that budgets of equal distance lead to."""
    tokens, labels = int((head.labels != -100).sum()), head.labels.numel()
    vocab, features = head.weight.shape
    given = (("hidden", head.hidden), ("weight", head.weight), ("bias", head.bias))
    grads = tuple(name for name, t in given if t is not None and t.requires_grad)

    def of(budget: int) -> Plan:
        return plan(
            tokens, features, vocab, head.hidden.dtype, grads=grads, memory_budget=budget, device=head.hidden.device,
            impl=impl, labels=labels,
        )  # fmt: skip

    most = of(2**50).bytes
    try:
        least = of(1).bytes
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(" ")[0].replace(",", ""))
    made = [of(least + (most - least) * i // steps) for i in range(steps + 1)]
    fit = [p for p in made if p.mode == mode and outer in (None, ",".join(sweep.outer for sweep in p.sweeps))]
    assert fit, f"no budget leads to {mode} {outer}: {sorted({p.mode for p in made})}"
    return fit[len(fit) // 2]


def assert_close(got: Tensor, exact: Tensor, tolerance: float, what: str = "") -> None:
    """Largest absolute error at most `tolerance`; NaN fails."""
    assert got.shape == exact.shape
    error = (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance, f"{what}: error {error:.2e}, allowed {tolerance:.2e}"


def assert_as_good(got: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0, what: str = "") -> None:
    """At most `factor` times the error of plain PyTorch in the same dtype, with a floor of a few ulp; NaN fails."""
    assert got.dtype == same_dtype.dtype
    assert got.shape == exact.shape
    ulps = 256 if got.dtype == exact.dtype else 4  # in float64 plain PyTorch is the truth itself, with an error of 0
    floor = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item()
    error, baseline = ((t.double() - exact).abs().max().item() for t in (got, same_dtype))
    assert error <= factor * baseline + floor, (
        f"{what}: error {error:.2e}, plain PyTorch {baseline:.2e}, floor {floor:.2e}"
    )


LOG_PROB_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


# The largest errors that `check_against_reference` met, by implementation and dtype: of log-probs, absolute, and of
# gradients, relative to the largest number of the exact one. pytest prints them at the end.
WORST: dict[tuple[str, str], dict[str, float]] = {}


def note_errors(impl: str | None, dtype: torch.dtype, **errors: float) -> None:
    worst = WORST.setdefault((impl or "default", str(dtype).removeprefix("torch.")), {"cases": 0})
    worst["cases"] += 1
    for name, error in errors.items():
        worst[name] = max(worst.get(name, 0.0), error)


def check_against_reference(
    head: Head, log_prob_tolerance: float | None = None, factor: float = 2.0, **options
) -> None:
    """Statistics against float64, gradients against float64 and relative to plain PyTorch in the same dtype.

    factor: times plain PyTorch's error. Of a few numbers that error is luck: tests/fuzz.py has bounds for those.
    """
    reference_options = {k: v for k, v in options.items() if k not in ("memory_budget", "impl")}
    exact, exact_grads = run(reference.token_stats, detached(head, torch.float64), **reference_options)
    _, plain_grads = run(reference.token_stats, detached(head), **reference_options)
    got, grads = run(token_stats, detached(head), **options)
    tolerance = log_prob_tolerance or LOG_PROB_TOLERANCE[head.hidden.dtype]
    for name, value, truth in zip(got._fields, got, exact, strict=True):
        assert (value is None) == (truth is None), name
        if name == "is_top1" and value is not None:
            assert torch.equal(value, truth), name
        elif value is not None:
            assert_close(value, truth, tolerance * max(1.0, truth.abs().max().item() / 10), name)
    for name, value, plain, truth in zip(("hidden", "weight", "bias"), grads, plain_grads, exact_grads, strict=True):
        assert (value is None) == (truth is None), name
        if value is not None:
            assert_as_good(value, plain, truth, factor, what=f"gradient of {name}")
    worst_gradient = (
        max(
            ((g.double() - e).abs().max() / e.abs().max()).item()
            for g, e in zip(grads, exact_grads, strict=True)
            if g is not None and e.abs().max() > 0
        )
        if any(e is not None and e.abs().max() > 0 for e in exact_grads)
        else 0.0
    )
    log_prob_error = (got.log_probs.double() - exact.log_probs).abs().max().item()
    note_errors(options.get("impl"), head.hidden.dtype, log_probs=log_prob_error, gradients=worst_gradient)
