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

Saved: x (which a caller may recompute and put back, or put the norm in its place that it came from), h, and references
to the weights. The mask m is drawn again from its seed, never kept. Gᵀ x, (out, in), and W + s B A are never formed:
the cost over the frozen layer is 6 · rank · (in + out) floating-point operations a row instead of a third product of
the full size. W is a tensor, or a quantized matrix whose products `ops.frozen_matrix` computes. Several LoRA linears of
one input stand at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import Term
from backhand.kernels.library import InARow
from backhand.ops.dropout import dropout_multiplier
from backhand.ops.frozen_matrix import (
    FrozenMatrix,
    frozen_input_gradient_in_a_row,
    frozen_linear_in_turn,
    makes_shrunk,
)
from backhand.ops.low_rank import Member, low_rank_accumulate, low_rank_backward, low_rank_shrink
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply


class Dropout(NamedTuple):
    """Dropout of the low-rank branch's input: `probability` in [0, 1), and the seed that draws the mask again."""

    probability: float
    seed: int


class LoRASaved(NamedTuple):
    """What `lora_linear_forward` keeps: x (..., in), weight (out, in), the factors as given, h = x̃ Aᵀ (..., rank)."""

    x: Tensor | RMSNormSaved  # a caller may put what a norm saved in the place of what it gave
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
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _with_axes(y: Tensor, x: Tensor) -> Tensor:
    """The leading axes of x again: (rows, n) → (..., n)."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _empty(like: Tensor, columns: int) -> Tensor:
    """(rows, columns) as (rows, n) is given, uninitialised."""
    return torch.empty(like.shape[0], columns, dtype=like.dtype, device=like.device)


def multiplier(x: Tensor, dropout: Dropout | None) -> Tensor | None:
    """The dropout multiplier m, (rows, in), or None without dropout."""
    if dropout is None or dropout.probability == 0.0:
        return None
    return dropout_multiplier(rows(x).shape, dropout.probability, dropout.seed, dtype=x.dtype, device=x.device)


def branch_input(x: Tensor | RMSNormSaved, dropout: Dropout | None) -> tuple[Tensor | RMSNormSaved, Tensor | None]:
    """x̃ by rows, and m, both (rows, in), m None without dropout: then x̃ may remain the norm that x was given as."""
    if isinstance(x, RMSNormSaved):
        if dropout is None:
            return x._replace(x=rows(x.x), factor=rows(x.factor)), None
        x = rms_norm_apply(*x)
    mask = multiplier(x, dropout)
    return rows(x) if mask is None else rows(x) * mask, mask


def lora_linear_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
    row: InARow | None = None,
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
        row: where this is to be done in its turn, or None to do it now; with dropout, what is there is made at once.

    Returns:
        y (..., out) in x's dtype, and what backward needs.
    """
    x_rows, mask = rows(x), multiplier(x, dropout)
    if row is not None and mask is not None:
        row.make()
    inside = mask is None and makes_shrunk(x_rows, weight.shape[0], lora_A.shape[0])
    if inside:
        h = _empty(x_rows, lora_A.shape[0])
    else:  # first: x is still near the processor, which the large product fills
        h = low_rank_shrink(x_rows if mask is None else x_rows * mask, lora_A, turned=True, row=row)
    around = None if residual is None else rows(residual)
    term = Term(0, h, lora_B, scaling, lora_A if inside else None)
    y = frozen_linear_in_turn(x_rows, weight, bias, around, [term], row)
    return _with_axes(y, x), LoRASaved(x, weight, lora_A, lora_B, _with_axes(h, x), scaling, dropout)


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
    g, (branch, mask) = rows(d_y), branch_input(saved.x, saved.dropout)
    d_lora_A, d_lora_B = (torch.zeros_like(saved.lora_A), torch.zeros_like(saved.lora_B)) if into is None else into
    row = InARow()
    d_h = low_rank_backward(g, rows(saved.h), [Member(0, saved.lora_B, saved.scaling, d_lora_B)], row=row)
    low_rank_accumulate(branch, d_h, [d_lora_A], turned=True, row=row)
    if mask is not None:
        row.make()
    del branch  # with dropout, x̃ is let go before there is a ∂L/∂x
    d_x = None
    if input_gradient:
        d_x = _empty(g, saved.weight.shape[1])
        _input_gradient(g, saved.weight, d_h, saved.lora_A, mask, d_x, row)
    row.make()
    return LoRAGrads(None if d_x is None else _with_axes(d_x, d_y), d_lora_A, d_lora_B)


def lora_linear_backward_without_input(
    d_y: Tensor,
    weight: FrozenMatrix,
    factors: Factors,
    h: Tensor,
    d_lora_B: Tensor,
    dropout: Dropout | None = None,
    row: InARow | None = None,
) -> tuple[Tensor, Tensor]:
    """What of the backward needs no x, where x is not there yet.

    Args:
        d_y: (rows, out).
        weight: as in the forward, like factors and dropout.
        factors: the adapter.
        h: from the forward, (rows, rank).
        d_lora_B: of lora_B's shape, in d_y's dtype or wider, to which its gradient is added.
        dropout: None, or probability and seed of the mask.
        row: where this is to be done in its turn, or None to do it now.

    Returns:
        ∂L/∂x, (rows, in), and ∂L/∂h, (rows, rank), for `add_lora_A_gradient`.
    """
    d_x, mask, turn = _empty(d_y, weight.shape[1]), None, InARow() if row is None else row
    if dropout is not None:
        mask = multiplier(d_x, dropout)
    d_h = low_rank_backward(d_y, h, [Member(0, factors.lora_B, factors.scaling, d_lora_B)], row=turn)
    _input_gradient(d_y, weight, d_h, factors.lora_A, mask, d_x, turn)
    if row is None:
        turn.make()
    return d_x, d_h


