"""Rotary position embedding: each pair of features turns by an angle proportional to the position.

    y₁ = x₁ cos θ - x₂ sin θ
    y₂ = x₂ cos θ + x₁ sin θ,      θ_{t,j} = position_t · f_j      [arXiv:2104.09864, eq. 34]

where x₁ is the first half of a head's features and x₂ the second (the half-split pairing of Hugging Face weights), so
that queries and keys meet at an angle that depends on the difference of their positions only.

Backward. A rotation R is orthogonal, y = R x gives ∂L/∂x = Rᵀ ∂L/∂y, the rotation by -θ:
    ∂L/∂x₁ =  G₁ cos θ + G₂ sin θ
    ∂L/∂x₂ =  G₂ cos θ - G₁ sin θ       (tokens, heads, head_dim)

Saved: the table of cosines and sines, shared by all layers; neither x nor y.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """cos and sin of every token's angles, (tokens, head_dim / 2), float32 or wider; also all that backward needs."""

    cos: Tensor
    sin: Tensor


class RotaryGrads(NamedTuple):
    """d_x (tokens, heads, head_dim)."""

    d_x: Tensor


def rotary_table(positions: Tensor, frequencies: Tensor, attention_factor: float = 1.0) -> RotaryTable:
    """Cosines and sines of position · frequency.

    Args:
        positions: (tokens,) integers, restarting at 0 in each document.
        frequencies: (head_dim / 2,) radians a token, float32 or float64.
        attention_factor: multiplier of both, for scaling rules that ask for one.
    """
    angles = positions.to(frequencies.dtype)[:, None] * frequencies[None, :]
    return RotaryTable(angles.cos() * attention_factor, angles.sin() * attention_factor)


def rotary_forward(x: Tensor, table: RotaryTable, *, out: Tensor | None = None) -> tuple[Tensor, RotaryTable]:
    """Turn every head of x by its token's angles.

    Args:
        x: (tokens, heads, head_dim).
        table: the angles of the tokens.
        out: where to write y; it may be x itself.

    Returns:
        y (tokens, heads, head_dim) in x's dtype, and the table.
    """
    return _rotate(x, table.cos, table.sin, out), table


def rotary_backward(d_y: Tensor, saved: RotaryTable, *, out: Tensor | None = None) -> RotaryGrads:
    """Turn d_y, (tokens, heads, head_dim), back by the same angles; `out` may be d_y itself."""
    return RotaryGrads(_rotate(d_y, saved.cos, -saved.sin, out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None) -> Tensor:
    halves = (2, x.shape[-1] // 2)
    wide = x.to(cos.dtype).unflatten(-1, halves)  # (tokens, heads, 2, head_dim / 2)
    turned = wide * cos[:, None, None, :]
    turned[:, :, 0].addcmul_(wide[:, :, 1], sin[:, None, :], value=-1)
    turned[:, :, 1].addcmul_(wide[:, :, 0], sin[:, None, :])
    # Complete before anything is written, so that `out` may be x.
    y = turned.flatten(-2)
    return y.to(x.dtype) if out is None else out.copy_(y)


def rotary_reference(x: Tensor, table: RotaryTable) -> Tensor:
    """The same y as a product of complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.complex(table.cos, table.sin)[:, None, :]
    return torch.cat([turned.real, turned.imag], dim=-1)
