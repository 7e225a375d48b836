"""Every preference loss once: a small function of a batch of pairs, in the table `LOSSES` from its name.

A loss takes `Pairs`, numbers per pair that `losses.py` has summed up from log-probs, and `LossOptions`, and gives one
number per pair, (B,). Below, for each answer y to its prompt x (c the chosen one, r the rejected one):

    logp = log pi(y|x)    h = log pi(y|x) - log pi_ref(y|x)    s = f'(pi / pi_ref), the score; h itself by default
    n = number of tokens that count    d = s_c - s_r    eps = label_smoothing

logp and h are sums over the tokens or means, as `aggregate` says. All values and gradients stay finite in float32, for
margins of any size that log-probs can have and for answers without a token. So do norms of gradients, but for ipo and
ipo_unnormalized under forward_kl and alpha_divergence: their gradient is a product of two exponentials, whose square no
longer fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT_LIMIT = 20.0  # exp goes on as a line from here: see `_continued`


@dataclass(frozen=True)
class LossOptions:
    """What a preference loss can be told; `dpo_kernels.checks.loss_options` holds it to the ranges given here.

    beta: >= 0, for ipo and sppo_hard > 0. How strongly the policy is held to the reference.
    aggregate: "sum", or "mean" over the tokens that count.
    loss_type: a key of `LOSSES`, or several: their weighted sum.
    loss_weights: one finite number per loss_type; None: 1 each.
    label_smoothing: in [0, 1), the share of pairs whose preference may be flipped; for robust < 0.5, for exo_pair > 0.
        Only the losses in `SMOOTHED` have it; in a sum it counts in each of those, and the others are as without.
    f_divergence_type: a key of `DIVERGENCES`; other than "reverse_kl" only with the losses in `DIVERGING`.
    f_alpha_divergence_coef: finite, alpha of "alpha_divergence"; 1 is the reverse KL divergence.
    ld_alpha: None or in [0, 1]: weight of the tokens that the longer answer of a pair has beyond the shorter one's
        length, in policy and reference (LD-DPO, Liu et al. 2024, arXiv:2409.06411). Negative log-likelihoods (sft, and
        those within cpo and orpo) count every token in full all the same.
    use_weighting: each pair weighs as much as it is likely under the policy (WPO, Zhou et al. 2024, arXiv:2406.11827);
        not for the losses in `SORTED`, which have no pairs left.
    discopop_tau: temperature of discopop, > 0.
    simpo_gamma: target margin of simpo, >= 0.
    cpo_alpha: weight of cpo's negative log-likelihood, >= 0.
    """

    beta: float = 0.1
    aggregate: str = "sum"
    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses looks at the reference; the rewards always do where there is one."""
        return not all(name in REFERENCE_FREE for name in self.names)


class Sides(NamedTuple):
    """One number per answer: (B,) of the chosen, (B,) of the rejected."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Pairs:
    """What the losses are made of, all float32 or float64.

    logps, ref_logps: aggregated log-probs of policy and reference.
    logratios: aggregated log pi - log pi_ref, subtracted token by token; beta times it is the reward.
    scores: f' of pi / pi_ref.
    tokens: how many tokens count.
    is_mean: whether logps, ref_logps and logratios are means over the tokens, and scores f' of such a mean.
    chosen_nll: the chosen answers' negative log-probs, (B,), scaled so that the mean over pairs is that over tokens.
    weights: None, or what each pair weighs, (B,).
    """

    logps: Sides
    ref_logps: Sides
    logratios: Sides
    scores: Sides
    tokens: Sides
    is_mean: bool
    chosen_nll: Tensor
    weights: Tensor | None

    def per_token(self, values: Sides) -> Sides:
        """Aggregated values over the number of tokens; those of a mean as they are; 0 for an answer without a token."""
        if self.is_mean:
            return values
        return Sides(*(value / count.clamp_min(1) for value, count in zip(values, self.tokens, strict=True)))


def pair_losses(pairs: Pairs, options: LossOptions) -> Tensor:
    """The weighted sum of the losses that the options name, one number per pair, (B,)."""
    factors = options.loss_weights or (1.0,) * len(options.names)
    terms = [factor * LOSSES[name](pairs, options) for name, factor in zip(options.names, factors, strict=True)]
    total = torch.stack(terms).sum(0)
    return total if pairs.weights is None else total * pairs.weights


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """-(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d).

    DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7. With eps > 0 conservative DPO: Mitchell 2023, "A note on
    DPO with noisy preferences". eps in [0, 1).
    """
    return _smoothed(options.beta * pairs.scores.margin, options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid with d = s_c / n_c - s_r / n_r.

    Length-normalised DPO: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124. eps in [0, 1).
    """
    return _smoothed(options.beta * pairs.per_token(pairs.scores).margin, options.label_smoothing)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """max(0, 1 - beta d).

    Zhao et al. 2023 (SLiC), arXiv:2305.10425; with the reference Liu et al. 2023 (RSO), arXiv:2309.06657.
    """
    return F.relu(1 - options.beta * pairs.scores.margin)


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """(s_c / n_c - s_r / n_r - 1 / (2 beta))^2.

    Azar et al. 2023, arXiv:2310.12036, equation 17, with the scores a token, as its authors ran it. beta > 0.
    """
    return (pairs.per_token(pairs.scores).margin - 0.5 / options.beta).square()


