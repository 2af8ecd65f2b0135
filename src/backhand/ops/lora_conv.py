"""LoRA convolution, in one, two or three dimensions: a frozen kernel plus a trainable low-rank one.

    y = x ∗ W + b + s (x̃ ∗ A) ∗ B,   s = alpha / rank      [arXiv:2106.09685, §4.1, with convolutions for products]

W (out, in/groups, *K) and A (rank, in, *K) slide over x (batch, in, *L) with the same stride σ, zero padding and
dilation δ; B (out, rank/groups, 1 …) mixes channels at one place. x̃ = x, or, with dropout, m ⊙ x. Written out, with x̂
the padded x̃, γ(o) the group of output channel o, and ρ running over the rank/groups rows of h that belong to it,
    h[n, r, l] = Σ_{i,k} A[r, i, k] x̂[n, i, σ l + δ k]
    y[n, o, l] = (x ∗ W + b)[n, o, l] + s Σ_ρ B[o, ρ] h[n, γ(o)·rank/groups + ρ, l]
As in PEFT, A is not grouped although W may be: then the update reads channels that W does not, and cannot be merged.

Backward. Let G = ∂L/∂y. y depends on B and h place by place, so in each group, summing over batch n and places l,
    ∂L/∂h[n, r, l] = s Σ_{o in r's group} B[o, ρ(r)] G[n, o, l]                    (batch, rank, *L')
    ∂L/∂B[o, ρ]    = s Σ_{n,l} G[n, o, l] h[n, γ(o)·rank/groups + ρ, l]            (out, rank/groups, 1 …)
h depends on A[r, i, k] with factor x̂[n, i, σ l + δ k], so
    ∂L/∂A[r, i, k] = Σ_{n,l} ∂L/∂h[n, r, l] x̂[n, i, σ l + δ k]                     (rank, in, *K)
For each position k of the kernel this is one product, over all n and l, with the slice of x̂ that starts at δ k and has
stride σ. The columns of an unfolded x̂, |K| times as large as x, are never formed.

Each x̂[n, i, p] contributes to every (l, k) with σ l + δ k = p, with the factor A[r, i, k] in h and W[o, i, k] in y:
    ∂L/∂x[n, i, p] = Σ_{σ l + δ k = p} (Σ_o W[o, i, k] G[n, o, l] + m[n, i, p] Σ_r A[r, i, k] ∂L/∂h[n, r, l])
These sums are transposed convolutions of G and ∂L/∂h with the same kernels. Positions of x after the last stride step
contribute to no sum. Their gradient is zero, which `output_padding` provides.

Saved: x, h and references to the parameters; the mask is drawn again from its seed.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.lora_linear import Dropout, multiplier


class ConvGeometry(NamedTuple):
    """Geometry of a convolution: stride, zero padding on both sides and dilation per dimension; groups of W and B."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


