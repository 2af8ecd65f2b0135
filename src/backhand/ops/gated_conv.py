"""The gated short convolution of LFM2: a causal depthwise convolution between two gates computed from the same input.

    [B | C | x] = three projections of one input,   z = B ⊙ x,   c = conv(z),   y = C ⊙ c      [arXiv:2511.23404, §2]

with conv as in `causal_conv`: a few taps back in time, never across documents.

Backward. dy = c ⊙ dC + C ⊙ conv(dz), dz = x ⊙ dB + B ⊙ dx; conv is linear with the adjoint convᵀ of `causal_conv`, so
with G = ∂L/∂y and Z = convᵀ(C ⊙ G)
    ∂L/∂C = G ⊙ c,   ∂L/∂B = Z ⊙ x,   ∂L/∂x = Z ⊙ B      (tokens, channels) each
The convolution's weight and bias are frozen.

Saved: the projections' output, [B | C | x]; z and c are recomputed, for a few multiplications per element. The kernels
are those of `causal_conv`, which also multiply by the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import causal_conv as kernels
from backhand.ops.causal_conv import Taps, convolved, convolved_back
from backhand.ops.document_groups import SegmentRun, segments


class GatedConvSaved(NamedTuple):
    """bcx (tokens, 3 channels), the taps, the documents' segments."""

    bcx: Tensor
    taps: Taps
    runs: tuple[SegmentRun, ...]


class GatedConvGrads(NamedTuple):
    """d_bcx (tokens, 3 channels)."""

    d_bcx: Tensor


def gated_conv_forward(bcx: Tensor, taps: Taps, runs: tuple[SegmentRun, ...]) -> tuple[Tensor, GatedConvSaved]:
    """Compute y = C ⊙ conv(B ⊙ x).

    Args:
        bcx: [B | C | x], (tokens, 3 channels).
        taps: weight (channels, J) and bias of the convolution.
        runs: the documents' segments; see `causal_conv_forward`.

    Returns:
        y (tokens, channels) in bcx's dtype, and the saved tensors.
    """
    b, c, x = bcx.chunk(3, dim=-1)
    saved = GatedConvSaved(bcx, taps, runs)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if kernels.causal_conv(kernels.GATED, bcx, *taps, runs, y):
        return y, saved
    return torch.mul(convolved(b * x, taps, runs), c, out=y), saved


def gated_conv_backward(d_y: Tensor, saved: GatedConvSaved, *, out: Tensor | None = None) -> GatedConvGrads:
    """Map d_y of shape (tokens, channels) to the gradients derived in the module docstring.

    Args:
        out: (tokens, 3 channels) to receive [d_B | d_C | d_x], or None.
    """
    bcx, taps, runs = saved
    b, c, x = bcx.chunk(3, dim=-1)
    out = torch.empty_like(bcx) if out is None else out
    if kernels.causal_conv_gradient(kernels.GATED, d_y, bcx, *taps, runs, out):
        return GatedConvGrads(out)
    d_b, d_c, d_x = out.chunk(3, dim=-1)
    torch.mul(d_y, convolved(b * x, taps, runs), out=d_c)
    d_z = convolved_back(d_y * c, taps, runs)
    torch.mul(d_z, x, out=d_b)
    torch.mul(d_z, b, out=d_x)
    return GatedConvGrads(out)


def gated_conv_reference(bcx: Tensor, taps: Taps, runs: tuple[SegmentRun, ...]) -> Tensor:
    """Compute the same y token by token, from the definition of the convolution."""
    channels, width = taps.weight.shape
    b, c, x = bcx.unflatten(-1, (3, channels)).unbind(1)
    z = b * x
    outputs = [z[:0]]
    for (start, stop), before in segments(runs):
        places = [*before, *range(start, stop)]
        for t in range(len(before), len(places)):
            seen = z[places[max(0, t - width + 1) : t + 1]]
            y = (seen * taps.weight[:, width - len(seen) :].T).sum(0)
            outputs.append((c[places[t]] * (y if taps.bias is None else y + taps.bias))[None])
    return torch.cat(outputs)
