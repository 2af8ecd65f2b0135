"""Gated unit between the factors of an adapter: what its backward does with gate's and up's, and with those behind it.

    a = a₀ + s₁ h₁ B₁ᵀ,   u = u₀ + s₂ h₂ B₂ᵀ        gate and up with what their factors add, h₁ and h₂ given
    p = φ(a) ⊙ u,         t = p Aᵀ                  the product, and the h of the projection behind it

Backward. `glu` has ∂L/∂a and ∂L/∂u, `lora_linear` the rest. With G = ∂L/∂p in all, through t and elsewhere, (..., n),
and T = ∂L/∂t, (..., rank),
    ∂L/∂a₀ = ∂L/∂a = G ⊙ u ⊙ φ'(a),   ∂L/∂u₀ = ∂L/∂u = G ⊙ φ(a)      (..., n)
    ∂L/∂h₁ = s₁ (∂L/∂a) B₁,           ∂L/∂h₂ = s₂ (∂L/∂u) B₂         (..., rank)
    ∂L/∂B₁ = s₁ (∂L/∂a)ᵀ h₁,          ∂L/∂B₂ = s₂ (∂L/∂u)ᵀ h₂        (n, rank)
    ∂L/∂A  = Tᵀ p                                                    (rank, n)

Saved: a and u side by side, h₁ and h₂. p is made again. In torch's form it is a pass over all rows, and so is each line
above. The compiled loop (native/adapted_glu.cpp) makes a few rows and columns of ∂L/∂a, ∂L/∂u and p at a time and
multiplies them while they are near the processor: a, u and G are read once, ∂L/∂a and ∂L/∂u written once, and p never.
It is for float32. Half as wide numbers are multiplied in other units, which the passes one by one have.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import matrix
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, Declared, InARow, loop, now_or_in
from backhand.ops.glu import ACTIVATIONS, GLUSaved, glu_backward, glu_forward, glu_reference
from backhand.ops.lora_linear import rows
from backhand.ops.low_rank import (
    Member,
    low_rank_accumulate,
    low_rank_backward,
    low_rank_expand,
    low_rank_shrink,
    with_memory,
)

_BACKWARD = Declared("backhand_adapted_glu_backward", INT, INT, POINTER, POINTER, INT64, INT64, result=INT)
_NUMBERS, _SCALINGS = INT64 * 33, DOUBLE * 2
_NOWHERE = (0, 0)


class Side(NamedTuple):
    """The factor of gate or up: lora_B (n, rank) and its scaling."""

    lora_B: Tensor
    scaling: float


class AdaptedGLUSaved(NamedTuple):
    """What backward needs.

    gate_up: [a | u], (..., 2n). activation: `silu`, `gelu_tanh` or `sigmoid`. sides: gate's and up's factors, None
    without. h: [h₁ | h₂] of those that are there, (..., Σ rank). d_t: T, (..., rank), which a caller puts here when it
    is there; None where nothing behind the unit has factors.
    """

    gate_up: Tensor
    activation: str
    sides: tuple[Side | None, Side | None]
    h: Tensor
    d_t: Tensor | None = None


class AdaptedGLUGrads(NamedTuple):
    """d_gate_up (..., 2n); d_h (..., Σ rank); d_lora_B of gate and up, (n, rank), and d_lora_A (rank, n), or None."""

    d_gate_up: Tensor
    d_h: Tensor
    d_lora_B: tuple[Tensor | None, Tensor | None]
    d_lora_A: Tensor | None


class Receivers(NamedTuple):
    """What the gradients of factors are added to: of gate's and up's lora_B, and of the lora_A behind the unit."""

    d_lora_B: tuple[Tensor | None, Tensor | None]
    d_lora_A: Tensor | None


def adapted_glu_forward(
    gate_up: Tensor, activation: str, sides: tuple[Side | None, Side | None], h: Tensor, lora_A: Tensor | None
) -> tuple[tuple[Tensor, Tensor | None], AdaptedGLUSaved]:
    """p (..., n) and t (..., rank), None without a lora_A, and what backward needs but for T.

    Args:
        gate_up: [a₀ | u₀], (..., 2n).
        activation: `silu`, `gelu_tanh` or `sigmoid`.
        sides: gate's and up's factors, None without.
        h: [h₁ | h₂] of those that are there, (..., Σ rank).
        lora_A: A, (rank, n), or None.
    """
    n, whole, own = gate_up.shape[-1] // 2, rows(gate_up).clone(), rows(h)
    first = 0
    for place, side in enumerate(sides):
        if side is not None:
            rank = side.lora_B.shape[1]
            part = whole[:, place * n : (place + 1) * n]
            low_rank_expand(part, own[:, first : first + rank], side.lora_B, side.scaling)
            first += rank
    p, _ = glu_forward(whole[:, :n], whole[:, n:], activation)
    t = None if lora_A is None else low_rank_shrink(p, lora_A, turned=True)
    lead = gate_up.shape[:-1]
    saved = AdaptedGLUSaved(whole.view(gate_up.shape), activation, sides, h)
    return (p.view(*lead, n), None if t is None else t.view(*lead, t.shape[1])), saved


def adapted_glu_backward(
    d_y: Tensor,
    saved: AdaptedGLUSaved,
    *,
    out: Tensor | None = None,
    into: Receivers | None = None,
    row: InARow | None = None,
) -> AdaptedGLUGrads:
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        d_y: G, ∂L/∂p in all; it may be overwritten.
        saved: from the forward pass, with T.
        out: of gate_up's shape, to receive [∂L/∂a | ∂L/∂u]; perhaps gate_up itself; or None.
        into: in d_y's dtype or wider, to which gradients of factors are added, and which are returned; None for fresh.
        row: where this is to be done in its turn, or None to do it now.
    """
    gate_up, g, h = rows(saved.gate_up), rows(d_y), rows(saved.h)
    n = g.shape[1]
    out = torch.empty_like(saved.gate_up) if out is None else out
    d_gate_up = rows(out)
    d_t = None if saved.d_t is None else rows(saved.d_t)
    if into is None:
        d_A = None if d_t is None else g.new_zeros(d_t.shape[1], n)
        gate, up = (None if side is None else torch.zeros_like(side.lora_B) for side in saved.sides)
        into = Receivers((gate, up), d_A)
    d_h = _by_loop(g, gate_up, saved, h, d_t, d_gate_up, into, row)
    if d_h is None:
        # A pass for each line of the docstring; p again, in G's place, for A's gradient alone.
        unit = GLUSaved(gate_up[:, :n], gate_up[:, n:], saved.activation)
        glu_backward(g, unit, out=d_gate_up, again=None if d_t is None else g, row=row)
        if d_t is not None and into.d_lora_A is not None:
            low_rank_accumulate(g, d_t, [into.d_lora_A], turned=True, row=row)
        d_h = low_rank_backward(d_gate_up, h, _members(saved, n, into), row=row)
    return AdaptedGLUGrads(out, d_h.view(saved.h.shape), into.d_lora_B, into.d_lora_A)


