"""The bias of lora_B, PEFT's `lora_bias`: a trained offset of an adapted layer's output.

    y = z + s β,   β (out,),   s = alpha / rank

z is the output of a layer adapted by LoRA: in x Wᵀ + b + s (h Bᵀ + β) the offset is inside the scaled branch.

Backward. dy = dz + s dβ in every row, so with G = ∂L/∂y
    ∂L/∂z = G                    of z's shape, passed on unchanged
    ∂L/∂β = s Σ G                (out,), summed over all axes but the channel, in float32 at least

Saved: s and the channel axis; no tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.dora import along


class LoRABiasSaved(NamedTuple):
    """Saved for the backward: s and the axis of the channels."""

    scaling: float
    axis: int


class LoRABiasGrads(NamedTuple):
    """d_z, which is d_y itself, and d_lora_bias (out,) in float32 at least."""

    d_z: Tensor
    d_lora_bias: Tensor


def lora_bias_forward(
    z: Tensor, lora_bias: Tensor, scaling: float, axis: int = -1, *, out: Tensor | None = None
) -> tuple[Tensor, LoRABiasSaved]:
    """Compute y = z + s β.

    Args:
        z: (…, out, …).
        lora_bias: β, (out,).
        scaling: s.
        axis: the axis of the channels in z.
        out: receives y, may be z itself; None for a new tensor.

    Returns:
        y of z's shape and dtype, and the saved tensors.
    """
    y = torch.add(z, along(lora_bias.to(z.dtype), z, axis), alpha=scaling, out=out)
    return y, LoRABiasSaved(scaling, axis)


def lora_bias_backward(d_y: Tensor, saved: LoRABiasSaved) -> LoRABiasGrads:
    """Map d_y, of z's shape, to the gradients derived in the module docstring."""
    wide = torch.promote_types(d_y.dtype, torch.float32)
    axis = saved.axis % d_y.dim()
    others = [dim for dim in range(d_y.dim()) if dim != axis]
    return LoRABiasGrads(d_y, d_y.sum(others, dtype=wide).mul_(saved.scaling))


def lora_bias_reference(z: Tensor, lora_bias: Tensor, scaling: float, axis: int = -1) -> Tensor:
    """Compute the same y, with the offset as a product of a column of ones and β."""
    ones = torch.ones_like(z).movedim(axis, -1)
    return z + (ones * (scaling * lora_bias)).movedim(-1, axis)
