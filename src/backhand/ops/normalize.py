"""L2 normalization of rows.

    y = x / n,   n = max(‖x‖, ε)      x (..., features), ε = 1e-12 as in `torch.nn.functional.normalize`

The scalar product of two normalized rows is their cosine.

Backward. Where ‖x‖ > ε, dn = ⟨y, dx⟩ and dy = (dx - y dn) / n, so with G = ∂L/∂y
    ∂L/∂x = (G - y ⟨y, G⟩) / n      (..., features)
which is orthogonal to y: a change of length does not change y. For x = 0 the formula gives G / ε, also the derivative.

Saved: y and n, in float32 or wider.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-12


class NormalizeSaved(NamedTuple):
    """Saved for the backward: y (..., features), n (..., 1), the dtype of x."""

    y: Tensor
    n: Tensor
    dtype: torch.dtype


class NormalizeGrads(NamedTuple):
    """d_x (..., features)."""

    d_x: Tensor


def normalize_forward(x: Tensor) -> tuple[Tensor, NormalizeSaved]:
    """Compute y in float32 or wider from x (..., features)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(EPSILON)
    y = wide / n
    return y, NormalizeSaved(y, n, x.dtype)


def normalize_backward(d_y: Tensor, saved: NormalizeSaved) -> NormalizeGrads:
    """Map d_y (..., features) to the gradient derived in the module docstring."""
    y, n, dtype = saved
    d_y = d_y.to(y.dtype)
    return NormalizeGrads(((d_y - y * (y * d_y).sum(-1, keepdim=True)) / n).to(dtype))


def normalize_reference(x: Tensor) -> Tensor:
    """Compute the same y by the root of the sum of squares."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * wide.square().sum(-1, keepdim=True).clamp_min(EPSILON * EPSILON).rsqrt()
