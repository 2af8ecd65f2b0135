"""Gated linear unit's elementwise part: SwiGLU and GeGLU.

    y = φ(a) ⊙ u,   φ = SiLU or GELU (tanh form)      [arXiv:2002.05202, eq. 6]

Backward. dy = φ'(a) ⊙ u ⊙ da + φ(a) ⊙ du, so with G = ∂L/∂y
    ∂L/∂a = G ⊙ u ⊙ φ'(a)      (..., n)
    ∂L/∂u = G ⊙ φ(a)           (..., n)

SiLU: φ(a) = a σ(a), φ'(a) = σ + a σ (1 - σ) = φ + σ (1 - φ): the line from φ to 1 at σ.
GELU, tanh form: φ(a) = a (1 + t) / 2 with t = tanh(z), z = κ (a + 0.044715 a³), κ = √(2/π)      [arXiv:1606.08415, §2]
      φ'(a) = (1 + t) / 2 + a (1 - t²) κ (1 + 3 · 0.044715 a²) / 2.

Saved: a and u, which are the columns of one buffer; φ(a) is recomputed. In bfloat16 the slopes are computed in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.lora_linear import rows

KAPPA = math.sqrt(2 / math.pi)
CUBIC = 0.044715
# Elements a chunk of rows may have: what is computed between two reads of memory then stays in the second-level cache.
CHUNK_ELEMENTS = 1 << 16


class GLUSaved(NamedTuple):
    """gate a and up u, (..., n) each (views are fine), and the activation's name."""

    gate: Tensor
    up: Tensor
    activation: str


class GLUGrads(NamedTuple):
    """d_gate and d_up, (..., n) each."""

    d_gate: Tensor
    d_up: Tensor


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, GLUSaved]:
    """y = φ(gate) ⊙ up.

    Args:
        gate: a, (..., n).
        up: u, (..., n).
        activation: `silu` or `gelu_tanh`.
    """
    return _activate(gate, activation).mul_(up), GLUSaved(gate, up, activation)


def _activate(a: Tensor, activation: str) -> Tensor:
    """φ(a), a fresh tensor."""
    if activation == "silu":
        return torch.nn.functional.silu(a)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(a, approximate="tanh")
    raise ValueError(f"activation {activation!r} is neither 'silu' nor 'gelu_tanh'")


def _value_and_slope(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """φ(a) and φ'(a), both fresh tensors, by the formulas of the module docstring."""
    if activation == "silu":
        sigmoid = torch.sigmoid(a)
        value = a * sigmoid
        slope = torch.addcmul(value, sigmoid, 1 - value)
        return value, slope
    square = a * a
    t = torch.tanh((square * CUBIC + 1) * a * KAPPA)
    half = (1 + t) * 0.5
    slope = half + 0.5 * KAPPA * a * (1 - t * t) * (1 + 3 * CUBIC * square)
    return a * half, slope


def glu_backward(d_y: Tensor, saved: GLUSaved, *, out: Tensor | None = None) -> GLUGrads:
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y.
        saved: from the forward pass.
        out: (..., 2n) to receive [d_gate | d_up] side by side, or None.
    """
    n = d_y.shape[-1]
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    wide = torch.float64 if d_y.dtype == torch.float64 else torch.float32
    flat = [rows(t) for t in (d_y, saved.gate, saved.up, out[..., :n], out[..., n:])]
    step = max(1, CHUNK_ELEMENTS // max(n, 1)) if d_y.device.type == "cpu" else max(1, flat[0].shape[0])
    for g, a, u, d_a, d_u in zip(*(t.split(step) for t in flat), strict=True):
        g_wide, u_wide = g.to(wide), u.to(wide)
        value, slope = _value_and_slope(a.to(wide), saved.activation)
        d_u.copy_(value.mul_(g_wide))
        d_a.copy_(slope.mul_(g_wide).mul_(u_wide))
    return GLUGrads(out[..., :n], out[..., n:])


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same y from the definitions: a / (1 + e⁻ᵃ), or the tanh form written out."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(KAPPA * (gate + CUBIC * gate**3))) * up
