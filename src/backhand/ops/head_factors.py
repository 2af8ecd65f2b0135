"""LoRA of the head, computed in chunks of rows: the factors' part of the logits, and their gradients.

    Z += γ s h Bᵀ,   h = x̃ Aᵀ,   x̃ = m ⊙ x under dropout, else x          (`lora_linear`; γ of `logits_rule`)

Backward, with D = ∂L/∂Z / (w γ) of a chunk, w γ of its rows, and ∂L/∂h = s w γ D B:
    ∂L/∂x += m ⊙ ((∂L/∂h) A),   ∂L/∂A += (∂L/∂h)ᵀ x̃,   ∂L/∂B += s w γ Dᵀ h
The chunks' gradients are summed in float32, so that many chunks round no more than few. The op is
`linear_cross_entropy`, whose cases prove these lines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.lora_linear import Dropout, multiplier


class HeadFactors(NamedTuple):
    """The head's adapter: lora_A (rank, hidden), lora_B (vocab, rank), scaling, and its dropout in training."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: Dropout | None = None


class AdaptedHead:
    """The factors during one pass over the rows.

    Args:
        x: all rows, (rows, hidden).

    Attributes:
        d_lora_A, d_lora_B: of the factors' shapes, in float32 at least; the sums of the chunks so far.
    """

    def __init__(self, factors: HeadFactors, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        self._factors, self._x = factors, x
        self._mask = multiplier(x, factors.dropout)
        self.d_lora_A = torch.zeros_like(factors.lora_A, dtype=wide)
        self.d_lora_B = torch.zeros_like(factors.lora_B, dtype=wide)

    def add_logits(self, logits: Tensor, part: slice, scaling: float) -> Tensor:
        """Add γ s h Bᵀ to the logits of these rows, (part, vocab), and return h (part, rank); `scaling` is γ."""
        x, factors = self._x[part], self._factors
        h = (x if self._mask is None else x * self._mask[part]) @ factors.lora_A.T
        logits.addmm_(h, factors.lora_B.T, alpha=scaling * factors.scaling)
        return h

    def add_gradients(self, d_x: Tensor, d_logits: Tensor, h: Tensor, part: slice, w: float | Tensor) -> None:
        """Add to ∂L/∂x of these rows, (part, hidden), and to the factors' gradients; h may be overwritten.

        Args:
            d_x: ∂L/∂x of these rows, which is added to.
            d_logits: D, (part, vocab).
            h: from `add_logits`.
            part: the rows.
            w: w γ, one number or one per row, (part, 1).
        """
        x, (lora_A, lora_B, scaling, _) = self._x[part], self._factors
        d_h = (d_logits @ lora_B).mul_(scaling * w)
        if self._mask is None:
            d_x.addmm_(d_h, lora_A)
        else:
            d_x.addcmul_(self._mask[part], d_h @ lora_A)
            x = x * self._mask[part]
        self.d_lora_A.add_(d_h.T @ x)
        if isinstance(w, float):
            self.d_lora_B.add_(d_logits.T @ h, alpha=scaling * w)
        else:
            self.d_lora_B.add_(d_logits.T @ h.mul_(w), alpha=scaling)
