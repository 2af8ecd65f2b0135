"""Preference losses of pairs: DPO in its forms, IPO, SimPO, ORPO and KTO, as one table of formulas.

A pair is a prompt x with a chosen answer y⁺ and a rejected one y⁻. Its loss ℓ is a function of two numbers, c of the
chosen and r of the rejected answer. Let

    u = β c,   v = β r,   z = u - v - γ,   σ the logistic function,   ε label smoothing.

What c and r are depends on the method:

    dpo             log π(y|x) - log π_ref(y|x), summed over an answer's tokens                  [arXiv:2305.18290, §4]
    sigmoid_norm    the same, as the mean over the tokens, and so for ipo          [arXiv:2411.15124; 2310.12036]
    simpo, orpo     log π(y|x), as the mean over the tokens, without a reference model; only simpo has γ > 0
    aot             values of equal rank in a step's pairs, with the loss sigmoid                    [arXiv:2406.05882]
    kto             ρ = log π(y|x) - log π_ref(y|x) of a single answer, and z₀, an estimate of the divergence of π from
                    π_ref. A desirable answer is chosen over z₀: c = ρ, r = z₀. An undesirable one is rejected:
                    c = z₀, r = ρ. No gradient flows through z₀. `apo_zero_unpaired` has z₀ = 0.

Losses of the margin z. σ'(t) = σ(t) σ(-t) and (log σ)'(t) = σ(-t), so

    loss        ℓ                                              ∂ℓ/∂z                                 source
    sigmoid     -(1 - ε) log σ(z) - ε log σ(-z)                ε σ(z) - (1 - ε) σ(-z)                2305.18290, eq. 7;
                                                                                     with γ (simpo)  2405.14734, eq. 6
    kto         1 - σ(z)                                       -σ'(z)                                2402.01306, eq. 7
    hinge       max(0, 1 - z)                                  -[z < 1]                              2309.06657
    ipo         (z - ½)² / β² = (c - r - 1 / 2β)²              2 (z - ½) / β²                        2310.12036, eq. 17
    exo_pair    q (log q - log(1 - ε))                         σ'(z) (z - log((1 - ε) / ε)); the     2402.00856, eq. 16
                + (1 - q) (log(1 - q) - log ε),  q = σ(z)      terms from q itself cancel
    robust      (-(1 - ε) log σ(z) + ε log σ(-z)) / (1 - 2ε)   (-(1 - ε) σ(-z) - ε σ(z)) / (1 - 2ε)  2403.00409
    discopop    -(1 - m) log σ(z) + m e⁻ᶻ,  m = σ(z / τ)       m (1 - m) (e⁻ᶻ + log σ(z)) / τ        2406.08414, eq. 5
                                                               - (1 - m) σ(-z) - m e⁻ᶻ

with ∂ℓ/∂u = -∂ℓ/∂v = ∂ℓ/∂z. Losses of both sides:

    loss        ℓ                                              ∂ℓ/∂u               ∂ℓ/∂v             source
    nca_pair    -log σ(u) - ½ log σ(-u) - ½ log σ(-v)          ½ σ(u) - σ(-u)      ½ σ(v)            2402.05369
    bco_pair    -log σ(u) - log σ(-v)                          -σ(-u)              σ(v)              2404.04656
    sppo_hard   ((u - ½)² + (v + ½)²) / β²                     2 (u - ½) / β²      2 (v + ½) / β²    2405.00675, eq. 4.7
    apo_zero    1 - σ(u) + σ(v)                                -σ'(u)              σ'(v)             2408.06266, eq. 7
    apo_down    σ(u) + 1 - σ(z)                                σ'(u) - σ'(z)       σ'(z)             2408.06266, eq. 8

and with G = ∂L/∂ℓ of shape (pairs,),   ∂L/∂c = β G ∂ℓ/∂u,   ∂L/∂r = β G ∂ℓ/∂v      (pairs,).

ORPO raises the odds of the chosen answer above those of the rejected one:

    ℓ = -c - β log σ(o),   o = log odds(c) - log odds(r),   log odds(t) = t - log(1 - eᵗ)   [arXiv:2403.07691, eq. 4, 7]

β is TRL's name of the paper's λ. The first term is the loss of supervised training on the chosen answer, a mean over
its tokens per pair. (TRL takes this mean over all tokens of a batch, including those of the prompts.)
With (log odds)'(t) = 1 / (1 - eᵗ),
    ∂L/∂c = -G (1 + β σ(-o) / (1 - eᶜ)),     ∂L/∂r = β G σ(-o) / (1 - eʳ)      (pairs,)
Where c nears 0, σ(-o) and 1 - eᶜ both vanish. With a = eᶜ (1 - eʳ) and b = eʳ (1 - eᶜ), o = log(a / b), so that
σ(-o) = b / (a + b) and σ(-o) / (1 - eᶜ) = eʳ / (a + b), which stays finite.
Where r nears 0, ℓ and its slope grow without bounds, while their factor, the token's 1 - p, vanishes at the same rate.
Float32 has no p between 1 - 2⁻²⁴ and 1, and rounds the nats of such a p to 0. Both c and r are therefore clamped to
-2⁻²⁴ at most, slopes included.

Saved: c and r. The backward evaluates the same row of the table again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid

CERTAIN = 2.0**-24
"""The smallest nats of a token that float32 distinguishes from 0."""


class PreferenceRule(NamedTuple):
    """The row of the table, β, ε, γ and discopop's τ; names as in TRL's configurations."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    discopop_tau: float = 0.05