def ipo_unnormalized(pairs: Pairs, options: LossOptions) -> Tensor:
    """(d - 1 / (2 beta))^2: `ipo` to the letter of the paper, with scores that grow with the answer. beta > 0.

    Azar et al. 2023, arXiv:2310.12036, equation 17. With aggregate "mean" it is `ipo`.
    """
    return (pairs.scores.margin - 0.5 / options.beta).square()


def exo_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps) with q = sigmoid(beta d).

    The reverse KL divergence from preferences (1 - eps, eps): Ji et al. 2024 (EXO), arXiv:2402.00856, equation 16. eps
    in (0, 1); the paper takes 1e-3.
    """
    x, eps = options.beta * pairs.scores.margin, options.label_smoothing
    return torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-eps)) + torch.sigmoid(-x) * (
        F.logsigmoid(-x) - math.log(eps)
    )


def nca_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta h_c) - (log sigmoid(-beta h_c) + log sigmoid(-beta h_r)) / 2.

    Chen et al. 2024 (noise contrastive alignment), arXiv:2402.05369, for two answers.
    """
    chosen, rejected = (options.beta * h for h in pairs.logratios)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """(-(1 - eps) log sigmoid(beta d) + eps log sigmoid(-beta d)) / (1 - 2 eps).

    Unbiased where a share eps of the preferences is flipped: Chowdhury et al. 2024 (robust DPO), arXiv:2403.00409. eps
    in [0, 0.5).
    """
    x, eps = options.beta * pairs.scores.margin, options.label_smoothing
    return (eps * F.logsigmoid(-x) - (1 - eps) * F.logsigmoid(x)) / (1 - 2 * eps)


