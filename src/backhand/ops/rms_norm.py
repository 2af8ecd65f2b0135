"""Root-mean-square norm.

    ρ = (mean_j x_j² + ε)^(-1/2),   x̂ = ρ x,   y = (c + w) ⊙ x̂      [arXiv:1910.07467, eq. 4]

with c = 0, or c = 1 for families that store the weight as a difference from one (Gemma).

Backward. With n columns, dρ = -ρ³ (x · dx) / n, so dx̂ = ρ dx - (ρ³ / n) x (x · dx) = ρ (dx - x̂ (x̂ · dx) / n).
Let G = ∂L/∂y and g = (c + w) ⊙ G = ∂L/∂x̂. The matrix between dx and dx̂ is symmetric, hence
    ∂L/∂x = ρ (g - x̂ (g · x̂) / n)      (..., n)
    ∂L/∂w = Σ_rows G ⊙ x̂               (n,)

Saved: x and the factor ρ (one float32 a row); x̂ is recomputed, since keeping it would double what x already costs.
Statistics and the backward run in float32 (float64 for float64 input), whatever the input's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RMSNormSaved(NamedTuple):
    """x (..., n), weight (n,), factor ρ (..., 1) in float32 or wider, offset c."""

    x: Tensor
    weight: Tensor
    factor: Tensor
    offset: float


class RMSNormGrads(NamedTuple):
    """d_x (..., n); d_weight (n,), or None when not asked for."""

    d_x: Tensor
    d_weight: Tensor | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> tuple[Tensor, RMSNormSaved]:
    """y = (offset + weight) ⊙ x / rms(x).

    Args:
        x: (..., n).
        weight: (n,).
        eps: ε inside the root.
        offset: c, added to the weight.
        out: the shape and dtype of x, to receive y, or None.

    Returns:
        y (..., n) in x's dtype, and what backward needs.
    """
    wide = x.to(statistics_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(wide, factor, out=out) if wide is x else wide.mul_(factor)
    normed.mul_(gain(weight, offset, factor.dtype))
    y = normed.to(x.dtype) if wide is x or out is None else out.copy_(normed)
    return y, RMSNormSaved(x, weight, factor, offset)


def rms_norm_apply(x: Tensor, weight: Tensor, factor: Tensor, offset: float = 0.0) -> Tensor:
    """y again from x and the saved factor: what the backward pass of a following layer needs."""
    return _times(x, factor).mul_(gain(weight, offset, factor.dtype)).to(x.dtype)


def _times(x: Tensor, multiplier: Tensor) -> Tensor:
    """x · multiplier in the multiplier's dtype; a copy made by the cast is multiplied in place."""
    return x * multiplier if x.dtype == multiplier.dtype else x.to(multiplier.dtype).mul_(multiplier)


def gain(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """c + w in the wide dtype."""
    wide = weight.to(dtype)
    return wide + offset if offset else wide


def rms_norm_backward(d_y: Tensor, saved: RMSNormSaved, *, weight_gradient: bool = True) -> RMSNormGrads:
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y.
        saved: from the forward pass.
        weight_gradient: False skips ∂L/∂w, which a frozen norm does not need.
    """
    x, weight, factor, offset = saved
    x_hat = _times(x, factor)
    d_weight = None
    if weight_gradient:
        d_weight = (d_y * x_hat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    g = _times(d_y, gain(weight, offset, factor.dtype))
    along = torch.linalg.vecdot(g, x_hat).unsqueeze(-1).div_(x.shape[-1])
    d_x = g.addcmul_(x_hat, along, value=-1).mul_(factor)
    return RMSNormGrads(d_x.to(x.dtype), d_weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The same y from the definition, by division."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * (weight + offset)