class PreferenceSaved(NamedTuple):
    """Saved for the backward: c and r of shape (pairs,) in float32 or wider, the rule, and their original dtype."""

    chosen: Tensor
    rejected: Tensor
    rule: PreferenceRule
    dtype: torch.dtype


class PreferenceGrads(NamedTuple):
    """d_chosen and d_rejected of shape (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


def _slope(t: Tensor) -> Tensor:
    """Return σ'(t)."""
    return sigmoid(t) * sigmoid(-t)


def _exo_pair(z: Tensor, rule: PreferenceRule) -> tuple[Tensor, Tensor]:
    right, wrong = math.log1p(-rule.label_smoothing), math.log(rule.label_smoothing)
    loss = sigmoid(z) * (logsigmoid(z) - right) + sigmoid(-z) * (logsigmoid(-z) - wrong)
    return loss, _slope(z) * (z - right + wrong)


def _robust(z: Tensor, rule: PreferenceRule) -> tuple[Tensor, Tensor]:
    eps, whole = rule.label_smoothing, 1 - 2 * rule.label_smoothing
    loss = ((eps - 1) * logsigmoid(z) + eps * logsigmoid(-z)) / whole
    return loss, ((eps - 1) * sigmoid(-z) - eps * sigmoid(z)) / whole


def _discopop(z: Tensor, rule: PreferenceRule) -> tuple[Tensor, Tensor]:
    tau, decay = rule.discopop_tau, (-z).exp()
    m, rest = sigmoid(z / tau), sigmoid(-z / tau)
    d_z = m * rest * (decay + logsigmoid(z)) / tau - rest * sigmoid(-z) - m * decay
    return m * decay - rest * logsigmoid(z), d_z


# (z, rule) → ℓ and ∂ℓ/∂z.
_OF_MARGIN: dict[str, Callable[[Tensor, PreferenceRule], tuple[Tensor, Tensor]]] = {
    "sigmoid": lambda z, o: (
        (o.label_smoothing - 1) * logsigmoid(z) - o.label_smoothing * logsigmoid(-z),
        o.label_smoothing * sigmoid(z) - (1 - o.label_smoothing) * sigmoid(-z),
    ),
    "kto": lambda z, _: (sigmoid(-z), -_slope(z)),
    "hinge": lambda z, _: ((1 - z).relu(), -(z < 1).to(z.dtype)),
    "ipo": lambda z, o: (((z - 0.5) / o.beta) ** 2, 2 * (z - 0.5) / o.beta**2),
    "exo_pair": _exo_pair,
    "robust": _robust,
    "discopop": _discopop,
}

# (u, v, rule) → ℓ, ∂ℓ/∂u and ∂ℓ/∂v.
_OF_SIDES: dict[str, Callable[[Tensor, Tensor, PreferenceRule], tuple[Tensor, Tensor, Tensor]]] = {
    "nca_pair": lambda u, v, _: (
        -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v),
        0.5 * sigmoid(u) - sigmoid(-u),
        0.5 * sigmoid(v),
    ),
    "bco_pair": lambda u, v, _: (-logsigmoid(u) - logsigmoid(-v), -sigmoid(-u), sigmoid(v)),
    "sppo_hard": lambda u, v, o: (
        ((u - 0.5) ** 2 + (v + 0.5) ** 2) / o.beta**2,
        2 * (u - 0.5) / o.beta**2,
        2 * (v + 0.5) / o.beta**2,
    ),
    "apo_zero": lambda u, v, _: (sigmoid(-u) + sigmoid(v), -_slope(u), _slope(v)),
    "apo_down": lambda u, v, _: (sigmoid(u) + sigmoid(v - u), _slope(u) - _slope(u - v), _slope(u - v)),
}


