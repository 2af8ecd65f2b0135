"""A bfloat16 product with all that is added to it, by AMX's tiles: y = r + x W + b + Σ s h Fᵀ.

A library's product knows nothing of an adapter, so that y = x Wᵀ is written, read again, added to and written once
more. Here the products with the factors go on with the same sums, and an element is rounded once
(native/dense_product.h). A row's bits do not depend on how many rows, columns or threads there are.

A quantized W is unpacked where the product packs it, a few rows at a time within the cache (native/panels.h): the bits
are those of the dense W, which never stands in memory.

Other instruction sets keep their library, which multiplies float32, and bfloat16 without tiles, at its processor's
rate; with AMX oneDNN gives products of few outputs one thread of two.
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


# Types of ctypes are made once.
_UPDATES = tuple(_Update * count for count in range(MOST_UPDATES + 1))
_SCALINGS = tuple(DOUBLE * count for count in range(MOST_UPDATES + 1))
_PARTS = tuple(INT64 * (NUMBERS_OF_PART * count) for count in range(MOST_PARTS + 1))


class LowRankUpdate(NamedTuple):
    """scaling · h factorᵀ, added to the columns from `column` on."""

    column: int
    h: Tensor  # (rows, rank)
    factor: Tensor  # (n, rank), as lora_B is
    scaling: float = 1.0
    lora_A: Tensor | None = None  # (rank, in), if h is to be formed first, x Aᵀ, and written; None if it is there
    transposed: bool = False  # whether the factor is (rank, n), as lora_A is

    @property
    def outputs(self) -> int:
        """n."""
        return self.factor.shape[1 if self.transposed else 0]


def amx_available(dtype: torch.dtype) -> bool:
    """Whether products of this type go this way: bfloat16 by tiles, and float64 where kernels are proved."""
    if dtype == torch.float32 or torch.compiler.is_compiling():  # what is traced has no addresses
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
    """residual + x W + bias + the updates, or None where a library has to do, or W has to be unpacked before.

    Args:
        x: (rows, in).
        weight: W, (in, out), or with `transposed` Wᵀ, (out, in); dense, or quantized and of x's dtype.
        bias: (out,) or None.
        residual: (rows, out) or None; may be `out`.
        out: (rows, out) to write into; a new one if not given.
        updates: `MOST_UPDATES` at most, in the order of their columns.
        transposed: whether `weight` is Wᵀ.

    Raises:
        ValueError: parts of a quantized W take rows that are not there.
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
    needed = kernel(*call, _KEPT.workspace.data_ptr(), _KEPT.workspace.numel())
    if needed < 0:
        raise ValueError(f"rows outside those of the stored matrix, or more than {tuple(weight.shape)} has")
    if needed:
        drop_workspace()  # before there is a larger one
        _KEPT.workspace = in_large_pages(needed, torch.uint8)
        kernel(*call, _KEPT.workspace.data_ptr(), _KEPT.workspace.numel())
    return y


def as_stored(factor: Tensor, transposed: bool = False) -> tuple[Tensor, bool]:
    """A matrix as it lies row by row, and whether that is its transpose, as it is if its transpose is given."""
    rows, columns = factor.stride()
    return (factor, transposed) if columns == 1 or rows != 1 else (factor.T, not transposed)


class _Kept(threading.local):
    """The workspace of a thread's products, kept from one to the next."""

    def __init__(self) -> None:
        self.workspace = torch.empty(0, dtype=torch.uint8)


_KEPT = _Kept()


def drop_workspace() -> None:
    """Give it back."""
    _KEPT.workspace = torch.empty(0, dtype=torch.uint8)
