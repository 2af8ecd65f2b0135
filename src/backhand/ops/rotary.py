"""Rotary position embedding: each pair of features turns by an angle proportional to the position.

    y₁ = x₁ cos θ - x₂ sin θ
    y₂ = x₂ cos θ + x₁ sin θ,      θ_{t,j} = position_t · f_j      [arXiv:2104.09864, eq. 34]

where x₁ is the first half of a head's features and x₂ the second (the half-split pairing of most Hugging Face weights),
or x₁ the even features and x₂ the odd ones (`interleaved`, GLM), so that queries and keys meet at an angle that depends
on the difference of their positions only. With fewer angles than pairs the first features alone turn, as many as the
angles suffice for, and the others pass as they are (partial rotary).

A multiplier m of cosines and sines may depend on the token: y = m R x. Scaling rules that lengthen the rotated features
(yarn, longrope) need it, and so do queries whose temperature grows with their position (llama 4, Ministral 3).

Backward. R is orthogonal and R(θ)ᵀ = R(-θ), so y = m R x gives ∂L/∂x = m Rᵀ ∂L/∂y, the rotation by -θ:
    ∂L/∂x₁ =  G₁ m cos θ + G₂ m sin θ
    ∂L/∂x₂ =  G₂ m cos θ - G₁ m sin θ       (tokens, heads, head_dim); where nothing turns, ∂L/∂x = G

Saved: the table of cosines and sines, shared by all layers; neither x nor y. The kernel is native/rotary.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel
from backhand.ops.rms_norm import statistics_dtype

_ROTARY = KernelSignature(
    "backhand_rotary", INT, *(POINTER, INT64, INT64) * 2, POINTER, POINTER, INT64, INT64, INT64, INT
)


class RotaryTable(NamedTuple):
    """cos and sin of every token's angles, (tokens, ≤ head_dim / 2), float32 or wider; also all that backward needs."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False  # whether a pair are neighbours, or else features half the rotated ones apart


class RotaryGrads(NamedTuple):
    """d_x (tokens, heads, head_dim)."""

    d_x: Tensor


def rotary_table(
    positions: Tensor, frequencies: Tensor, attention_factor: float | Tensor = 1.0, *, interleaved: bool = False
) -> RotaryTable:
    """Cosines and sines of position · frequency.

    Args:
        positions: (tokens,) integers, restarting at 0 in each document.
        frequencies: (pairs,) radians a token, float32 or float64; or (tokens, pairs) where they differ from document
            to document, as with longrope's two lists. Fewer pairs than head_dim / 2: only the first features turn.
        attention_factor: m, one number or (tokens,).
        interleaved: whether the pairs are neighbours.
    """
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    table = RotaryTable(angles.cos(), angles.sin(), interleaved)
    return times(table, attention_factor)


def times(table: RotaryTable, multiplier: float | Tensor) -> RotaryTable:
    """The table with m, one number or (tokens,), in its cosines and sines: for queries scaled by position.

    Only what turns is multiplied, so that for a partial rotary embedding this is no scaling of the whole query.
    """
    if isinstance(multiplier, Tensor):
        multiplier = multiplier.to(table.cos.dtype)[:, None]
    return table._replace(cos=table.cos * multiplier, sin=table.sin * multiplier)


class Frequencies(NamedTuple):
    """What the angles of one set are made from, on their device."""

    short: Tensor  # (pairs,) float32
    # the same for documents longer than `longest_short`; None where there is one list for every length
    long: Tensor | None
    longest_short: int | None  # tokens, or None likewise
    attention_factor: float  # m
    interleaved: bool  # whether the pairs are neighbours


def angles(frequencies: Frequencies, positions: Tensor, dtype: torch.dtype, reach: Tensor) -> RotaryTable:
    """Cosines and sines of every token.

    Args:
        frequencies: the set's.
        positions: (tokens,) int64.
        dtype: of the result, float32 or wider.
        reach: (tokens,) int64, how long each token's document is.
    """
    used = frequencies.short.to(dtype)
    if frequencies.long is not None and frequencies.longest_short is not None:
        used = torch.where((reach > frequencies.longest_short)[:, None], frequencies.long.to(dtype), used)
    return rotary_table(positions, used, frequencies.attention_factor, interleaved=frequencies.interleaved)


def scaled_for_queries(table: RotaryTable, positions: Tensor, beta: float, length: float) -> RotaryTable:
    """The table with 1 + β log(1 + ⌊position / length⌋) as m, for queries that grow with their position.

    Args:
        table: of all their features.
        positions: (tokens,) int64.
        beta: β.
        length: in tokens.
    """
    steps = torch.floor(positions / length).to(table.cos.dtype)
    return times(table, 1 + beta * torch.log(1 + steps))


def rotary_forward(x: Tensor, table: RotaryTable, *, out: Tensor | None = None) -> tuple[Tensor, RotaryTable]:
    """Turn every head of x by its token's angles.

    Args:
        x: (tokens, heads, head_dim).
        table: the angles of the tokens.
        out: where to write y; it may be x itself.

    Returns:
        y (tokens, heads, head_dim) in x's dtype, and the table.
    """
    return _rotate(x, table, out, back=False), table


def rotary_backward(d_y: Tensor, saved: RotaryTable, *, out: Tensor | None = None) -> RotaryGrads:
    """Turn d_y, (tokens, heads, head_dim), back by the same angles; `out` may be d_y itself."""
    return RotaryGrads(_rotate(d_y, saved, out, back=True))


def _rotate(x: Tensor, table: RotaryTable, out: Tensor | None, *, back: bool) -> Tensor:
    turning = 2 * table.cos.shape[-1]
    if turning < x.shape[-1]:
        if out is None:
            out = x.clone()
        elif out is not x:
            out.copy_(x)
        _rotate(x[..., :turning], table, out[..., :turning], back=back)
        return out
    cos, sin = table.cos, table.sin
    laid_out = cos.is_contiguous() and sin.is_contiguous() and cos.dtype == statistics_dtype(x.dtype)
    kernel = find_kernel(_ROTARY, x, out) if laid_out and not table.interleaved else None
    if kernel is not None:
        y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        kernel(
            *(x.data_ptr(), x.stride(0), x.stride(1), y.data_ptr(), y.stride(0), y.stride(1)),
            *(cos.data_ptr(), sin.data_ptr(), x.shape[0], x.shape[1], x.shape[2] // 2, back),
        )
        return y
    cos, sin = cos[:, None, :], (-sin if back else sin)[:, None, :]
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
    """The same y as a product of complex numbers."""
    half = table.cos.shape[-1]
    first, second = slice(0, half), slice(half, 2 * half)
    if table.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    pairs = torch.complex(x[..., first], x[..., second])
    rotated = pairs * torch.complex(table.cos, table.sin)[:, None, :]
    together = torch.stack([rotated.real, rotated.imag], -1 if table.interleaved else -2).flatten(-2)
    return torch.cat([together, x[..., 2 * half :]], dim=-1)
