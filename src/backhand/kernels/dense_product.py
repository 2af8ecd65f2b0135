"""Our own matrix product, with all that is added to it, for bfloat16 with AMX: y = r + x W + b + Σ s h Fᵀ.

With a library's product, y = x Wᵀ is written, read again, added to an adapter's update, and written once more. Here the
products with the factors continue the same sums, and an element is rounded once (native/dense_product.h). The bits of a
row do not depend on the number of rows, columns or threads.

A quantized W is unpacked where the product packs it, a few rows at a time within the cache (native/panels.h). The bits
are those of the dense W, which is never formed as a whole.

Other instruction sets use their library, which multiplies float32, and bfloat16 without AMX, at the processor's rate.
With AMX, oneDNN uses one of two threads for products with few outputs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.builds import library
from backhand.kernels.large_pages import in_large_pages
from backhand.kernels.library import (
    DOUBLE,
    INT,
    INT64,
    POINTER,
    KernelSignature,
    find_kernel,
    kernels_take_float64,
    matrix,
)
from backhand.kernels.quantized_matrix import NUMBERS_OF_PART, QuantizedMatrix

MOST_UPDATES = MOST_PARTS = 8
_MATRIX = (POINTER, INT64)
_PRODUCT = KernelSignature(
    "backhand_dense_product",
    *(INT, *_MATRIX, *_MATRIX, INT, INT64, POINTER, *_MATRIX, *_MATRIX, POINTER),
    *(INT64, POINTER, POINTER, INT64, INT64, INT64, INT64, POINTER, INT64),
    result=INT64,
)


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, INT64) for name in ("column", "outputs", "rank", "h", "h_row", "factor", "factor_row", "transposed")),
        *(("lora_A", INT64), ("lora_A_row", INT64)),
    )


# ctypes array types are created once.
_UPDATES = tuple(_Update * count for count in range(MOST_UPDATES + 1))
_SCALINGS = tuple(DOUBLE * count for count in range(MOST_UPDATES + 1))
_PARTS = tuple(INT64 * (NUMBERS_OF_PART * count) for count in range(MOST_PARTS + 1))


class LowRankUpdate(NamedTuple):
    """A low-rank update: scaling · h factorᵀ is added to the columns from `column` on."""

    column: int
    h: Tensor  # (rows, rank)
    factor: Tensor  # (n, rank), like lora_B
    scaling: float = 1.0
    lora_A: Tensor | None = None  # (rank, in), to compute and write h = x Aᵀ first; None if h is already computed
    transposed: bool = False  # True if the factor is (rank, n), like lora_A

    @property
    def outputs(self) -> int:
        """The number of columns that the update changes, n."""
        return self.factor.shape[1 if self.transposed else 0]


def amx_available(dtype: torch.dtype) -> bool:
    """Return True if this product computes a dtype: bfloat16 with AMX, and float64 while kernels are proved."""
    if dtype == torch.float32 or torch.compiler.is_compiling():  # traced tensors have no addresses
        return False
    build = library()
    if build is None:
        return False
    return kernels_take_float64() if dtype == torch.float64 else dtype == torch.bfloat16 and build.name == "amx"


def dense_product(
    x: Tensor,
    weight: Tensor | QuantizedMatrix,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
    *,
    transposed: bool = False,
) -> Tensor | None:
    """Compute residual + x W + bias + the updates; return None if a library has to, or if W has to be unpacked first.

    Args:
        x: (rows, in).
        weight: W, (in, out), or with `transposed` Wᵀ, (out, in); dense, or quantized and of x's dtype.
        bias: (out,) or None.
        residual: (rows, out) or None; may be `out`.
        out: (rows, out) to receive the result, or None for a new tensor.
        updates: at most `MOST_UPDATES`, in the order of their columns.
        transposed: True if `weight` is Wᵀ.

    Raises:
        ValueError: parts of a quantized W refer to missing rows.
    """
    if not amx_available(x.dtype) or len(updates) > MOST_UPDATES or 0 in weight.shape:
        return None
    dense: Tensor | None = None
    right: tuple[Any, ...]
    if isinstance(weight, Tensor):
        dense, transposed_weight = as_stored(weight, transposed)
        right = (*matrix(dense), transposed_weight, 0, None)
    else:
        parts = weight.table if weight.dtype == x.dtype else None
        if parts is None or len(parts) > MOST_PARTS * NUMBERS_OF_PART:
            return None
        count = len(parts) // NUMBERS_OF_PART
        right = (None, 0, transposed, count, _PARTS[count](*parts))
    factors = [as_stored(update.factor, update.transposed) for update in updates]
    kernel = find_kernel(
        *(_PRODUCT, x, dense, bias, residual, out),
        *(tensor for update in updates for tensor in (update.h, update.lora_A)),
        *(factor for factor, _ in factors),
    )
    if kernel is None:
        return None
    (rows, inputs), outputs = x.shape, weight.shape[0 if transposed else 1]
    y = torch.empty(rows, outputs, dtype=x.dtype) if out is None else out
    table = _UPDATES[len(updates)](
        *(
            _Update(
                *(update.column, update.outputs, update.h.shape[1], *matrix(update.h), *matrix(factor), by_rank),
                *((0, 0) if update.lora_A is None else matrix(update.lora_A)),
            )
            for update, (factor, by_rank) in zip(updates, factors, strict=True)
        )
    )
    call = (
        *(*matrix(x), *right, *matrix(y)),
        *((None, 0) if residual is None else matrix(residual)),
        *(None if bias is None else bias.data_ptr(), len(updates)),
        *(table, _SCALINGS[len(updates)](*(update.scaling for update in updates))),
        *(rows, outputs, inputs, torch.get_num_threads()),
    )
    needed = kernel(*call, _WORKSPACE.buffer.data_ptr(), _WORKSPACE.buffer.numel())
    if needed < 0:
        raise ValueError(f"rows outside those of the stored matrix, or more than {tuple(weight.shape)} has")
    if needed:
        drop_workspace()  # before a larger one is allocated
        _WORKSPACE.buffer = in_large_pages(needed, torch.uint8)
        kernel(*call, _WORKSPACE.buffer.data_ptr(), _WORKSPACE.buffer.numel())
    return y


def as_stored(factor: Tensor, transposed: bool = False) -> tuple[Tensor, bool]:
    """Return a matrix or its transpose, whichever is stored row by row, and True if that is the transpose.

    Args:
        transposed: True if `factor` is already the transpose.
    """
    rows, columns = factor.stride()
    return (factor, transposed) if columns == 1 or rows != 1 else (factor.T, not transposed)


class _Workspace(threading.local):
    """The workspace of a thread's products, reused from one to the next."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


_WORKSPACE = _Workspace()


def drop_workspace() -> None:
    """Free this thread's workspace."""
    _WORKSPACE.buffer = torch.empty(0, dtype=torch.uint8)
