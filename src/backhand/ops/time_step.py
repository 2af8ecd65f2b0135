"""The time step of a state-space layer, computed from the token.

    Δ = min(max(softplus(a + b), low), high),   softplus(z) = log(1 + e^z)      [arXiv:2312.00752, §3.6]

with one frozen b per head, and a (tokens, heads) projected from the token. Most models have no limits.

Backward. softplus' = σ, and a bound that applies stops the gradient, so with G = ∂L/∂Δ
    ∂L/∂a = G σ(a + b) where low ≤ softplus(a + b) ≤ high, else 0      (tokens, heads)

Saved: a and b. Δ is float32 or wider whatever a is, since hundreds of steps are added in the exponents of `ssd`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Limits = tuple[float, float]
"""The lowest and the highest time step."""


class TimeStepSaved(NamedTuple):
    """a (tokens, heads), b (heads,), and the limits, if any."""

    a: Tensor
    bias: Tensor
    limits: Limits | None


class TimeStepGrads(NamedTuple):
    """d_a (tokens, heads)."""

    d_a: Tensor


def time_step_forward(a: Tensor, bias: Tensor, limits: Limits | None = None) -> tuple[Tensor, TimeStepSaved]:
    """Compute Δ of every token and head.

    Args:
        a: (tokens, heads).
        bias: b, (heads,).
        limits: low and high, or None.

    Returns:
        Δ (tokens, heads), float32 or wider, and the saved tensors.
    """
    steps = functional.softplus(_wide_sum(a, bias))
    return steps if limits is None else steps.clamp_(*limits), TimeStepSaved(a, bias, limits)


def time_step_backward(d_y: Tensor, saved: TimeStepSaved) -> TimeStepGrads:
    """Map d_y of shape (tokens, heads) to the gradient derived in the module docstring, in a's dtype."""
    a, bias, limits = saved
    z = _wide_sum(a, bias)
    slope = torch.sigmoid(z)
    if limits is not None:
        steps = functional.softplus(z)
        slope.masked_fill_((steps < limits[0]) | (steps > limits[1]), 0)
    return TimeStepGrads(slope.mul_(d_y).to(a.dtype))


def _wide_sum(a: Tensor, bias: Tensor) -> Tensor:
    """Return a + b (tokens, heads) in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) + bias.to(wide)


def time_step_reference(a: Tensor, bias: Tensor, limits: Limits | None = None) -> Tensor:
    """Compute the same Δ by the logarithm of a sum: log(e^0 + e^z)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    z = a.to(wide) + bias.to(wide)
    steps = torch.logaddexp(torch.zeros_like(z), z)
    return steps if limits is None else steps.clamp(*limits)
