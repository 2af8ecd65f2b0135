"""The kernels of low-rank products (native/low_rank*.cpp): `ops.low_rank`'s functions, where they apply."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from backhand.kernels.dense_product import amx_available
from backhand.kernels.library import (
    DOUBLE,
    INT,
    INT64,
    POINTER,
    KernelSignature,
    find_kernel,
    matrix,
    wide_dtype,
)

_MATRIX = (POINTER, INT64)
_SIZES = (INT64, INT64, INT64)
_DOWN = KernelSignature("backhand_low_rank_down", INT, *_MATRIX, *_MATRIX, *_MATRIX, *_SIZES, result=INT)
_UP = KernelSignature("backhand_low_rank_up", INT, *_MATRIX, *_MATRIX, *_MATRIX, INT, *_SIZES, DOUBLE, result=INT)
_GATHER = KernelSignature(
    "backhand_low_rank_gather",
    *(INT, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, POINTER, INT, INT),
    *(INT64, INT64, POINTER, POINTER, DOUBLE),
    result=INT,
)
_BACKWARD = KernelSignature(
    *("backhand_low_rank_backward", INT, *_MATRIX, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, INT, INT, INT64),
    result=INT,
)


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, INT64) for name in ("column", "outputs", "rank", "lora_B", "lora_B_row", "d_lora_B", "d_lora_B_row")
    )


class Adapter(Protocol):
    """The part of `ops.low_rank.LoRAFactors` that the kernels use."""

    @property
    def column(self) -> int:
        """The layer's first output."""

    @property
    def lora_B(self) -> Tensor:
        """(out, rank)."""

    @property
    def scaling(self) -> float:
        """s."""

    @property
    def d_lora_B(self) -> Tensor:
        """(out, rank), to which ∂L/∂B is added."""


def down_projection(x: Tensor, lora_A: Tensor, out: Tensor | None) -> Tensor | None:
    """Return h = x Aᵀ of shape (rows, rank) in `out` if it is given, or None if the kernel does not apply."""
    kernel = find_kernel(_DOWN, x, lora_A, out)
    if kernel is None:
        return None
    h = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype) if out is None else out
    _check(kernel(*matrix(x), *matrix(lora_A), *matrix(h), *x.shape, h.shape[1]))
    return h


def add_up_projection(y: Tensor, h: Tensor, factor: Tensor, scaling: float, *, transposed: bool) -> bool:
    """Add s h Fᵀ to y in place and return True; return False if the kernel does not apply."""
    kernel = find_kernel(_UP, y, h, factor)
    if kernel is None:
        return False
    _check(kernel(*matrix(y), *matrix(h), *matrix(factor), transposed, *y.shape, h.shape[1], scaling))
    return True


def h_gradient(g: Tensor, h: Tensor, adapters: Sequence[Adapter], d_h: Tensor) -> bool:
    """Write ∂L/∂h to d_h, add ∂L/∂B to the adapters' buffers and return True; return False if it does not apply."""
    kernel = find_kernel(_BACKWARD, g, h, *(adapter.lora_B for adapter in adapters))
    wide = _are_wide([adapter.d_lora_B for adapter in adapters], g.dtype)
    if kernel is None or wide is None:
        return False
    table = (_Layer * len(adapters))(
        *(
            _Layer(adapter.column, *adapter.lora_B.shape, *matrix(adapter.lora_B), *matrix(adapter.d_lora_B))
            for adapter in adapters
        )
    )
    scalings = (DOUBLE * len(adapters))(*(adapter.scaling for adapter in adapters))
    places = (*matrix(g), *matrix(h), *matrix(d_h))
    _check(kernel(*places, len(adapters), table, scalings, wide, by_parts_of_rows(g.dtype), g.shape[0]))
    return True


def add_lora_A_gradients(
    x: Tensor,
    weight: Tensor | None,
    inverse_rms: Tensor | None,
    offset: float,
    d_h: Tensor,
    accumulate_into: Sequence[Tensor],
) -> bool:
    """Add the rows of (∂L/∂h)ᵀ V to the buffers and return True; return False if the kernel does not apply.

    Args:
        x: (rows, in): V itself, or the input of a norm whose output is V.
        weight: the norm's weight, or None if x is V.
        inverse_rms: ρ of the norm, or None if x is V.
        offset: the norm's offset.
        d_h: ∂L/∂h, (rows, Σ rank).
        accumulate_into: one buffer (rank, in) per factor.
    """
    kernel, wide = find_kernel(_GATHER, x, d_h, weight), _are_wide(accumulate_into, x.dtype)
    dense = inverse_rms is None or weight is None or (inverse_rms.is_contiguous() and weight.is_contiguous())
    if kernel is None or wide is None or not dense:
        return False
    norm = (
        None if inverse_rms is None else inverse_rms.data_ptr(),
        None if weight is None else weight.data_ptr(),
        offset,
    )
    how = wide, by_parts_of_rows(x.dtype)
    _check(kernel(*matrix(x), *matrix(d_h), *_places(accumulate_into), *how, *x.shape, *norm))
    return True


def _places(accumulate_into: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the number of buffers, and their addresses, row strides and ranks."""
    count = len(accumulate_into)
    return (
        count,
        (POINTER * count)(*(buffer.data_ptr() for buffer in accumulate_into)),
        (INT64 * count)(*(buffer.stride(0) for buffer in accumulate_into)),
        (INT64 * count)(*(buffer.shape[0] for buffer in accumulate_into)),
    )


def _are_wide(grad_buffers: Sequence[Tensor], dtype: torch.dtype) -> bool | None:
    """Return True for buffers of float32 or wider, False for buffers of `dtype`, None if kernels cannot add to them."""
    first, wide = grad_buffers[0].dtype, wide_dtype(dtype)
    alike = all(buffer.dtype == first and buffer.stride(1) == 1 for buffer in grad_buffers)
    return first == wide if alike and first in (dtype, wide) else None


def by_parts_of_rows(dtype: torch.dtype) -> bool:
    """Return True if threads divide the rows of x or G; else they divide columns, as for bfloat16 without AMX."""
    return dtype != torch.bfloat16 or amx_available(dtype)


def _check(without_memory: int) -> None:
    if without_memory:
        raise MemoryError("products with an adapter's factors: no memory for their workspace")
