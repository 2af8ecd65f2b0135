"""The kernel of a gated unit's backward with the factors around it (native/adapted_glu.cpp), for `ops.adapted_glu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.kernels.glu import ACTIVATIONS
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, KernelSignature, find_kernel
from backhand.kernels.low_rank import Adapter

_BACKWARD = KernelSignature("backhand_adapted_glu_backward", INT, INT, POINTER, POINTER, INT64, INT64, result=INT)


class _Matrix(ctypes.Structure):
    _fields_ = (("address", INT64), ("row", INT64))

    @classmethod
    def of(cls, x: Tensor, column: int = 0) -> _Matrix:
        """Describe x from this column on."""
        return cls(x.data_ptr() + column * x.element_size(), x.stride(0))


class _Side(ctypes.Structure):
    _fields_ = (*((name, _Matrix) for name in ("h", "lora_B", "d_h", "d_lora_B")), ("rank", INT64))


class _Unit(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("d_y", "gate", "up", "d_gate", "d_up")),
        *(("gate_side", _Side), ("up_side", _Side)),
        *(("d_t", _Matrix), ("d_lora_A", _Matrix), ("down_rank", INT64)),
    )


def adapted_glu_gradients(
    g: Tensor,
    gate_up: Tensor,
    activation: str,
    adapters: Sequence[Adapter],
    h: Tensor,
    down: tuple[Tensor, ...],
    d_gate_up: Tensor,
) -> Tensor | None:
    """Compute all gradients and return ∂L/∂h; return None if the kernel does not apply.

    Args:
        g: ∂L/∂p, (rows, n).
        gate_up: [a | u], (rows, 2n).
        activation: the name of φ.
        adapters: the factors of gate and up, to whose buffers ∂L/∂B is added.
        h: their hidden activations, (rows, Σ rank).
        down: ∂L/∂t, (rows, rank), and the buffer (rank, n) to which ∂L/∂A is added; empty without a factor.
        d_gate_up: (rows, 2n), receives [∂L/∂a | ∂L/∂u]; may be `gate_up`.
    """
    n = g.shape[1]
    factors = [each for adapter in adapters for each in (adapter.lora_B, adapter.d_lora_B)]
    operands = (g, gate_up, h, d_gate_up, *down, *factors)
    separate = all(adapter.column in (0, n) and len(adapter.lora_B) == n for adapter in adapters)
    if g.dtype == torch.bfloat16 or not g.numel() or not separate or not (adapters or down):
        return None
    kernel = find_kernel(_BACKWARD, *operands) if activation in ACTIVATIONS else None
    # The strides of an h without columns mean nothing.
    if kernel is None or any(x.stride(1) != 1 for x in operands if x.shape[1] > 1):
        return None
    d_h = torch.empty(h.shape, dtype=h.dtype)
    unit = _Unit(
        *(_Matrix.of(g), _Matrix.of(gate_up), _Matrix.of(gate_up, n), _Matrix.of(d_gate_up), _Matrix.of(d_gate_up, n)),
        *_sides(adapters, h, d_h, n),
    )
    if down:
        unit.d_t, unit.d_lora_A, unit.down_rank = _Matrix.of(down[0]), _Matrix.of(down[1]), down[0].shape[1]
    scalings = {adapter.column: adapter.scaling for adapter in adapters}
    both = (DOUBLE * 2)(scalings.get(0, 0.0), scalings.get(n, 0.0))
    if kernel(ACTIVATIONS[activation], ctypes.addressof(unit), both, len(g), n):
        raise MemoryError("a gated unit's backward: no memory for its workspace")
    return d_h


def _sides(adapters: Sequence[Adapter], h: Tensor, d_h: Tensor, n: int) -> tuple[_Side, _Side]:
    """Describe the factors of gate and of up; zeros for a side without factors."""
    sides, first = {0: _Side(), n: _Side()}, 0
    for adapter in adapters:
        rank, matrix = adapter.lora_B.shape[1], _Matrix.of
        sides[adapter.column] = _Side(
            matrix(h, first), matrix(adapter.lora_B), matrix(d_h, first), matrix(adapter.d_lora_B), rank
        )
        first += rank
    return sides[0], sides[n]
