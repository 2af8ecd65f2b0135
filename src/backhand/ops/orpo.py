"""ORPO: learn the chosen answer, and raise its odds above those of the rejected one, without a reference model.

    ℓ = -c - β log σ(o),   o = log odds(c) - log odds(r),   log odds(t) = t - log(1 - eᵗ)   [arXiv:2403.07691, eq. 4, 7]

with c and r < 0 the means over the tokens of log π of the chosen and of the rejected answer. β is TRL's name of the
paper's λ. The first term is the loss of supervised training on the chosen answer, a mean over its tokens per pair. (TRL
takes this mean over all tokens of a batch, including those of the prompts.)

Backward. (log odds)'(t) = 1 + eᵗ / (1 - eᵗ) = 1 / (1 - eᵗ), so with G = ∂L/∂ℓ, (pairs,),
    ∂L/∂c = -G (1 + β σ(-o) / (1 - eᶜ)),     ∂L/∂r = β G σ(-o) / (1 - eʳ)      (pairs,)
Where c nears 0, σ(-o) and 1 - eᶜ both vanish. With a = eᶜ (1 - eʳ) and b = eʳ (1 - eᶜ), o = log(a / b), so that
σ(-o) = b / (a + b) and σ(-o) / (1 - eᶜ) = eʳ / (a + b), which stays finite.
Where r nears 0, ℓ and its slope grow without bounds, while their factor, the token's 1 - p, vanishes at the same rate.
Float32 has no p between 1 - 2⁻²⁴ and 1, and rounds the nats of such a p to 0. Both c and r are therefore clamped to
-2⁻²⁴ at most, slopes included.

Saved: c and r after clamping.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CERTAIN = 2.0**-24
"""The smallest nats of a token that float32 tells from 0."""


class ORPOSaved(NamedTuple):
    """Saved for the backward: c and r, (pairs,) in float32 or wider, β, and their original dtype."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    dtype: torch.dtype


class ORPOGrads(NamedTuple):
    """d_chosen and d_rejected, (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


def orpo_forward(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, ORPOSaved]:
    """Compute ℓ of every pair, (pairs,), float32 or wider, from mean log-probabilities c and r, (pairs,), below 0."""
    wide = torch.promote_types(chosen.dtype, torch.float32)
    c, r = (t.to(wide).clamp(max=-CERTAIN) for t in (chosen, rejected))
    return -c - beta * logsigmoid(log_odds(c) - log_odds(r)), ORPOSaved(c, r, beta, chosen.dtype)


def log_odds(t: Tensor) -> Tensor:
    """Return the log-odds of mean log-probabilities, which are clamped first."""
    t = t.clamp(max=-CERTAIN)
    return t - (-t.expm1()).log()


def orpo_backward(d_y: Tensor, saved: ORPOSaved) -> ORPOGrads:
    """Map d_y, (pairs,), to the gradients derived in the module docstring."""
    c, r, beta, dtype = saved
    rest_c, rest_r = -torch.expm1(c), -torch.expm1(r)  # 1 - eᵗ
    both = c.exp() * rest_r + r.exp() * rest_c
    d_c = -d_y * (1 + beta * r.exp() / both)
    d_r = beta * d_y * r.exp() * rest_c / (both * rest_r)
    return ORPOGrads(d_c.to(dtype), d_r.to(dtype))


def orpo_reference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Compute the same losses from the odds themselves."""
    chosen, rejected = (t - (t.detach() + CERTAIN).relu() for t in (chosen, rejected))
    odds_c, odds_r = (t.exp() / -t.expm1() for t in (chosen, rejected))
    return -chosen - beta * (odds_c / (odds_c + odds_r)).log()
