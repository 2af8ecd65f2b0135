"""DoRA linear: a frozen dense layer, a trainable low-rank update, and a trained norm for every row of their sum.

    y = (m / c) ⊙ (x Vᵀ) + b,   V = W + s B A,   c_o = ‖V_o‖      [arXiv:2402.09353, eq. 5]

With dropout, PEFT applies the mask to the rescaled part but not to the frozen one. With x̃ = μ ⊙ x (μ the multiplier),
    y = x Wᵀ + b + (m / c - 1) ⊙ (x̃ Wᵀ) + (m / c) ⊙ s (x̃ Aᵀ) Bᵀ
      = (m / c) ⊙ z + b + (x - x̃) Wᵀ,   z = x̃ Vᵀ
which is the first line where x̃ = x.

Backward, with c fixed as in the paper. z is `lora_linear` of x̃. `dora` gives ∂L/∂z = (m / c) ⊙ G and ∂L/∂m. From ∂L/∂z,
`lora_linear` gives ∂L/∂A (rank, in), ∂L/∂B (out, rank) and ∂L/∂x̃ (..., in). x reaches y through x̃ and directly:
    ∂L/∂x = G W + μ ⊙ (∂L/∂x̃ - G W)      (..., in)
or just ∂L/∂x̃ without dropout.

Saved: x, h = x̃ Aᵀ and references to the parameters. z, as large as y, is recomputed for ∂L/∂m. This takes one more
product of the frozen layer's size, and saves memory that plain LoRA does not need either. The mask is drawn again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import LowRankUpdate
from backhand.ops.dora import DoRASaved, dora_backward, weight_scale
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.lora_linear import Dropout, LoRASaved, lora_linear_backward, multiplier, rows
from backhand.ops.low_rank import down_projection
from backhand.ops.weight_tiles import FrozenMatrix


class DoRALinearSaved(NamedTuple):
    """Saved for the backward: x (..., in), the parameters, h (..., rank)."""

    x: Tensor
    weight: FrozenMatrix
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    norm: Tensor
    h: Tensor
    scaling: float
    dropout: Dropout | None


class DoRALinearGrads(NamedTuple):
    """d_x (..., in) or None when not asked for, d_lora_A (rank, in), d_lora_B (out, rank), d_magnitude (out,)."""

    d_x: Tensor | None
    d_lora_A: Tensor
    d_lora_B: Tensor
    d_magnitude: Tensor


class DoRAConstants(NamedTuple):
    """The constants: c (out,), from `dora.dora_norm`, s, and the dropout of V's input."""

    norm: Tensor
    scaling: float
    dropout: Dropout | None = None


def dora_linear_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    constants: DoRAConstants,
) -> tuple[Tensor, DoRALinearSaved]:
    """Compute y = (m / c) ⊙ (x̃ Vᵀ) + b + (x - x̃) Wᵀ.

    Args:
        x: (..., in).
        weight: (out, in), frozen.
        bias: (out,) or None, frozen.
        lora_A: (rank, in).
        lora_B: (out, rank).
        magnitude: m, (out,).
        constants: c, s, and dropout.

    Returns:
        y (..., out) in x's dtype, and the saved tensors.
    """
    norm, scaling, dropout = constants
    x_rows = rows(x)
    mask = multiplier(x_rows, dropout)
    dropped = x_rows if mask is None else x_rows * mask
    h = down_projection(dropped, lora_A)
    y = _rescaled(dropped, weight, lora_B, h, scaling).mul_(weight_scale(magnitude, norm, x.dtype))
    if bias is not None:
        y.add_(bias)
    if mask is not None:
        frozen_linear(x_rows - dropped, weight, residual=y, out=y)
    lead = x.shape[:-1]
    saved = DoRALinearSaved(x, weight, lora_A, lora_B, magnitude, norm, h.view(*lead, h.shape[1]), scaling, dropout)
    return y.view(*lead, weight.shape[0]), saved


def _rescaled(x: Tensor, weight: FrozenMatrix, lora_B: Tensor, h: Tensor, scaling: float) -> Tensor:
    """Compute z = x Wᵀ + s h Bᵀ, which the magnitude multiplies, from rows of x and h."""
    return frozen_linear(x, weight, updates=[LowRankUpdate(0, h, lora_B, scaling)])


def dora_linear_backward(d_y: Tensor, saved: DoRALinearSaved, *, input_gradient: bool = True) -> DoRALinearGrads:
    """Map d_y of shape (..., out) to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y, (..., out).
        input_gradient: False skips ∂L/∂x, for the lowest adapted layer.
    """
    x, weight, lora_A, lora_B, magnitude, norm, h, scaling, dropout = saved
    g, x_rows = rows(d_y), rows(x)
    mask = multiplier(x_rows, dropout)
    dropped = x_rows if mask is None else x_rows * mask
    z = _rescaled(dropped, weight, lora_B, rows(h), scaling)
    d_z, d_magnitude = dora_backward(g, DoRASaved(z, magnitude, norm, -1))
    del z
    branch = LoRASaved(dropped, weight, lora_A, lora_B, rows(h), scaling, None)
    grads = lora_linear_backward(d_z, branch, input_gradient=input_gradient)
    d_x = grads.d_x
    if d_x is not None and mask is not None:
        direct = frozen_input_gradient(g, weight)
        d_x = direct.addcmul_(mask, d_x - direct)
    return DoRALinearGrads(None if d_x is None else d_x.view(x.shape), grads.d_lora_A, grads.d_lora_B, d_magnitude)


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor],
    magnitude: Tensor,
    constants: DoRAConstants,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the same y from the whole rescaled weight m V / c; the dropout multiplier is given."""
    (lora_A, lora_B), (norm, scaling, _) = factors, constants
    adapted = (magnitude / norm).to(weight.dtype)[:, None] * (weight + scaling * (lora_B @ lora_A))
    if mask is None:
        return torch.nn.functional.linear(x, adapted, bias)
    dropped = x * mask.view(x.shape)
    return torch.nn.functional.linear(x, weight, bias) + torch.nn.functional.linear(dropped, adapted - weight)
