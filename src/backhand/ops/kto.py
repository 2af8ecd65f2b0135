"""KTO: single answers, each desirable or not, compared with the model's divergence on other answers.

    ℓ = λ_D (1 - σ(β (ρ - z₀)))   of a desirable answer                                      [arXiv:2402.01306, eq. 7]
    ℓ = λ_U (1 - σ(β (z₀ - ρ)))   of an undesirable one

with ρ = log π(y|x) - log π_ref(y|x), summed over the answer's tokens. z₀ ≥ 0 estimates the divergence of π from π_ref
by the mean of the same sums over answers y' to other prompts; no gradient flows through it. With z₀ = 0 this is TRL's
`apo_zero_unpaired` [arXiv:2408.06266, eq. 7].

Backward. With s = 1 for desirable answers and -1 for others, ℓ = λ σ(-s β (ρ - z₀)), and σ'(t) = σ(t) σ(-t) is even, so
    ∂L/∂ρ = -s λ β G σ'(β (ρ - z₀))      (rows,),     G = ∂L/∂ℓ (rows,)

Saved: β (ρ - z₀), and s λ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, sigmoid


class KTORule(NamedTuple):
    """β, λ_D and λ_U; names as in TRL's KTOConfig."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


class KTOSaved(NamedTuple):
    """Saved for the backward: β (ρ - z₀) and s λ, (rows,) in float32 or wider, β, and the dtype of ρ."""

    apart: Tensor
    signed: Tensor
    beta: float
    dtype: torch.dtype


class KTOGrads(NamedTuple):
    """d_log_ratio (rows,)."""

    d_log_ratio: Tensor


def kto_forward(log_ratio: Tensor, desirable: Tensor, kl: Tensor, rule: KTORule) -> tuple[Tensor, KTOSaved]:
    """Compute ℓ of every row.

    Args:
        log_ratio: ρ, (rows,).
        desirable: (rows,) bool, on any device.
        kl: z₀, 0-d.
        rule: β and the weights.

    Returns:
        (rows,) losses, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(log_ratio.dtype, torch.float32)
    apart = rule.beta * (log_ratio.to(wide) - kl.to(wide))
    good = desirable.to(apart.device)
    signed = torch.full_like(apart, -rule.undesirable_weight).masked_fill_(good, rule.desirable_weight)
    return signed.abs() * sigmoid(-signed.sign() * apart), KTOSaved(apart, signed, rule.beta, log_ratio.dtype)


def kto_backward(d_y: Tensor, saved: KTOSaved) -> KTOGrads:
    """Map d_y, (rows,), to the gradient derived in the module docstring."""
    apart, signed, beta, dtype = saved
    return KTOGrads((-beta * d_y * signed * sigmoid(apart) * sigmoid(-apart)).to(dtype))


def kto_reference(log_ratio: Tensor, desirable: Tensor, kl: Tensor, rule: KTORule) -> Tensor:
    """Compute the same losses by the paper's formula, λ - v(x, y)."""
    good = rule.desirable_weight / (1 + torch.exp(-rule.beta * (log_ratio - kl)))
    bad = rule.undesirable_weight / (1 + torch.exp(-rule.beta * (kl - log_ratio)))
    return torch.where(desirable, rule.desirable_weight - good, rule.undesirable_weight - bad)
