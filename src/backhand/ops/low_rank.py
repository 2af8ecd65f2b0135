"""Products with a low-rank factor: what LoRA adds to a frozen layer, forward and backward.

With V and Y (rows, n) activations or their gradients, F (n, rank) lora_B or lora_Aᵀ, and H (rank-sized) beside them:
    low_rank_shrink     H = s V F          (rows, rank)      h = x Aᵀ, ∂L/∂h = s G B
    low_rank_expand     Y += s H Fᵀ        (rows, n)         y += s h Bᵀ, ∂L/∂x += (∂L/∂h) A
    low_rank_gather     s Vᵀ H             (n, rank)         ∂L/∂B = s Gᵀ h, ∂L/∂Aᵀ = xᵀ (∂L/∂h)
    low_rank_accumulate                    the same, added to what is there
    low_rank_shrink_and_accumulate         ∂L/∂h and ∂L/∂B from one pass over G
The formulas are derived in `lora_linear`, whose cases prove both forms of these.

At ranks of 8 to 64 they cost as much as memory does. The compiled loops (native/low_rank.cpp) read V once and read and
write Y once, round each sum once, and add a gradient straight to a float32 buffer. In torch's form each is a matrix
product. MKL's own Y += s H Fᵀ is as fast in float32 and is left to it. The one pass is taken in bfloat16, where reading
takes longer than multiplying.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, Declared, loop

_MATRIX = (POINTER, INT64)
_FACTOR = (*_MATRIX, INT)
_SIZES = (INT64, INT64, INT64, DOUBLE)
_SHRINK = Declared("backhand_low_rank_shrink", INT, *_MATRIX, *_FACTOR, *_MATRIX, *_SIZES, result=INT)
_EXPAND = Declared("backhand_low_rank_expand", INT, *_MATRIX, *_MATRIX, *_FACTOR, *_SIZES, result=INT)
_GATHER = Declared(
    "backhand_low_rank_gather",
    *(INT, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, POINTER, INT, INT, INT, INT64, INT64, DOUBLE),
    result=INT,
)
_SHRINK_AND_GATHER = Declared("backhand_low_rank_shrink_and_gather", INT, *_MATRIX * 5, INT, *_SIZES, result=INT)

# Groups have three members at most; a type of ctypes is made once.
_ARRAYS = tuple((POINTER * count, INT64 * count) for count in range(1, 4))


def low_rank_shrink(v: Tensor, factor: Tensor, scaling: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """s V F, (rows, rank).

    Args:
        v: V, (rows, n).
        factor: F, (n, rank), or a view of its transpose, as lora_A.T is.
        scaling: s.
        out: (rows, rank) to receive it, or None.
    """
    stored = _stored(factor)
    run = loop(_SHRINK, v, stored, out)
    if run is None:
        h = v @ factor if scaling == 1.0 else (v @ factor).mul_(scaling)
        return h if out is None else out.copy_(h)
    if out is None:
        out = torch.empty(v.shape[0], factor.shape[1], dtype=v.dtype)
    _check(run(*_matrix(v), *_matrix(stored), stored is not factor, *_matrix(out), *v.shape, out.shape[1], scaling))
    return out


def low_rank_expand(y: Tensor, h: Tensor, factor: Tensor, scaling: float = 1.0) -> Tensor:
    """Y + s H Fᵀ, (rows, n), in Y's place.

    Args:
        y: Y, (rows, n).
        h: H, (rows, rank).
        factor: F, (n, rank), or a view of its transpose.
        scaling: s.
    """
    stored = _stored(factor)
    run = None if y.dtype == torch.float32 else loop(_EXPAND, y, h, stored)
    if run is None:
        return y.addmm_(h, factor.T, alpha=scaling)
    _check(run(*_matrix(y), *_matrix(h), *_matrix(stored), stored is not factor, *y.shape, h.shape[1], scaling))
    return y


def low_rank_gather(v: Tensor, h: Tensor, scaling: float = 1.0) -> Tensor:
    """s Vᵀ H, (n, rank).

    Args:
        v: V, (rows, n).
        h: H, (rows, rank).
        scaling: s.
    """
    run = loop(_GATHER, v, h)
    if run is None:
        # As the transpose of s Hᵀ V: long rows in place of short ones take half the time.
        product = h.T @ v
        return product.T if scaling == 1.0 else product.mul_(scaling).T
    out = torch.empty(h.shape[1], v.shape[1], dtype=v.dtype)
    _check(run(*_matrix(v), *_matrix(h), *_places([out], True), True, False, False, *v.shape, scaling))
    return out.T


def low_rank_accumulate(v: Tensor, h: Tensor, scaling: float, into: Sequence[Tensor]) -> None:
    """Add s Vᵀ H to tensors that stand side by side, each for as many columns of H as it has.

    Args:
        v: V, (rows, n).
        h: H, (rows, Σ rank).
        scaling: s.
        into: (n, rank) each, or views of their transposes; in V's dtype or wider; perhaps none.
    """
    if not into:
        return
    run = loop(_GATHER, v, h)
    stored = [_stored(part) for part in into]
    dtype, transposed = stored[0].dtype, stored[0] is not into[0]
    wide = torch.promote_types(v.dtype, torch.float32)
    alike = all(part.dtype == dtype and part.stride(1) == 1 for part in stored)
    alike = alike and all((part is not given) == transposed for part, given in zip(stored, into, strict=True))
    if run is None or dtype not in (v.dtype, wide) or not alike or len(stored) > len(_ARRAYS):
        product = low_rank_gather(v, h, scaling)
        for part, added in zip(into, product.split([part.shape[1] for part in into], 1), strict=True):
            part.add_(added)
        return
    places = _places(stored, transposed)
    _check(run(*_matrix(v), *_matrix(h), *places, transposed, dtype == wide, True, *v.shape, scaling))


def low_rank_shrink_and_accumulate(
    v: Tensor, h: Tensor, factor: Tensor, scaling: float, into: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """s V F, (rows, rank), as `low_rank_shrink` gives it, and s Vᵀ H added to `into`: where loops do it, in one pass.

    Args:
        v: V, (rows, n).
        h: H, (rows, rank).
        factor: F, (n, rank).
        scaling: s, of both.
        into: (n, rank), in V's dtype or wider.
        out: (rows, rank) to receive the first, or None.
    """
    run = loop(_SHRINK_AND_GATHER, v, h, factor, out) if v.dtype != torch.float32 else None
    wide = torch.promote_types(v.dtype, torch.float32)
    if run is None or into.dtype not in (v.dtype, wide) or into.stride(1) != 1:
        shrunk = low_rank_shrink(v, factor, scaling, out=out)
        low_rank_accumulate(v, h, scaling, [into])
        return shrunk
    if out is None:
        out = torch.empty(v.shape[0], factor.shape[1], dtype=v.dtype)
    matrices = (part for matrix in (v, h, factor, out, into) for part in _matrix(matrix))
    _check(run(*matrices, into.dtype == wide, *v.shape, factor.shape[1], scaling))
    return out


def _places(stored: Sequence[Tensor], transposed: bool) -> tuple[Any, ...]:
    """How many there are, and address, distance of rows and rank of each."""
    count = len(stored)
    addresses, distances = _ARRAYS[count - 1]
    return (
        count,
        addresses(*(part.data_ptr() for part in stored)),
        distances(*(part.stride(0) for part in stored)),
        distances(*(part.shape[0 if transposed else 1] for part in stored)),
    )


def _stored(factor: Tensor) -> Tensor:
    """The factor, or its transpose if that is what lies row by row."""
    rows, columns = factor.stride()
    return factor if columns == 1 or rows != 1 else factor.T


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _check(outcome: int) -> None:
    if outcome:
        raise MemoryError("low-rank products: no memory for what they work with")
