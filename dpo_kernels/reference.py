"""The mathematics in plain PyTorch, written to be read: what every implementation is held to.

Nothing here is chunked, fused or clever, and everything is differentiable by autograd itself, twice if need be.
Logits are (N, V) in memory at once. In float64 this is the ground truth of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.call import LowRank, accumulate_dtype, ignored
from dpo_kernels.statistics import TokenStats


def logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """z = cap(logit_scale * (h W^T + b)) / temperature, (..., V), in the inputs' dtype."""
    return _transform(F.linear(hidden, weight, bias), temperature, logit_scale, softcap)


def logits_to_log_probs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(z)[label] per row, float32 (float64 for float64), 0 where the label is `ignore_index`."""
    z = _transform(logits.to(accumulate_dtype(logits.dtype)), temperature, logit_scale, softcap)
    return _stats_of(z, labels, ignore_index, ()).log_probs


def hidden_to_log_probs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """log softmax(cap(logit_scale * (h W^T + b)) / temperature)[label] per row, 0 where the label is ignored."""
    return token_stats(
        hidden, weight, labels, bias, outputs=(), ignore_index=ignore_index,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, low_rank=low_rank,
    ).log_probs  # fmt: skip


def token_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    outputs: Sequence[str] = ("entropy",),
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: LowRank | None = None,
) -> TokenStats:
    """Log-probs and the statistics named in `outputs`; see `TokenStats`. low_rank: of the weight W + scale * b a."""
    product = F.linear(hidden, weight, bias)
    if low_rank is not None:
        a, b = (t.to(hidden.dtype) for t in low_rank[:2])
        product = product + low_rank.scale * F.linear(F.linear(hidden, a), b)
    z = _transform(product.to(accumulate_dtype(product.dtype)), temperature, logit_scale, softcap)
    return _stats_of(z, labels, ignore_index, outputs)


def dpo_loss(
    ref_log_probs: Tensor,  # (2B, S)
    policy_log_probs: Tensor,  # (2B, S)
    mask: Tensor,  # (2B, S)
    beta: float = 0.1,
    aggregate: str = "sum",
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7): loss, mean chosen reward, mean rejected reward."""
    policy, ref = (torch.where(mask.bool(), t, 0.0).sum(1) for t in (policy_log_probs, ref_log_probs))
    if aggregate == "mean":
        count = mask.bool().sum(1).to(policy.dtype).clamp_min(1e-8)
        policy, ref = policy / count, ref / count
    policy_chosen, policy_rejected = policy.chunk(2)
    ref_chosen, ref_rejected = ref.chunk(2)
    loss = -F.logsigmoid(beta * ((policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))).mean()
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return loss, chosen.mean().detach(), rejected.mean().detach()


def _transform(product: Tensor, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    u = logit_scale * product
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    return u / temperature


def _stats_of(z: Tensor, labels: Tensor, ignore_index: int | None, outputs: Sequence[str]) -> TokenStats:
    counts = ~ignored(labels, ignore_index)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    label = torch.where(counts, labels, 0).long().unsqueeze(-1)
    stats = {"log_probs": log_p.gather(-1, label).squeeze(-1)}
    if "entropy" in outputs:
        stats["entropy"] = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    if "log_sum_sq_probs" in outputs:
        stats["log_sum_sq_probs"] = torch.logsumexp(2 * log_p, dim=-1).detach()
    if "mean_logits" in outputs:
        stats["mean_logits"] = z.mean(-1).detach()
    if "is_top1" in outputs:
        stats["is_top1"] = z.argmax(-1) == label.squeeze(-1)
    return TokenStats(**{name: torch.where(counts, value, torch.zeros_like(value)) for name, value in stats.items()})
