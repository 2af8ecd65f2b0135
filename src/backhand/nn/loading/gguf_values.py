"""Convert stored GGUF values to torch tensors, with `kernels.dequantize`."""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from backhand.kernels.dequantize import Bytes, block_shape, dequantize, native_dtype

_BLOCKS_PER_ROW = 512
"""Blocks in one row of the flat data, few enough that every thread gets rows."""


@cache
def is_readable(type_id: int) -> bool:
    """Return True if the values of a storage type can be dequantized."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantized_rows

    if native_dtype(type_id) is not None:
        return True
    try:
        dequantized_rows(np.zeros((1, block_shape(type_id)[1]), np.uint8), GGMLQuantizationType(type_id))
    except NotImplementedError:
        return False
    return True


def dequantized(data: Bytes, type_id: int) -> Tensor:
    """Return all values as one flat tensor: a view of the data if torch has the type, otherwise float32.

    Raises:
        ArtifactError: if the gguf package cannot dequantize the type.
    """
    dtype = native_dtype(type_id)
    if dtype is not None:
        return torch.from_numpy(data).view(dtype)
    values, size = block_shape(type_id)
    out = torch.empty(len(data) // size * values)
    dequantize_into(data, type_id, out)
    return out


def dequantize_into(data: Bytes, type_id: int, destination: Tensor) -> None:
    """Write all values into a tensor, with one rounding per value.

    Args:
        destination: contiguous, of any floating dtype, on any device.

    Raises:
        ArtifactError: if the gguf package cannot dequantize the type.
    """
    dtype = native_dtype(type_id)
    if dtype is not None:
        destination.view(-1).copy_(torch.from_numpy(data).view(dtype))
        return
    values, size = block_shape(type_id)
    # Blocks are independent of the matrix's rows, so the data may be cut into rows that suit the kernel's threads.
    in_row = gcd(len(data) // size, _BLOCKS_PER_ROW)
    dequantize(data.reshape(-1, in_row * size), type_id, destination.view(-1, in_row * values))
