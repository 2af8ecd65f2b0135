"""LoRA linear: a frozen dense layer plus a trainable low-rank update.

    y = x Wᵀ + b + s (x̃ Aᵀ) Bᵀ,   s = alpha / rank      [arXiv:2106.09685, eq. 3 and §4.1]

Only A and B are trained; alpha and the rank are chosen by the user. Without dropout x̃ = x. With dropout x̃ = m ⊙ x,
where each element of m is 0 with probability p, otherwise 1 / (1 - p).

Backward. P ⊙ Q multiplies element by element, and ⟨P, Q⟩ is the sum of all elements of P ⊙ Q. Let G = ∂L/∂y and
h = x̃ Aᵀ. Infinitesimal changes dx, dA and dB change y by dy, and L by dL = ⟨G, dy⟩. W and b are constants, so
    dy = dx Wᵀ + s dh Bᵀ + s h dBᵀ,   dh = (m ⊙ dx) Aᵀ + x̃ dAᵀ.
Insert dy into dL. Then rewrite each term as ⟨…, dx⟩, ⟨…, dA⟩ or ⟨…, dB⟩ by two rules: ⟨P, Q Rᵀ⟩ = ⟨P R, Q⟩ = ⟨Pᵀ Q, R⟩
and ⟨P, m ⊙ Q⟩ = ⟨m ⊙ P, Q⟩. The left factors are the gradients:
    ∂L/∂h = s G B                       (..., rank)
    ∂L/∂x = G W + m ⊙ ((∂L/∂h) A)       (..., in)
    ∂L/∂A = (∂L/∂h)ᵀ x̃                  (rank, in)
    ∂L/∂B = s Gᵀ h                      (out, rank)
Here all axes of a tensor except the last are flattened into rows. The last two gradients are sums over the rows.

Saved: x, h and references to the weights. m is not saved; the backward generates the same m from the seed. Apart from
W, forward and backward form no matrix of W's size: neither Gᵀ x nor W + s B A.

The frozen layer has two large products, x Wᵀ in the forward and G W in the backward. Training W would add a third one,
Gᵀ x. The adapter adds 6 · rank · (in + out) floating-point operations per row to forward and backward together.

W is a tensor or a quantized matrix; `ops.frozen_matrix` multiplies by both kinds. Instead of this op, a training step
calls `ops.lora_group`, which applies the same formulas to several layers with the same input, in a few large products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.dropout import dropout_multiplier
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.weight_tiles import FrozenMatrix


class Dropout(NamedTuple):
    """Dropout of the input of the low-rank part, s (x̃ Aᵀ) Bᵀ."""

    probability: float  # p, in [0, 1)
    seed: int  # determines m, so that forward and backward use the same m


class LoRASaved(NamedTuple):
    """Tensors saved for the backward."""

    x: Tensor  # (..., in)
    weight: FrozenMatrix  # (out, in)
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    h: Tensor  # x̃ Aᵀ, (..., rank)
    scaling: float
    dropout: Dropout | None


class LoRAGrads(NamedTuple):
    """Gradients of the loss."""

    d_x: Tensor | None  # (..., in); None if it was not requested
    d_lora_A: Tensor  # (rank, in)
    d_lora_B: Tensor  # (out, rank)


def rows(x: Tensor) -> Tensor:
    """Reshape (..., n) to (rows, n). A vector becomes one row."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def multiplier(x: Tensor, dropout: Dropout | None) -> Tensor | None:
    """Return the dropout multiplier m, which has the shape of x, or None without dropout."""
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
        dropout: the dropout that turns x into x̃, or None for x̃ = x.

    Returns:
        y (..., out) in x's dtype, and the saved tensors.
    """
    m = multiplier(x, dropout)
    h = (x if m is None else m * x) @ lora_A.T
    y = frozen_linear(rows(x), weight, bias)
    y.addmm_(rows(h), lora_B.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), LoRASaved(x, weight, lora_A, lora_B, h, scaling, dropout)


def lora_linear_backward(d_y: Tensor, saved: LoRASaved, *, input_gradient: bool = True) -> LoRAGrads:
    """Compute the gradients that are derived in the module docstring.

    Args:
        d_y: ∂L/∂y, (..., out).
        saved: returned by the forward.
        input_gradient: False skips ∂L/∂x and its large product. Nothing below the lowest adapted layer needs ∂L/∂x.
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
    m: Tensor | None = None,
) -> Tensor:
    """Compute the same y in plain torch, for autograd to differentiate.

    Args:
        m: the dropout multiplier, which has the shape of x; None without dropout, where y = x (W + s B A)ᵀ + b.
    """
    if m is None:
        return torch.nn.functional.linear(x, weight + scaling * (lora_B @ lora_A), bias)
    delta = torch.einsum("...i,ri,or->...o", x * m, lora_A, lora_B)
    return torch.nn.functional.linear(x, weight, bias) + scaling * delta
