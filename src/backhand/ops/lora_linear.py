"""LoRA linear: a frozen dense layer plus a trainable low-rank update.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ,   s = alpha / rank      [arXiv:2106.09685, eq. 3 and §4.1]

with x̃ = x, or, with dropout, x̃ = m ⊙ x where m is 0 with probability p and 1 / (1 - p) otherwise.

Backward. ⊙ multiplies element by element; ⟨P, Q⟩ is the sum of P ⊙ Q. Let G = ∂L/∂y and h = x̃ Aᵀ. With W and b
fixed, dL = ⟨G, dy⟩ where
    dy = dx Wᵀ + s dh Bᵀ + s h dBᵀ,   dh = (m ⊙ dx) Aᵀ + x̃ dAᵀ.
Since ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩ and ⟨P, m ⊙ Q⟩ = ⟨m ⊙ P, Q⟩, what stands beside each differential is
    ∂L/∂h = s G B                       (..., rank)
    ∂L/∂x = G W + m ⊙ ((∂L/∂h) A)       (..., in)
    ∂L/∂A = (∂L/∂h)ᵀ x̃                  (rank, in)
    ∂L/∂B = s Gᵀ h                      (out, rank)
with rows (all leading axes) summed in the last two. A residual r added to y has ∂L/∂r = G.

Saved: x (which a caller may recompute and put back), h, and references to the weights. The mask m is drawn again
from its seed, never kept. Gᵀ x, (out, in), and W + s B A are never formed: the cost over the frozen layer is
6 · rank · (in + out) floating-point operations a row instead of a third product of the full size. W is a tensor, or a
quantized matrix whose products `ops.frozen_matrix` computes. Several LoRA linears of one input stand at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.dropout import dropout_multiplier
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_input_gradient, frozen_linear
from backhand.ops.low_rank import (
    low_rank_accumulate,
    low_rank_expand,
    low_rank_gather,
    low_rank_shrink,
    low_rank_shrink_and_accumulate,
)


class Dropout(NamedTuple):
    """Dropout of the low-rank branch's input: `probability` in [0, 1), and the seed that draws the mask again."""

    probability: float
    seed: int


class LoRASaved(NamedTuple):
    """What `lora_linear_forward` keeps: x (..., in), weight (out, in), the factors as given, h = x̃ Aᵀ (..., rank)."""

    x: Tensor
    weight: FrozenMatrix
    lora_A: Tensor
    lora_B: Tensor
    h: Tensor
    scaling: float
    dropout: Dropout | None


class LoRAGrads(NamedTuple):
    """d_x (..., in) or None when not asked for, d_lora_A (rank, in), d_lora_B (out, rank)."""

    d_x: Tensor | None
    d_lora_A: Tensor
    d_lora_B: Tensor


