"""Gated linear unit's elementwise part: SwiGLU, GeGLU, and the plain GLU that gates attention's output.

    y = φ(a) ⊙ u,   φ = SiLU, GELU (tanh form) or σ      [arXiv:2002.05202, eq. 6]

Backward. dy = φ'(a) ⊙ u ⊙ da + φ(a) ⊙ du, so with G = ∂L/∂y
    ∂L/∂a = G ⊙ u ⊙ φ'(a)      (..., n)
    ∂L/∂u = G ⊙ φ(a)           (..., n)

SiLU: φ(a) = a σ(a), φ'(a) = σ + a σ (1 - σ) = φ + σ (1 - φ): the line from φ to 1 at σ.
GELU, tanh form: φ(a) = a (1 + t) / 2 with t = tanh(z), z = κ (a + 0.044715 a³), κ = √(2/π)      [arXiv:1606.08415, §2]
      φ'(a) = (1 + t) / 2 + a (1 - t²) κ (1 + 3 · 0.044715 a²) / 2.
σ: φ(a) = 1 / (1 + e⁻ᵃ), φ'(a) = σ (1 - σ).

Saved: a and u, which are the columns of one buffer; φ(a) is recomputed. The backward gives y again for little more than
the writing, perhaps in G's place. What needs y before there is a G gets it from `glu_recompute`, in torch's form with φ
and φ' beside it, so that the exponentials, the dearest part, are evaluated once for both. The kernels
(native/glu.cpp) hold no φ and φ' at all: there an exponential costs less than memory does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.library import INT, INT64, POINTER, Declared, loop

_FORWARD = Declared("backhand_glu_forward", INT, INT, *(POINTER, INT64) * 3, INT64, INT64)
_BACKWARD = Declared("backhand_glu_backward", INT, INT, *(POINTER, INT64) * 6, INT64, INT64)
# As in native/glu.cpp.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_NOWHERE = (0, 0)

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
        activation: `silu`, `gelu_tanh` or `sigmoid`.
        out: the shape and dtype of gate, to receive y, or None.
    """
    saved = GLUSaved(gate, up, activation)
    y = _compiled_forward(saved, out)
    return (_activate(gate, activation, out).mul_(up) if y is None else y), saved


