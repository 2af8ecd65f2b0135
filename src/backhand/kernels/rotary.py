"""The kernel of rotary embeddings (native/rotary.cpp): `ops.rotary`'s rotation, or None where it does not apply."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.kernels.library import INT, INT64, POINTER, KernelSignature, find_kernel, wide_dtype

_ROTARY = KernelSignature(
    "backhand_rotary", INT, *(POINTER, INT64, INT64) * 2, POINTER, POINTER, INT64, INT64, INT64, INT
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None, *, back: bool) -> Tensor | None:
    """Rotate the halves of every head of x, or return None if the kernel does not apply.

    Args:
        x: (tokens, heads, head_dim).
        cos: (tokens, head_dim / 2).
        sin: of cos's shape.
        out: receives the result, may be x itself; or None for a new tensor.
        back: rotate by minus the angles.
    """
    kernel_layout = cos.is_contiguous() and sin.is_contiguous() and cos.dtype == wide_dtype(x.dtype)
    kernel = find_kernel(_ROTARY, x, out) if kernel_layout else None
    if kernel is None:
        return None
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    kernel(
        *(x.data_ptr(), x.stride(0), x.stride(1), y.data_ptr(), y.stride(0), y.stride(1)),
        *(cos.data_ptr(), sin.data_ptr(), x.shape[0], x.shape[1], x.shape[2] // 2, back),
    )
    return y
