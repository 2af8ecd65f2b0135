"""Products with a low-rank factor: what LoRA adds to a frozen layer, forward and backward.

With V and Y (rows, n) activations or their gradients, F (n, rank) lora_B or lora_Aᵀ, and H (rank-sized) beside them:
    low_rank_shrink     H = V F            (rows, rank)      h = x Aᵀ
    low_rank_expand     Y += s H Fᵀ        (rows, n)         y += s h Bᵀ, ∂L/∂x += (∂L/∂h) A
    low_rank_accumulate += Vᵀ H            (n, rank)         ∂L/∂Aᵀ = xᵀ (∂L/∂h), x perhaps by the norm that made it
    low_rank_backward   s V F and s Vᵀ H   at once           ∂L/∂h and ∂L/∂B = s Gᵀ h, of all layers of one input
The formulas are derived in `lora_linear`, whose cases prove both forms of these.

At ranks of 8 to 64 they cost as much as memory does. The compiled loops (native/low_rank*.cpp) read V once and read and
write Y once, round each sum once, and add a gradient straight to a float32 buffer. In torch's form each is a matrix
product. MKL's own Y += s H Fᵀ is as fast in float32 and is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import as_stored, matrix
from backhand.kernels.library import DOUBLE, INT, INT64, POINTER, Declared, InARow, library, loop, now_or_in
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply, statistics_dtype

_MATRIX = (POINTER, INT64)
_FACTOR = (*_MATRIX, INT)
_SIZES = (INT64, INT64, INT64)
_SHRINK = Declared("backhand_low_rank_shrink", INT, *_MATRIX, *_FACTOR, *_MATRIX, *_SIZES, result=INT)
_EXPAND = Declared("backhand_low_rank_expand", INT, *_MATRIX, *_MATRIX, *_FACTOR, *_SIZES, DOUBLE, result=INT)
_GATHER = Declared(
    "backhand_low_rank_gather",
    *(INT, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, POINTER, INT, INT, INT),
    *(INT64, INT64, POINTER, POINTER, DOUBLE),
    result=INT,
)

_BACKWARD = Declared(
    *("backhand_low_rank_backward", INT, *_MATRIX, *_MATRIX, *_MATRIX, INT64, POINTER, POINTER, INT, INT, INT64),
    result=INT,
)

# Groups have three members at most; a type of ctypes is made once.
_ARRAYS = tuple((POINTER * count, INT64 * count) for count in range(1, 4))


def low_rank_shrink(
    v: Tensor, factor: Tensor, *, out: Tensor | None = None, turned: bool = False, row: InARow | None = None
) -> Tensor:
    """V F, (rows, rank).

    Args:
        v: V, (rows, n).
        factor: F, (n, rank), or a view of its transpose, as lora_A.T is.
        out: (rows, rank) to receive it, or None.
        turned: whether `factor` is Fᵀ, (rank, n), as lora_A is: here and below, a view less to be made.
        row: where this is to be done in its turn, or None to do it now; here and below torch's form may not wait.
    """
    stored, transposed = as_stored(factor, turned)
    run = loop(_SHRINK, v, stored, out)
    if run is None:
        if row is not None:
            row.make()
        h = v @ (factor.T if turned else factor)
        return h if out is None else out.copy_(h)
    if out is None:
        out = torch.empty(v.shape[0], factor.shape[0 if turned else 1], dtype=v.dtype)
    call = partial(with_memory, run, *matrix(v), *matrix(stored), transposed, *matrix(out), *v.shape, out.shape[1])
    now_or_in(row, call, v, stored, out)
    return out


def low_rank_expand(
    y: Tensor, h: Tensor, factor: Tensor, scaling: float = 1.0, *, turned: bool = False, row: InARow | None = None
) -> Tensor:
    """Y + s H Fᵀ, (rows, n), in Y's place.

    Args:
        y: Y, (rows, n).
        h: H, (rows, rank).
        factor: F, (n, rank), or a view of its transpose.
        scaling: s.
        turned: whether `factor` is Fᵀ, (rank, n).
        row: where this is to be done in its turn, or None to do it now.
    """
    run = None
    if y.dtype != torch.float32:
        stored, transposed = as_stored(factor, turned)
        run = loop(_EXPAND, y, h, stored)
    if run is None:
        now_or_in(row, partial(y.addmm_, h, factor if turned else factor.T, alpha=scaling))
        return y
    call = partial(with_memory, run, *matrix(y), *matrix(h), *matrix(stored), transposed, *y.shape, h.shape[1], scaling)
    now_or_in(row, call, y, h, stored)
    return y


def low_rank_accumulate(
    v: Tensor | RMSNormSaved, h: Tensor, into: Sequence[Tensor], *, turned: bool = False, row: InARow | None = None
) -> None:
    """Add Vᵀ H to tensors that stand side by side, each for as many columns of H as it has.

    A norm's V = ρ X ⊙ (c + w) need not be there: Vᵀ H = (c + w) ⊙ Xᵀ (ρ H), row by row, and ρ H is small.

    Args:
        v: V, (rows, n), or what a norm of rows saved when it gave V.
        h: H, (rows, Σ rank).
        into: (n, rank) each, or views of their transposes; in V's dtype or wider; perhaps none.
        turned: whether each is given as its transpose, (rank, n), as ∂L/∂A is.
        row: where this is to be done in its turn, or None to do it now.
    """
    if not into:
        return
    x, weight, factor, offset = v if isinstance(v, RMSNormSaved) else (v, None, None, 0.0)
    run = loop(_GATHER, x, h, weight)
    lying = [as_stored(part, turned) for part in into]
    dtype, transposed = into[0].dtype, lying[0][1]
    wide = statistics_dtype(x.dtype)
    alike = all(part.dtype == dtype and part.stride(1) == 1 and way == transposed for part, way in lying)
    lies_so = factor is None or weight is None or (factor.is_contiguous() and weight.is_contiguous())
    if run is None or dtype not in (x.dtype, wide) or not (alike and lies_so) or len(into) > len(_ARRAYS):
        now_or_in(row, partial(_accumulate_by_torch, v, h, into if turned else [part.T for part in into]))
        return
    places = _places([part for part, _ in lying], transposed)
    norm = (None if factor is None else factor.data_ptr(), None if weight is None else weight.data_ptr(), offset)
    how = transposed, dtype == wide, by_parts_of_rows(x.dtype)
    call = partial(with_memory, run, *matrix(x), *matrix(h), *places, *how, *x.shape, *norm)
    now_or_in(row, call, v, h, into)


def _accumulate_by_torch(v: Tensor | RMSNormSaved, h: Tensor, into: Sequence[Tensor]) -> None:
    """Add Hᵀ V to (rank, n) each: of the transpose long rows in place of short ones, which takes half the time."""
    formed = rms_norm_apply(*v) if isinstance(v, RMSNormSaved) else v
    for part, added in zip(into, (h.T @ formed).split([part.shape[0] for part in into]), strict=True):
        part.add_(added)


class Member(NamedTuple):
    """One of the layers that share an input: its first column of G, its lora_B (n, rank) and scaling.

    into: (n, rank), in G's dtype or wider, to which ∂L/∂B is added.
    """

    column: int
    lora_B: Tensor
    scaling: float
    into: Tensor


def low_rank_backward(g: Tensor, h: Tensor, members: Sequence[Member], *, row: InARow | None = None) -> Tensor:
    """∂L/∂h = [s_1 G_1 B_1 | … | s_n G_n B_n], (rows, Σ rank); ∂L/∂B_i = s_i G_iᵀ h_i is added to `into`.

    Args:
        g: G, (rows, Σ out_i), of all layers, adapted or not.
        h: (rows, Σ rank), of the members in their order.
        members: the adapted ones.
        row: where this is to be done in its turn, or None to do it now.
    """
    d_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not members:
        return d_h
    run = loop(_BACKWARD, g, h, *(member.lora_B for member in members))
    dtype, wide = members[0].into.dtype, statistics_dtype(g.dtype)
    alike = all(member.into.dtype == dtype and member.into.stride(1) == 1 for member in members)
    if run is None or dtype not in (g.dtype, wide) or not alike:
        now_or_in(row, partial(_backward_by_torch, g, h, members, d_h))
        return d_h
    numbers: list[int] = []
    for column, lora_B, _, into in members:
        numbers += (column, *lora_B.shape, *matrix(lora_B), *matrix(into))
    table = (INT64 * len(numbers))(*numbers)
    scalings = (DOUBLE * len(members))(*(member.scaling for member in members))
    places = (*matrix(g), *matrix(h), *matrix(d_h))
    by_parts = by_parts_of_rows(g.dtype)
    call = partial(with_memory, run, *places, len(members), table, scalings, dtype == wide, by_parts, g.shape[0])
    now_or_in(row, call, g, h, members, d_h)
    return d_h


def _backward_by_torch(g: Tensor, h: Tensor, members: Sequence[Member], d_h: Tensor) -> None:
    first = 0
    for column, lora_B, scaling, into in members:
        n, rank = lora_B.shape
        part, ranks = g[:, column : column + n], slice(first, first + rank)
        d_h[:, ranks] = (part @ lora_B).mul_(scaling)
        into.add_((h[:, ranks].T @ part).mul_(scaling).T)
        first = ranks.stop


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


# As in native/low_rank.h.
_ROWS_OF_PART, _MOST_PARTS = 256, 8


def by_parts_of_rows(dtype: torch.dtype) -> bool:
    """Whether threads divide the rows of V or G among them, or else columns, as for bfloat16 without tiles."""
    build = library()
    return dtype != torch.bfloat16 or (build is not None and build.name == "amx")


def parts_of_rows(rows: int) -> int:
    """Into how many parts so many rows are divided, whatever the number of threads."""
    return max(1, min(_MOST_PARTS, -(-rows // _ROWS_OF_PART)))


def with_memory(run: Callable[..., int], *arguments: Any) -> None:
    """Make a call that returns whether it had no memory for what it works with.

    Raises:
        MemoryError: it had none.
    """
    if run(*arguments):
        raise MemoryError("products with an adapter's factors: no memory for what they work with")