def rows(x: Tensor) -> Tensor:
    """All leading axes as one: (..., n) → (rows, n)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def multiplier(x: Tensor, dropout: Dropout | None) -> Tensor | None:
    """The dropout multiplier m, (rows, in), or None without dropout."""
    if dropout is None or dropout.probability == 0.0:
        return None
    return dropout_multiplier(rows(x).shape, dropout.probability, dropout.seed, dtype=x.dtype, device=x.device)


def lora_linear_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, LoRASaved]:
    """y = residual + x Wᵀ + b + s (x̃ Aᵀ) Bᵀ.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s, the only multiplier the op sees.
        dropout: None, or probability and seed of the mask on the low-rank branch's input.
        residual: (..., out) added to the result inside the product, or None; its gradient is d_y itself.

    Returns:
        y (..., out) in x's dtype, and what backward needs.
    """
    x_rows, mask = rows(x), multiplier(x, dropout)
    # First: x is still near the processor, which the large product fills.
    h = low_rank_shrink(x_rows if mask is None else x_rows * mask, lora_A.T)
    y = frozen_linear(x_rows, weight, bias, None if residual is None else rows(residual))
    y = low_rank_expand(y, h, lora_B, scaling).view(*x.shape[:-1], weight.shape[0])
    return y, LoRASaved(x, weight, lora_A, lora_B, h.view(*x.shape[:-1], h.shape[1]), scaling, dropout)


def lora_linear_backward(
    d_y: Tensor, saved: LoRASaved, *, input_gradient: bool = True, into: tuple[Tensor, Tensor] | None = None
) -> LoRAGrads:
    """Map d_y, (..., out), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y, (..., out).
        saved: from the forward pass.
        input_gradient: False skips ∂L/∂x, the largest product, for the lowest adapted layer.
        into: of lora_A's and lora_B's shapes, in x's dtype or wider, to which their gradients are added, and which are
            returned; None for fresh ones.
    """
    g, x = rows(d_y), rows(saved.x)
    mask = multiplier(saved.x, saved.dropout)
    dropped = x if mask is None else x * mask
    if into is None:
        d_h = low_rank_shrink(g, saved.lora_B, saved.scaling)
        into = low_rank_gather(dropped, d_h).T, low_rank_gather(g, rows(saved.h), saved.scaling)
    else:
        d_h = low_rank_shrink_and_accumulate(g, rows(saved.h), saved.lora_B, saved.scaling, into[1])
        low_rank_accumulate(dropped, d_h, 1.0, [into[0].T])
    if not input_gradient:
        return LoRAGrads(None, *into)
    d_x = _with_low_rank(frozen_input_gradient(g, saved.weight), d_h, saved.lora_A, mask)
    return LoRAGrads(d_x.view(saved.x.shape), *into)


def lora_linear_input_gradient(
    d_y: Tensor, weight: FrozenMatrix, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None = None
) -> Tensor:
    """∂L/∂x alone, (rows, in), from d_y, (rows, out), where x is not there yet; the rest as in the forward."""
    d_x = frozen_input_gradient(d_y, weight)
    return _with_low_rank(d_x, low_rank_shrink(d_y, lora_B, scaling), lora_A, multiplier(d_x, dropout))


def _with_low_rank(d_x: Tensor, d_h: Tensor, lora_A: Tensor, mask: Tensor | None) -> Tensor:
    """d_x + m ⊙ ((∂L/∂h) A), in d_x's place."""
    if mask is None:
        return low_rank_expand(d_x, d_h, lora_A.T)
    return d_x.addcmul_(mask, d_h @ lora_A)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same y by another route, x (W + s B A)ᵀ + b; the dropout multiplier m is given, as many elements as x."""
    if mask is None:
        y = torch.nn.functional.linear(x, weight + scaling * (lora_B @ lora_A), bias)
    else:
        delta = torch.einsum("...i,ri,or->...o", x * mask.view(x.shape), lora_A, lora_B)
        y = torch.nn.functional.linear(x, weight, bias) + scaling * delta
    return y if residual is None else y + residual


# ---------------------------------------------------------------------------------------------------------------------
# Several that share their input, as q/k/v and gate/up do, in few large products.
#
#     y_i = x W_iᵀ + b_i + s_i (x̃ A_iᵀ) B_iᵀ,   i = 1 … n      [arXiv:2106.09685, eq. 3, for each member]
#
# Stacked: W = [W_1; …; W_n] (Σ out_i, in), A = [A_1; …; A_n] (Σ rank_i, in), so that y = [y_1 | … | y_n] and
# h = x̃ Aᵀ = [h_1 | … | h_n] take one product each; only the B_i differ in what they read and write:
#     y = x Wᵀ + b,   then   y_i += s_i h_i B_iᵀ.
#
# Backward. With G = [G_1 | … | G_n] = ∂L/∂y, each member follows `lora_linear`, and what they share adds up:
#     ∂L/∂h_i = s_i G_i B_i                        (..., rank_i), side by side in ∂L/∂h (..., Σ rank_i)
#     ∂L/∂A   = (∂L/∂h)ᵀ x̃                         (Σ rank_i, in): one product, its row blocks are the ∂L/∂A_i
#     ∂L/∂B_i = s_i G_iᵀ h_i                       (out_i, rank_i)
#     ∂L/∂x   = G W + m ⊙ ((∂L/∂h) A)              (..., in): the sum over members is inside the products
#
# A member without an adapter takes part in W and G only. All members see the same dropout mask m, since they see the
# same x: one draw a group instead of one a member; each member's masking is as random as alone.
# Saved: x (or recomputed), h. Never formed: Gᵀ x, B A, separate copies of x for the members.


class Factors(NamedTuple):
    """The adapter of one member: lora_A (rank, in), lora_B (out_i, rank) and its scaling."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class LoRAGroupSaved(NamedTuple):
    """What the forward keeps: x (..., in), the stacked weight, the members, h (..., Σ rank)."""

    x: Tensor
    weight: FrozenMatrix
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
    weight: FrozenMatrix,
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
    if any(member is not None for member in factors):
        mask = multiplier(x, dropout)
        h = low_rank_shrink(x_rows if mask is None else x_rows * mask, stacked_A(factors).T)
    else:
        h = x_rows.new_empty(x_rows.shape[0], 0)
    y = frozen_linear(x_rows, weight, bias)
    column = rank_column = 0
    for size, member in zip(sizes, factors, strict=True):
        if member is not None:
            rank = member.lora_A.shape[0]
            h_i = h[:, rank_column : rank_column + rank]
            low_rank_expand(y[:, column : column + size], h_i, member.lora_B, member.scaling)
            rank_column += rank
        column += size
    lead = x.shape[:-1]
    return y.view(*lead, weight.shape[0]), LoRAGroupSaved(
        x, weight, tuple(sizes), tuple(factors), h.view(*lead, h.shape[1]), dropout
    )


