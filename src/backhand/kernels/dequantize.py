"""Dequantise rows of a stored matrix, in the blocks of a GGUF type, to float32 or bfloat16.

The kernels know the common types. Every other type, and everything without a compiled library, goes through the gguf
package, several times slower. Both give the same bits: the gguf package's float32, rounded once to nearest for any
other dtype. The exception is NaN: it becomes the one quiet NaN, since the compiler decides which NaN an instruction
produces (stored bfloat16 keeps its bits).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.errors import ArtifactError, not_none
from backhand.kernels.builds import library
from backhand.kernels.library import INT, INT64, POINTER, KernelSignature
from backhand.kernels.pieces import piece_size

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_TYPES = KernelSignature("backhand_dequantize_types", POINTER, INT, result=INT)
_DEQUANTIZE = KernelSignature(
    "backhand_dequantize", *(INT, POINTER, INT64, INT64, POINTER, INT64, INT64, INT64, POINTER, INT64, INT), result=INT
)

# Values passed to the gguf package at a time, so that its intermediate results stay in the processor's cache.
_PIECE_VALUES = 1 << 17

_NATIVE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_BFLOAT16 = 30


@functools.cache
def block_shape(type_id: int) -> tuple[int, int]:
    """Return the values and bytes of one block.

    Args:
        type_id: ggml's number of the type.

    Raises:
        ArtifactError: there is no such type.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    except (KeyError, ValueError):
        raise ArtifactError(f"tensors of type {type_id} cannot be read", why="ggml knows no such type") from None
    return values, size


def native_dtype(type_id: int) -> torch.dtype | None:
    """Return the stored torch dtype, or None for a quantized type."""
    return _NATIVE.get(type_id)


def type_name(type_id: int) -> str:
    """Return ggml's name of a type, such as Q4_K."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(type_id).name)


def is_compiled(type_id: int) -> bool:
    """Return True if there are kernels for this type; otherwise the gguf package dequantises it, slower."""
    build = library()
    return build is not None and type_id in _compiled_types(build.name)


@functools.cache
def _compiled_types(build: str) -> frozenset[int]:
    function = _TYPES.function()
    assert function is not None, build
    room = 64
    found = (INT * room)()
    count: int = function(found, room)
    assert count <= room
    return frozenset(found[:count])


def dequantize(
    source: Bytes, type_id: int, out: Tensor, *, row_ids: Tensor | None = None, first_value: int = 0
) -> Tensor:
    """Write rows of `source`, or a range of their columns, to `out`.

    Args:
        source: (rows, bytes of a row), contiguous.
        type_id: ggml's number of the type.
        out: (n, columns), any floating dtype and device, with contiguous rows.
        row_ids: (n,) int64 on the processor, the rows to write; None for the first n.
        first_value: the column of the source that is `out`'s first.

    Returns:
        `out`.

    Raises:
        ArtifactError: neither the kernels nor the gguf package know the type.
        ValueError: columns are not whole blocks, or the source lacks these rows or columns.
    """
    values, size = block_shape(type_id)
    n, columns = out.shape
    if source.ndim != 2 or (source.shape[0] and not source.flags.c_contiguous):
        raise ValueError("the rows of the stored matrix are not contiguous bytes")
    if columns % values or first_value % values or first_value < 0:
        raise ValueError(f"columns {first_value} to {first_value + columns} are not whole blocks of {values}")
    if columns > 1 and out.stride(1) != 1:
        raise ValueError("the rows of the destination are not contiguous")
    if row_ids is not None and (row_ids.dtype != torch.int64 or row_ids.shape != (n,) or not row_ids.is_contiguous()):
        raise ValueError(f"{n} rows need {n} contiguous int64 row indices")
    first, blocks = first_value // values, columns // values
    if (first + blocks) * size > source.shape[1] or (row_ids is None and n > source.shape[0]):
        raise ValueError(f"the stored matrix, {source.shape[0]} rows of {source.shape[1]} bytes, has no such part")
    if out.numel() == 0:
        return out
    if out.device.type != "cpu" or out.dtype not in (torch.float32, torch.bfloat16) or not is_compiled(type_id):
        return _by_pieces(source, type_id, out, row_ids, first, blocks)
    status: int = not_none(_DEQUANTIZE.function())(
        *(type_id, source.ctypes.data, source.shape[1], source.shape[0]),
        None if row_ids is None else row_ids.data_ptr(),
        *(n, first, blocks, out.data_ptr(), out.stride(0), int(out.dtype == torch.bfloat16)),
    )
    if status:
        raise ValueError(f"a row outside the {source.shape[0]} of the stored matrix")
    return out


def _by_pieces(source: Bytes, type_id: int, out: Tensor, row_ids: Tensor | None, first: int, blocks: int) -> Tensor:
    """Dequantise through float32 in pieces of whole rows, by the kernels for other dtypes, else by the gguf package."""
    values, size = block_shape(type_id)
    step = max(1, piece_size(_PIECE_VALUES) // (blocks * values))
    compiled = is_compiled(type_id)
    for start in range(0, out.shape[0], step):
        part = out[start : start + step]
        if compiled:
            wide = torch.empty(part.shape, dtype=torch.float32)
            ids = None if row_ids is None else row_ids[start : start + step]
            dequantize(
                source if ids is not None else source[start:], type_id, wide, row_ids=ids, first_value=first * values
            )
            part.copy_(wide)
            continue
        columns = slice(first * size, (first + blocks) * size)
        if row_ids is None:
            stored = source[start : start + len(part), columns]
        else:
            wanted = row_ids[start : start + step].numpy()
            if wanted.min() < 0 or wanted.max() >= source.shape[0]:
                raise ValueError(f"a row outside the {source.shape[0]} of the stored matrix")
            stored = source[wanted, columns]
        part.copy_(_by_gguf(np.ascontiguousarray(stored), type_id).view(part.shape))
        if type_id != _BFLOAT16:
            missing = part.isnan()
            if missing.any():
                part.masked_fill_(missing, torch.nan)
    return out


def _by_gguf(stored: Bytes, type_id: int) -> Tensor:
    """Return the values of whole blocks, flat, in float32 or in the stored torch dtype."""
    dtype = _NATIVE.get(type_id)
    if dtype is not None:
        # A copy, since torch does not accept memory that is mapped read-only.
        return torch.from_numpy(stored.reshape(-1).copy()).view(dtype)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantized

    kind = GGMLQuantizationType(type_id)
    try:
        with np.errstate(all="ignore"):
            # Blocks are independent of rows, so that the package takes all of them as one row.
            return torch.from_numpy(dequantized(stored.reshape(1, -1), kind).reshape(-1))
    except NotImplementedError:
        raise ArtifactError(
            f"tensors of type {kind.name} cannot be read",
            why="the gguf package has no dequantisation of it",
            next_step="use a file of another quantization, such as Q8_0, Q4_K_M or BF16",
        ) from None