def add_lora_A_gradient(
    x: Tensor, d_h: Tensor, d_lora_A: Tensor, dropout: Dropout | None = None, row: InARow | None = None
) -> None:
    """Add (∂L/∂h)ᵀ x̃ to d_lora_A, (rank, in), of x, (rows, in), and ∂L/∂h; in its turn where no mask is drawn."""
    if row is not None and dropout is not None:
        row.make()
    low_rank_accumulate(branch_input(x, dropout)[0], d_h, [d_lora_A], turned=True, row=row)


def _input_gradient(
    g: Tensor, weight: FrozenMatrix, d_h: Tensor, lora_A: Tensor, mask: Tensor | None, out: Tensor, row: InARow
) -> None:
    """G W + m ⊙ ((∂L/∂h) A) into `out`, (rows, in), in its turn."""
    if mask is None:
        frozen_input_gradient_in_a_row(g, weight, out, [Term(0, d_h, lora_A, turned=True)], row)
    else:
        frozen_input_gradient_in_a_row(g, weight, out, [], row)
        row.add(lambda: out.addcmul_(mask, d_h @ lora_A))


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

    x: Tensor | RMSNormSaved  # as in `LoRASaved`
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
    row: InARow | None = None,
) -> tuple[Tensor, LoRAGroupSaved]:
    """[y_1 | … | y_n] for the n members.

    Args:
        x: (..., in).
        weight: (Σ out_i, in), the members' frozen weights stacked.
        bias: (Σ out_i,) or None.
        sizes: out_i of each member.
        factors: the adapter of each member, or None.
        dropout: None, or probability and seed of the shared mask.
        row: as in `lora_linear_forward`.

    Returns:
        y (..., Σ out_i), and what backward needs; with no adapter at all h has no columns.
    """
    x_rows = rows(x)
    mask, inside = None, False
    ranks = [member.lora_A.shape[0] for member in factors if member is not None]
    if ranks:
        mask = multiplier(x, dropout)
        if row is not None and mask is not None:
            row.make()
        inside = mask is None and makes_shrunk(x_rows, weight.shape[0], sum(ranks))
    if inside or not ranks:
        h = _empty(x_rows, sum(ranks))
    else:
        h = low_rank_shrink(x_rows if mask is None else x_rows * mask, stacked_A(factors), turned=True, row=row)
    terms, column, parts = [], 0, iter(h.split_with_sizes(ranks, dim=1))
    for size, member in zip(sizes, factors, strict=True):
        if member is not None:
            shrink = member.lora_A if inside else None
            terms.append(Term(column, next(parts), member.lora_B, member.scaling, shrink))
        column += size
    y = frozen_linear_in_turn(x_rows, weight, bias, None, terms, row)
    saved = LoRAGroupSaved(x, weight, tuple(sizes), tuple(factors), _with_axes(h, x), dropout)
    return _with_axes(y, x), saved


def lora_linear_group_backward(
    d_y: Tensor,
    saved: LoRAGroupSaved,
    *,
    input_gradient: bool = True,
    into: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    d_h: Tensor | None = None,
    row: InARow | None = None,
) -> LoRAGroupGrads:
    """Map d_y, (..., Σ out_i), to the gradients derived above.

    Args:
        d_y: ∂L/∂y, the members' gradients side by side.
        saved: from the forward pass.
        input_gradient: False skips ∂L/∂x.
        into: for each member with an adapter its pair, as in `lora_linear_backward`; None for fresh gradients.
        d_h: ∂L/∂h, (rows, Σ rank), where it is there, or will be in its turn, and ∂L/∂B with it; else None.
        row: where this is to be done in its turn, or None to do it now.
    """
    g, h = rows(d_y), rows(saved.h)
    if into is None:
        into = [
            None if member is None else (torch.zeros_like(member.lora_A), torch.zeros_like(member.lora_B))
            for member in saved.factors
        ]
    members, column = [], 0
    for size, member, receiver in zip(saved.sizes, saved.factors, into, strict=True):
        if member is not None and receiver is not None:
            members.append(Member(column, member.lora_B, member.scaling, receiver[1]))
        column += size
    branch, mask = branch_input(saved.x, saved.dropout if members else None)
    turn = InARow() if row is None else row
    if d_h is None:
        d_h = low_rank_backward(g, h, members, row=turn)
    d_lora_A = tuple(None if receiver is None else receiver[0] for receiver in into)
    receiving_A = [d_A for d_A in d_lora_A if d_A is not None]
    low_rank_accumulate(branch, d_h, receiving_A, turned=True, row=turn)
    if mask is not None:
        turn.make()
    del branch  # as above
    d_x = None
    if input_gradient:
        d_x = _empty(g, saved.weight.shape[1])
        if members:
            _input_gradient(g, saved.weight, d_h, stacked_A(saved.factors), mask, d_x, turn)
        else:
            frozen_input_gradient_in_a_row(g, saved.weight, d_x, [], turn)
    if row is None:
        turn.make()
    d_x = None if d_x is None else _with_axes(d_x, d_y)
    return LoRAGroupGrads(d_x, d_lora_A, tuple(None if receiver is None else receiver[1] for receiver in into))


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