class LoRAConvSaved(NamedTuple):
    """Saved for the backward: x (batch, in, *L), the parameters, h (batch, rank, *L')."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    h: Tensor
    scaling: float
    geometry: ConvGeometry
    dropout: Dropout | None


class LoRAConvGrads(NamedTuple):
    """d_x (batch, in, *L), or None if skipped; d_lora_A (rank, in, *K); d_lora_B (out, rank/groups, 1 …)."""

    d_x: Tensor | None
    d_lora_A: Tensor
    d_lora_B: Tensor


def lora_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: ConvGeometry,
    dropout: Dropout | None = None,
) -> tuple[Tensor, LoRAConvSaved]:
    """Compute y = x ∗ W + b + s (x̃ ∗ A) ∗ B.

    Args:
        x: (batch, in, *L).
        weight: (out, in/groups, *K), frozen.
        bias: (out,) or None, frozen.
        lora_A: (rank, in, *K), not grouped.
        lora_B: (out, rank/groups, 1 …).
        scaling: s.
        geometry: stride, padding, dilation and groups.
        dropout: dropout of the low-rank branch's input, or None.

    Returns:
        y (batch, out, *L') in x's dtype, and the saved tensors.
    """
    y = convolution(x, weight, bias, geometry)
    mask = multiplier(x, dropout)
    h = convolution(x if mask is None else x * mask, lora_A, None, geometry._replace(groups=1))
    delta = _grouped_B(lora_B, geometry.groups) @ _grouped(h, geometry.groups)
    y.add_(delta.view(y.shape), alpha=scaling)
    return y, LoRAConvSaved(x, weight, lora_A, lora_B, h, scaling, geometry, dropout)


def lora_conv_backward(d_y: Tensor, saved: LoRAConvSaved, *, input_gradient: bool = True) -> LoRAConvGrads:
    """Map d_y of shape (batch, out, *L') to the gradients derived in the module docstring.

    Args:
        input_gradient: False skips ∂L/∂x, for the lowest adapted layer.
    """
    geometry, groups = saved.geometry, saved.geometry.groups
    g = _grouped(d_y, groups)
    d_h = (_grouped_B(saved.lora_B, groups).mT @ g).mul_(saved.scaling).view(saved.h.shape)
    d_lora_B = torch.einsum("ngol,ngrl->gor", g, _grouped(saved.h, groups)).mul_(saved.scaling)
    mask = multiplier(saved.x, saved.dropout)
    d_lora_A = _kernel_gradient(saved.x if mask is None else saved.x * mask, d_h, saved.lora_A, geometry)
    d_x = None
    if input_gradient:
        d_x = _transposed(d_y, saved.weight, saved.x, geometry)
        d_x_low_rank = _transposed(d_h, saved.lora_A, saved.x, geometry._replace(groups=1))
        d_x = d_x.add_(d_x_low_rank) if mask is None else d_x.addcmul_(mask, d_x_low_rank)
    return LoRAConvGrads(d_x, d_lora_A, d_lora_B.reshape(saved.lora_B.shape))


def lora_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    geometry: ConvGeometry,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the same y as one convolution with the whole adapted kernel W + s B A; the dropout multiplier m is given.

    The kernel has no groups, and zeros where W reads nothing, since the update reads every channel.
    """
    groups, outputs, rank = geometry.groups, weight.shape[0], lora_A.shape[0]
    per_group = torch.einsum(
        "gor,gr...->go...",
        lora_B.reshape(groups, outputs // groups, rank // groups),
        lora_A.reshape(groups, rank // groups, *lora_A.shape[1:]),
    )
    delta = scaling * per_group.reshape(outputs, *lora_A.shape[1:])
    blocks = weight.reshape(groups, outputs // groups, 1, weight.shape[1], *weight.shape[2:])
    own_group = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    dense = blocks * own_group.reshape(groups, 1, groups, *(1 for _ in weight.shape[1:]))
    dense = dense.reshape(outputs, groups * weight.shape[1], *weight.shape[2:])
    ungrouped = geometry._replace(groups=1)
    if mask is None:
        return convolution(x, dense + delta, bias, ungrouped)
    return convolution(x, dense, bias, ungrouped) + convolution(x * mask, delta, None, ungrouped)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Compute x ∗ W + b in the dimensions of the kernel."""
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


def _transposed(d_y: Tensor, weight: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum W[o, i, k] d_y[n, o, l] over (l, k) with σ l + δ k = p: the adjoint of `convolution` in x, of x's shape."""
    stride, padding, dilation, groups = geometry
    left_over = [
        (size + 2 * pad - step * (kernel - 1) - 1) % stride_
        for size, pad, step, kernel, stride_ in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    ]
    return torch.convolution(d_y, weight, None, stride, padding, dilation, True, left_over, groups)


def _kernel_gradient(x: Tensor, d_h: Tensor, lora_A: Tensor, geometry: ConvGeometry) -> Tensor:
    """Sum d_h[n, r, l] x̂[n, i, σ l + δ k] over n and l, by one product per position k of the kernel."""
    padded = functional.pad(x, [pad for size in reversed(geometry.padding) for pad in (size, size)])
    rows = d_h.flatten(2)
    d_lora_A = torch.empty_like(lora_A, dtype=d_h.dtype)
    for place in product(*(range(size) for size in lora_A.shape[2:])):
        starts = [k * step for k, step in zip(place, geometry.dilation, strict=True)]
        window = tuple(
            slice(start, start + stride * (steps - 1) + 1, stride)
            for start, stride, steps in zip(starts, geometry.stride, d_h.shape[2:], strict=True)
        )
        met: tuple[Any, ...] = (..., *window)
        here: tuple[Any, ...] = (..., *place)
        d_lora_A[here] = torch.einsum("nrl,nil->ri", rows, padded[met].flatten(2))
    return d_lora_A


def _grouped(channels: Tensor, groups: int) -> Tensor:
    """Reshape (batch, c, *L) to (batch, groups, c/groups, positions)."""
    batch, count = channels.shape[:2]
    return channels.reshape(batch, groups, count // groups, channels.shape[2:].numel())


def _grouped_B(lora_B: Tensor, groups: int) -> Tensor:
    """Reshape (out, rank/groups, 1 …) to (groups, out/groups, rank/groups)."""
    return lora_B.reshape(groups, lora_B.shape[0] // groups, lora_B.shape[1])
