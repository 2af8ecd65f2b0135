"""Products of few rows with a frozen matrix by a kernel that reads every row of the matrix once, in its file's blocks.

The product of a new token is bound by reading the matrix. Without this kernel, a quantized matrix would be unpacked to
memory and read again. Here a few of its rows at a time are unpacked within the cache. A dense matrix of the same
numbers goes through the same sums.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from backhand.kernels.dequantize import is_compiled
from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel
from backhand.kernels.pieces import piece_size
from backhand.kernels.quantized_matrix import QuantizedMatrix, dequantized_rows

MOST_ROWS, MOST_TILED_ROWS = 8, 64
"""The largest numbers of rows, without and with AMX. More rows are faster by a library's product, after a piece is
unpacked for all of them, or with AMX by `dense_product`, which gives the same bits."""

QUICK_ROW: ContextVar[bool] = ContextVar("quick_row", default=False)
"""True if a single row may differ in its bits from the same row among others, for a quantized matrix or an adapter.

AMX's tiles, which training uses, take longer for one row than dot products do.
"""

_FEW_ROWS = KernelSignature(
    "backhand_few_rows",
    *(INT, INT, POINTER, INT64, INT64, POINTER, INT64, INT64),
    *(POINTER, INT64, INT64, POINTER, POINTER, INT64, POINTER, INT64, INT),
    result=INT,
)
# Rows unpacked at a time if the kernel does not know their type, or if columns are in another order.
_ROWS_BY_PACKAGE = 4096


class _Stored(NamedTuple):
    """The kernel's description of rows: ggml's type, or -1 for dense numbers, and the stored row of each output."""

    type_id: int
    address: int
    row_bytes: int
    rows: int
    ids: Tensor | None


def few_rows_product(
    x: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Compute residual + x Wᵀ + bias, or return None if the kernel does not apply.

    Args:
        x: (rows, in), with 1 to `MOST_ROWS` rows, or `MOST_TILED_ROWS` with AMX.
        weight: (out, in), of x's dtype.
        bias: (out,) or None.
        residual: (rows, out) or None.
        out: (rows, out) to receive the result, or None for a new tensor.
    """
    if weight.dtype != x.dtype or weight.device.type != "cpu":
        return None
    kernel = find_kernel(_FEW_ROWS, x, weight if isinstance(weight, Tensor) else None, bias, residual, out)
    if kernel is None:
        return None
    y = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    size = x.element_size()
    tiles = isinstance(weight, Tensor) or x.shape[0] > 1 or not QUICK_ROW.get()

    def multiply(stored: _Stored, first: int, count: int) -> None:
        """Compute outputs first to first + count from the same number of stored rows."""
        status: int = kernel(
            *(stored.type_id, stored.address, stored.row_bytes, stored.rows),
            *(None if stored.ids is None else stored.ids.data_ptr(), count, x.shape[1]),
            *(x.data_ptr(), x.stride(0), x.shape[0], None if bias is None else bias.data_ptr() + first * size),
            *((None, 0) if residual is None else (residual.data_ptr() + first * size, residual.stride(0))),
            *(y.data_ptr() + first * size, y.stride(0), tiles),
        )
        if status:
            raise ValueError(f"a row outside the {stored.rows} of the stored matrix")

    if isinstance(weight, Tensor):
        multiply(_dense_rows(weight), 0, weight.shape[0])
        return y
    first = 0
    for part in weight.parts:
        if is_compiled(part.type_id) and part.column_order is None:
            blocks = part.blocks
            multiply(
                _Stored(part.type_id, blocks.ctypes.data, blocks.shape[1], len(blocks), part.order),
                first,
                part.row_count,
            )
        else:
            step = piece_size(_ROWS_BY_PACKAGE)
            for start in range(0, part.row_count, step):
                piece = part.part(start, min(start + step, part.row_count))
                numbers = x.new_empty(piece.row_count, x.shape[1])
                dequantized_rows(piece, numbers, piece.order)
                multiply(_dense_rows(numbers), first + start, piece.row_count)
        first += part.row_count
    return y


def _dense_rows(numbers: Tensor) -> _Stored:
    return _Stored(-1, numbers.data_ptr(), numbers.stride(0) * numbers.element_size(), numbers.shape[0], None)
