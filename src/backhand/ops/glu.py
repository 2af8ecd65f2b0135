"""Elementwise part of a gated linear unit: SwiGLU, GeGLU, and the plain GLU that gates attention's output.

    y = φ(a) ⊙ u,   φ = SiLU, GELU or σ      [arXiv:2002.05202, eq. 6]

Backward. dy = φ'(a) ⊙ u ⊙ da + φ(a) ⊙ du, so with G = ∂L/∂y
    ∂L/∂a = G ⊙ u ⊙ φ'(a)      (..., n)
    ∂L/∂u = G ⊙ φ(a)           (..., n)

φ and φ' are in `activation`.
Saved: a and u, which are the columns of one buffer; φ(a) is recomputed. The backward can also recompute y, at the cost
of writing it, and may write it in G's place. A caller that needs y before it has G calls `glu_recompute`. In torch's
form that also returns φ and φ' for the backward, so that the exponentials, the most expensive part, are evaluated once.
The kernels (native/glu.cpp) store neither φ nor φ', since an exponential costs less than memory does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels import glu as kernels
from backhand.ops.activation import CUBIC, KAPPA, SQRT_HALF, Activated, activate, activated


class GLUSaved(NamedTuple):
    """gate a and up u of shape (..., n) each, which may be views, and the activation's name."""

    gate: Tensor
    up: Tensor
    activation: str


class GLUGrads(NamedTuple):
    """d_gate and d_up of shape (..., n) each."""

    d_gate: Tensor
    d_up: Tensor


def glu_forward(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> tuple[Tensor, GLUSaved]:
    """Compute y = φ(gate) ⊙ up.

    Args:
        gate: a, (..., n).
        up: u, (..., n).
        activation: `silu`, `gelu`, `gelu_tanh` or `sigmoid`.
        out: of gate's shape and dtype, to receive y; or None.
    """
    y = kernels.glu(gate, up, activation, out)
    return (activate(gate, activation, out).mul_(up) if y is None else y), GLUSaved(gate, up, activation)


def glu_recompute(saved: GLUSaved) -> tuple[Tensor, Activated | None]:
    """Recompute y of shape (..., n) and return φ and φ' for the backward; None if the kernel does not need them."""
    y = kernels.glu(*saved)
    if y is not None:
        return y, None
    ready = activated(saved.gate, saved.activation)
    return ready.value * saved.up, ready


def glu_backward(
    d_y: Tensor,
    saved: GLUSaved,
    *,
    ready: Activated | None = None,
    out: Tensor | None = None,
    output_buffer: Tensor | None = None,
) -> GLUGrads:
    """Map d_y of shape (..., n) to the gradients derived in the module docstring.

    Args:
        ready: φ and φ' from `glu_recompute`, or None to evaluate them; its slope is overwritten.
        out: (..., 2n) to receive [d_gate | d_up]; may be the buffer of a and u; or None.
        output_buffer: of d_y's shape and dtype, to receive y; may be d_y itself; or None.
    """
    n = d_y.shape[-1]
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    d_gate, d_up = out[..., :n], out[..., n:]
    if ready is None and kernels.glu_gradients(d_y, *saved, d_gate, d_up, output_buffer):
        return GLUGrads(d_gate, d_up)
    value, slope = activated(saved.gate, saved.activation) if ready is None else ready
    # Every tensor is read for the last time before it may be overwritten: a and u by the gradients, d_y by y.
    slope.mul_(d_y).mul_(saved.up)
    y = None if output_buffer is None else value * saved.up
    torch.mul(d_y, value, out=d_up)
    d_gate.copy_(slope)
    if output_buffer is not None and y is not None:
        output_buffer.copy_(y)
    return GLUGrads(d_gate, d_up)


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute the same y from the definitions: a / (1 + e⁻ᵃ), 1 / (1 + e⁻ᵃ), or GELU's forms written out."""
    if activation == "sigmoid":
        return up / (1 + torch.exp(-gate))
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu":
        return 0.5 * gate * torch.erfc(-SQRT_HALF * gate) * up
    return 0.5 * gate * (1 + torch.tanh(KAPPA * (gate + CUBIC * gate**3))) * up
