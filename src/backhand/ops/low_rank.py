"""Products with a low-rank factor: what LoRA adds to a frozen layer, forward and backward.

Of x and y, (rows, in) and (rows, out), and of what is rank-sized beside them:
    down_projection        h = x Aᵀ                          (rows, rank)
    add_up_projection      y += s h Bᵀ, or += h A            (rows, out), (rows, in)
    hidden_gradient        ∂L/∂h = s G B, ∂L/∂B += s Gᵀ h    of all layers of one input at once
    add_lora_A_gradients   ∂L/∂A += (∂L/∂h)ᵀ x               x perhaps by the norm that made it
The formulas are derived in `lora_linear`; the cases of `lora_group` prove both forms of these.

At ranks of 8 to 64 they cost as much as memory does. The kernels (native/low_rank*.cpp) read x or G once, read
and write y once, round each sum once, and add a gradient straight to a float32 buffer. In torch's form each is a matrix
product. MKL's own y += s h Bᵀ is as fast in float32 and is left to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import is_taken
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, Declared, loop, matrix
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, statistics_dtype

_MATRIX = (POINTER, INT64)
_SIZES = (INT64, INT64, INT64)
_DOWN = Declared("backhand_low_rank_down", INT, *_MATRIX, *_MATRIX, *_MATRIX, *_SIZES, result=INT)
_UP = Declared("backhand_low_rank_up", INT, *_MATRIX, *_MATRIX, *_MATRIX, INT, *_SIZES, DOUBLE, result=INT)
_GATHER = Declared(
    "backhand_low_rank_gather",
    *(INT, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, POINTER, INT, INT),
    *(INT64, INT64, POINTER, POINTER, DOUBLE),
    result=INT,
)
_BACKWARD = Declared(
    *("backhand_low_rank_backward", INT, *_MATRIX, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, INT, INT, INT64),
    result=INT,
)


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, INT64) for name in ("column", "outputs", "rank", "lora_B", "lora_B_row", "d_lora_B", "d_lora_B_row")
    )


class Member(NamedTuple):
    """One adapted layer of those that share an input."""

    column: int  # of y, the first of its outputs
    lora_A: Tensor  # (rank, in)
    lora_B: Tensor  # (out, rank)
    scaling: float  # s
    d_lora_A: Tensor  # (rank, in), wider or of its dtype, to which ∂L/∂A is added
    d_lora_B: Tensor  # (out, rank), likewise for ∂L/∂B


def down_projection(x: Tensor, lora_A: Tensor, out: Tensor | None = None) -> Tensor:
    """h = x Aᵀ, (rows, rank), in `out` or a new tensor; x (rows, in), lora_A (rank, in)."""
    run = loop(_DOWN, x, lora_A, out)
    if run is None:
        h = x @ lora_A.T
        return h if out is None else out.copy_(h)
    h = torch.empty(x.shape[0], lora_A.shape[0], dtype=x.dtype) if out is None else out
    _checked(run(*matrix(x), *matrix(lora_A), *matrix(h), *x.shape, h.shape[1]))
    return h


def add_up_projection(
    y: Tensor, h: Tensor, factor: Tensor, scaling: float = 1.0, *, transposed: bool = False
) -> Tensor:
    """y + s h Fᵀ, (rows, n), in y's place.

    Args:
        y: (rows, n).
        h: (rows, rank).
        factor: F, (n, rank), as lora_B is; or its transpose, (rank, n), as lora_A is.
        scaling: s.
        transposed: whether `factor` is Fᵀ.
    """
    run = None if y.dtype == torch.float32 else loop(_UP, y, h, factor)
    if run is None:
        return y.addmm_(h, factor if transposed else factor.T, alpha=scaling)
    _checked(run(*matrix(y), *matrix(h), *matrix(factor), transposed, *y.shape, h.shape[1], scaling))
    return y


def hidden_gradient(g: Tensor, h: Tensor, members: Sequence[Member]) -> Tensor:
    """∂L/∂h = [s₁ G₁ B₁ | … | sₙ Gₙ Bₙ], (rows, Σ rank); ∂L/∂Bᵢ = sᵢ Gᵢᵀ hᵢ is added to each `d_lora_B`.

    Args:
        g: G, (rows, Σ out), of all layers, adapted or not.
        h: (rows, Σ rank), of the members in their order.
        members: the adapted ones.
    """
    d_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not members:
        return d_h
    run = loop(_BACKWARD, g, h, *(member.lora_B for member in members))
    wide = _are_wide([member.d_lora_B for member in members], g.dtype)
    if run is None or wide is None:
        first = 0
        for column, _, lora_B, scaling, _, into in members:
            n, rank = lora_B.shape
            part, ranks = g[:, column : column + n], slice(first, first + rank)
            d_h[:, ranks] = (part @ lora_B).mul_(scaling)
            into.add_((h[:, ranks].T @ part).mul_(scaling).T)
            first = ranks.stop
        return d_h
    table = (_Layer * len(members))(
        *(
            _Layer(member.column, *member.lora_B.shape, *matrix(member.lora_B), *matrix(member.d_lora_B))
            for member in members
        )
    )
    scalings = (DOUBLE * len(members))(*(member.scaling for member in members))
    places = (*matrix(g), *matrix(h), *matrix(d_h))
    _checked(run(*places, len(members), table, scalings, wide, by_parts_of_rows(g.dtype), g.shape[0]))
    return d_h


def add_lora_A_gradients(x: Tensor | RMSNormSaved, d_h: Tensor, into: Sequence[Tensor]) -> None:
    """Add (∂L/∂h)ᵀ x to tensors whose rows stand below one another, each for as many columns of ∂L/∂h as it has rows.

    A norm's x = ρ X ⊙ (c + w) need not be formed: (∂L/∂h)ᵀ x = ((ρ ∂L/∂h)ᵀ X) ⊙ (c + w), and ρ ∂L/∂h is small.

    Args:
        x: (rows, in), or what a norm of rows saved when it gave x.
        d_h: ∂L/∂h, (rows, Σ rank).
        into: (rank, in) each, in x's dtype or wider; perhaps none.
    """
    if not into:
        return
    rows, weight, factor, offset = x if isinstance(x, RMSNormSaved) else (x, None, None, 0.0)
    run, wide = loop(_GATHER, rows, d_h, weight), _are_wide(into, rows.dtype)
    dense = factor is None or weight is None or (factor.is_contiguous() and weight.is_contiguous())
    if run is None or wide is None or not dense:
        formed = rms_norm_apply(*x) if isinstance(x, RMSNormSaved) else x
        for part, added in zip(into, (d_h.T @ formed).split([len(part) for part in into]), strict=True):
            part.add_(added)
        return
    norm = (None if factor is None else factor.data_ptr(), None if weight is None else weight.data_ptr(), offset)
    how = wide, by_parts_of_rows(rows.dtype)
    _checked(run(*matrix(rows), *matrix(d_h), *_places(into), *how, *rows.shape, *norm))


def _places(into: Sequence[Tensor]) -> tuple[Any, ...]:
    """How many there are, and address, distance of rows and rank of each."""
    count = len(into)
    return (
        count,
        (POINTER * count)(*(part.data_ptr() for part in into)),
        (INT64 * count)(*(part.stride(0) for part in into)),
        (INT64 * count)(*(part.shape[0] for part in into)),
    )


def _are_wide(receivers: Sequence[Tensor], dtype: torch.dtype) -> bool | None:
    """Whether kernels for this dtype add to float32 or wider; None where they cannot add to these."""
    first, wide = receivers[0].dtype, statistics_dtype(dtype)
    alike = all(receiver.dtype == first and receiver.stride(1) == 1 for receiver in receivers)
    return first == wide if alike and first in (dtype, wide) else None


def by_parts_of_rows(dtype: torch.dtype) -> bool:
    """Whether threads divide the rows of x or G among them, or else columns, as for bfloat16 without tiles."""
    return dtype != torch.bfloat16 or is_taken(dtype)


def _checked(without_memory: int) -> None:
    """Raise MemoryError where a call returned that it had none to work with."""
    if without_memory:
        raise MemoryError("products with an adapter's factors: no memory for what they work with")