def bco_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta h_c) - log sigmoid(-beta h_r).

    Jung et al. 2024 (binary classifier optimization), arXiv:2404.04656, for pairs and without its reward shift.
    """
    return -F.logsigmoid(options.beta * pairs.logratios.chosen) - F.logsigmoid(-options.beta * pairs.logratios.rejected)


def sppo_hard(pairs: Pairs, options: LossOptions) -> Tensor:
    """(h_c - 1 / (2 beta))^2 + (h_r + 1 / (2 beta))^2.

    Wu et al. 2024 (SPPO), arXiv:2405.00675, equation 4.7 where the chosen answer always wins. beta > 0.
    """
    half = 0.5 / options.beta
    return (pairs.logratios.chosen - half).square() + (pairs.logratios.rejected + half).square()


def aot(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid with d = sort(logp_c - logp_r) - sort(logp_ref,c - logp_ref,r), sorted over the batch.

    Melnyk et al. 2024 (alignment via optimal transport, paired), arXiv:2406.05882. eps in [0, 1). No mean over pairs:
    it depends on which pairs share a batch.
    """
    margin = pairs.logps.margin.sort().values - pairs.ref_logps.margin.sort().values
    return _smoothed(options.beta * margin, options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid with d = sort(h_c) - sort(h_r), sorted over the batch.

    Melnyk et al. 2024 (alignment via optimal transport, unpaired), arXiv:2406.05882. eps in [0, 1). No mean over pairs,
    as `aot`.
    """
    margin = pairs.logratios.chosen.sort().values - pairs.logratios.rejected.sort().values
    return _smoothed(options.beta * margin, options.label_smoothing)


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """1 - sigmoid(beta h_c) + sigmoid(beta h_r): for chosen answers better than the model's own.

    D'Oosterlinck et al. 2024 (anchored preference optimization), arXiv:2408.06266, equation 7.
    """
    return torch.sigmoid(-options.beta * pairs.logratios.chosen) + torch.sigmoid(
        options.beta * pairs.logratios.rejected
    )


def apo_down(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid(beta h_c) + 1 - sigmoid(beta (h_c - h_r)): for chosen answers worse than the model's own.

    D'Oosterlinck et al. 2024 (anchored preference optimization), arXiv:2408.06266, equation 8.
    """
    return torch.sigmoid(options.beta * pairs.logratios.chosen) + torch.sigmoid(-options.beta * pairs.logratios.margin)


def discopop(pairs: Pairs, options: LossOptions) -> Tensor:
    """-(1 - m) log sigmoid(x) + m exp(-x) with x = beta d and m = sigmoid(x / tau).

    Lu et al. 2024 (log-ratio modulated loss), arXiv:2406.08414, equation 5. tau = discopop_tau > 0; the paper takes
    0.05. m exp(-x) is formed as one exponential: where m is 0 and exp(-x) infinite, their product is no NaN.
    """
    x, tau = options.beta * pairs.scores.margin, options.discopop_tau
    exponential = _continued(torch.exp, F.logsigmoid(x / tau) - x)
    return exponential - torch.sigmoid(-x / tau) * F.logsigmoid(x)


def sft(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log pi(y_c|x), the mean over the batch's tokens: weighted and beside sigmoid it makes RPO.

    Pang et al. 2024, arXiv:2404.19733. A pair's share is -logp_c over the mean number of tokens.
    """
    return pairs.chosen_nll


def simpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid with beta d = beta (logp_c / n_c - logp_r / n_r) - gamma.

    Meng et al. 2024 (SimPO), arXiv:2405.14734, equation 6; no reference. gamma = simpo_gamma >= 0; the paper takes
    beta of 2 to 10 and gamma of 0.3 to 1.6. eps in [0, 1).
    """
    return _smoothed(options.beta * pairs.per_token(pairs.logps).margin - options.simpo_gamma, options.label_smoothing)


def cpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid with d = logp_c - logp_r, and alpha times `sft`.

    Xu et al. 2024 (contrastive preference optimization), arXiv:2401.08417, equation 3; no reference.
    alpha = cpo_alpha >= 0. eps in [0, 1).
    """
    return _smoothed(options.beta * pairs.logps.margin, options.label_smoothing) + options.cpo_alpha * pairs.chosen_nll


def orpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """`sft`, and -beta log sigmoid(o_c - o_r) with log-odds o = logp / n - log(1 - exp(logp / n)).

    Hong et al. 2024 (ORPO), arXiv:2403.07691, equations 4 to 7, their lambda being beta; no reference. The negative
    log-likelihood is that of the answer alone. An answer without a token counts with odds of 1.
    """
    odds = [_log_odds(logp, n) for logp, n in zip(pairs.per_token(pairs.logps), pairs.tokens, strict=True)]
    return pairs.chosen_nll - options.beta * F.logsigmoid(odds[0] - odds[1])


def _smoothed(x: Tensor, eps: float) -> Tensor:
    loss = -F.logsigmoid(x)
    return loss if eps == 0 else (1 - eps) * loss - eps * F.logsigmoid(-x)


def _log_odds(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p <= 0, bounded at p = 1 - eps; 0 where there is no token."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(tokens > 0, log_p - torch.log(-torch.expm1(log_p)), 0)


def _continued(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """exp or expm1, and from EXPONENT_LIMIT on their tangent there: finite, and with a gradient that never vanishes."""
    return function(x.clamp(max=EXPONENT_LIMIT)) + math.exp(EXPONENT_LIMIT) * F.relu(x - EXPONENT_LIMIT)


LOSSES: dict[str, Callable[[Pairs, LossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_unnormalized": ipo_unnormalized,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "simpo": simpo,
    "cpo": cpo,
    "orpo": orpo,
}

# Which losses label_smoothing means something for.
SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo")
# f' leaves a term in each score that only a difference of scores is rid of (and sft has none).
DIVERGING = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_unnormalized", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip
SORTED = ("aot", "aot_unpaired")
REFERENCE_FREE = ("sft", "simpo", "cpo", "orpo")
POSITIVE_BETA = ("ipo", "ipo_unnormalized", "sppo_hard")


def _reverse_kl(h: Tensor, options: LossOptions) -> Tensor:
    """log t: DPO itself."""
    return h


def _forward_kl(h: Tensor, options: LossOptions) -> Tensor:
    """1 - 1 / t."""
    return -_continued(torch.expm1, -h)


def _js_divergence(h: Tensor, options: LossOptions) -> Tensor:
    """log(2 t / (1 + t))."""
    return math.log(2) + F.logsigmoid(h)


def _alpha_divergence(h: Tensor, options: LossOptions) -> Tensor:
    """(t^(alpha - 1) - 1) / (alpha - 1), and its limit log t at alpha = 1.

    alpha as TRL 1.16 has it: one minus that of the f-DPO paper, where f' is (1 - t^-alpha) / alpha.
    """
    power = options.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:
        return h
    return _continued(torch.expm1, power * h) / power


# f'(t) of t = exp(h) = pi / pi_ref: Wang et al. 2023 (f-DPO), arXiv:2309.16240, up to constants that cancel.
DIVERGENCES: dict[str, Callable[[Tensor, LossOptions], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
