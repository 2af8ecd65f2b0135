"""The kernels of causal convolutions (native/causal_conv.cpp), for `ops.causal_conv` and `ops.gated_conv`."""

from __future__ import annotations

from torch import Tensor

from backhand.kernels.library import (
    INT,
    INT64,
    POINTER,
    KernelSignature,
    SegmentRuns,
    find_kernel,
    matrix,
    segment_table,
)

_MATRIX = (POINTER, INT64)
_PROBLEM = (*_MATRIX, *_MATRIX, POINTER, POINTER, *(INT64,) * 3)
_FORWARD = KernelSignature("backhand_causal_conv_forward", INT, INT, *_PROBLEM, *_MATRIX)
_BACKWARD = KernelSignature("backhand_causal_conv_backward", INT, INT, *_PROBLEM, *_MATRIX, *_MATRIX)
# As in native/causal_conv.cpp: the functions around the convolution, and the largest number of taps.
PLAIN, WITH_SILU, GATED = range(3)
_MOST_TAPS = 8


def causal_conv(mode: int, x: Tensor, weight: Tensor, bias: Tensor | None, runs: SegmentRuns, y: Tensor) -> bool:
    """Fill y of shape (tokens, channels) and return True; return False if the kernel does not apply.

    Args:
        mode: PLAIN; WITH_SILU; or GATED, with x (tokens, 3 channels) as in `ops.gated_conv`.
        x: (tokens, channels).
        weight: (channels, J).
        bias: (channels,) or None.
        runs: the documents' segments; see `segment_table`.
        y: receives the result.
    """
    return _applies(_FORWARD, mode, x, weight, bias, runs, y)


def causal_conv_gradient(
    mode: int, d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, runs: SegmentRuns, d_x: Tensor
) -> bool:
    """Fill d_x, of x's shape, and return True; return False if the kernel does not apply."""
    return _applies(_BACKWARD, mode, x, weight, bias, runs, d_y, d_x)


def _applies(
    signature: KernelSignature,
    mode: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: SegmentRuns,
    *others: Tensor,
) -> bool:
    kernel = find_kernel(signature, x, weight, bias, *others)
    if kernel is None or weight.shape[1] > _MOST_TAPS:
        return False
    table = segment_table(runs)
    problem = (*matrix(x), *matrix(weight), None if bias is None else bias.data_ptr(), table.data_ptr())
    kernel(mode, *problem, table.shape[1], *weight.shape, *(number for other in others for number in matrix(other)))
    return True
