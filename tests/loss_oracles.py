"""Each preference loss against TRL's own code, or against a formula of its own where TRL has none.

`python tests/loss_oracles.py` prints the table: the largest difference in value and in gradient over random batches, in
float64. The tests hold the same cases to a bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import dpo_loss


class Batch(NamedTuple):
    """(2B, S) each; the policy wants a gradient, masked values are no zeros."""

    ref: Tensor
    policy: Tensor
    mask: Tensor
    log_sum_sq_probs: Tensor


Truth = Callable[[Batch, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class LossCase:
    """One loss with options, and what it is compared with; `against` says so in the table."""

    name: str
    paper: str
    truth: Truth
    against: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    bound: float = 1e-12

    @property
    def label(self) -> str:
        said = " ".join(f"{k}={v}" for k, v in self.options.items() if k not in ("loss_type", "beta"))
        return f"{self.name} {said}".strip()


def make_batch(seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """1 to 5 pairs of up to 12 tokens, at least one of them counting in each answer, log-probs of a few nats."""
    torch.manual_seed(seed)
    pairs, length = 1 + seed % 5, 2 + seed % 11
    ref = -torch.rand(2 * pairs, length, dtype=torch.float64) * 3
    policy = ref - torch.randn(2 * pairs, length, dtype=torch.float64).mul(0.4).maximum(ref * 0.5)
    mask = torch.rand(2 * pairs, length) < 0.6
    mask[torch.arange(2 * pairs), torch.randint(length, (2 * pairs,))] = True
    spread = -torch.rand(2 * pairs, length, dtype=torch.float64)
    return Batch(ref.to(dtype), policy.to(dtype).requires_grad_(), mask, spread.to(dtype))


def trl_dpo(batch: Batch, options: dict[str, Any]) -> Tensor:
    """The loss of TRL's `DPOTrainer`, by its own method, on log-probs that stand in for the models' outputs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    loss_type = options.get("loss_type", "sigmoid")
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    policy, ref = (torch.where(batch.mask, t, 0) for t in (batch.policy, batch.ref))
    nothing = torch.zeros_like(policy).detach()
    outputs = SimpleNamespace(
        log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(),
        log_sum_sq_probs=torch.where(batch.mask, batch.log_sum_sq_probs, 0),
    )  # fmt: skip
    accelerator = SimpleNamespace(device=policy.device, gather_for_metrics=lambda x: x, gather=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False, _modules={}), accelerator=accelerator,
        ref_model=lambda **_: SimpleNamespace(log_probs=ref), precompute_ref_logps=False, aux_loss_enabled=False,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        beta=options.get("beta", 0.1), loss_types=names, loss_weights=options.get("loss_weights") or [1.0] * len(names),
        label_smoothing=options.get("label_smoothing", 0.0), ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        use_weighting=options.get("use_weighting", False),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    completion_mask = F.pad(batch.mask.long(), (1, 0))  # TRL's has the first token, which nothing predicts
    inputs = {
        "input_ids": torch.zeros_like(completion_mask), "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)


def trl_cpo(batch: Batch, options: dict[str, Any]) -> Tensor:
    """The loss of TRL's `CPOTrainer` by its own method; for cpo plus a plain negative log-likelihood of the answer."""
    from trl.experimental.cpo import CPOTrainer

    simpo = options["loss_type"] == "simpo"
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo" if simpo else "sigmoid", beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0), simpo_gamma=options.get("simpo_gamma", 0.5),
        accelerator=SimpleNamespace(device=batch.policy.device),
    )  # fmt: skip
    losses, *_ = CPOTrainer.cpo_loss(trainer, *sums(batch.policy, batch.mask, mean=simpo))
    return losses.mean() + (0 if simpo else options.get("cpo_alpha", 1.0) * nll(batch))