def _compiled_forward(saved: GLUSaved, out: Tensor | None) -> Tensor | None:
    """y by the kernel, or None where it does not apply."""
    gate, up, activation = saved
    run = loop(_FORWARD, gate, up, out)
    if run is None or activation not in ACTIVATIONS:
        return None
    y = torch.empty(gate.shape, dtype=gate.dtype) if out is None else out
    operands = _operands(gate, up, y)
    if operands is None:
        return None
    n = gate.shape[-1]
    run(ACTIVATIONS[activation], *operands, gate.numel() // max(n, 1), n)
    return y


def _operands(*tensors: Tensor) -> list[int] | None:
    """Address and distance of rows of each, or None where rows do not lie at equal distances."""
    found = []
    for tensor in tensors:
        if tensor.dim() == 2:
            found += [tensor.data_ptr(), tensor.stride(0)]
        elif tensor.is_contiguous():
            found += [tensor.data_ptr(), tensor.shape[-1]]
        else:
            leading = tensor.shape[:-1]
            steps = [tensor.stride(-2) * math.prod(leading[axis + 1 :]) for axis in range(len(leading))]
            if list(tensor.stride()[:-1]) != steps:
                return None
            found += [tensor.data_ptr(), tensor.stride(-2)]
    return found


def _activate(a: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """φ(a), in `out` or a fresh tensor; torch.nn.functional has no `out`."""
    if out is None:
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if activation == "silu":
        torch.ops.aten.silu.out(a, out=out)
    elif activation == "gelu_tanh":
        torch.ops.aten.gelu.out(a, approximate="tanh", out=out)
    elif activation == "sigmoid":
        torch.sigmoid(a, out=out)
    else:
        raise ValueError(f"activation {activation!r} is none of 'silu', 'gelu_tanh', 'sigmoid'")
    return out


def activated(a: Tensor, activation: str) -> Activated:
    """φ(a) and φ'(a), both fresh tensors, by the formulas of the module docstring."""
    if activation == "silu":
        sigmoid = torch.sigmoid(a)
        value = a * sigmoid
        # In bfloat16 lerp rounds once, where sum and product would round three times.
        return Activated(value, torch.lerp(value, value.new_ones(()), sigmoid))
    if activation == "sigmoid":
        value = torch.sigmoid(a)
        return Activated(value, torch.addcmul(value, value, value, value=-1))
    if activation != "gelu_tanh":
        raise ValueError(f"activation {activation!r} is none of 'silu', 'gelu_tanh', 'sigmoid'")
    result = Activated(*(torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2)))
    rows = a.flatten(0, -2)
    step = max(1, CHUNK_ELEMENTS // max(a.shape[-1], 1)) if a.device.type == "cpu" else max(1, len(rows))
    for part, value, slope in zip(*(t.split(step) for t in (rows, *(t.flatten(0, -2) for t in result))), strict=True):
        wide = part.to(torch.float64 if a.dtype == torch.float64 else torch.float32)
        square = wide * wide
        t = torch.tanh((square * CUBIC + 1) * wide * KAPPA)
        half = (1 + t) * 0.5
        value.copy_(wide * half)
        slope.copy_(half + 0.5 * KAPPA * wide * (1 - t * t) * (1 + 3 * CUBIC * square))
    return result


def glu_recompute(saved: GLUSaved) -> tuple[Tensor, Activated | None]:
    """y again, (..., n), and φ and φ' for the backward that follows; None for them where it has no use for them."""
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
    again: Tensor | None = None,
) -> GLUGrads:
    """Map d_y, (..., n), to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂y.
        saved: from the forward pass.
        ready: from `glu_recompute`, which saves evaluating φ and φ' again; its slope is overwritten.
        out: (..., 2n) to receive [d_gate | d_up] side by side, perhaps where a and u stand; or None.
        again: of d_y's shape and dtype, to receive y; perhaps d_y itself; or None.
    """
    n = d_y.shape[-1]
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    d_gate, d_up = out[..., :n], out[..., n:]
    if ready is None and _compiled_backward(d_y, saved, d_gate, d_up, again):
        return GLUGrads(d_gate, d_up)
    value, slope = activated(saved.gate, saved.activation) if ready is None else ready
    # Nothing is written before it is read for the last time: gradients may stand where a and u do, y where d_y does.
    slope.mul_(d_y).mul_(saved.up)
    y = None if again is None else value * saved.up
    torch.mul(d_y, value, out=d_up)
    d_gate.copy_(slope)
    if again is not None and y is not None:
        again.copy_(y)
    return GLUGrads(d_gate, d_up)


def _compiled_backward(d_y: Tensor, saved: GLUSaved, d_gate: Tensor, d_up: Tensor, again: Tensor | None) -> bool:
    """Whether the kernel applied; d_gate, d_up and `again` are then filled."""
    gate, up, activation = saved
    run = loop(_BACKWARD, d_y, gate, up, d_gate, again)
    places = (d_y, gate, up, d_gate, d_up)
    operands = _operands(*places) if again is None else _operands(*places, again)
    if run is None or operands is None or activation not in ACTIVATIONS:
        return False
    if again is None:
        operands += _NOWHERE
    n = d_y.shape[-1]
    run(ACTIVATIONS[activation], *operands, d_y.numel() // max(n, 1), n)
    return True


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The same y from the definitions: a / (1 + e⁻ᵃ), 1 / (1 + e⁻ᵃ), or the tanh form written out."""
    if activation == "sigmoid":
        return up / (1 + torch.exp(-gate))
    if activation == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(KAPPA * (gate + CUBIC * gate**3))) * up
