"""Several LoRA linears that share their input, as q/k/v and gate/up do, in few large products.

    y_i = x W_iᵀ + b_i + s_i (x̃ A_iᵀ) B_iᵀ,   i = 1 … n      [arXiv:2106.09685, eq. 3, for each member]

Stacked: W = [W_1; …; W_n] (Σ out_i, in), A = [A_1; …; A_n] (Σ rank_i, in), so that y = [y_1 | … | y_n] and
h = x̃ Aᵀ = [h_1 | … | h_n] take one product each; only the B_i differ in what they read and write:
    y = x Wᵀ + b,   then   y_i += s_i h_i B_iᵀ.

Backward. With G = [G_1 | … | G_n] = ∂L/∂y, each member follows `lora_linear`, and what they share adds up:
    ∂L/∂h_i = s_i G_i B_i                        (..., rank_i), side by side in ∂L/∂h (..., Σ rank_i)
    ∂L/∂A   = (∂L/∂h)ᵀ x̃                         (Σ rank_i, in): one product, its row blocks are the ∂L/∂A_i
    ∂L/∂B_i = s_i G_iᵀ h_i                       (out_i, rank_i)
    ∂L/∂x   = G W + m ⊙ ((∂L/∂h) A)              (..., in): the sum over members is inside the products

A member without an adapter takes part in W and G only. All members see the same dropout mask m, since they see the
same x: one draw a group instead of one a member; each member's masking is as random as alone.
Saved: x (or recomputed), h. Never formed: Gᵀ x, B A, separate copies of x for the members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.lora_linear import Dropout, frozen_linear, lora_B_gradient, multiplier, rows, scaled


class Factors(NamedTuple):
    """The adapter of one member: lora_A (rank, in), lora_B (out_i, rank) and its scaling."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class LoRAGroupSaved(NamedTuple):
    """What the forward keeps: x (..., in), the stacked weight, the members, h (..., Σ rank)."""

    x: Tensor
    weight: Tensor
    sizes: tuple[int, ...]
    factors: tuple[Factors | None, ...]
    h: Tensor
    dropout: Dropout | None


class LoRAGroupGrads(NamedTuple):
    """d_x (..., in) or None; d_lora_A[i] (rank_i, in), d_lora_B[i] (out_i, rank_i), None without an adapter."""

    d_x: Tensor | None
    d_lora_A: tuple[Tensor | None, ...]
    d_lora_B: tuple[Tensor | None, ...]


def stacked_A(factors: Sequence[Factors | None]) -> Tensor:
    """[A_1; …; A_n], (Σ rank, in), of the members that have an adapter (at least one)."""
    present = [member.lora_A for member in factors if member is not None]
    return present[0] if len(present) == 1 else torch.cat(present)


def lora_linear_group_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    factors: Sequence[Factors | None],
    dropout: Dropout | None = None,
) -> tuple[Tensor, LoRAGroupSaved]:
    """[y_1 | … | y_n] for the n members.

    Args:
        x: (..., in).
        weight: (Σ out_i, in), the members' frozen weights stacked.
        bias: (Σ out_i,) or None.
        sizes: out_i of each member.
        factors: the adapter of each member, or None.
        dropout: None, or probability and seed of the shared mask.

    Returns:
        y (..., Σ out_i), and what backward needs; with no adapter at all h has no columns.
    """
    x_rows = rows(x)
    y = frozen_linear(x_rows, weight, bias, None)
    if any(member is not None for member in factors):
        mask = multiplier(x, dropout)
        h = (x_rows if mask is None else x_rows * mask) @ stacked_A(factors).T
    else:
        h = x_rows.new_empty(x_rows.shape[0], 0)
    column = rank_column = 0
    for size, member in zip(sizes, factors, strict=True):
        if member is not None:
            rank = member.lora_A.shape[0]
            h_i = h[:, rank_column : rank_column + rank]
            y[:, column : column + size].addmm_(h_i, member.lora_B.T, alpha=member.scaling)
            rank_column += rank
        column += size
    lead = x.shape[:-1]
    return y.view(*lead, weight.shape[0]), LoRAGroupSaved(
        x, weight, tuple(sizes), tuple(factors), h.view(*lead, h.shape[1]), dropout
    )


def lora_linear_group_backward(d_y: Tensor, saved: LoRAGroupSaved, *, input_gradient: bool = True) -> LoRAGroupGrads:
    """Map d_y, (..., Σ out_i), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y, the members' gradients side by side.
        saved: from the forward pass.
        input_gradient: False skips ∂L/∂x.
    """
    g, x, h = rows(d_y), rows(saved.x), rows(saved.h)
    d_h = torch.empty_like(h)
    d_lora_B: list[Tensor | None] = []
    column = rank_column = 0
    for size, member in zip(saved.sizes, saved.factors, strict=True):
        if member is None:
            d_lora_B.append(None)
        else:
            rank = member.lora_A.shape[0]
            g_i, ranks = g[:, column : column + size], slice(rank_column, rank_column + rank)
            d_h[:, ranks] = scaled(g_i @ member.lora_B, member.scaling)
            d_lora_B.append(lora_B_gradient(g_i, h[:, ranks], member.scaling))
            rank_column += rank
        column += size

    d_lora_A: list[Tensor | None] = [None] * len(saved.factors)
    d_x = g @ saved.weight if input_gradient else None
    if h.shape[1]:
        mask = multiplier(saved.x, saved.dropout)
        d_stacked = d_h.T @ (x if mask is None else x * mask)
        ranks_present = [m.lora_A.shape[0] for m in saved.factors if m is not None]
        blocks = iter(d_stacked.split(ranks_present))
        d_lora_A = [None if member is None else next(blocks) for member in saved.factors]
        if d_x is not None and mask is None:
            d_x.addmm_(d_h, stacked_A(saved.factors))
        elif d_x is not None and mask is not None:
            d_x.addcmul_(mask, d_h @ stacked_A(saved.factors))
    return LoRAGroupGrads(None if d_x is None else d_x.view(saved.x.shape), tuple(d_lora_A), tuple(d_lora_B))


def lora_linear_group_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    factors: Sequence[Factors | None],
    mask: Tensor | None = None,
) -> Tensor:
    """The same y, member by member and with the products formed, for autograd to differentiate."""
    outputs = []
    biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    for weight_i, bias_i, member in zip(weight.split(list(sizes)), biases, factors, strict=True):
        y_i = torch.nn.functional.linear(x, weight_i, bias_i)
        if member is not None:
            delta_weight = member.scaling * (member.lora_B @ member.lora_A)
            y_i = y_i + torch.nn.functional.linear(x if mask is None else x * mask.view(x.shape), delta_weight)
        outputs.append(y_i)
    return torch.cat(outputs, dim=-1)
