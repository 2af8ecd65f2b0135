"""Products with a low-rank factor: the part that LoRA adds to a frozen layer, forward and backward.

For x (rows, in), y (rows, out) and rank-sized h:
    down_projection        h = x Aᵀ                          (rows, rank)
    add_up_projection      y += s h Bᵀ, or += h A            (rows, out), (rows, in)
    h_gradient             ∂L/∂h = s G B, ∂L/∂B += s Gᵀ h    for all layers of one input at once
    add_lora_A_gradients   ∂L/∂A += (∂L/∂h)ᵀ x               x is given, or the norm that produced it
The formulas are derived in `lora_linear`. The cases of `lora_group` prove both forms of these functions.

At ranks of 8 to 64 these products are bound by memory. The kernels (native/low_rank*.cpp) read x or G once, read and
write y once, round each sum once, and add a gradient directly to a float32 buffer. Torch's form is one matrix product
for each. MKL's y += s h Bᵀ is as fast in float32, so that it has no kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import low_rank as kernels
from backhand.ops.layer_norm import LayerNormSaved, NormSaved, layer_norm_apply
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply


class LoRAFactors(NamedTuple):
    """The LoRA factors of one layer in a stack of layers that share their input."""

    column: int  # the layer's first output in the stack's y
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    scaling: float  # s
    d_lora_A: Tensor  # (rank, in), in lora_A's dtype or wider: ∂L/∂A is added to it
    d_lora_B: Tensor  # (out, rank), likewise for ∂L/∂B


def down_projection(x: Tensor, lora_A: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute h = x Aᵀ of shape (rows, rank) in `out` or a new tensor, from x (rows, in) and lora_A (rank, in)."""
    compiled = kernels.down_projection(x, lora_A, out)
    if compiled is not None:
        return compiled
    h = x @ lora_A.T
    return h if out is None else out.copy_(h)


def add_up_projection(
    y: Tensor, h: Tensor, factor: Tensor, scaling: float = 1.0, *, transposed: bool = False
) -> Tensor:
    """Add s h Fᵀ to y of shape (rows, n) in place, and return y.

    Args:
        y: (rows, n).
        h: (rows, rank).
        factor: F, (n, rank), like lora_B; or its transpose, (rank, n), like lora_A.
        scaling: s.
        transposed: True if `factor` is Fᵀ.
    """
    if y.dtype != torch.float32 and kernels.add_up_projection(y, h, factor, scaling, transposed=transposed):
        return y
    return y.addmm_(h, factor if transposed else factor.T, alpha=scaling)


def h_gradient(g: Tensor, h: Tensor, adapters: Sequence[LoRAFactors]) -> Tensor:
    """Return ∂L/∂h = [s₁ G₁ B₁ | … | sₙ Gₙ Bₙ] of shape (rows, Σ rank) and add ∂L/∂Bᵢ = sᵢ Gᵢᵀ hᵢ to each `d_lora_B`.

    Args:
        g: G, (rows, Σ out), of all layers, including those without an adapter.
        h: (rows, Σ rank), in the order of the adapters.
        adapters: the factors of the adapted layers.
    """
    d_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not adapters or kernels.h_gradient(g, h, adapters, d_h):
        return d_h
    first = 0
    for column, _, lora_B, scaling, _, d_lora_B in adapters:
        n, rank = lora_B.shape
        part, ranks = g[:, column : column + n], slice(first, first + rank)
        d_h[:, ranks] = (part @ lora_B).mul_(scaling)
        d_lora_B.add_((h[:, ranks].T @ part).mul_(scaling).T)
        first = ranks.stop
    return d_h


def add_lora_A_gradients(x: Tensor | NormSaved, d_h: Tensor, accumulate_into: Sequence[Tensor]) -> None:
    """Add the rows of (∂L/∂h)ᵀ x to the gradient buffers of the factors, in their order.

    The output x = ρ X ⊙ (c + w) of an RMS norm is not formed: (∂L/∂h)ᵀ x = ((ρ ∂L/∂h)ᵀ X) ⊙ (c + w), and ρ ∂L/∂h is
    small. The output of a layer norm is recomputed.

    Args:
        x: (rows, in), or the saved tensors of the norm that produced x.
        d_h: ∂L/∂h, (rows, Σ rank).
        accumulate_into: one buffer (rank, in) per factor, in x's dtype or wider; may be empty.
    """
    if not accumulate_into:
        return
    x = layer_norm_apply(x) if isinstance(x, LayerNormSaved) else x
    rows, weight, inverse_rms, offset = x if isinstance(x, RMSNormSaved) else (x, None, None, 0.0)
    if kernels.add_lora_A_gradients(rows, weight, inverse_rms, offset, d_h, accumulate_into):
        return
    formed = rms_norm_apply(*x) if isinstance(x, RMSNormSaved) else x
    gradients = (d_h.T @ formed).split([len(buffer) for buffer in accumulate_into])
    for buffer, gradient in zip(accumulate_into, gradients, strict=True):
        buffer.add_(gradient)
