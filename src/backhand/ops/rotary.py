"""Rotary position embedding: each pair of features is rotated by an angle proportional to the position.

    y₁ = x₁ cos θ - x₂ sin θ
    y₂ = x₂ cos θ + x₁ sin θ,      θ_{t,j} = position_t · f_j      [arXiv:2104.09864, eq. 34]

where x₁ is the first half of a head's features and x₂ the second (the pairing of most Hugging Face weights), or x₁ the
even features and x₂ the odd ones (`interleaved`, GLM). The product of a query and a key then depends on the difference
of their positions only. If there are fewer angles than pairs, only the first features are rotated and the others pass
unchanged (partial rotary).

A multiplier m of cosines and sines may depend on the token: y = m R x. Scaling rules that lengthen the rotated features
(yarn, longrope) need it, and so do queries whose temperature grows with their position (llama 4, Ministral 3).

Backward. R is orthogonal and R(θ)ᵀ = R(-θ), so y = m R x gives ∂L/∂x = m Rᵀ ∂L/∂y, the rotation by -θ:
    ∂L/∂x₁ =  G₁ m cos θ + G₂ m sin θ
    ∂L/∂x₂ =  G₂ m cos θ - G₁ m sin θ       (tokens, heads, head_dim); where nothing is rotated, ∂L/∂x = G

Saved: the table of cosines and sines, which all layers share; neither x nor y. The kernel is native/rotary.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import rotary as kernels


class RotaryTable(NamedTuple):
    """cos and sin of every token's angles, (tokens, ≤ head_dim / 2), float32 or wider; saved for the backward."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False  # True if a pair are neighbours, False if they are half of the rotated features apart


class RotaryGrads(NamedTuple):
    """d_x (tokens, heads, head_dim)."""

    d_x: Tensor


def rotary_table(
    positions: Tensor, frequencies: Tensor, attention_factor: float | Tensor = 1.0, *, interleaved: bool = False
) -> RotaryTable:
    """Compute cosines and sines of position · frequency.

    Args:
        positions: (tokens,) integers, restarting at 0 in each document.
        frequencies: (pairs,) radians per token, float32 or float64; or (tokens, pairs) if they differ between
            documents, like longrope's two lists. Fewer pairs than head_dim / 2 rotate only the first features.
        attention_factor: m, one number or (tokens,).
        interleaved: True if the pairs are neighbours.
    """
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    table = RotaryTable(angles.cos(), angles.sin(), interleaved)
    return times(table, attention_factor)


def times(table: RotaryTable, multiplier: float | Tensor) -> RotaryTable:
    """Multiply the table by m, one number or (tokens,), for queries scaled by position.

    Only rotated features are multiplied, so that a partial rotary embedding does not scale the whole query.
    """
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(table.cos.dtype)[:, None]
    return table._replace(cos=table.cos * multiplier, sin=table.sin * multiplier)


class Frequencies(NamedTuple):
    """The parameters of the angles of one set of layers, on their device."""

    short: Tensor  # (pairs,) float32
    long: Tensor | None  # the frequencies of documents longer than `longest_short`; None if they are the same
    longest_short: int | None  # in tokens; None if `long` is None
    attention_factor: float  # m
    interleaved: bool  # True if the pairs are neighbours


def angles(frequencies: Frequencies, positions: Tensor, dtype: torch.dtype, document_lengths: Tensor) -> RotaryTable:
    """Compute cosines and sines of every token.

    Args:
        frequencies: the parameters of the set.
        positions: (tokens,) int64.
        dtype: the result's, float32 or wider.
        document_lengths: (tokens,) int64, the length of each token's document.
    """
    used = frequencies.short.to(dtype)
    if frequencies.long is not None and frequencies.longest_short is not None:
        is_long = document_lengths > frequencies.longest_short
        used = torch.where(is_long[:, None], frequencies.long.to(dtype), used)
    return rotary_table(positions, used, frequencies.attention_factor, interleaved=frequencies.interleaved)


def scaled_for_queries(table: RotaryTable, positions: Tensor, beta: float, length: float) -> RotaryTable:
    """Multiply the table by 1 + β log(1 + ⌊position / length⌋), for queries that grow with their position.

    Args:
        table: the angles of the tokens.
        positions: (tokens,) int64.
        beta: β.
        length: in tokens.
    """
    steps = torch.floor(positions / length).to(table.cos.dtype)
    return times(table, 1 + beta * torch.log(1 + steps))


def rotary_forward(x: Tensor, table: RotaryTable, *, out: Tensor | None = None) -> tuple[Tensor, RotaryTable]:
    """Rotate every head of x by its token's angles.

    Args:
        x: (tokens, heads, head_dim).
        table: the angles of the tokens.
        out: receives y, may be x itself; or None.

    Returns:
        y (tokens, heads, head_dim) in x's dtype, and the table.
    """
    return _rotate(x, table, out, back=False), table


def rotary_backward(d_y: Tensor, saved: RotaryTable, *, out: Tensor | None = None) -> RotaryGrads:
    """Rotate d_y of shape (tokens, heads, head_dim) back by the same angles; `out` may be d_y itself."""
    return RotaryGrads(_rotate(d_y, saved, out, back=True))


def _rotate(x: Tensor, table: RotaryTable, out: Tensor | None, *, back: bool) -> Tensor:
    rotated_width = 2 * table.cos.shape[-1]
    if rotated_width < x.shape[-1]:
        if out is None:
            out = x.clone()
        elif out is not x:
            out.copy_(x)
        _rotate(x[..., :rotated_width], table, out[..., :rotated_width], back=back)
        return out
    if not table.interleaved:
        y = kernels.rotary(x, table.cos, table.sin, out, back=back)
        if y is not None:
            return y
    cos, sin = table.cos[:, None, :], (-table.sin if back else table.sin)[:, None, :]
    # (tokens, heads, 2, pairs), or (tokens, heads, pairs, 2): a view of each side either way.
    sizes, axis = ((cos.shape[-1], 2), -1) if table.interleaved else ((2, cos.shape[-1]), -2)
    wide = x.to(cos.dtype).unflatten(-1, sizes)
    rotated = wide * cos.unsqueeze(axis)
    rotated.select(axis, 0).addcmul_(wide.select(axis, 1), sin, value=-1)
    rotated.select(axis, 1).addcmul_(wide.select(axis, 0), sin)
    # Complete before anything is written, so that `out` may be x.
    y = rotated.flatten(-2)
    return y.to(x.dtype) if out is None else out.copy_(y)


def rotary_reference(x: Tensor, table: RotaryTable) -> Tensor:
    """Compute the same y as a product of complex numbers."""
    half = table.cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if table.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    pairs = torch.complex(x[..., first], x[..., second])
    rotated = pairs * torch.complex(table.cos, table.sin)[:, None, :]
    together = torch.stack([rotated.real, rotated.imag], -1 if table.interleaved else -2).flatten(-2)
    return torch.cat([together, x[..., 2 * half :]], dim=-1)
