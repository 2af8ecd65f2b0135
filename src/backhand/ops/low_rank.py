"""Products with a low-rank factor: the part that LoRA adds to a frozen layer, forward and backward.

For x (rows, in), y (rows, out) and rank-sized h:
    down_projection        h = x Aᵀ                          (rows, rank)
    add_up_projection      y += s h Bᵀ, or += h A            (rows, out), (rows, in)
    hidden_gradient        ∂L/∂h = s G B, ∂L/∂B += s Gᵀ h    for all layers of one input at once
    add_lora_A_gradients   ∂L/∂A += (∂L/∂h)ᵀ x               x is given, or the norm that produced it
The formulas are derived in `lora_linear`. The cases of `lora_group` prove both forms of these functions.

At ranks of 8 to 64 these products are bound by memory. The kernels (native/low_rank*.cpp) read x or G once, read and
write y once, round each sum once, and add a gradient directly to a float32 buffer. Torch's form is one matrix product
for each. MKL's y += s h Bᵀ is as fast in float32, so that it has no kernel there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import amx_available
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, KernelSignature, find_kernel, matrix
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, statistics_dtype

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


class LoRAFactors(NamedTuple):
    """The LoRA factors of one layer in a stack of layers that share their input."""

    column: int  # the layer's first output in the stack's y
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    scaling: float  # s
    d_lora_A: Tensor  # (rank, in), in lora_A's dtype or wider: ∂L/∂A is added to it
    d_lora_B: Tensor  # (out, rank), likewise for ∂L/∂B


def down_projection(x: Tensor, lora_A: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute h = x Aᵀ, (rows, rank), in `out` or a new tensor, from x (rows, in) and lora_A (rank, in)."""
    kernel = find_kernel(_DOWN, x, lora_A, out)
    if kernel is None:
        h = x @ lora_A.T
        return h if out is None else out.copy_(h)
    h = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype) if out is None else out
    _checked(kernel(*matrix(x), *matrix(lora_A), *matrix(h), *x.shape, h.shape[1]))
    return h


def add_up_projection(
    y: Tensor, h: Tensor, factor: Tensor, scaling: float = 1.0, *, transposed: bool = False
) -> Tensor:
    """Add s h Fᵀ to y, (rows, n), in place, and return y.

    Args:
        y: (rows, n).
        h: (rows, rank).
        factor: F, (n, rank), like lora_B; or its transpose, (rank, n), like lora_A.
        scaling: s.
        transposed: True if `factor` is Fᵀ.
    """
    kernel = None if y.dtype == torch.float32 else find_kernel(_UP, y, h, factor)
    if kernel is None:
        return y.addmm_(h, factor if transposed else factor.T, alpha=scaling)
    _checked(kernel(*matrix(y), *matrix(h), *matrix(factor), transposed, *y.shape, h.shape[1], scaling))
    return y


def hidden_gradient(g: Tensor, h: Tensor, adapters: Sequence[LoRAFactors]) -> Tensor:
    """Return ∂L/∂h = [s₁ G₁ B₁ | … | sₙ Gₙ Bₙ], (rows, Σ rank), and add ∂L/∂Bᵢ = sᵢ Gᵢᵀ hᵢ to each `d_lora_B`.

    Args:
        g: G, (rows, Σ out), of all layers, including those without an adapter.
        h: (rows, Σ rank), in the order of the adapters.
        adapters: the factors of the adapted layers.
    """
    d_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not adapters:
        return d_h
    kernel = find_kernel(_BACKWARD, g, h, *(adapter.lora_B for adapter in adapters))
    wide = _are_wide([adapter.d_lora_B for adapter in adapters], g.dtype)
    if kernel is None or wide is None:
        first = 0
        for column, _, lora_B, scaling, _, accumulate_into in adapters:
            n, rank = lora_B.shape
            part, ranks = g[:, column : column + n], slice(first, first + rank)
            d_h[:, ranks] = (part @ lora_B).mul_(scaling)
            accumulate_into.add_((h[:, ranks].T @ part).mul_(scaling).T)
            first = ranks.stop
        return d_h
    table = (_Layer * len(adapters))(
        *(
            _Layer(adapter.column, *adapter.lora_B.shape, *matrix(adapter.lora_B), *matrix(adapter.d_lora_B))
            for adapter in adapters
        )
    )
    scalings = (DOUBLE * len(adapters))(*(adapter.scaling for adapter in adapters))
    places = (*matrix(g), *matrix(h), *matrix(d_h))
    _checked(kernel(*places, len(adapters), table, scalings, wide, by_parts_of_rows(g.dtype), g.shape[0]))
    return d_h


def add_lora_A_gradients(x: Tensor | RMSNormSaved, d_h: Tensor, accumulate_into: Sequence[Tensor]) -> None:
    """Add the rows of (∂L/∂h)ᵀ x to the gradient buffers of the factors, in their order.

    The output x = ρ X ⊙ (c + w) of a norm is not formed: (∂L/∂h)ᵀ x = ((ρ ∂L/∂h)ᵀ X) ⊙ (c + w), and ρ ∂L/∂h is small.

    Args:
        x: (rows, in), or the saved tensors of the norm that produced x.
        d_h: ∂L/∂h, (rows, Σ rank).
        accumulate_into: one buffer (rank, in) per factor, in x's dtype or wider; may be empty.
    """
    if not accumulate_into:
        return
    rows, weight, factor, offset = x if isinstance(x, RMSNormSaved) else (x, None, None, 0.0)
    kernel, wide = find_kernel(_GATHER, rows, d_h, weight), _are_wide(accumulate_into, rows.dtype)
    dense = factor is None or weight is None or (factor.is_contiguous() and weight.is_contiguous())
    if kernel is None or wide is None or not dense:
        formed = rms_norm_apply(*x) if isinstance(x, RMSNormSaved) else x
        gradients = (d_h.T @ formed).split([len(buffer) for buffer in accumulate_into])
        for buffer, gradient in zip(accumulate_into, gradients, strict=True):
            buffer.add_(gradient)
        return
    norm = (None if factor is None else factor.data_ptr(), None if weight is None else weight.data_ptr(), offset)
    how = wide, by_parts_of_rows(rows.dtype)
    _checked(kernel(*matrix(rows), *matrix(d_h), *_places(accumulate_into), *how, *rows.shape, *norm))


def _places(accumulate_into: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return the number of buffers, and their addresses, row strides and ranks."""
    count = len(accumulate_into)
    return (
        count,
        (POINTER * count)(*(part.data_ptr() for part in accumulate_into)),
        (INT64 * count)(*(part.stride(0) for part in accumulate_into)),
        (INT64 * count)(*(part.shape[0] for part in accumulate_into)),
    )


def _are_wide(grad_buffers: Sequence[Tensor], dtype: torch.dtype) -> bool | None:
    """Return True for buffers of float32 or wider, False for buffers of `dtype`, None if kernels cannot add to them."""
    first, wide = grad_buffers[0].dtype, statistics_dtype(dtype)
    alike = all(buffer.dtype == first and buffer.stride(1) == 1 for buffer in grad_buffers)
    return first == wide if alike and first in (dtype, wide) else None


def by_parts_of_rows(dtype: torch.dtype) -> bool:
    """Return True if threads divide the rows of x or G; else they divide columns, as for bfloat16 without AMX."""
    return dtype != torch.bfloat16 or amx_available(dtype)


def _checked(without_memory: int) -> None:
    """Raise MemoryError if a kernel returned that it had no memory for its workspace."""
    if without_memory:
        raise MemoryError("products with an adapter's factors: no memory for their workspace")