def trl_orpo(batch: Batch, options: dict[str, Any]) -> Tensor:
    """The odds-ratio term of TRL's `ORPOTrainer` by its own method, which casts to float32, and a plain negative
    log-likelihood of the answer: TRL's own is of the prompt too."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=options["beta"], accelerator=SimpleNamespace(device=batch.policy.device))
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *sums(batch.policy, batch.mask, mean=True))
    return nll(batch) - losses.mean()


def sums(values: Tensor, mask: Tensor, mean: bool = False) -> tuple[Tensor, ...]:
    total = torch.where(mask, values, 0).sum(1)
    return (total / mask.sum(1) if mean else total).chunk(2)


def nll(batch: Batch) -> Tensor:
    chosen = len(batch.mask) // 2
    return -batch.policy[:chosen][batch.mask[:chosen]].mean()


def margin(batch: Batch, mean: bool = False) -> Tensor:
    """h_c - h_r."""
    (policy_c, policy_r), (ref_c, ref_r) = (sums(t, batch.mask, mean) for t in (batch.policy, batch.ref))
    return (policy_c - ref_c) - (policy_r - ref_r)


def plain_smoothed(batch: Batch, options: dict[str, Any]) -> Tensor:
    """Conservative DPO, as a cross-entropy with soft targets."""
    x = options["beta"] * margin(batch, mean=options["loss_type"] == "sigmoid_norm")
    target = torch.full_like(x, 1 - options["label_smoothing"])
    return F.binary_cross_entropy_with_logits(x, target)


def plain_ipo(batch: Batch, options: dict[str, Any]) -> Tensor:
    return ((margin(batch) - 1 / (2 * options["beta"])) ** 2).mean()


def plain_exo(batch: Batch, options: dict[str, Any]) -> Tensor:
    q = torch.sigmoid(options["beta"] * margin(batch))
    model, wanted = (
        torch.stack([q, 1 - q]),
        batch.policy.new_tensor([1 - options["label_smoothing"], options["label_smoothing"]]),
    )
    return (model * (model / wanted[:, None]).log()).sum(0).mean()


def plain_alpha_divergence(batch: Batch, options: dict[str, Any]) -> Tensor:
    power = options["f_alpha_divergence_coef"] - 1
    (policy_c, policy_r), (ref_c, ref_r) = (sums(t, batch.mask) for t in (batch.policy, batch.ref))
    t_c, t_r = (policy_c - ref_c).exp(), (policy_r - ref_r).exp()
    x = options["beta"] * (t_c**power - t_r**power) / power
    return torch.log1p(torch.exp(-x)).mean()


def plain_orpo(batch: Batch, options: dict[str, Any]) -> Tensor:
    p_c, p_r = (mean.exp() for mean in sums(batch.policy, batch.mask, mean=True))
    ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
    return nll(batch) + options["beta"] * (torch.log(1 + 1 / ratio)).mean()


def plain_weighted_nll(batch: Batch, options: dict[str, Any]) -> Tensor:
    """Each chosen token's negative log-prob times its pair's weight, over the number of chosen tokens."""
    likely = [s.exp() for s in sums((batch.policy - batch.log_sum_sq_probs).detach(), batch.mask, mean=True)]
    chosen = len(batch.mask) // 2
    counts = batch.mask[:chosen]
    weighted = -batch.policy[:chosen] * (likely[0] * likely[1])[:, None]
    return weighted[counts].sum() / counts.sum()


def plain_weighted_hinge(batch: Batch, options: dict[str, Any]) -> Tensor:
    likely = [s.exp() for s in sums((batch.policy - batch.log_sum_sq_probs).detach(), batch.mask, mean=True)]
    return ((1 - options["beta"] * margin(batch)).clamp(min=0) * likely[0] * likely[1]).mean()


def _trl(name: str, paper: str, **options: Any) -> LossCase:
    return LossCase(name, paper, trl_dpo, "TRL 1.16", {"loss_type": name, "beta": 0.3} | options)


def _plain(name: str, paper: str, truth: Truth, **options: Any) -> LossCase:
    return LossCase(name, paper, truth, "plain formula", {"loss_type": name, "beta": 0.3} | options)


CASES = [
    _trl("sigmoid", "2305.18290"),
    _plain("sigmoid", "cDPO, Mitchell 2023", plain_smoothed, label_smoothing=0.1),
    _trl("sigmoid_norm", "2411.15124"),
    _plain("sigmoid_norm", "2411.15124", plain_smoothed, label_smoothing=0.1),
    _trl("hinge", "2305.10425, 2309.06657"),
    _trl("ipo", "2310.12036"),
    _plain("ipo_unnormalized", "2310.12036", plain_ipo),
    LossCase("exo_pair", "2402.00856", trl_dpo, "TRL 1.16 (log eps in float32)",
             {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 1e-3}, bound=1e-6),
    _plain("exo_pair", "2402.00856", plain_exo, label_smoothing=1e-3),
    _trl("nca_pair", "2402.05369"),
    _trl("robust", "2403.00409", label_smoothing=0.1),
    _trl("bco_pair", "2404.04656"),
    _trl("sppo_hard", "2405.00675"),
    _trl("aot", "2406.05882"),
    _trl("aot", "2406.05882", label_smoothing=0.1),
    _trl("aot_unpaired", "2406.05882"),
    _trl("aot_unpaired", "2406.05882", label_smoothing=0.1),
    _trl("apo_zero", "2408.06266"),
    _trl("apo_down", "2408.06266"),
    _trl("discopop", "2406.08414"),
    _trl("discopop", "2406.08414", discopop_tau=0.5),
    _trl("sft", "2404.19733"),
    LossCase("sigmoid + 0.2 sft (RPO)", "2404.19733", trl_dpo, "TRL 1.16",
             {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.3}),
    LossCase("0.8 sigmoid + 0.2 bco_pair + sft (MPO)", "2411.10442", trl_dpo, "TRL 1.16",
             {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3}),
    *(_trl(name, "f-DPO, 2309.16240", f_divergence_type=divergence, **more)
      for divergence in ("forward_kl", "js_divergence")
      for name, more in (("sigmoid", {}), ("sigmoid_norm", {}), ("hinge", {}), ("ipo", {}), ("discopop", {}),
                         ("robust", {"label_smoothing": 0.1}))),
    *(_plain("sigmoid", "f-DPO, 2309.16240", plain_alpha_divergence, f_divergence_type="alpha_divergence",
             f_alpha_divergence_coef=alpha) for alpha in (0.2, 0.5, 1.5)),
    _trl("sigmoid", "f-DPO, 2309.16240", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    *(LossCase("sigmoid", "f-DPO, 2309.16240", trl_dpo, "TRL 1.16 (float32)", {"loss_type": "sigmoid", "beta": 0.3,
               "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}, torch.float32, 1e-5)
      for alpha in (0.2, 0.5, 1.5)),
    _trl("sigmoid", "f-DPO, 2309.16240", f_divergence_type="js_divergence", ld_alpha=0.5),
    _trl("sigmoid", "LD-DPO, 2409.06411", ld_alpha=0.4),
    _trl("ipo", "LD-DPO, 2409.06411", ld_alpha=0.0),
    *(_trl(name, "WPO, 2406.11827", use_weighting=True, **more)
      for name, more in (("sigmoid", {}), ("ipo", {}), ("robust", {"label_smoothing": 0.1}), ("bco_pair", {}))),
    _plain("hinge", "WPO, 2406.11827", plain_weighted_hinge, use_weighting=True),
    _plain("sft", "WPO, 2406.11827", plain_weighted_nll, use_weighting=True),
    LossCase("simpo", "2405.14734", trl_cpo, "TRL 1.16 CPOTrainer",
             {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8}),
    LossCase("cpo", "2401.08417", trl_cpo, "TRL 1.16's CPO term + plain NLL",
             {"loss_type": "cpo", "beta": 0.3, "cpo_alpha": 0.7}),
    LossCase("cpo", "2401.08417", trl_cpo, "TRL 1.16's CPO term + plain NLL",
             {"loss_type": "cpo", "beta": 0.3, "label_smoothing": 0.1}),
    _plain("orpo", "2403.07691", plain_orpo),
    LossCase("orpo", "2403.07691", trl_orpo, "TRL 1.16's odds-ratio term (float32) + plain NLL",
             {"loss_type": "orpo", "beta": 0.3}, torch.float32, 1e-5),
]  # fmt: skip


def differences(case: LossCase, batches: int = 20) -> tuple[float, float]:
    """The largest absolute difference in value and in the policy's gradient over so many random batches."""
    value = gradient = 0.0
    for seed in range(batches):
        batch = make_batch(seed, case.dtype)
        statistics = batch.log_sum_sq_probs if case.options.get("use_weighting") else None
        ours = dpo_loss(batch.ref, batch.policy, batch.mask, log_sum_sq_probs=statistics, **case.options).loss
        theirs = case.truth(batch, case.options)
        grads = [torch.autograd.grad(loss, batch.policy)[0] for loss in (ours, theirs)]
        assert torch.isfinite(theirs)
        assert torch.isfinite(grads[1]).all()
        value = max(value, (ours - theirs).abs().item())
        gradient = max(gradient, (grads[0] - grads[1]).abs().max().item())
        if not torch.isfinite(ours) or not torch.isfinite(grads[0]).all():
            return float("nan"), float("nan")
    return value, gradient


def main() -> None:
    print("| loss | paper (arXiv) | against | value | gradient |\n|---|---|---|---|---|")
    for case in CASES:
        value, gradient = differences(case)
        print(f"| {case.label} | {case.paper} | {case.against} | {value:.1e} | {gradient:.1e} |")


if __name__ == "__main__":
    main()
