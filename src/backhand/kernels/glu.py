"""The kernels of gated units (native/glu.cpp): `ops.glu`'s functions, where a kernel applies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel

_FORWARD = KernelSignature("backhand_glu_forward", INT, INT, *(POINTER, INT64) * 3, INT64, INT64)
_BACKWARD = KernelSignature("backhand_glu_backward", INT, INT, *(POINTER, INT64) * 6, INT64, INT64)
# The numbers of activations in native/glu.cpp.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_NOWHERE = (0, 0)


def glu(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor | None:
    """Return y = φ(gate) ⊙ up, in `out` if it is given, or None if the kernel does not apply."""
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


def glu_gradients(
    d_y: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    d_gate: Tensor,
    d_up: Tensor,
    output_buffer: Tensor | None = None,
) -> bool:
    """Fill d_gate, d_up and `output_buffer`, which receives y, and return True; return False if it does not apply."""
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


def _operands(*tensors: Tensor) -> list[int] | None:
    """Return the address and row stride of each tensor, or None if rows are not evenly spaced."""
    operands = []
    for tensor in tensors:
        matrix = tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
        if matrix.data_ptr() != tensor.data_ptr():
            return None
        operands += [matrix.data_ptr(), matrix.stride(0)]
    return operands
