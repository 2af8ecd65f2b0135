"""The decay of a gated state, as a logarithm: the share of the state that a token retains.

    g = -e^A softplus(a + b),   softplus(z) = log(1 + e^z)      [arXiv:2312.00752, §3.2 and appendix C; 2412.06464, §3]

with one frozen A and b per head, and a (tokens, heads) computed from the token. g < 0, so that e^g is in (0, 1).

Backward. softplus' = σ, so with G = ∂L/∂g
    ∂L/∂a = -e^A G σ(a + b)      (tokens, heads)

Saved: a, A and b. g is float32 or wider whatever a is, since the state is multiplied by e^g hundreds of times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class DecayGateSaved(NamedTuple):
    """a (tokens, heads); A and b of shape (heads,) each."""

    a: Tensor
    log_rate: Tensor
    bias: Tensor


class DecayGateGrads(NamedTuple):
    """d_a (tokens, heads)."""

    d_a: Tensor


def decay_gate_forward(a: Tensor, log_rate: Tensor, bias: Tensor) -> tuple[Tensor, DecayGateSaved]:
    """Compute g of every token and head.

    Args:
        a: (tokens, heads).
        log_rate: A, (heads,).
        bias: b, (heads,).

    Returns:
        g (tokens, heads), float32 or wider, and the saved tensors.
    """
    saved = DecayGateSaved(a, log_rate, bias)
    rate, z = _rate_and_z(saved)
    return functional.softplus(z).mul_(-rate), saved


def decay_gate_backward(d_y: Tensor, saved: DecayGateSaved) -> DecayGateGrads:
    """Map d_y of shape (tokens, heads) to the gradient derived in the module docstring, in a's dtype."""
    rate, z = _rate_and_z(saved)
    return DecayGateGrads(torch.sigmoid(z).mul_(-rate).mul_(d_y).to(saved.a.dtype))


def _rate_and_z(saved: DecayGateSaved) -> tuple[Tensor, Tensor]:
    """Return e^A (heads,) and a + b (tokens, heads), in float32 or wider."""
    wide = torch.promote_types(saved.a.dtype, torch.float32)
    return saved.log_rate.to(wide).exp(), saved.a.to(wide) + saved.bias.to(wide)


def decay_gate_reference(a: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """Compute the same g by the logarithm of a sum: log(e^0 + e^z)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    z = a.to(wide) + bias.to(wide)
    return -torch.exp(log_rate.to(wide)) * torch.logaddexp(torch.zeros_like(z), z)
