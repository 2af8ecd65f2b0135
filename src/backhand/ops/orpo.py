"""ORPO: the chosen answer is learnt, and its odds raised above those of the rejected one; without a reference.

    ℓ = -c - β log σ(o),   o = log odds(c) - log odds(r),   log odds(t) = t - log(1 - eᵗ)   [arXiv:2403.07691, eq. 4, 7]

with c and r < 0 the means over the tokens of log π of the chosen and of the rejected answer, and β the paper's λ, as
TRL calls it. The first term is the loss of supervised training on the chosen answer, a mean over its tokens, of each
pair by itself. (TRL takes this mean over all tokens of a batch, those of the prompts included.)

Backward. (log odds)'(t) = 1 + eᵗ / (1 - eᵗ) = 1 / (1 - eᵗ), so with G = ∂L/∂ℓ, (pairs,),
    ∂L/∂c = -G (1 + β σ(-o) / (1 - eᶜ)),     ∂L/∂r = β G σ(-o) / (1 - eʳ)      (pairs,)
Where c nears 0, σ(-o) and 1 - eᶜ both vanish. With a = eᶜ (1 - eʳ) and b = eʳ (1 - eᶜ), o = log(a / b), so that
σ(-o) = b / (a + b) and σ(-o) / (1 - eᶜ) = eʳ / (a + b), which stays finite.

Saved: c and r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class ORPOSaved(NamedTuple):
    """What the forward keeps: c and r, (pairs,) in float32 or wider, β, and the dtype they came in."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    dtype: torch.dtype


class ORPOGrads(NamedTuple):
    """d_chosen and d_rejected, (pairs,)."""

    d_chosen: Tensor
    d_rejected: Tensor


def orpo_forward(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, ORPOSaved]:
    """ℓ of every pair, (pairs,), float32 or wider, from mean log-probabilities c and r, (pairs,), below 0."""
    wide = torch.promote_types(chosen.dtype, torch.float32)
    c, r = chosen.to(wide), rejected.to(wide)
    log_odds = _log_odds(c) - _log_odds(r)
    return -c - beta * logsigmoid(log_odds), ORPOSaved(c, r, beta, chosen.dtype)


def _log_odds(t: Tensor) -> Tensor:
    return t - (-torch.expm1(t)).log()


def orpo_backward(d_y: Tensor, saved: ORPOSaved) -> ORPOGrads:
    """Map d_y, (pairs,), to the gradients derived in the module docstring."""
    c, r, beta, dtype = saved
    rest_c, rest_r = -torch.expm1(c), -torch.expm1(r)  # 1 - eᵗ
    both = c.exp() * rest_r + r.exp() * rest_c
    d_c = -d_y * (1 + beta * r.exp() / both)
    d_r = beta * d_y * r.exp() * rest_c / (both * rest_r)
    return ORPOGrads(d_c.to(dtype), d_r.to(dtype))


def orpo_reference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The same losses from the odds themselves."""
    odds_c, odds_r = (t.exp() / (1 - t.exp()) for t in (chosen, rejected))
    return -chosen - beta * (odds_c / (odds_c + odds_r)).log()
