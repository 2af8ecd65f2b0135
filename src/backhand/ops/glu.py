"""Elementwise part of a gated linear unit: SwiGLU, GeGLU, and the plain GLU that gates attention's output.

    y = φ(a) ⊙ u,   φ = SiLU, GELU (tanh form) or σ      [arXiv:2002.05202, eq. 6]

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

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel
from backhand.ops.activation import CUBIC, KAPPA, Activated, activate, activated

_FORWARD = KernelSignature("backhand_glu_forward", INT, INT, *(POINTER, INT64) * 3, INT64, INT64)
_BACKWARD = KernelSignature("backhand_glu_backward", INT, INT, *(POINTER, INT64) * 6, INT64, INT64)
# As in native/glu.cpp.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_NOWHERE = (0, 0)


class GLUSaved(NamedTuple):
    """gate a and up u, (..., n) each, which may be views, and the activation's name."""

    gate: Tensor
    up: Tensor
    activation: str


class GLUGrads(NamedTuple):
    """d_gate and d_up, (..., n) each."""

    d_gate: Tensor
    d_up: Tensor


def glu_forward(gate: Tensor, up: Tensor, activation: str, *, out: Tensor | None = None) -> tuple[Tensor, GLUSaved]:
    """Compute y = φ(gate) ⊙ up.

    Args:
        gate: a, (..., n).
        up: u, (..., n).
        activation: `silu`, `gelu_tanh` or `sigmoid`.
        out: of gate's shape and dtype, to receive y; or None.
    """
    saved = GLUSaved(gate, up, activation)
    y = _compiled_forward(saved, out)
    return (activate(gate, activation, out).mul_(up) if y is None else y), saved


def _compiled_forward(saved: GLUSaved, out: Tensor | None) -> Tensor | None:
    """Compute y by the kernel; return None if it does not apply."""
    gate, up, activation = saved
    kernel = find_kernel(_FORWARD, gate, up, out)
    if kernel is None or activation not in ACTIVATIONS:
        return None
    y = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
    operands = _operands(gate, up, y)
    if operands is None:
        return None
    n = gate.shape[-1]
    kernel(ACTIVATIONS[activation], *operands, gate.numel() // max(n, 1), n)
    return y


def _operands(*tensors: Tensor) -> list[int] | None:
    """Return the address and row stride of each tensor, or None if rows are not evenly spaced."""
    operands = []
    for tensor in tensors:
        matrix = tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        if matrix.data_ptr() != tensor.data_ptr():
            return None
        operands += [matrix.data_ptr(), matrix.stride(0)]
    return operands


def glu_recompute(saved: GLUSaved) -> tuple[Tensor, Activated | None]:
    """Recompute y, (..., n), and return φ and φ' for the backward; None if the kernel does not need them."""
    y = _compiled_forward(saved, None)
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
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        ready: φ and φ' from `glu_recompute`, or None to evaluate them; its slope is overwritten.
        out: (..., 2n) to receive [d_gate | d_up]; may be the buffer of a and u; or None.
        output_buffer: of d_y's shape and dtype, to receive y; may be d_y itself; or None.
    """
    n = d_y.shape[-1]
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    d_gate, d_up = out[..., :n], out[..., n:]
    if ready is None and _compiled_backward(d_y, saved, d_gate, d_up, output_buffer):
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


def _compiled_backward(
    d_y: Tensor, saved: GLUSaved, d_gate: Tensor, d_up: Tensor, output_buffer: Tensor | None
) -> bool:
    """Fill d_gate, d_up and `output_buffer` by the kernel and return True; return False if it does not apply."""
    gate, up, activation = saved
    kernel = find_kernel(_BACKWARD, d_y, gate, up, d_gate, output_buffer)
    places = (d_y, gate, up, d_gate, d_up)
    operands = _operands(*places) if output_buffer is None else _operands(*places, output_buffer)
    if kernel is None or operands is None or activation not in ACTIVATIONS:
        return False
    if output_buffer is None:
        operands += _NOWHERE
    n = d_y.shape[-1]
    kernel(ACTIVATIONS[activation], *operands, d_y.numel() // max(n, 1), n)
    return True


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute the same y from the definitions: a / (1 + e⁻ᵃ), 1 / (1 + e⁻ᵃ), or the tanh form written out."""
    if activation == "sigmoid":
        return up / (1 + torch.exp(-gate))
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(KAPPA * (gate + CUBIC * gate**3))) * up
