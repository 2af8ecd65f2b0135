"""Stored GGUF values to torch tensors, in pieces that stay in the processor's cache.

The gguf package does the arithmetic, so that every type it knows works here and gives its very numbers. It goes through
a tensor in groups of 16 rows, which for rows of a few hundred elements is mostly overhead; quantization blocks do not
care where rows begin, so that whole pieces are handed to it as one row. For 135M elements into bf16, one thread, new
process: 0.5 s, where its own way takes 0.7 s without the cast; twice larger pieces take 1 s, since each of their
buffers then comes fresh from the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.errors import ArtifactError

_PIECE_ELEMENTS = 1 << 17

_NATIVE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml type id of types that torch has too."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def native_dtype(type_id: int) -> torch.dtype | None:
    """The torch dtype that is stored, None for a quantized tensor."""
    return _NATIVE.get(type_id)


def dequantized(data: Bytes, type_id: int) -> Tensor:
    """All values, flat: a view of the data where torch has the type, else float32.

    Raises:
        ArtifactError: for a type that the gguf package cannot dequantise.
    """
    dtype = native_dtype(type_id)
    if dtype is not None:
        return torch.from_numpy(data).view(dtype)
    pieces = list(_pieces(data, type_id))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def dequantize_into(data: Bytes, type_id: int, destination: Tensor) -> None:
    """Write all values into a contiguous tensor of any floating dtype on any device, one rounding each.

    Raises:
        ArtifactError: for a type that the gguf package cannot dequantise.
    """
    dtype = native_dtype(type_id)
    flat = destination.view(-1)
    if dtype is not None:
        flat.copy_(torch.from_numpy(data).view(dtype))
        return
    start = 0
    for piece in _pieces(data, type_id):
        flat[start : start + piece.numel()].copy_(piece)
        start += piece.numel()


def _pieces(data: Bytes, type_id: int) -> Iterator[Tensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(type_id)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    piece_bytes = _PIECE_ELEMENTS // block_size * block_bytes
    for start in range(0, len(data), piece_bytes):
        piece = data[start : start + piece_bytes]
        try:
            values = dequantize(piece[None, :], kind)
        except NotImplementedError:
            raise ArtifactError(
                f"tensors of type {kind.name} cannot be read",
                why="the gguf package has no dequantisation of it",
                next_step="use a file of another quantization, such as Q8_0, Q4_K_M or BF16",
            ) from None
        yield torch.from_numpy(values.reshape(-1))
