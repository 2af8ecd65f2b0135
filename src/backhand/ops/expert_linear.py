"""Frozen linear layers of all experts, each with a low-rank update, on rows sorted by expert.

    y_r = x_r W_eᵀ + b_e + s (x̃_r A_eᵀ) B_eᵀ      for the rows r of expert e      [arXiv:2106.09685, eq. 3, for each]

with x̃ = x or, under dropout, m ⊙ x. An expert without rows is skipped, and its factors' gradients are zero.

Backward. An expert's rows depend on its weights only, so that each expert is `lora_linear` on its own rows:
    ∂L/∂h = s G B_e               (rows of e, rank)
    ∂L/∂x = G W_e + m ⊙ ((∂L/∂h) A_e)
    ∂L/∂A_e = (∂L/∂h)ᵀ x̃          (rank, in)
    ∂L/∂B_e = s Gᵀ h              (out, rank)
with the sums over the rows of e. Since rows are sorted by expert, each line is one product per expert.

Saved: x (which a caller may gather again) and h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.ops.low_rank import LoRAFactors, add_lora_A_gradients, add_up_projection, down_projection, h_gradient
from backhand.ops.weight_tiles import FrozenMatrix


class ExpertFactors(NamedTuple):
    """The experts' adapters: lora_A (experts, rank, in), lora_B (experts, out, rank), any strides; and the scaling."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class ExpertLinearSaved(NamedTuple):
    """x (rows, in), the experts' weights, rows of each, factors or None, h (rows, rank)."""

    x: Tensor
    weights: Tensor | Sequence[FrozenMatrix]
    counts: tuple[int, ...]
    factors: ExpertFactors | None
    h: Tensor
    dropout: Dropout | None


class ExpertLinearGrads(NamedTuple):
    """d_x (rows, in) or None; d_lora_A (experts, rank, in), d_lora_B (experts, out, rank), None without an adapter."""

    d_x: Tensor | None
    d_lora_A: Tensor | None
    d_lora_B: Tensor | None


def _present(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and their range."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def expert_linear_forward(
    x: Tensor,
    weights: Tensor | Sequence[FrozenMatrix],
    counts: tuple[int, ...],
    factors: ExpertFactors | None = None,
    biases: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, ExpertLinearSaved]:
    """Apply each expert's layer to its rows.

    Args:
        x: (rows, in), sorted by expert.
        weights: the frozen weights, as one tensor (experts, out, in) or one matrix (out, in) per expert.
        counts: rows of each expert.
        factors: the experts' adapters, or None.
        biases: (experts, out), frozen, or None.
        dropout: dropout of the low-rank branch's input, with one mask for all rows.

    Returns:
        y (rows, out) in x's dtype, and the saved tensors.
    """
    y = x.new_empty(x.shape[0], weights[0].shape[0])
    mask = None if factors is None else multiplier(x, dropout)
    h = x.new_empty(x.shape[0], 0 if factors is None else factors.lora_A.shape[1])
    for expert, part in _present(counts):
        frozen_linear(x[part], weights[expert], None if biases is None else biases[expert], out=y[part])
        if factors is not None:
            dropped = x[part] if mask is None else x[part] * mask[part]
            down_projection(dropped, factors.lora_A[expert], out=h[part])
            add_up_projection(y[part], h[part], factors.lora_B[expert], factors.scaling)
    return y, ExpertLinearSaved(x, weights, counts, factors, h, dropout)


def expert_linear_backward(
    d_y: Tensor,
    saved: ExpertLinearSaved,
    *,
    input_gradient: bool = True,
    accumulate_into: tuple[Tensor, Tensor] | None = None,
) -> ExpertLinearGrads:
    """Map d_y of shape (rows, out) to the gradients derived in the module docstring.

    Args:
        input_gradient: False skips ∂L/∂x.
        accumulate_into: of lora_A's and lora_B's shapes, in x's dtype or wider and of any strides. Their gradients are
            added to these, which are returned. None for fresh ones.
    """
    x, weights, counts, factors, h, dropout = saved
    d_x = torch.empty_like(x) if input_gradient else None
    d_lora_A, d_lora_B = accumulate_into or (None, None)
    if factors is not None and accumulate_into is None:
        d_lora_A, d_lora_B = torch.zeros_like(factors.lora_A), torch.zeros_like(factors.lora_B)
    mask = None if factors is None else multiplier(x, dropout)
    for expert, part in _present(counts):
        g = d_y[part]
        if d_x is not None:
            frozen_input_gradient(g, weights[expert], out=d_x[part])
        if factors is None or d_lora_A is None or d_lora_B is None:
            continue
        lora_A = factors.lora_A[expert]
        member = LoRAFactors(0, lora_A, factors.lora_B[expert], factors.scaling, d_lora_A[expert], d_lora_B[expert])
        d_h = h_gradient(g, h[part], [member])
        add_lora_A_gradients(x[part] if mask is None else x[part] * mask[part], d_h, [member.d_lora_A])
        if d_x is not None and mask is None:
            add_up_projection(d_x[part], d_h, lora_A, transposed=True)
        elif d_x is not None and mask is not None:
            d_x[part].addcmul_(mask[part], d_h @ lora_A)
    return ExpertLinearGrads(d_x, d_lora_A, d_lora_B)


def expert_linear_reference(
    x: Tensor,
    weights: Tensor,
    counts: tuple[int, ...],
    factors: ExpertFactors | None = None,
    biases: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the same y by applying every expert to every row and picking the row's own; m is given."""
    outputs = torch.einsum("ri,eoi->reo", x, weights)
    if biases is not None:
        outputs = outputs + biases
    if factors is not None:
        dropped = x if mask is None else x * mask
        low_rank = torch.einsum("ri,eki,eok->reo", dropped, factors.lora_A, factors.lora_B)
        outputs = outputs + factors.scaling * low_rank
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(x.device)
    own = torch.nn.functional.one_hot(expert, len(counts)).to(x.dtype)
    return torch.einsum("reo,re->ro", outputs, own)
