"""Root-mean-square norm.

    ρ = (mean_j x_j² + ε)^(-1/2),   x̂ = ρ x,   y = (c + w) ⊙ x̂      [arXiv:1910.07467, eq. 4]

with c = 0, or c = 1 for families that store the weight as a difference from one (Gemma).

Backward. With n columns, dρ = -ρ³ (x · dx) / n, so dx̂ = ρ dx - (ρ³ / n) x (x · dx) = ρ (dx - x̂ (x̂ · dx) / n).
Let G = ∂L/∂y and g = (c + w) ⊙ G = ∂L/∂x̂. The matrix between dx and dx̂ is symmetric, hence
    ∂L/∂x = ρ (g - x̂ (g · x̂) / n)      (..., n)
    ∂L/∂w = Σ_rows G ⊙ x̂               (n,)

Saved: x and the inverse RMS ρ (one float32 per row). x̂ is recomputed, since saving it would double the memory of x.
Statistics and the backward run in float32 (float64 for float64 input), whatever the input's dtype. The kernel
(native/rms_norm.cpp) reads each row once for the sum and once for the result, and rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import rms_norm as kernels
from backhand.kernels.library import wide_dtype


class RMSNormSaved(NamedTuple):
    """x (..., n), weight (n,), inverse RMS ρ (..., 1) in float32 or wider, offset c."""

    x: Tensor
    weight: Tensor
    inverse_rms: Tensor
    offset: float


class RMSNormGrads(NamedTuple):
    """d_x (..., n); d_weight (n,), or None if skipped."""

    d_x: Tensor
    d_weight: Tensor | None


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, out: Tensor | None = None
) -> tuple[Tensor, RMSNormSaved]:
    """Compute y = (offset + weight) ⊙ x / rms(x).

    Args:
        x: (..., n).
        weight: (n,).
        eps: ε inside the root.
        offset: c, added to the weight.
        out: of x's shape and dtype, to receive y; or None.

    Returns:
        y (..., n) in x's dtype, and the saved tensors.
    """
    compiled = kernels.rms_norm(x, weight, eps, offset, out=out)
    if compiled is not None:
        y, inverse_rms = compiled
        return y, RMSNormSaved(x, weight, inverse_rms, offset)
    wide = x.to(wide_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(wide, inverse_rms, out=out) if wide is x else wide.mul_(inverse_rms)
    normed.mul_(weight_scale(weight, offset, inverse_rms.dtype))
    y = normed.to(x.dtype) if wide is x or out is None else out.copy_(normed)
    return y, RMSNormSaved(x, weight, inverse_rms, offset)


def rms_norm_apply(x: Tensor, weight: Tensor, inverse_rms: Tensor, offset: float = 0.0) -> Tensor:
    """Recompute y from x and the saved inverse RMS, for the backward of a following layer."""
    compiled = kernels.rms_norm(x, weight, 0.0, offset, inverse_rms)
    if compiled is not None:
        return compiled[0]
    return _times(x, inverse_rms).mul_(weight_scale(weight, offset, inverse_rms.dtype)).to(x.dtype)


def _times(x: Tensor, multiplier: Tensor) -> Tensor:
    """Return x · multiplier in the multiplier's dtype; a copy made by the cast is multiplied in place."""
    return x * multiplier if x.dtype == multiplier.dtype else x.to(multiplier.dtype).mul_(multiplier)


def weight_scale(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """Return c + w in the given dtype."""
    wide = weight.to(dtype)
    return wide + offset if offset else wide


def rms_norm_backward(
    d_y: Tensor,
    saved: RMSNormSaved,
    *,
    weight_gradient: bool = True,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> RMSNormGrads:
    """Map d_y of shape (..., n) to the gradients derived in the module docstring.

    Args:
        weight_gradient: False skips ∂L/∂w, which a frozen norm does not need.
        residual: (..., n), the gradient of the residual stream, which is added to d_x; or None.
        out: (..., n) to receive d_x; may be d_y itself; or None.
    """
    x, weight, inverse_rms, offset = saved
    compiled = kernels.rms_norm_gradients(d_y, *saved, weight_gradient=weight_gradient, residual=residual, out=out)
    if compiled is not None:
        return RMSNormGrads(*compiled)
    x_hat = _times(x, inverse_rms)
    d_weight = None
    if weight_gradient:
        d_weight = (d_y * x_hat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    g = _times(d_y, weight_scale(weight, offset, inverse_rms.dtype))
    along = torch.linalg.vecdot(g, x_hat).unsqueeze(-1).div_(x.shape[-1])
    d_x = g.addcmul_(x_hat, along, value=-1).mul_(inverse_rms)
    if residual is not None:
        d_x = d_x.add_(residual)
    return RMSNormGrads(d_x.to(x.dtype) if out is None else out.copy_(d_x), d_weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute the same y from the definition, by division."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * (weight + offset)
