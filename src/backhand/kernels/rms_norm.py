"""The kernels of RMSNorm (native/rms_norm.cpp): `ops.rms_norm`'s functions, or None where a kernel does not apply."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, KernelSignature, find_kernel, wide_dtype

_FORWARD = KernelSignature(
    *("backhand_rms_norm_forward", INT, POINTER, INT64, INT64, INT64, POINTER, POINTER, POINTER, INT),
    *(INT64, INT64, DOUBLE, DOUBLE),
)
_BACKWARD = KernelSignature(
    *("backhand_rms_norm_backward", INT, POINTER, INT64, INT64, INT64, POINTER, INT64, INT64),
    *(POINTER, POINTER, POINTER, POINTER, INT64, INT64, DOUBLE),
)
_WEIGHT_GRADIENT = KernelSignature(
    *("backhand_rms_norm_weight_gradient", INT, POINTER, INT64, INT64, INT64, POINTER, INT64, INT64),
    *(POINTER, POINTER, INT64, INT64),
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, inverse_rms: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return y and the inverse RMS ρ, or None if the kernel does not apply.

    Args:
        x: (..., n).
        weight: (n,).
        eps: ε.
        offset: c, added to the weight.
        inverse_rms: ρ, (..., 1), to use unchanged; None to compute it.
        out: of x's shape and dtype, to receive y; or None.
    """
    kernel, rows = find_kernel(_FORWARD, x, weight, out), _row_strides(x)
    if kernel is None or rows is None or not (out is None or out.is_contiguous()) or not weight.is_contiguous():
        return None
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    given = inverse_rms is not None
    if inverse_rms is None:
        inverse_rms = torch.empty(*x.shape[:-1], 1, dtype=wide_dtype(x.dtype))
    elif not inverse_rms.is_contiguous():
        return None
    n = x.shape[-1]
    places = (x.data_ptr(), *rows, weight.data_ptr(), y.data_ptr(), inverse_rms.data_ptr())
    kernel(*places, given, x.numel() // max(n, 1), n, eps, offset)
    return y, inverse_rms


def rms_norm_gradients(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
    offset: float,
    *,
    weight_gradient: bool,
    residual: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return d_x and d_weight, or None if the kernels do not apply; see `ops.rms_norm.rms_norm_backward`."""
    kernel, d_y_rows, x_rows = find_kernel(_BACKWARD, d_y, x, weight, residual, out), _row_strides(d_y), _row_strides(x)
    dense = all(t.is_contiguous() for t in (weight, inverse_rms, residual, out) if t is not None)
    if kernel is None or d_y_rows is None or x_rows is None or not dense:
        return None
    n = x.shape[-1]
    rows = x.numel() // max(n, 1)
    d_weight = None
    if weight_gradient:  # first, since d_x may overwrite d_y
        d_weight = torch.empty(weight.shape, dtype=weight.dtype)
        not_none(find_kernel(_WEIGHT_GRADIENT, d_y, x))(
            *(d_y.data_ptr(), *d_y_rows, x.data_ptr(), *x_rows[1:], inverse_rms.data_ptr()),
            *(d_weight.data_ptr(), rows, n),
        )
    d_x = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    kernel(
        *(d_y.data_ptr(), *d_y_rows, x.data_ptr(), *x_rows[1:], weight.data_ptr(), inverse_rms.data_ptr()),
        *(None if residual is None else residual.data_ptr(), d_x.data_ptr(), rows, n, offset),
    )
    return d_x, d_weight


def _row_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Return (length of the last leading axis, stride of the axis before it, its own stride); None for other layouts.

    A matrix, and any tensor without gaps, counts as having a last leading axis of length 1.
    """
    if x.dim() == 2:
        return 1, x.stride(0), 0
    if x.dim() == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return (1, x.shape[-1], 0) if x.is_contiguous() and x.dim() > 0 else None
