"""The gated unit's backward with its neighbours' factor gradients, in one pass: those in front of it and behind it.

    [a | u] = [a₀ | u₀] + s h Bᵀ    gate and up with what their factors add, h given: of gate, of up, or of both as one
    p = φ(a) ⊙ u,   t = p̃ Aᵀ        the product, and the h of the projection behind it; p̃ is m ⊙ p under its dropout

Backward. `glu` has ∂L/∂a and ∂L/∂u, `lora_linear` the rest. With G = ∂L/∂p in all, through t and elsewhere, (..., n),
T = ∂L/∂t, (..., rank), and V = [∂L/∂a | ∂L/∂u], whose columns V_i are those of a factor,
    ∂L/∂[a₀ | u₀] = V = [G ⊙ u ⊙ φ'(a) | G ⊙ φ(a)]      (..., 2n)
    ∂L/∂h_i = s_i V_i B_i                               (..., rank_i)
    ∂L/∂B_i = s_i V_iᵀ h_i                              (out_i, rank_i)
    ∂L/∂A   = Tᵀ p̃                                      (rank, n)

Saved: a and u side by side, and h. p is recomputed. In torch's form it is a pass over all rows, and so is each line
above. The kernel (native/adapted_glu.cpp) makes a few rows and columns of ∂L/∂a, ∂L/∂u and p at a time and
multiplies them while they are near the processor: a, u and G are read once, V written once, and p never. It is for
float32, where gate and up have factors of their own, and for p̃ = p. Half as wide numbers are multiplied in other units,
which the passes one by one have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, Declared, loop
from backhand.ops.glu import ACTIVATIONS, GLUSaved, glu_backward, glu_forward, glu_reference
from backhand.ops.lora_group import LoRAGroup, group_A_gradients, stacked_A
from backhand.ops.lora_linear import multiplier
from backhand.ops.low_rank import Member, add_up_projection, down_projection, hidden_gradient

_BACKWARD = Declared("backhand_adapted_glu_backward", INT, INT, POINTER, POINTER, INT64, INT64, result=INT)
_NO_GROUP = LoRAGroup()


class _Matrix(ctypes.Structure):
    _fields_ = (("address", INT64), ("row", INT64))

    @classmethod
    def of(cls, x: Tensor, column: int = 0) -> _Matrix:
        """The columns from this one on."""
        return cls(x.data_ptr() + column * x.element_size(), x.stride(0))


class _Side(ctypes.Structure):
    _fields_ = (*((name, _Matrix) for name in ("h", "lora_B", "d_h", "d_lora_B")), ("rank", INT64))


class _Unit(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("d_y", "gate", "up", "d_gate", "d_up")),
        *(("gate_side", _Side), ("up_side", _Side)),
        *(("d_t", _Matrix), ("d_lora_A", _Matrix), ("rank_behind", INT64)),
    )


class AdaptedGLUSaved(NamedTuple):
    """What backward needs."""

    gate_up: Tensor  # [a | u], (..., 2n)
    activation: str  # `silu`, `gelu_tanh` or `sigmoid`
    front: LoRAGroup  # the factors of gate and up
    h: Tensor  # theirs, (..., Σ rank)
    behind: LoRAGroup = _NO_GROUP  # the factors of the projection that takes p
    # T, (..., rank), put here when it is there; None where nothing behind the unit has factors
    d_t: Tensor | None = None


class AdaptedGLUGrads(NamedTuple):
    """d_gate_up (..., 2n); d_h (..., Σ rank); d_lora_B, (out_i, rank_i) of those in front, and d_lora_A (rank, n)."""

    d_gate_up: Tensor
    d_h: Tensor
    d_lora_B: tuple[Tensor, ...]
    d_lora_A: tuple[Tensor, ...]


def adapted_glu_forward(
    gate_up: Tensor, activation: str, front: LoRAGroup, h: Tensor, behind: LoRAGroup = _NO_GROUP
) -> tuple[tuple[Tensor, Tensor | None], AdaptedGLUSaved]:
    """p (..., n) and t (..., rank), None without a factor behind, and what backward needs but for T.

    Args:
        gate_up: [a₀ | u₀], (..., 2n).
        activation: `silu`, `gelu_tanh` or `sigmoid`.
        front: the factors of gate and up.
        h: theirs, side by side, (..., Σ rank).
        behind: the factors of the projection that takes p.
    """
    n, both, lead = gate_up.shape[-1] // 2, gate_up.flatten(0, -2).clone(), gate_up.shape[:-1]
    ranks = [len(member.lora_A) for member in front.members]
    for member, part in zip(front.members, h.flatten(0, -2).split_with_sizes(ranks, dim=1), strict=True):
        columns = slice(member.column, member.column + len(member.lora_B))
        add_up_projection(both[:, columns], part, member.lora_B, member.scaling)
    p, _ = glu_forward(both[:, :n], both[:, n:], activation)
    t = None
    if behind.members:
        mask = multiplier(p, behind.dropout)
        t = down_projection(p if mask is None else p * mask, stacked_A(behind.members))
        t = t.view(*lead, t.shape[1])
    return (p.view(*lead, n), t), AdaptedGLUSaved(both.view(gate_up.shape), activation, front, h, behind)


def adapted_glu_backward(d_y: Tensor, saved: AdaptedGLUSaved, *, out: Tensor | None = None) -> AdaptedGLUGrads:
    """Map d_y, (..., n), to the gradients of the module docstring; those of factors are added to what members name.

    Args:
        d_y: G, ∂L/∂p in all; it may be overwritten.
        saved: from the forward pass, with T.
        out: of gate_up's shape, to receive [∂L/∂a | ∂L/∂u]; perhaps gate_up itself; or None.
    """
    gate_up, g, h = saved.gate_up.flatten(0, -2), d_y.flatten(0, -2), saved.h.flatten(0, -2)
    n, members, behind = g.shape[1], saved.front.members, saved.behind
    out = torch.empty_like(saved.gate_up) if out is None else out
    d_gate_up, d_t = out.flatten(0, -2), None if saved.d_t is None else saved.d_t.flatten(0, -2)
    d_h = None if behind.dropout is not None else _by_loop(g, gate_up, saved, h, d_t, d_gate_up)
    if d_h is None:
        # A pass for each line of the docstring; p again, in G's place, for A's gradient alone.
        unit = GLUSaved(gate_up[:, :n], gate_up[:, n:], saved.activation)
        glu_backward(g, unit, out=d_gate_up, again=None if d_t is None else g)
        if d_t is not None:
            group_A_gradients(g, d_t, behind)
        d_h = hidden_gradient(d_gate_up, h, members)
    d_lora_A = () if d_t is None else tuple(member.d_lora_A for member in behind.members)
    return AdaptedGLUGrads(out, d_h.view(saved.h.shape), tuple(member.d_lora_B for member in members), d_lora_A)


def _by_loop(
    g: Tensor, gate_up: Tensor, saved: AdaptedGLUSaved, h: Tensor, d_t: Tensor | None, d_gate_up: Tensor
) -> Tensor | None:
    """∂L/∂h by the kernel, and all else with it; None where it does not apply."""
    n, members = g.shape[1], saved.front.members
    behind = [] if d_t is None else [each for one in saved.behind.members for each in (d_t, one.d_lora_A)]
    factors = [each for member in members for each in (member.lora_B, member.d_lora_B)]
    operands = (g, gate_up, h, d_gate_up, *behind, *factors)
    own = all(member.column in (0, n) and len(member.lora_B) == n for member in members)
    if g.dtype == torch.bfloat16 or not g.numel() or not own or not (members or behind):
        return None
    run = loop(_BACKWARD, *operands) if saved.activation in ACTIVATIONS else None
    # h of no columns has no strides to look at.
    if run is None or any(x.stride(1) != 1 for x in operands if x.shape[1] > 1):
        return None
    d_h = torch.empty(h.shape, dtype=h.dtype)
    unit = _Unit(
        *(_Matrix.of(g), _Matrix.of(gate_up), _Matrix.of(gate_up, n), _Matrix.of(d_gate_up), _Matrix.of(d_gate_up, n)),
        *_sides(members, h, d_h, n),
    )
    if behind:
        unit.d_t, unit.d_lora_A, unit.rank_behind = _Matrix.of(behind[0]), _Matrix.of(behind[1]), behind[0].shape[1]
    scalings = {member.column: member.scaling for member in members}
    both = (DOUBLE * 2)(scalings.get(0, 0.0), scalings.get(n, 0.0))
    if run(ACTIVATIONS[saved.activation], ctypes.addressof(unit), both, len(g), n):
        raise MemoryError("a gated unit's backward: no memory for what it works with")
    return d_h


def _sides(members: Sequence[Member], h: Tensor, d_h: Tensor, n: int) -> tuple[_Side, _Side]:
    """gate and up; zeros where there is no factor."""
    sides, first = {0: _Side(), n: _Side()}, 0
    for member in members:
        rank = member.lora_B.shape[1]
        places = (_Matrix.of(h, first), _Matrix.of(member.lora_B), _Matrix.of(d_h, first), _Matrix.of(member.d_lora_B))
        sides[member.column] = _Side(*places, rank)
        first += rank
    return sides[0], sides[n]


def adapted_glu_reference(
    gate_up: Tensor,
    activation: str,
    front: LoRAGroup,
    h: Tensor,
    behind: LoRAGroup = _NO_GROUP,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same p and t from the definitions; the dropout multiplier m is given, of p's shape."""
    first = 0
    for column, _, lora_B, scaling, *_ in front.members:
        part = h[..., first : first + lora_B.shape[1]]
        first += lora_B.shape[1]
        added = scaling * torch.einsum("...r,nr->...n", part, lora_B)
        gate_up = gate_up + torch.nn.functional.pad(added, (column, gate_up.shape[-1] - column - len(lora_B)))
    gate, up = gate_up.chunk(2, dim=-1)
    p = glu_reference(gate, up, activation)
    seen = p if mask is None else p * mask
    return p, torch.einsum("...n,rn->...r", seen, behind.members[0].lora_A) if behind.members else None
