"""Backward of a gated unit together with the LoRA factors before it (gate, up) and after it (down).

    [a | u] = [a₀ | u₀] + s h Bᵀ    gate and up plus their low-rank updates; h is given
    p = φ(a) ⊙ u,   t = p̃ Aᵀ        the product, and the h of the down projection; p̃ is m ⊙ p under its dropout

Factors may belong to gate, to up, to each of them, or to both as one stacked layer.

Backward. `glu` derives ∂L/∂a and ∂L/∂u, `lora_linear` the rest. Let G = ∂L/∂p (..., n) be the whole gradient of
p, including what reaches p through t, and let T = ∂L/∂t of shape (..., rank). With V = [∂L/∂a | ∂L/∂u] and V_i the
columns of V that belong to factor i,
    ∂L/∂[a₀ | u₀] = V = [G ⊙ u ⊙ φ'(a) | G ⊙ φ(a)]      (..., 2n)
    ∂L/∂h_i = s_i V_i B_i                               (..., rank_i)
    ∂L/∂B_i = s_i V_iᵀ h_i                              (out_i, rank_i)
    ∂L/∂A   = Tᵀ p̃                                      (rank, n)

Saved: a and u as the columns of one buffer, and h. p is recomputed.

Torch's form makes one pass over all rows per line above. The kernel (native/adapted_glu.cpp) computes a few rows and
columns of ∂L/∂a, ∂L/∂u and p at a time and multiplies them while they are in the cache. It reads a, u and G once,
writes V once, and never writes p. It is used for float32, if gate and up have separate factors and p̃ = p. For bfloat16
the separate passes are faster, since other units of the processor multiply it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import adapted_glu as kernels
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward, glu_reference
from backhand.ops.lora_group import LoRAGroup, group_A_gradients, stacked_A
from backhand.ops.lora_linear import multiplier
from backhand.ops.low_rank import add_up_projection, down_projection, h_gradient

_NO_GROUP = LoRAGroup()


class AdaptedGLUSaved(NamedTuple):
    """Inputs of the backward."""

    gate_up: Tensor  # [a | u], (..., 2n)
    activation: str  # `silu`, `gelu`, `gelu_tanh` or `sigmoid`
    gate_up_group: LoRAGroup  # the factors of gate and up
    h: Tensor  # their hidden activations, (..., Σ rank)
    down_group: LoRAGroup = _NO_GROUP  # the factors of the projection that takes p
    # T, (..., rank): the caller adds it before the backward; None if the down projection has no factors
    d_t: Tensor | None = None


class AdaptedGLUGrads(NamedTuple):
    """d_gate_up (..., 2n); d_h (..., Σ rank); d_lora_B (out_i, rank_i) of gate and up; d_lora_A (rank, n) of down."""

    d_gate_up: Tensor
    d_h: Tensor
    d_lora_B: tuple[Tensor, ...]
    d_lora_A: tuple[Tensor, ...]


def adapted_glu_forward(
    gate_up: Tensor, activation: str, gate_up_group: LoRAGroup, h: Tensor, down_group: LoRAGroup = _NO_GROUP
) -> tuple[tuple[Tensor, Tensor | None], AdaptedGLUSaved]:
    """Compute p and t.

    Args:
        gate_up: [a₀ | u₀], (..., 2n).
        activation: `silu`, `gelu`, `gelu_tanh` or `sigmoid`.
        gate_up_group: the factors of gate and up.
        h: their hidden activations, (..., Σ rank).
        down_group: the factors of the projection that takes p.

    Returns:
        p (..., n) and t (..., rank), None if `down_group` has no factors; and the saved inputs of the backward,
        without T.
    """
    n, both, lead = gate_up.shape[-1] // 2, gate_up.flatten(0, -2).clone(), gate_up.shape[:-1]
    ranks = [len(adapter.lora_A) for adapter in gate_up_group.factors]
    for adapter, part in zip(gate_up_group.factors, h.flatten(0, -2).split_with_sizes(ranks, dim=1), strict=True):
        columns = slice(adapter.column, adapter.column + len(adapter.lora_B))
        add_up_projection(both[:, columns], part, adapter.lora_B, adapter.scaling)
    p, _ = glu_forward(both[:, :n], both[:, n:], activation)
    t = None
    if down_group.factors:
        mask = multiplier(p, down_group.dropout)
        t = down_projection(p if mask is None else p * mask, stacked_A(down_group.factors))
        t = t.view(*lead, t.shape[1])
    return (p.view(*lead, n), t), AdaptedGLUSaved(both.view(gate_up.shape), activation, gate_up_group, h, down_group)


def adapted_glu_backward(d_y: Tensor, saved: AdaptedGLUSaved, *, out: Tensor | None = None) -> AdaptedGLUGrads:
    """Map d_y (..., n) to the gradients of the module docstring; factor gradients are added to the groups' buffers.

    Args:
        d_y: G, the whole gradient of p; it may be overwritten.
        saved: from the forward pass, with T.
        out: of gate_up's shape, to receive [∂L/∂a | ∂L/∂u]; may be gate_up itself; or None.
    """
    gate_up, g, h = saved.gate_up.flatten(0, -2), d_y.flatten(0, -2), saved.h.flatten(0, -2)
    n, adapters, down_group = g.shape[1], saved.gate_up_group.factors, saved.down_group
    out = torch.empty_like(saved.gate_up) if out is None else out
    d_gate_up, d_t = out.flatten(0, -2), None if saved.d_t is None else saved.d_t.flatten(0, -2)
    d_h = None
    if down_group.dropout is None:
        down = () if d_t is None else tuple(x for adapter in down_group.factors for x in (d_t, adapter.d_lora_A))
        d_h = kernels.adapted_glu_gradients(g, gate_up, saved.activation, adapters, h, down, d_gate_up)
    if d_h is None:
        # One pass per line of the docstring. p takes G's place and is needed for ∂L/∂A alone.
        unit = GLUSaved(gate_up[:, :n], gate_up[:, n:], saved.activation)
        glu_backward(g, unit, out=d_gate_up, output_buffer=None if d_t is None else g)
        if d_t is not None:
            group_A_gradients(g, d_t, down_group)
        d_h = h_gradient(d_gate_up, h, adapters)
    d_lora_A = () if d_t is None else tuple(adapter.d_lora_A for adapter in down_group.factors)
    return AdaptedGLUGrads(out, d_h.view(saved.h.shape), tuple(adapter.d_lora_B for adapter in adapters), d_lora_A)


def adapted_glu_reference(
    gate_up: Tensor,
    activation: str,
    gate_up_group: LoRAGroup,
    h: Tensor,
    down_group: LoRAGroup = _NO_GROUP,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same p and t from the definitions; the dropout multiplier m is given, of p's shape."""
    first = 0
    for column, _, lora_B, scaling, *_ in gate_up_group.factors:
        part = h[..., first : first + lora_B.shape[1]]
        first += lora_B.shape[1]
        added = scaling * torch.einsum("...r,nr->...n", part, lora_B)
        gate_up = gate_up + torch.nn.functional.pad(added, (column, gate_up.shape[-1] - column - len(lora_B)))
    gate, up = gate_up.chunk(2, dim=-1)
    p = glu_reference(gate, up, activation)
    seen = p if mask is None else p * mask
    if not down_group.factors:
        return p, None
    return p, torch.einsum("...n,rn->...r", seen, down_group.factors[0].lora_A)
