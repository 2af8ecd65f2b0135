"""Linear: a trained dense layer.

    y = x Wᵀ + b

Backward. Let G = ∂L/∂y. Then dL = ⟨G, dy⟩ with dy = dx Wᵀ + x dWᵀ + 1 dbᵀ, where 1 is a column of ones, one per row.
Since ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩, the other factor of each differential is its gradient:
    ∂L/∂x = G W         (..., in)
    ∂L/∂W = Gᵀ x        (out, in)
    ∂L/∂b = Gᵀ 1        (out,), the sum of G over its rows
with the last two summed over rows (all leading axes).

Saved: x and W; nothing is recomputed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.ops.frozen_matrix import frozen_input_gradient
from backhand.ops.weight_tiles import FrozenMatrix


class LinearSaved(NamedTuple):
    """Saved for the backward: x (..., in), weight (out, in), and True if there was a bias."""

    x: Tensor
    weight: FrozenMatrix
    has_bias: bool


class LinearGrads(NamedTuple):
    """d_x (..., in), or None if skipped; d_weight (out, in); d_bias (out,), or None if there is no bias."""

    d_x: Tensor | None
    d_weight: Tensor
    d_bias: Tensor | None


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LinearSaved]:
    """Map x (..., in) to y (..., out) with weight (out, in) and bias (out,); any floating dtype, the same for all."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return y, LinearSaved(x, weight, bias is not None)


def linear_backward(d_y: Tensor, saved: LinearSaved, *, input_gradient: bool = True) -> LinearGrads:
    """Map d_y of shape (..., out) to the gradients derived in the module docstring; no rows give zero gradients.

    Args:
        input_gradient: False skips ∂L/∂x.
    """
    x, weight, has_bias = saved
    d_y_rows = d_y.reshape(-1, weight.shape[0])
    d_x = frozen_input_gradient(d_y_rows, weight).view(x.shape) if input_gradient else None
    d_weight = d_y_rows.T @ x.reshape(-1, weight.shape[1])
    d_bias = d_y_rows.sum(0) if has_bias else None
    return LinearGrads(d_x, d_weight, d_bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the same y element by element: y[..., o] = Σ_i x[..., i] W[o, i] + b[o]."""
    y = (x.unsqueeze(-2) * weight).sum(-1)
    return y if bias is None else y + bias
