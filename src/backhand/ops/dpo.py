"""Direct preference optimisation, in every form of TRL's `loss_type` that is a closed formula of one pair.

A pair is a prompt x with a chosen answer y⁺ and a rejected one y⁻. Its losses depend on

    c = log π(y⁺|x) - log π_ref(y⁺|x),   r = log π(y⁻|x) - log π_ref(y⁻|x)      [arXiv:2305.18290, §4]

which are sums over the answers' tokens, or means over them for the forms in `AVERAGED`. With u = β c, v = β r, z = u -
v, the logistic function σ and label smoothing ε:

    sigmoid, sigmoid_norm   -log σ(z)                                             [arXiv:2305.18290, eq. 7; 2411.15124]
    hinge        max(0, 1 - z)                                                              [arXiv:2309.06657]
    ipo          (c - r - 1 / 2β)²                                                          [arXiv:2310.12036, eq. 17]
    exo_pair     q (log q - log(1 - ε)) + (1 - q) (log(1 - q) - log ε),  q = σ(z)           [arXiv:2402.00856, eq. 16]
    robust       (-(1 - ε) log σ(z) + ε log σ(-z)) / (1 - 2ε)                               [arXiv:2403.00409]
    discopop     -(1 - m) log σ(z) + m e⁻ᶻ,  m = σ(z / τ)                                   [arXiv:2406.08414, eq. 5]
    nca_pair     -log σ(u) - ½ log σ(-u) - ½ log σ(-v)                                      [arXiv:2402.05369]
    bco_pair     -log σ(u) - log σ(-v)                                       [arXiv:2404.04656, without the shift of r]
    sppo_hard    (c - 1 / 2β)² + (r + 1 / 2β)²                                              [arXiv:2405.00675, eq. 4.7]
    apo_zero     1 - σ(u) + σ(v)                                                            [arXiv:2408.06266, eq. 7]
    apo_down     σ(u) + 1 - σ(z)                                                            [arXiv:2408.06266, eq. 8]

Backward. σ'(t) = σ(t) σ(-t) and (log σ)'(t) = σ(-t), so ∂ℓ/∂z (then ∂ℓ/∂u = -∂ℓ/∂v = ∂ℓ/∂z), or ∂ℓ/∂u and ∂ℓ/∂v, are
    sigmoid, sigmoid_norm   -σ(-z)            hinge   -[z < 1]            ipo   2 (z - ½) / β²
    exo_pair     q (1 - q) (z - log((1 - ε) / ε)), for the terms from q itself cancel: q' - q' = 0
    robust       (-(1 - ε) σ(-z) - ε σ(z)) / (1 - 2ε)
    discopop     m (1 - m) (e⁻ᶻ + log σ(z)) / τ - (1 - m) σ(-z) - m e⁻ᶻ
    nca_pair     -σ(-u) + ½ σ(u),  ½ σ(v)     bco_pair  -σ(-u),  σ(v)     sppo_hard  2 (u - ½) / β²,  2 (v + ½) / β²
    apo_zero     -σ'(u),  σ'(v)               apo_down  σ'(u) - σ'(z),  σ'(z)
and with G = ∂L/∂ℓ, (pairs,),   ∂L/∂c = β G ∂ℓ/∂u,   ∂L/∂r = β G ∂ℓ/∂v      (pairs,).

Saved: u and v. TRL's forms that sort the pairs of a batch (`aot`) apply SimPO's formula to the sorted values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import logsigmoid


class DPORule(NamedTuple):
    """The form of the loss, β, ε and discopop's τ; names as in TRL's DPOConfig."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


class DPOSaved(NamedTuple):
    """Saved for the backward: u and v, (pairs,) in float32 or wider, the rule, and the dtype of c and r."""

    u: Tensor
    v: Tensor
    rule: DPORule
    dtype: torch.dtype


class DPOGrads(NamedTuple):
    """d_chosen and d_rejected, (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


AVERAGED = frozenset({"ipo", "sigmoid_norm"})
"""The forms whose c and r are means over an answer's tokens."""


Parts = tuple[Tensor, Tensor, Tensor]


def _of_margin(loss: Tensor, d_z: Tensor) -> Parts:
    return loss, d_z, -d_z


def _sigmoid_slope(t: Tensor) -> Tensor:
    return sigmoid(t) * sigmoid(-t)


def _exo_pair(u: Tensor, v: Tensor, rule: DPORule) -> Parts:
    z, right, wrong = u - v, math.log1p(-rule.label_smoothing), math.log(rule.label_smoothing)
    loss = sigmoid(z) * (logsigmoid(z) - right) + sigmoid(-z) * (logsigmoid(-z) - wrong)
    return _of_margin(loss, _sigmoid_slope(z) * (z - right + wrong))