def lora_linear_group_backward(
    d_y: Tensor,
    saved: LoRAGroupSaved,
    *,
    input_gradient: bool = True,
    into: Sequence[tuple[Tensor, Tensor] | None] | None = None,
) -> LoRAGroupGrads:
    """Map d_y, (..., Σ out_i), to the gradients derived above.

    Args:
        d_y: ∂L/∂y, the members' gradients side by side.
        saved: from the forward pass.
        input_gradient: False skips ∂L/∂x.
        into: for each member with an adapter its pair, as in `lora_linear_backward`; None for fresh gradients.
    """
    g, x, h = rows(d_y), rows(saved.x), rows(saved.h)
    d_h = torch.empty_like(h)
    d_lora_B: list[Tensor | None] = []
    column = rank_column = 0
    for place, (size, member) in enumerate(zip(saved.sizes, saved.factors, strict=True)):
        receiver = None if into is None else into[place]
        if member is None:
            d_lora_B.append(None)
        else:
            rank = member.lora_A.shape[0]
            g_i, ranks = g[:, column : column + size], slice(rank_column, rank_column + rank)
            of_member, d_h_i = (h[:, ranks], member.lora_B, member.scaling), d_h[:, ranks]
            if receiver is None:
                low_rank_shrink(g_i, member.lora_B, member.scaling, out=d_h_i)
                d_lora_B.append(low_rank_gather(g_i, h[:, ranks], member.scaling))
            else:
                low_rank_shrink_and_accumulate(g_i, *of_member, receiver[1], out=d_h_i)
                d_lora_B.append(receiver[1])
            rank_column += rank
        column += size

    d_lora_A: list[Tensor | None] = [None] * len(saved.factors)
    mask = multiplier(saved.x, saved.dropout) if h.shape[1] else None
    dropped = x if mask is None else x * mask
    if into is not None:
        d_lora_A = [None if receiver is None else receiver[0] for receiver in into]
        low_rank_accumulate(dropped, d_h, 1.0, [d_A.T for d_A in d_lora_A if d_A is not None])
    elif h.shape[1]:
        ranks_present = [m.lora_A.shape[0] for m in saved.factors if m is not None]
        blocks = iter(low_rank_gather(dropped, d_h).T.split(ranks_present))
        d_lora_A = [None if member is None else next(blocks) for member in saved.factors]
    d_x = frozen_input_gradient(g, saved.weight) if input_gradient else None
    if d_x is not None and mask is not None:
        d_x.addcmul_(mask, d_h @ stacked_A(saved.factors))
    elif d_x is not None and h.shape[1]:
        low_rank_expand(d_x, d_h, stacked_A(saved.factors).T)
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
