"""Gated linear unit's elementwise part: SwiGLU and GeGLU.

    y = φ(a) ⊙ u,   φ = SiLU or GELU (tanh form)      [arXiv:2002.05202, eq. 6]

Backward. dy = φ'(a) ⊙ u ⊙ da + φ(a) ⊙ du, so with G = ∂L/∂y
    ∂L/∂a = G ⊙ u ⊙ φ'(a)      (..., n)
    ∂L/∂u = G ⊙ φ(a)           (..., n)

SiLU: φ(a) = a σ(a), φ'(a) = σ + a σ (1 - σ) = φ + σ (1 - φ): the line from φ to 1 at σ.
GELU, tanh form: φ(a) = a (1 + t) / 2 with t = tanh(z), z = κ (a + 0.044715 a³), κ = √(2/π)      [arXiv:1606.08415, §2]
      φ'(a) = (1 + t) / 2 + a (1 - t²) κ (1 + 3 · 0.044715 a²) / 2.

Saved: a and u, which are the columns of one buffer; φ(a) is recomputed. A backward pass that needs y again gets it from
`glu_recompute`, together with φ and φ', so that the exponentials, the dearest part, are evaluated once for both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.lora_linear import rows

KAPPA = math.sqrt(2 / math.pi)
CUBIC = 0.044715
# GELU's many steps run on chunks of rows: what lies between two reads of memory then stays in the second-level cache.
CHUNK_ELEMENTS = 1 << 16


class GLUSaved(NamedTuple):
    """gate a and up u, (..., n) each (views are fine), and the activation's name."""

    gate: Tensor
    up: Tensor
    activation: str


class Activated(NamedTuple):
    """φ(a) and φ'(a), (..., n) each."""

    value: Tensor
    slope: Tensor


class GLUGrads(NamedTuple):
    """d_gate and d_up, (..., n) each."""

    d_gate: Tensor
    d_up: Tensor


def glu_forward(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> tuple[Tensor, GLUSaved]:
    """y = φ(gate) ⊙ up.

    Args:
        gate: a, (..., n).
        up: u, (..., n).
        activation: `silu` or `gelu_tanh`.
        out: the shape and dtype of gate, to receive y, or None.
    """
    return _activate(gate, activation, out).mul_(up), GLUSaved(gate, up, activation)


def _activate(a: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """φ(a), in `out` or a fresh tensor; torch.nn.functional has no `out`."""
    if out is None:
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if activation == "silu":
        torch.ops.aten.silu.out(a, out=out)
    elif activation == "gelu_tanh":
        torch.ops.aten.gelu.out(a, approximate="tanh", out=out)
    else:
        raise ValueError(f"activation {activation!r} is neither 'silu' nor 'gelu_tanh'")
    return out


def activated(a: Tensor, activation: str) -> Activated:
    """φ(a) and φ'(a), both fresh tensors, by the formulas of the module docstring."""
    if activation == "silu":
        sigmoid = torch.sigmoid(a)
        value = a * sigmoid
        # In bfloat16 lerp rounds once, where sum and product would round three times.
        return Activated(value, torch.lerp(value, value.new_ones(()), sigmoid))
    if activation != "gelu_tanh":
        raise ValueError(f"activation {activation!r} is neither 'silu' nor 'gelu_tanh'")
    result = Activated(*(torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2)))
    step = max(1, CHUNK_ELEMENTS // max(a.shape[-1], 1)) if a.device.type == "cpu" else max(1, rows(a).shape[0])
    for part, value, slope in zip(*(rows(t).split(step) for t in (a, *result)), strict=True):
        wide = part.to(torch.float64 if a.dtype == torch.float64 else torch.float32)
        square = wide * wide
        t = torch.tanh((square * CUBIC + 1) * wide * KAPPA)
        half = (1 + t) * 0.5
        value.copy_(wide * half)
        slope.copy_(half + 0.5 * KAPPA * wide * (1 - t * t) * (1 + 3 * CUBIC * square))
    return result


def glu_recompute(saved: GLUSaved) -> tuple[Tensor, Activated]:
    """y again, (..., n), and φ and φ' for the backward that follows."""
    ready = activated(saved.gate, saved.activation)
    return ready.value * saved.up, ready


def glu_backward(
    d_y: Tensor, saved: GLUSaved, *, ready: Activated | None = None, out: Tensor | None = None
) -> GLUGrads:
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y.
        saved: from the forward pass.
        ready: from `glu_recompute`, which saves evaluating φ and φ' again; its slope is overwritten.
        out: (..., 2n) to receive [d_gate | d_up] side by side, or None.
    """
    n = d_y.shape[-1]
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    value, slope = activated(saved.gate, saved.activation) if ready is None else ready
    d_gate, d_up = out[..., :n], out[..., n:]
    torch.mul(d_y, value, out=d_up)
    torch.mul(slope.mul_(d_y), saved.up, out=d_gate)
    return GLUGrads(d_gate, d_up)


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same y from the definitions: a / (1 + e⁻ᵃ), or the tanh form written out."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(KAPPA * (gate + CUBIC * gate**3))) * up