def _members(saved: AdaptedGLUSaved, n: int, into: Receivers) -> list[Member]:
    """gate and up as `low_rank_backward` takes them, those that have a factor."""
    return [
        Member(place * n, side.lora_B, side.scaling, receiver)
        for place, (side, receiver) in enumerate(zip(saved.sides, into.d_lora_B, strict=True))
        if side is not None and receiver is not None
    ]


def _by_loop(
    g: Tensor,
    gate_up: Tensor,
    saved: AdaptedGLUSaved,
    h: Tensor,
    d_t: Tensor | None,
    d_gate_up: Tensor,
    into: Receivers,
    row: InARow | None,
) -> Tensor | None:
    """∂L/∂h by the compiled loop, and all else with it; None where it does not apply."""
    members = _members(saved, g.shape[1], into)
    behind = [] if d_t is None or into.d_lora_A is None else [d_t, into.d_lora_A]
    operands = (
        g,
        gate_up,
        h,
        d_gate_up,
        *behind,
        *(each for member in members for each in (member.lora_B, member.into)),
    )
    if g.dtype == torch.bfloat16 or not g.numel() or not (members or behind) or saved.activation not in ACTIVATIONS:
        return None
    run = loop(_BACKWARD, *operands)
    # h of no columns has no strides to look at.
    if run is None or any(x.stride(1) != 1 for x in operands if x.shape[1] > 1):
        return None
    d_h = torch.empty(h.shape, dtype=h.dtype)
    (count, n), size, width = g.shape, g.element_size(), gate_up.stride(0)
    numbers = [*matrix(g), *matrix(gate_up), gate_up.data_ptr() + n * size, width]
    numbers += [*matrix(d_gate_up), d_gate_up.data_ptr() + n * size, d_gate_up.stride(0)]
    first, found = 0, {member.column: member for member in members}
    for column in (0, n):
        member = found.get(column)
        if member is None:
            numbers += (*_NOWHERE * 4, 0)
            continue
        rank = member.lora_B.shape[1]
        numbers += (h.data_ptr() + first * size, h.stride(0), *matrix(member.lora_B))
        numbers += (d_h.data_ptr() + first * size, d_h.stride(0), *matrix(member.into), rank)
        first += rank
    numbers += (*matrix(behind[0]), *matrix(behind[1]), behind[0].shape[1]) if behind else (*_NOWHERE * 2, 0)
    scalings = _SCALINGS(*(found[column].scaling if column in found else 0.0 for column in (0, n)))
    call = partial(with_memory, run, ACTIVATIONS[saved.activation], _NUMBERS(*numbers), scalings, count, n)
    now_or_in(row, call, operands, d_h)
    return d_h


def adapted_glu_reference(
    gate_up: Tensor, activation: str, sides: tuple[Side | None, Side | None], h: Tensor, lora_A: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same p and t from the definitions."""
    halves, first = [], 0
    for half, side in zip(gate_up.chunk(2, dim=-1), sides, strict=True):
        if side is not None:
            rank = side.lora_B.shape[1]
            half = half + side.scaling * torch.einsum("...r,nr->...n", h[..., first : first + rank], side.lora_B)
            first += rank
        halves.append(half)
    p = glu_reference(halves[0], halves[1], activation)
    return p, None if lora_A is None else torch.einsum("...n,rn->...r", p, lora_A)
