"""Layer norm.

    c = x - mean_j x_j,   ρ = (mean_j c_j² + ε)^(-1/2),   x̂ = ρ c,   y = w ⊙ x̂ + b      [arXiv:1607.06450, eq. 4]

with a bias b in most families of encoders and none in ModernBERT.

Backward. With n columns, dc = dx - mean(dx), and since Σ_j c_j = 0,
    dρ = -ρ³ (c · dc) / n = -ρ³ (c · dx) / n,   dx̂ = ρ dc + c dρ = ρ (dx - mean(dx) - x̂ (x̂ · dx) / n).
Let G = ∂L/∂y and g = w ⊙ G = ∂L/∂x̂. The matrix between dx and dx̂ is symmetric, hence
    ∂L/∂x = ρ (g - mean(g) - x̂ (g · x̂) / n)      (..., n)
    ∂L/∂w = Σ_rows G ⊙ x̂                         (n,)
    ∂L/∂b = Σ_rows G                             (n,)

Saved: x and its statistics, the mean and ρ (two numbers per row in float32). x̂ is recomputed, since saving it would
double the memory of x. Statistics and the backward run in float32 (float64 for float64 input), whatever the input's
dtype. The forward is torch's own kernel, which reads each row twice and rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import wide_dtype
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply


class LayerNormSaved(NamedTuple):
    """x (..., n), weight (n,), bias (n,) or None, and statistics (..., 2): mean and ρ in float32 or wider."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    statistics: Tensor


NormSaved = RMSNormSaved | LayerNormSaved
"""Saved tensors of either kind of norm. They represent its output, which a layer after it can recompute."""


class LayerNormGrads(NamedTuple):
    """d_x (..., n); d_weight and d_bias (n,), or None if skipped or if there is no bias."""

    d_x: Tensor
    d_weight: Tensor | None
    d_bias: Tensor | None


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, LayerNormSaved]:
    """Compute y = weight ⊙ (x - mean) ρ + bias.

    Args:
        x: (..., n).
        weight: (n,).
        bias: (n,) or None.
        eps: ε inside the root.
        out: of x's shape and dtype, to receive y; or None.

    Returns:
        y (..., n) in x's dtype, and the saved tensors.
    """
    wide = wide_dtype(x.dtype)
    if x.dtype == wide:
        y, mean, rho = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:  # torch rounds the statistics to the dtype of the weight
        parts = weight.to(wide), None if bias is None else bias.to(wide)
        y, mean, rho = torch.native_layer_norm(x.to(wide), x.shape[-1:], *parts, eps)
    saved = LayerNormSaved(x, weight, bias, torch.cat([mean, rho], dim=-1))
    return y.to(x.dtype) if out is None else out.copy_(y), saved


def layer_norm_apply(saved: LayerNormSaved) -> Tensor:
    """Recompute y from the saved tensors, for the backward of a following layer."""
    x, weight, bias, _ = saved
    y = _x_hat(saved).mul_(weight)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def norm_apply(saved: NormSaved) -> Tensor:
    """Recompute the output of either kind of norm from its saved tensors."""
    return layer_norm_apply(saved) if isinstance(saved, LayerNormSaved) else rms_norm_apply(*saved)


def _x_hat(saved: LayerNormSaved) -> Tensor:
    """Return x̂ of x's shape in the statistics' dtype."""
    x_hat: Tensor = saved.x - saved.statistics[..., :1]
    return x_hat.mul_(saved.statistics[..., 1:])


def layer_norm_backward(
    d_y: Tensor,
    saved: LayerNormSaved,
    *,
    weight_gradient: bool = True,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> LayerNormGrads:
    """Map d_y of shape (..., n) to the gradients derived in the module docstring.

    Args:
        weight_gradient: False skips ∂L/∂w and ∂L/∂b, which a frozen norm does not need.
        residual: (..., n), the gradient of the residual stream, which is added to d_x; or None.
        out: (..., n) to receive d_x; may be d_y itself; or None.
    """
    x, weight, bias, statistics = saved
    x_hat, n = _x_hat(saved), x.shape[-1]
    d_weight = d_bias = None
    if weight_gradient:
        d_weight = (d_y * x_hat).reshape(-1, n).sum(0).to(weight.dtype)
        d_bias = None if bias is None else d_y.reshape(-1, n).sum(0, dtype=statistics.dtype).to(bias.dtype)
    g = d_y * weight.to(statistics.dtype)
    mean, along = g.mean(dim=-1, keepdim=True), torch.linalg.vecdot(g, x_hat).unsqueeze(-1).div_(n)
    d_x = g.sub_(mean).addcmul_(x_hat, along, value=-1).mul_(statistics[..., 1:])
    if residual is not None:
        d_x = d_x.add_(residual)
    return LayerNormGrads(d_x.to(x.dtype) if out is None else out.copy_(d_x), d_weight, d_bias)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute the same y from the definition, by division."""
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias
