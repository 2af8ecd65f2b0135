"""DoRA's magnitude: an adapted layer's output rescaled per channel, so that each row of its weight has a trained norm.

    y = (m / c) ⊙ z + b,   z = V x,   V = W + s B A,   c_o = ‖V_o‖      [arXiv:2402.09353, eq. 5]

m (out,) is trained and starts at ‖W_o‖, so that y is unchanged at first. z is the output of any adapted layer (linear,
embedding, convolution) without its bias; V_o is the part of the adapted weight that makes channel o.

Backward. The paper (§4.3) and PEFT treat c as a constant and omit its gradient, which would need all of V. With
g = m / c and G = ∂L/∂y, and c and b fixed, dy = g ⊙ dz + dm ⊙ z / c, hence
    ∂L/∂z = g ⊙ G                          (…, out, …)
    ∂L/∂m = (1 / c) ⊙ Σ G ⊙ z              (out,), summed over all axes but the channel

V is never formed; `dora_norm` computes c without it: with M = W Aᵀ (out, rank) and K = A Aᵀ (rank, rank),
    ‖W_o + s B_o A‖² = ‖W_o‖² + 2 s ⟨B_o, M_o⟩ + s² B_o K B_oᵀ
in float32 at least.

The sum over G ⊙ z runs in float32 at least. Saved: z, m and c; a caller may drop z and recompute it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.weight_tiles import FrozenMatrix, frozen_tiles


class DoRASaved(NamedTuple):
    """Saved for the backward: z (…, out, …), magnitude and norm (out,), the axis of the channels."""

    z: Tensor
    magnitude: Tensor
    norm: Tensor
    axis: int


class DoRAGrads(NamedTuple):
    """d_z of z's shape, d_magnitude (out,) in float32 at least."""

    d_z: Tensor
    d_magnitude: Tensor


def dora_norm(weight: FrozenMatrix, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return c of shape (out,): the norms of the rows of W + s B A, in float32 at least.

    Args:
        weight: (out, in).
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: s.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    crossed = torch.cat([tile.to(wide) @ lora_A.T for _, tile in frozen_tiles(weight)])
    crossed = 2 * scaling * crossed + scaling**2 * (lora_B @ (lora_A @ lora_A.T))
    return (row_squares(weight) + (lora_B * crossed).sum(1)).clamp_(min=0).sqrt_()


def row_squares(weight: FrozenMatrix) -> Tensor:
    """Return ‖W_o‖² of shape (out,) in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    # Not vector_norm, whose error grows with the row: 1.6e-6 for 8,192 numbers, while the pairwise `sum` has 1e-7.
    return torch.cat([tile.to(wide).square().sum(1) for _, tile in frozen_tiles(weight)])


def dora_forward(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None, axis: int = -1
) -> tuple[Tensor, DoRASaved]:
    """Compute y = (m / c) ⊙ z + b.

    Args:
        z: (…, out, …), an adapted layer's output without bias.
        magnitude: m, (out,).
        norm: c, (out,), a constant.
        bias: (out,) or None, frozen.
        axis: the axis of the channels in z.

    Returns:
        y of z's shape and dtype, and the saved tensors.
    """
    y = z * along(weight_scale(magnitude, norm, z.dtype), z, axis)
    if bias is not None:
        y = y.add_(along(bias.to(y.dtype), z, axis))
    return y, DoRASaved(z, magnitude, norm, axis)


def dora_backward(d_y: Tensor, saved: DoRASaved) -> DoRAGrads:
    """Map d_y, of z's shape, to the gradients derived in the module docstring."""
    z, magnitude, norm, axis = saved
    wide = torch.promote_types(d_y.dtype, torch.float32)
    axis %= z.dim()
    others = [dim for dim in range(z.dim()) if dim != axis]
    along_z = (d_y.to(wide) * z.to(wide)).sum(others)
    return DoRAGrads(d_y * along(weight_scale(magnitude, norm, d_y.dtype), z, axis), along_z / norm.to(wide))


def weight_scale(magnitude: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return m / c of shape (out,), divided in the wider dtype and then cast."""
    return (magnitude / norm).to(dtype)


def along(channels: Tensor, z: Tensor, axis: int) -> Tensor:
    """Reshape (out,) so that it broadcasts over all axes of z but the channel axis."""
    shape = [1] * z.dim()
    shape[axis] = channels.shape[0]
    return channels.view(shape)


def dora_reference(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None, axis: int = -1) -> Tensor:
    """Compute the same y by a product with a diagonal matrix."""
    channels_last = z.movedim(axis, -1)
    y = channels_last @ torch.diag(magnitude / norm).to(z.dtype)
    return (y if bias is None else y + bias).movedim(-1, axis)
