"""LoRA linear: a frozen dense layer plus a trainable low-rank update.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ,   s = alpha / rank      [arXiv:2106.09685, eq. 3 and §4.1]

with x̃ = x, or, with dropout, x̃ = m ⊙ x where m is 0 with probability p and 1 / (1 - p) otherwise.

Backward. ⊙ multiplies element by element; ⟨P, Q⟩ is the sum of P ⊙ Q. Let G = ∂L/∂y and h = x̃ Aᵀ. With W and b
fixed, dL = ⟨G, dy⟩ where
    dy = dx Wᵀ + s dh Bᵀ + s h dBᵀ,   dh = (m ⊙ dx) Aᵀ + x̃ dAᵀ.
Since ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩ and ⟨P, m ⊙ Q⟩ = ⟨m ⊙ P, Q⟩, the other factor of each differential is its
gradient:
    ∂L/∂h = s G B                       (..., rank)
    ∂L/∂x = G W + m ⊙ ((∂L/∂h) A)       (..., in)
    ∂L/∂A = (∂L/∂h)ᵀ x̃                  (rank, in)
    ∂L/∂B = s Gᵀ h                      (out, rank)
with the last two summed over rows (all leading axes).

Saved: x, h and references to the weights. The mask m is drawn again from its seed, never saved. Gᵀ x, (out, in), and
W + s B A are never formed. In forward and backward together, an adapter adds 6 · rank · (in + out) floating-point
operations per row to the frozen layer's two products. Training W would add a third product of the full size. W is a
tensor, or a quantized matrix whose products `ops.frozen_matrix` computes.

This file states the idea in a few lines. A training step uses `ops.lora_group`, which applies the same formulas to
several layers of one input in few large products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.dropout import dropout_multiplier
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.weight_tiles import FrozenMatrix


class Dropout(NamedTuple):
    """Dropout of the low-rank branch's input: `probability` in [0, 1), and the seed that draws the mask again."""

    probability: float
    seed: int


class LoRASaved(NamedTuple):
    """Saved for the backward: x (..., in), weight (out, in), the factors, h = x̃ Aᵀ (..., rank)."""

    x: Tensor
    weight: FrozenMatrix
    lora_A: Tensor
    lora_B: Tensor
    h: Tensor
    scaling: float
    dropout: Dropout | None


class LoRAGrads(NamedTuple):
    """d_x (..., in), or None if skipped; d_lora_A (rank, in); d_lora_B (out, rank)."""

    d_x: Tensor | None
    d_lora_A: Tensor
    d_lora_B: Tensor


def rows(x: Tensor) -> Tensor:
    """Flatten the leading axes, (..., n) → (rows, n); a vector becomes one row."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def multiplier(x: Tensor, dropout: Dropout | None) -> Tensor | None:
    """Return the dropout multiplier m of x, (..., in), or None without dropout."""
    if dropout is None or dropout.probability == 0.0:
        return None
    return dropout_multiplier(x.shape, dropout.probability, dropout.seed, dtype=x.dtype, device=x.device)


def lora_linear_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, LoRASaved]:
    """Compute y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s.
        dropout: dropout of the low-rank branch's input, or None.

    Returns:
        y (..., out) in x's dtype, and the saved tensors.
    """
    m = multiplier(x, dropout)
    h = (x if m is None else m * x) @ lora_A.T
    y = frozen_linear(rows(x), weight, bias)
    y.addmm_(rows(h), lora_B.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), LoRASaved(x, weight, lora_A, lora_B, h, scaling, dropout)


def lora_linear_backward(d_y: Tensor, saved: LoRASaved, *, input_gradient: bool = True) -> LoRAGrads:
    """Map d_y, (..., out), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y, (..., out).
        input_gradient: False skips ∂L/∂x, the largest product, for the lowest adapted layer.
    """
    x, weight, lora_A, lora_B, h, scaling, dropout = saved
    m = multiplier(x, dropout)
    d_h = scaling * (d_y @ lora_B)
    d_lora_A = rows(d_h).T @ rows(x if m is None else m * x)
    d_lora_B = scaling * (rows(d_y).T @ rows(h))
    d_x = None
    if input_gradient:
        low_rank = d_h @ lora_A
        d_x = frozen_input_gradient(rows(d_y), weight).view(x.shape)
        d_x += low_rank if m is None else m * low_rank
    return LoRAGrads(d_x, d_lora_A, d_lora_B)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the same y as x (W + s B A)ᵀ + b; the dropout multiplier m is given, of x's shape."""
    if mask is None:
        return torch.nn.functional.linear(x, weight + scaling * (lora_B @ lora_A), bias)
    delta = torch.einsum("...i,ri,or->...o", x * mask, lora_A, lora_B)
    return torch.nn.functional.linear(x, weight, bias) + scaling * delta