def _robust(u: Tensor, v: Tensor, rule: DPORule) -> Parts:
    z, eps, whole = u - v, rule.label_smoothing, 1 - 2 * rule.label_smoothing
    loss = ((eps - 1) * logsigmoid(z) + eps * logsigmoid(-z)) / whole
    return _of_margin(loss, ((eps - 1) * sigmoid(-z) - eps * sigmoid(z)) / whole)


def _discopop(u: Tensor, v: Tensor, rule: DPORule) -> Parts:
    z, tau = u - v, rule.discopop_tau
    m, rest, decay = sigmoid(z / tau), sigmoid(-z / tau), (-z).exp()
    d_z = m * rest * (decay + logsigmoid(z)) / tau - rest * sigmoid(-z) - m * decay
    return _of_margin(m * decay - rest * logsigmoid(z), d_z)


def _nca_pair(u: Tensor, v: Tensor, _: DPORule) -> Parts:
    loss = -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v)
    return loss, 0.5 * sigmoid(u) - sigmoid(-u), 0.5 * sigmoid(v)


# ℓ, ∂ℓ/∂u and ∂ℓ/∂v of each form.
_FORMS: dict[str, Callable[[Tensor, Tensor, DPORule], Parts]] = {
    "sigmoid": lambda u, v, _: _of_margin(-logsigmoid(u - v), -sigmoid(v - u)),
    "hinge": lambda u, v, _: _of_margin((1 - u + v).relu(), -(u - v < 1).to(u.dtype)),
    "ipo": lambda u, v, o: _of_margin(((u - v - 0.5) / o.beta) ** 2, 2 * (u - v - 0.5) / o.beta**2),
    "exo_pair": _exo_pair,
    "robust": _robust,
    "discopop": _discopop,
    "nca_pair": _nca_pair,
    "bco_pair": lambda u, v, _: (-logsigmoid(u) - logsigmoid(-v), -sigmoid(-u), sigmoid(v)),
    "sppo_hard": lambda u, v, o: (
        ((u - 0.5) ** 2 + (v + 0.5) ** 2) / o.beta**2,
        2 * (u - 0.5) / o.beta**2,
        2 * (v + 0.5) / o.beta**2,
    ),
    "apo_zero": lambda u, v, _: (sigmoid(-u) + sigmoid(v), -_sigmoid_slope(u), _sigmoid_slope(v)),
    "apo_down": lambda u, v, _: (
        sigmoid(u) + sigmoid(v - u),
        _sigmoid_slope(u) - _sigmoid_slope(u - v),
        _sigmoid_slope(u - v),
    ),
}
_FORMS["sigmoid_norm"] = _FORMS["sigmoid"]


def dpo_forward(chosen: Tensor, rejected: Tensor, rule: DPORule) -> tuple[Tensor, DPOSaved]:
    """Compute ℓ of every pair.

    Args:
        chosen: c, (pairs,).
        rejected: r, (pairs,).
        rule: the form and its parameters.

    Returns:
        (pairs,) losses, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(chosen.dtype, torch.float32)
    u, v = rule.beta * chosen.to(wide), rule.beta * rejected.to(wide)
    losses, _, _ = _FORMS[rule.loss_type](u, v, rule)
    return losses, DPOSaved(u, v, rule, chosen.dtype)


def dpo_backward(d_y: Tensor, saved: DPOSaved) -> DPOGrads:
    """Map d_y, (pairs,), to the gradients derived in the module docstring."""
    u, v, rule, dtype = saved
    _, d_u, d_v = _FORMS[rule.loss_type](u, v, rule)
    return DPOGrads((rule.beta * d_y * d_u).to(dtype), (rule.beta * d_y * d_v).to(dtype))


def dpo_reference(chosen: Tensor, rejected: Tensor, rule: DPORule) -> Tensor:
    """Compute the same losses by the papers' formulas, with exponentials and logarithms of c and r."""

    def p(t: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-beta * t))

    beta, eps = rule.beta, rule.label_smoothing
    c, r, m = chosen, rejected, 1 / (1 + torch.exp(-beta * (chosen - rejected) / rule.discopop_tau))
    log_q, log_rest = p(c - r).log(), p(r - c).log()
    by_type: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -log_q,
        "sigmoid_norm": lambda: -log_q,
        "hinge": lambda: torch.clamp(1 - beta * (c - r), min=0),
        "ipo": lambda: (c - r - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: p(c - r) * (log_q - math.log(1 - eps)) + p(r - c) * (log_rest - math.log(eps)),
        "robust": lambda: (-(1 - eps) * log_q + eps * log_rest) / (1 - 2 * eps),
        "discopop": lambda: -(1 - m) * log_q + m * torch.exp(-beta * (c - r)),
        "nca_pair": lambda: -p(c).log() - p(-c).log() / 2 - p(-r).log() / 2,
        "bco_pair": lambda: -p(c).log() - p(-r).log(),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - p(c) + p(r),
        "apo_down": lambda: p(c) + 1 - p(c - r),
    }
    return by_type[rule.loss_type]()
