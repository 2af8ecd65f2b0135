"""Direct preference optimisation, in every form of TRL's `loss_type` that is a closed formula of one pair.

A pair is a prompt x with a chosen answer y⁺ and a rejected one y⁻. Its losses see

    c = log π(y⁺|x) - log π_ref(y⁺|x),   r = log π(y⁻|x) - log π_ref(y⁻|x)      [arXiv:2305.18290, §4]

sums over the answers' tokens, or (`AVERAGED`) means over them. With u = β c, v = β r, z = u - v, the logistic function
σ and label smoothing ε:

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

Saved: u and v. Not here are those of TRL's forms that sort the pairs of a batch (`aot`), and `sft`, which is no pair's.
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
    """What the forward keeps: u and v, (pairs,) in float32 or wider, the rule, and the dtype of c and r."""

    u: Tensor
    v: Tensor
    rule: DPORule
    dtype: torch.dtype


class DPOGrads(NamedTuple):
    """d_chosen and d_rejected, (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


AVERAGED = frozenset({"ipo", "sigmoid_norm"})
"""Forms whose c and r are means over an answer's tokens."""

Slopes = tuple[Tensor, Tensor]


def _of_margin(
    loss: Callable[[Tensor, DPORule], Tensor], slope: Callable[[Tensor, DPORule], Tensor]
) -> tuple[Callable[[Tensor, Tensor, DPORule], Tensor], Callable[[Tensor, Tensor, DPORule], Slopes]]:
    """A form of z alone."""

    def slopes(u: Tensor, v: Tensor, rule: DPORule) -> Slopes:
        d_z = slope(u - v, rule)
        return d_z, -d_z

    return lambda u, v, rule: loss(u - v, rule), slopes


def _sigmoid_slope(t: Tensor) -> Tensor:
    return sigmoid(t) * sigmoid(-t)


def _exo_pair(z: Tensor, rule: DPORule) -> Tensor:
    right, wrong = math.log1p(-rule.label_smoothing), math.log(rule.label_smoothing)
    return sigmoid(z) * (logsigmoid(z) - right) + sigmoid(-z) * (logsigmoid(-z) - wrong)


def _discopop_slope(z: Tensor, rule: DPORule) -> Tensor:
    m, rest = sigmoid(z / rule.discopop_tau), sigmoid(-z / rule.discopop_tau)
    return m * rest * ((-z).exp() + logsigmoid(z)) / rule.discopop_tau - rest * sigmoid(-z) - m * (-z).exp()


_SIGMOID = _of_margin(lambda z, _: -logsigmoid(z), lambda z, _: -sigmoid(-z))

# Each form's loss and its slopes, both of (u, v, rule).
_FORMS: dict[str, tuple[Callable[[Tensor, Tensor, DPORule], Tensor], Callable[[Tensor, Tensor, DPORule], Slopes]]] = {
    "sigmoid": _SIGMOID,
    "sigmoid_norm": _SIGMOID,
    "hinge": _of_margin(lambda z, _: (1 - z).relu(), lambda z, _: -(z < 1).to(z.dtype)),
    "ipo": _of_margin(lambda z, o: ((z - 0.5) / o.beta) ** 2, lambda z, o: 2 * (z - 0.5) / o.beta**2),
    "exo_pair": _of_margin(
        _exo_pair, lambda z, o: _sigmoid_slope(z) * (z - math.log((1 - o.label_smoothing) / o.label_smoothing))
    ),
    "robust": _of_margin(
        lambda z, o: (
            ((o.label_smoothing - 1) * logsigmoid(z) + o.label_smoothing * logsigmoid(-z)) / (1 - 2 * o.label_smoothing)
        ),
        lambda z, o: (
            ((o.label_smoothing - 1) * sigmoid(-z) - o.label_smoothing * sigmoid(z)) / (1 - 2 * o.label_smoothing)
        ),
    ),
    "discopop": _of_margin(
        lambda z, o: sigmoid(z / o.discopop_tau) * (-z).exp() - sigmoid(-z / o.discopop_tau) * logsigmoid(z),
        _discopop_slope,
    ),
    "nca_pair": (
        lambda u, v, _: -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v),
        lambda u, v, _: (0.5 * sigmoid(u) - sigmoid(-u), 0.5 * sigmoid(v)),
    ),
    "bco_pair": (
        lambda u, v, _: -logsigmoid(u) - logsigmoid(-v),
        lambda u, v, _: (-sigmoid(-u), sigmoid(v)),
    ),
    "sppo_hard": (
        lambda u, v, o: ((u - 0.5) ** 2 + (v + 0.5) ** 2) / o.beta**2,
        lambda u, v, o: (2 * (u - 0.5) / o.beta**2, 2 * (v + 0.5) / o.beta**2),
    ),
    "apo_zero": (
        lambda u, v, _: sigmoid(-u) + sigmoid(v),
        lambda u, v, _: (-_sigmoid_slope(u), _sigmoid_slope(v)),
    ),
    "apo_down": (
        lambda u, v, _: sigmoid(u) + sigmoid(v - u),
        lambda u, v, _: (_sigmoid_slope(u) - _sigmoid_slope(u - v), _sigmoid_slope(u - v)),
    ),
}


def dpo_forward(chosen: Tensor, rejected: Tensor, rule: DPORule) -> tuple[Tensor, DPOSaved]:
    """ℓ of every pair.

    Args:
        chosen: c, (pairs,).
        rejected: r, (pairs,).
        rule: the form and its parameters.

    Returns:
        (pairs,) losses, float32 or wider, and what backward needs.
    """
    wide = torch.promote_types(chosen.dtype, torch.float32)
    u, v = rule.beta * chosen.to(wide), rule.beta * rejected.to(wide)
    loss, _ = _FORMS[rule.loss_type]
    return loss(u, v, rule), DPOSaved(u, v, rule, chosen.dtype)


def dpo_backward(d_y: Tensor, saved: DPOSaved) -> DPOGrads:
    """Map d_y, (pairs,), to the gradients derived in the module docstring."""
    u, v, rule, dtype = saved
    _, slopes = _FORMS[rule.loss_type]
    d_u, d_v = slopes(u, v, rule)
    return DPOGrads((rule.beta * d_y * d_u).to(dtype), (rule.beta * d_y * d_v).to(dtype))


def dpo_reference(chosen: Tensor, rejected: Tensor, rule: DPORule) -> Tensor:
    """The same losses as the papers write them, by exponentials and logarithms of c and r."""

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
