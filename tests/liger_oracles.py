"""Liger's fused linear DPO loss and ours on random valid inputs, and on inputs where Liger fails.

`python tests/liger_oracles.py` prints both tables; the tests hold both to a bound.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss

OUTPUTS = (
    "loss", "chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll_loss",
    "chosen_rewards", "rejected_rewards",
)  # fmt: skip
BF16_BOUND = 0.02  # Liger rounds each logit to bfloat16
GRADIENTS = ("input", "weight", "bias")
LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
Case = tuple[dict[str, Any], dict[str, Tensor]]  # of the constructor, of the call


def random_case(seed: int) -> Case:
    """Options and inputs on which Liger works: an even batch, a label in each row, smoothing where it has it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    loss_type = rng.choice(LOSS_TYPES)
    options: dict[str, Any] = {
        "beta": rng.choice([0.05, 0.1, 0.5]), "alpha": rng.choice([0.5, 1.0]), "loss_type": loss_type,
        "compute_nll_loss": rng.random() < 0.5, "use_ref_model": rng.random() < 0.7, "compiled": False,
        "average_log_prob": rng.random() < 0.5, "chunk_size": rng.choice([1, 2, 3]),
        "label_smoothing": {"exo_pair": 1e-3, "robust": rng.choice([0.0, 0.2])}.get(loss_type, 0.0),
        "ignore_index": rng.choice([-100, -1]), "discopop_tau": rng.choice([0.05, 0.5]),
    }  # fmt: skip
    return options, make_inputs(2 * rng.randint(1, 4), rng.randint(1, 40), options["ignore_index"], rng.random() < 0.5)


def make_inputs(rows: int, length: int, ignore_index: int = -100, bias: bool = False) -> dict[str, Tensor]:
    features, vocab = 16, 50
    target = torch.randint(vocab, (rows, length))
    target[torch.rand(rows, length) < 0.3] = ignore_index
    target[:, -1] = torch.randint(vocab, (rows,))
    inputs = {
        "lin_weight": torch.randn(vocab, features) * 0.5, "_input": torch.randn(rows, length, features),
        "target": target, "ref_input": torch.randn(rows, length, features),
        "ref_weight": torch.randn(vocab, features) * 0.5,
    }  # fmt: skip
    return inputs | ({"bias": torch.randn(vocab), "ref_bias": torch.randn(vocab)} if bias else {})


def outputs_and_gradients(
    loss_class: Callable[..., Any],
    case: Case,
    scale: float = 0.7,
    wanted: tuple[str, ...] = ("_input", "lin_weight", "bias"),
) -> dict[str, Tensor]:
    """The eight outputs, and the gradients of scale * loss by the inputs wanted; the others are frozen."""
    options, inputs = case
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items() if n in wanted}
    loss, others = loss_class(**options)(**(inputs | leaves))
    (scale * loss).backward()
    values = dict(zip(OUTPUTS, (loss, *others), strict=True))
    names = {"_input": "input", "lin_weight": "weight", "bias": "bias"}
    return {n: v.detach() for n, v in values.items()} | {f"d {names[n]}": t.grad for n, t in leaves.items()}


def differences(cases: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest difference of each output and gradient, relative to the largest value where that is over 1."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Liger

    largest = dict.fromkeys((*OUTPUTS, *(f"d {name}" for name in GRADIENTS)), 0.0)
    for seed in range(cases):
        options, inputs = random_case(seed)
        case = options, {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        ours, theirs = (outputs_and_gradients(cls, case) for cls in (LigerFusedLinearDPOLoss, Liger))
        for name, value in theirs.items():
            assert value.shape == ours[name].shape, name
            error = (ours[name].float() - value.float()).abs().max() / value.abs().max().float().clamp_min(1)
            largest[name] = max(largest[name], error.item()) if torch.isfinite(error) else float("nan")
    return largest


def _masked(rows: slice) -> dict[str, Tensor]:
    inputs = make_inputs(4, 5)
    inputs["target"][rows] = -100
    return inputs


def _nan_where_masked() -> dict[str, Tensor]:
    inputs = make_inputs(4, 5)
    inputs["_input"][inputs["target"] == -100] = float("nan")
    return inputs


def _wide_margin() -> dict[str, Tensor]:
    inputs = make_inputs(4, 5)
    labels = inputs["target"][:2].clamp(min=0)
    inputs["_input"][:2] = -20 * inputs["lin_weight"][labels]  # rules the chosen answers out
    return inputs


def failing_cases() -> dict[str, Case]:
    """Inputs that mean something, on which Liger 0.8.5 raises, gives NaN or a number of something else."""
    torch.manual_seed(0)
    plain = {"compiled": False}
    return {
        "loss_type ipo": (plain | {"loss_type": "ipo"}, make_inputs(4, 5)),
        "an all-masked row, average_log_prob": (plain | {"average_log_prob": True}, _masked(slice(1, 2))),
        "an all-masked chosen half, compute_nll_loss": (plain | {"compute_nll_loss": True}, _masked(slice(0, 2))),
        "an all-masked chosen half": (plain, _masked(slice(0, 2))),
        "everything masked, compute_nll_loss": (plain | {"compute_nll_loss": True}, _masked(slice(None))),
        "an odd batch": (plain, make_inputs(3, 5)),
        "NaN in a masked token": (plain, _nan_where_masked()),
        "discopop, a margin of -hundreds": (plain | {"loss_type": "discopop", "beta": 1.0}, _wide_margin()),
        "label_smoothing with sigmoid": (plain | {"label_smoothing": 0.2}, make_inputs(4, 5)),
    }


def describe(loss_class: Callable[..., Any], case: Case) -> str:
    """The loss and whether its gradients are finite, or the error."""
    try:
        made = outputs_and_gradients(loss_class, case)
    except Exception as error:  # whatever it is, it is what the table shows
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    bad = [name for name, value in made.items() if not torch.isfinite(value).all()]
    return f"loss {made['loss'].item():.4f}" + (f", not finite: {', '.join(bad)}" if bad else ", all finite")


def main() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Liger

    print("| of 200 random valid inputs | float32 | bfloat16 |\n|---|---|---|")
    narrow = differences(200, torch.bfloat16)
    for name, error in differences(200).items():
        print(f"| {name} | {error:.1e} | {narrow[name]:.1e} |")
    print("\n| input | Liger 0.8.5 | ours |\n|---|---|---|")
    for name, case in failing_cases().items():
        print(f"| {name} | {describe(Liger, case)} | {describe(LigerFusedLinearDPOLoss, case)} |")


if __name__ == "__main__":
    main()