def log_odds(t: Tensor) -> Tensor:
    """Return the log-odds of mean log-probabilities, which are clamped first."""
    t = t.clamp(max=-CERTAIN)
    return t - (-t.expm1()).log()


def _orpo(c: Tensor, r: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    c, r = c.clamp(max=-CERTAIN), r.clamp(max=-CERTAIN)
    rest_c, rest_r = -torch.expm1(c), -torch.expm1(r)  # 1 - eᵗ
    both = c.exp() * rest_r + r.exp() * rest_c
    loss = -c - beta * logsigmoid(log_odds(c) - log_odds(r))
    return loss, -(1 + beta * r.exp() / both), beta * r.exp() * rest_c / (both * rest_r)


def _evaluate(c: Tensor, r: Tensor, rule: PreferenceRule) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ, ∂ℓ/∂c and ∂ℓ/∂r."""
    if rule.loss_type == "orpo":
        return _orpo(c, r, rule.beta)
    u, v = rule.beta * c, rule.beta * r
    if rule.loss_type in _OF_MARGIN:
        loss, d_z = _OF_MARGIN[rule.loss_type](u - v - rule.simpo_gamma, rule)
        return loss, rule.beta * d_z, -rule.beta * d_z
    loss, d_u, d_v = _OF_SIDES[rule.loss_type](u, v, rule)
    return loss, rule.beta * d_u, rule.beta * d_v


def preference_forward(chosen: Tensor, rejected: Tensor, rule: PreferenceRule) -> tuple[Tensor, PreferenceSaved]:
    """Compute ℓ of every pair.

    Args:
        chosen: c, (pairs,).
        rejected: r, (pairs,).
        rule: the loss and its parameters.

    Returns:
        (pairs,) losses, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(chosen.dtype, torch.float32)
    c, r = chosen.to(wide), rejected.to(wide)
    losses, _, _ = _evaluate(c, r, rule)
    return losses, PreferenceSaved(c, r, rule, chosen.dtype)


def preference_backward(d_y: Tensor, saved: PreferenceSaved) -> PreferenceGrads:
    """Map d_y of shape (pairs,) to the gradients derived in the module docstring."""
    c, r, rule, dtype = saved
    _, d_c, d_r = _evaluate(c, r, rule)
    return PreferenceGrads((d_y * d_c).to(dtype), (d_y * d_r).to(dtype))


def preference_reference(chosen: Tensor, rejected: Tensor, rule: PreferenceRule) -> Tensor:
    """Compute the same losses by the papers' formulas, with exponentials and logarithms of c and r."""

    def p(t: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-beta * t))

    def orpo() -> Tensor:
        below = [t - (t.detach() + CERTAIN).relu() for t in (chosen, rejected)]
        odds_c, odds_r = (t.exp() / -t.expm1() for t in below)
        return -below[0] - beta * (odds_c / (odds_c + odds_r)).log()

    beta, eps = rule.beta, rule.label_smoothing
    c, r, d = chosen, rejected, chosen - rejected - rule.simpo_gamma / beta
    m = 1 / (1 + torch.exp(-beta * d / rule.discopop_tau))
    log_q, log_rest = p(d).log(), p(-d).log()
    by_type: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -(1 - eps) * log_q - eps * log_rest,
        "kto": lambda: 1 - p(d),
        "hinge": lambda: torch.clamp(1 - beta * d, min=0),
        "ipo": lambda: (d - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: p(d) * (log_q - math.log(1 - eps)) + p(-d) * (log_rest - math.log(eps)),
        "robust": lambda: (-(1 - eps) * log_q + eps * log_rest) / (1 - 2 * eps),
        "discopop": lambda: -(1 - m) * log_q + m * torch.exp(-beta * d),
        "nca_pair": lambda: -p(c).log() - p(-c).log() / 2 - p(-r).log() / 2,
        "bco_pair": lambda: -p(c).log() - p(-r).log(),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - p(c) + p(r),
        "apo_down": lambda: p(c) + 1 - p(c - r),
        "orpo": orpo,
    }
    return by_type[rule.loss_type]()
