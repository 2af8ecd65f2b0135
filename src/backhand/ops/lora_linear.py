"""LoRA linear: a frozen dense layer plus a trainable low-rank update.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ,   s = alpha / rank      [arXiv:2106.09685, eq. 3 and §4.1]

with x̃ = x, or, with dropout, x̃ = m ⊙ x where m is 0 with probability p and 1 / (1 - p) otherwise.

Backward. Let G = ∂L/∂y and h = x̃ Aᵀ. With W and b fixed, dL = ⟨G, dy⟩ where
    dy = dx Wᵀ + s dh Bᵀ + s h dBᵀ,   dh = (m ⊙ dx) Aᵀ + x̃ dAᵀ.
Since ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩ and ⟨P, m ⊙ Q⟩ = ⟨m ⊙ P, Q⟩, what stands beside each differential is
    ∂L/∂h = s G B                       (..., rank)
    ∂L/∂x = G W + m ⊙ ((∂L/∂h) A)       (..., in)
    ∂L/∂A = (∂L/∂h)ᵀ x̃                  (rank, in)
    ∂L/∂B = s Gᵀ h                      (out, rank)
with rows (all leading axes) summed in the last two.

Saved: x (which a caller may recompute and put back), h, and references to the weights. The mask m is drawn again
from its seed, never kept. Gᵀ x, (out, in), and W + s B A are never formed: the cost over the frozen layer is
6 · rank · (in + out) floating-point operations a row instead of a third product of the full size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.dropout import dropout_multiplier


class Dropout(NamedTuple):
    """Dropout of the low-rank branch's input: `probability` in [0, 1), and the seed that draws the mask again."""

    probability: float
    seed: int


class LoRASaved(NamedTuple):
    """What `lora_linear_forward` keeps: x (..., in), the parameters, h (..., rank)."""

    x: Tensor
    weight: Tensor
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
    weight: Tensor,
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
    x_rows = rows(x)
    y = frozen_linear(x_rows, weight, bias, None if residual is None else rows(residual))
    mask = multiplier(x, dropout)
    h = (x_rows if mask is None else x_rows * mask) @ lora_A.T
    y.addmm_(h, lora_B.T, alpha=scaling)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y, LoRASaved(x, weight, lora_A, lora_B, h.view(*x.shape[:-1], h.shape[1]), scaling, dropout)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + x Wᵀ + b on rows, with one of the sums folded into the product."""
    if residual is None:
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    y = torch.addmm(residual, x, weight.T)
    return y if bias is None else y.add_(bias)


def lora_linear_backward(d_y: Tensor, saved: LoRASaved, *, input_gradient: bool = True) -> LoRAGrads:
    """Map d_y, (..., out), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y, (..., out).
        saved: from the forward pass.
        input_gradient: False skips ∂L/∂x, the largest product, for the lowest adapted layer.
    """
    g, x = rows(d_y), rows(saved.x)
    mask = multiplier(saved.x, saved.dropout)
    d_h = scaled(g @ saved.lora_B, saved.scaling)
    d_lora_A = d_h.T @ (x if mask is None else x * mask)
    d_lora_B = lora_B_gradient(g, rows(saved.h), saved.scaling)
    if not input_gradient:
        return LoRAGrads(None, d_lora_A, d_lora_B)
    d_x = g @ saved.weight
    if mask is None:
        d_x.addmm_(d_h, saved.lora_A)
    else:
        d_x.addcmul_(mask, d_h @ saved.lora_A)
    return LoRAGrads(d_x.view(saved.x.shape), d_lora_A, d_lora_B)


def lora_B_gradient(g: Tensor, h: Tensor, scaling: float) -> Tensor:
    """s Gᵀ h, (out, rank), as the transpose of s hᵀ G: long rows in place of short ones take half the time."""
    return scaled(h.T @ g, scaling).T


def scaled(tensor: Tensor, scaling: float) -> Tensor:
    """The fresh result of a product, multiplied in place."""
    return tensor.mul_(scaling)


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
    """The same y by another route, x (W + s B A)ᵀ + b, with the dropout multiplier m given explicitly."""
    if mask is None:
        y = torch.nn.functional.linear(x, weight + scaling * (lora_B @ lora_A), bias)
    else:
        delta = torch.einsum("...i,ri,or->...o", x * mask.view(x.shape), lora_A, lora_B)
        y = torch.nn.functional.linear(x, weight, bias) + scaling * delta
    return y if residual is None else y + residual
