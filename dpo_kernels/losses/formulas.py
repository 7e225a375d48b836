"""Every preference loss once: a small function of a batch of pairs, and its row in the table at the end of this file.

A loss takes `Pairs`, numbers per pair that `make_pairs` has summed up from log-probs, and `LossOptions`, and gives one
number per pair, (B,). A new loss is a function and a row. Below, for each answer y to its prompt x (c the chosen one, r
the rejected one):

    logp = log pi(y|x)    h = log pi(y|x) - log pi_ref(y|x)    s = f'(pi / pi_ref), the score; h itself by default
    n = number of tokens that count    d = s_c - s_r    eps = label_smoothing

logp and h are sums over the tokens or means, as `aggregate` says. All values and gradients stay finite in float32, for
margins of any size that log-probs can have and for answers without a token. So do norms of gradients, but for ipo and
ipo_unnormalized under forward_kl and alpha_divergence: their gradient is a product of two exponentials, whose square no
longer fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.losses.options import LossOptions
from dpo_kernels.losses.pairs import Pairs
from dpo_kernels.losses.registry import DIVERGENCES, Loss, Smoothing, register

EXPONENT_LIMIT = 20.0  # exp goes on as a line from here: see `_continued`


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


# Wang et al. 2023 (f-DPO), arXiv:2309.16240, up to constants that cancel.
DIVERGENCES.update(
    reverse_kl=_reverse_kl,
    forward_kl=_forward_kl,
    js_divergence=_js_divergence,
    alpha_divergence=_alpha_divergence,
)

# f' leaves a term in each score that only a difference of scores is rid of, so that most losses have the first alone.
EVERY = tuple(DIVERGENCES)
ANY_SHARE = Smoothing()  # [0, 1)

register(
    Loss("sigmoid", sigmoid, smoothing=ANY_SHARE, divergences=EVERY),
    Loss("sigmoid_norm", sigmoid_norm, smoothing=ANY_SHARE, divergences=EVERY),
    Loss("hinge", hinge, divergences=EVERY),
    Loss("ipo", ipo, positive_beta=True, divergences=EVERY),
    Loss("ipo_unnormalized", ipo_unnormalized, positive_beta=True, divergences=EVERY),
    Loss("exo_pair", exo_pair, smoothing=Smoothing(positive=True, example="1e-3"), divergences=EVERY),
    Loss("nca_pair", nca_pair),
    Loss("robust", robust, smoothing=Smoothing(below=0.5), divergences=EVERY),
    Loss("bco_pair", bco_pair),
    Loss("sppo_hard", sppo_hard, positive_beta=True),
    Loss("aot", aot, smoothing=ANY_SHARE, paired=False),
    Loss("aot_unpaired", aot_unpaired, smoothing=ANY_SHARE, paired=False),
    Loss("apo_zero", apo_zero),
    Loss("apo_down", apo_down),
    Loss("discopop", discopop, divergences=EVERY),
    Loss("sft", sft, needs_reference=False, divergences=EVERY),  # it has no scores
    Loss("simpo", simpo, smoothing=ANY_SHARE, needs_reference=False),
    Loss("cpo", cpo, smoothing=ANY_SHARE, needs_reference=False),
    Loss("orpo", orpo, needs_reference=False),
)
