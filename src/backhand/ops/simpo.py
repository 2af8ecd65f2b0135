"""SimPO: preference by the mean log-probability of an answer's tokens, with a margin and without a reference model.

    ℓ = -(1 - ε) log σ(z) - ε log σ(-z),   z = β (c - r) - γ      [arXiv:2405.14734, eq. 6; ε as in TRL's CPOTrainer]

with c and r the means over the tokens of log π of the chosen and of the rejected answer, γ the target margin between
their rewards β c and β r, and label smoothing ε.

Backward. (log σ)'(t) = σ(-t), so ∂ℓ/∂z = ε σ(z) - (1 - ε) σ(-z) and with G = ∂L/∂ℓ, (pairs,),
    ∂L/∂c = β G ∂ℓ/∂z      (pairs,),     ∂L/∂r = -∂L/∂c

Saved: z.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, sigmoid
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


class SimPORule(NamedTuple):
    """β, γ and ε; names as in TRL's CPOConfig."""

    beta: float
    simpo_gamma: float
    label_smoothing: float = 0.0


class SimPOSaved(NamedTuple):
    """Saved for the backward: z (pairs,) in float32 or wider, the rule, and the dtype of c and r."""

    z: Tensor
    rule: SimPORule
    dtype: torch.dtype


class SimPOGrads(NamedTuple):
    """d_chosen and d_rejected, (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


def simpo_forward(chosen: Tensor, rejected: Tensor, rule: SimPORule) -> tuple[Tensor, SimPOSaved]:
    """Compute ℓ of every pair, (pairs,), float32 or wider, from mean log-probabilities c and r, (pairs,)."""
    wide = torch.promote_types(chosen.dtype, torch.float32)
    z = rule.beta * (chosen.to(wide) - rejected.to(wide)) - rule.simpo_gamma
    eps = rule.label_smoothing
    return (eps - 1) * logsigmoid(z) - eps * logsigmoid(-z), SimPOSaved(z, rule, chosen.dtype)


def simpo_backward(d_y: Tensor, saved: SimPOSaved) -> SimPOGrads:
    """Map d_y, (pairs,), to the gradients derived in the module docstring."""
    z, rule, dtype = saved
    d_z = rule.label_smoothing * sigmoid(z) - (1 - rule.label_smoothing) * sigmoid(-z)
    d_chosen = (rule.beta * d_y * d_z).to(dtype)
    return SimPOGrads(d_chosen, -d_chosen)


def simpo_reference(chosen: Tensor, rejected: Tensor, rule: SimPORule) -> Tensor:
    """Compute the same losses as torch's binary cross-entropy with logits z and labels 1 - ε."""
    z = rule.beta * (chosen - rejected) - rule.simpo_gamma
    return binary_cross_entropy_with_logits(z, torch.full_like(z, 1 - rule.label_smoothing), reduction="none")
