"""A frozen weight and its products, dense or in its file's own blocks: an op never asks which.

    y = r + x Wᵀ + b        W (out, in) frozen, bias b (out,) and residual r (..., out) where there are any

Backward. Only x is varied: dy = dx Wᵀ, and with G = ∂L/∂y, ⟨G, dx Wᵀ⟩ = ⟨G W, dx⟩, so that
    ∂L/∂x = G W             (..., in)
(∂L/∂r is G itself). Saved: W, which is there anyway. A quantized W is dequantised again; autograd would keep it.

To either, products with the factors of an adapter can be added, + s h Fᵀ (`Term`, `ops.lora_linear`): within the same
sums where a kernel of ours multiplies (`kernels.dense_product`: bfloat16 with AMX), else afterwards.

Where a kernel of ours multiplies (`kernels.dense_product`), it unpacks a quantized matrix itself, a few rows at a time
where it packs its operand, and gives the bits of the dense one. Otherwise in tiles: W is cut into pieces of at most
TILE_BYTES in the compute dtype, so that a quantized matrix never stands there in full. For a library, a dense one is
cut in the same way, although it need not be: how it adds up a product depends on the product's width (oneDNN with AMX:
some sums in ten thousand end in another bit), and then

    the same calls on the same numbers give dense and quantized the same bits, on every processor.

    forward     y[:, t] = x W[t, :]ᵀ           t a range of rows of W, of outputs
    backward    d_x[:, t] = G W[:, t]          t a range of columns of W, of inputs
                d_x = Σ_t G[:, t] W[t, :]      t a range of rows of W, of outputs

Few rows of x, as of new tokens, go through a kernel of their own, which reads W once (`kernels.few_rows`), dense and
quantized alike, so that this holds for them too.

Columns of d_x are not sums of one another, while a sum over row tiles is rounded to the compute dtype once a tile: that
costs bfloat16 its precision, and float32, which a library's sums are in anyway, nothing. There W is cut into rows where
it has more of them than columns and its column tiles would be as narrow as they may be, as a head's are (SmolLM2's
49,152 × 576 with 256 rows of G: 1.17 times what the whole product takes in columns, 1.06 in rows). Where one or a few
wide column tiles do, these are faster (17,920 × 1,536: 611 ms in columns, 631 in rows; 9,728 × 896 with 64 rows of G,
which is one tile: 20.7 and 27.9). Edges lie at multiples of 64 rows and of 256 columns, of which every block is a part.

How large. The library wants wide products: tiles of columns are as large as may be, 64 MB, since narrow ones cost more
than they save. Rows are taken 16 MB at a time, at least 2,048 of them: that many are about as fast as all of them, and
what is unpacked is multiplied before it has left the caches (a head of 151,936 × 1,536 with 512 rows of x, AMX: 175 ms
in tiles of 64 MB, 146 in these; dense 136 and 143).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.dense_product import Term, dense_product, drop_workspace, is_taken
from backhand.kernels.few_rows import MOST_ROWS, few_rows_product
from backhand.kernels.large_pages import in_large_pages
from backhand.kernels.library import is_loopable
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.ops.low_rank import add_up_projection, down_projection

FrozenMatrix = Tensor | QuantizedMatrix
"""(out, in); both have shape, dtype and device."""

TILE_BYTES = 64 << 20
ROWS_BYTES, FEWEST_ROWS = 16 << 20, 2048
ROW_EDGE, COLUMN_EDGE = 64, 256
_tile_bytes = ContextVar("tile_bytes", default=TILE_BYTES)


class FrozenLinearSaved(NamedTuple):
    """What the forward keeps: the weight."""

    weight: FrozenMatrix


class FrozenLinearGrads(NamedTuple):
    """d_x, (..., in)."""

    d_x: Tensor


def frozen_linear_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, FrozenLinearSaved]:
    """y = residual + x Wᵀ + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (..., out) or None.

    Returns:
        y (..., out) in x's dtype, and what backward needs.
    """
    lead, (outputs, inputs) = x.shape[:-1], weight.shape
    y = frozen_linear(
        x.reshape(lead.numel(), inputs),
        weight,
        bias,
        None if residual is None else residual.reshape(lead.numel(), outputs),
    )
    return y.view(*lead, outputs), FrozenLinearSaved(weight)


def frozen_linear_backward(d_y: Tensor, saved: FrozenLinearSaved) -> FrozenLinearGrads:
    """Map d_y, (..., out), to the gradient derived in the module docstring."""
    lead, (outputs, inputs) = d_y.shape[:-1], saved.weight.shape
    return FrozenLinearGrads(
        frozen_input_gradient(d_y.reshape(lead.numel(), outputs), saved.weight).view(*lead, inputs)
    )


def frozen_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The same y from the whole dense weight."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def frozen_linear(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    terms: Sequence[Term] = (),
) -> Tensor:
    """residual + x Wᵀ + bias + the terms on rows, with one of the first two sums folded into the product.

    Args:
        x: (rows, in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (rows, out) or None.
        out: (rows, out) to write into; a new one if not given.
        terms: s h Fᵀ added to columns of the result, in their order; where `forms_h`, an h may be formed from its A.
    """
    if 0 < x.shape[0] <= MOST_ROWS:
        few = few_rows_product(x, weight, bias, residual, out)
        if few is not None:
            return _with_terms(few, x, terms)
    by_loop = dense_product(x, weight, bias, residual, out, terms, transposed=True)
    if by_loop is not None:
        return by_loop
    tiles = row_tiles(weight)
    if len(tiles) == 1:
        return _product(x, _rows_of(weight, tiles[0]), bias, residual, out, terms)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    for tile in tiles:
        part_bias, around = None if bias is None else bias[tile], None if residual is None else residual[:, tile]
        _product(x, _rows_of(weight, tile), part_bias, around, y[:, tile], _terms_of(terms, tile))
    return y


def frozen_input_gradient(
    d_y: Tensor, weight: FrozenMatrix, out: Tensor | None = None, terms: Sequence[Term] = ()
) -> Tensor:
    """G W + the terms on rows.

    Args:
        d_y: G, (rows, out).
        weight: (out, in).
        out: (rows, in) to write into; a new one if not given.
        terms: as in `frozen_linear`.
    """
    by_loop = dense_product(d_y, weight, None, None, out, terms)
    if by_loop is not None:
        return by_loop
    cut = _gradient_by_rows if sums_over_rows(weight) else _gradient_by_columns
    return cut(d_y, weight, out, terms)


def sums_over_rows(weight: FrozenMatrix) -> bool:
    """Whether a library's G W is the sum over row tiles of W, rather than put together from column tiles."""
    if weight.shape[0] <= weight.shape[1] or weight.dtype not in (torch.float32, torch.float64):
        return False
    first, *others = column_tiles(weight)
    return len(others) > 0 and first.stop <= COLUMN_EDGE


def _gradient_by_rows(d_y: Tensor, weight: FrozenMatrix, out: Tensor | None, terms: Sequence[Term]) -> Tensor:
    first, *others = row_tiles(weight)
    d_x = torch.mm(d_y[:, first], _rows_of(weight, first), out=out)
    for tile in others:
        torch.addmm(d_x, d_y[:, tile], _rows_of(weight, tile), out=d_x)
    return _with_terms(d_x, d_y, terms)


def _gradient_by_columns(d_y: Tensor, weight: FrozenMatrix, out: Tensor | None, terms: Sequence[Term]) -> Tensor:
    tiles = column_tiles(weight)
    if len(tiles) == 1:
        return _gradient_product(d_y, _columns_of(weight, tiles[0]), out, terms)
    d_x = torch.empty(d_y.shape[0], weight.shape[1], dtype=d_y.dtype, device=d_y.device) if out is None else out
    for tile in tiles:
        _gradient_product(d_y, _columns_of(weight, tile), d_x[:, tile], _terms_of(terms, tile))
    return d_x


def frozen_rows(weight: FrozenMatrix, ids: Tensor) -> Tensor:
    """The rows with these ids, (..., in) for ids (...): an embedding, or the head's rows of a few candidates."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.embedding(ids, weight)
    return weight.rows(ids)


def frozen_split(weight: FrozenMatrix, sizes: Sequence[int]) -> tuple[FrozenMatrix, ...]:
    """The members of a stacked weight, of so many rows each; nothing is copied."""
    return tuple(weight.split(list(sizes))) if isinstance(weight, Tensor) else weight.split(sizes)


def frozen_part(weight: FrozenMatrix, start: int, stop: int) -> FrozenMatrix:
    """Rows start to stop as a matrix of its own; nothing is copied."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.part(start, stop)


def frozen_dense(weight: FrozenMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """All of it as a tensor: itself where it is one of that dtype."""
    if isinstance(weight, Tensor):
        return weight if dtype is None else weight.to(dtype)
    return weight.dense(dtype)


def frozen_tiles(weight: FrozenMatrix) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their dense form) from top to bottom; a quantized one lasts until the next product or tile."""
    for tile in row_tiles(weight):
        yield tile, _rows_of(weight, tile)


def row_tiles(weight: FrozenMatrix) -> list[slice]:
    """Ranges of rows of about equal size, ROWS_BYTES or FEWEST_ROWS at most; an empty one for a matrix without rows."""
    outputs, inputs = weight.shape
    row_bytes = inputs * weight.dtype.itemsize
    most_bytes = min(_most_bytes(), max(ROWS_BYTES, FEWEST_ROWS * row_bytes))
    return _tiles(outputs, row_bytes, ROW_EDGE, most_bytes)


def column_tiles(weight: FrozenMatrix) -> list[slice]:
    """Ranges of columns of about equal size, TILE_BYTES at most; one empty one for a matrix without columns."""
    outputs, inputs = weight.shape
    return _tiles(inputs, outputs * weight.dtype.itemsize, COLUMN_EDGE, _most_bytes())


def _most_bytes() -> int:
    """Of a tile; torch.compile traces no context variable."""
    return TILE_BYTES if torch.compiler.is_compiling() else _tile_bytes.get()


@contextmanager
def tiles_of(tile_bytes: int) -> Iterator[None]:
    """Cut matrices into tiles of so many bytes at most inside, for proofs and measurements."""
    before = _tile_bytes.set(tile_bytes)
    try:
        yield
    finally:
        _tile_bytes.reset(before)


def _tiles(count: int, bytes_each: int, edge: int, most_bytes: int) -> list[slice]:
    most = max(edge, most_bytes // max(bytes_each, 1) // edge * edge)
    if count <= most:
        return [slice(0, count)]
    pieces = -(-count // most)
    step = -(-count // (pieces * edge)) * edge
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def takes_tiles(operand: FrozenMatrix) -> bool:
    """Whether products of it go by a kernel of ours, in which a row's bits never depend on the others' number."""
    if isinstance(operand, Tensor):
        return is_taken(operand.dtype) and is_loopable(operand)
    return is_taken(operand.dtype) and operand.device.type == "cpu"


def forms_h(x: Tensor, outputs: int, ranks: int) -> bool:
    """Whether `frozen_linear` is to form the h = x Aᵀ of its terms; else they have to be there.

    A thread that has columns of the result forms h for itself: not where that is much beside what it multiplies.

    Args:
        x: (rows, in).
        outputs: columns of the result.
        ranks: of all h, in all.
    """
    return x.shape[0] > MOST_ROWS and takes_tiles(x) and ranks * torch.get_num_threads() * 4 <= outputs


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None, terms: Sequence[Term]
) -> Tensor:
    """Of a dense W, or a tile of it."""
    y = dense_product(x, weight, bias, residual, out, terms, transposed=True)
    return _with_terms(library_product(x, weight, bias, residual, out), x, terms) if y is None else y


def _gradient_product(d_y: Tensor, weight: Tensor, out: Tensor | None, terms: Sequence[Term]) -> Tensor:
    d_x = dense_product(d_y, weight, None, None, out, terms)
    return _with_terms(torch.mm(d_y, weight, out=out), d_y, terms) if d_x is None else d_x


def _with_terms(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """y + the terms, in y's place."""
    for term in terms:
        if term.lora_A is not None:
            down_projection(x, term.lora_A, out=term.h)
        columns = y if term.outputs == y.shape[1] else y[:, term.column : term.column + term.outputs]
        add_up_projection(columns, term.h, term.factor, term.scaling, transposed=term.transposed)
    return y


def _terms_of(terms: Sequence[Term], tile: slice) -> list[Term]:
    """What of them falls on these columns of the result; in the first tile every h is formed, that of others too."""
    found, first = [], tile.start == 0
    for term in terms:
        begin = min(max(term.column, tile.start), tile.stop)
        end = max(begin, min(term.column + term.outputs, tile.stop))
        if begin < end or (first and term.lora_A is not None):
            own = slice(begin - term.column, end - term.column) if begin < end else slice(0, 0)
            part = term.factor[:, own] if term.transposed else term.factor[own]
            lora_A = term.lora_A if first else None
            found.append(term._replace(column=begin - tile.start, factor=part, lora_A=lora_A))
    return found


def library_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """residual + x Wᵀ + bias by torch's own product, of W dense."""
    if residual is not None:
        y = torch.addmm(residual, x, weight.T, out=out)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _rows_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    rows = tile.stop - tile.start
    if isinstance(weight, Tensor):
        return weight if rows == weight.shape[0] else weight[tile]
    return weight.rows_into(tile.start, tile.stop, _scratch(rows, weight.shape[1], weight))


def _columns_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    columns = tile.stop - tile.start
    if isinstance(weight, Tensor):
        return weight if columns == weight.shape[1] else weight[:, tile]
    return weight.columns_into(tile.start, tile.stop, _scratch(weight.shape[0], columns, weight))


class _Scratch(threading.local):
    """One tile a dtype, device and thread, kept from product to product."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_KEPT = _Scratch()


def _scratch(rows: int, columns: int, like: FrozenMatrix) -> Tensor:
    """(rows, columns), uninitialised; what it held before is lost."""
    key, elements = (like.dtype, like.device), rows * columns
    buffer = _KEPT.buffers.get(key)
    if buffer is None or buffer.numel() < elements:
        _KEPT.buffers.pop(key, None)
        buffer = _KEPT.buffers[key] = _elements(elements, like)
    return buffer[:elements].view(rows, columns)


def _elements(count: int, like: FrozenMatrix) -> Tensor:
    if like.device.type == "cpu":
        return in_large_pages(count, like.dtype)
    return torch.empty(count, dtype=like.dtype, device=like.device)


def drop_scratch() -> None:
    """Give this thread's tiles back: what comes next multiplies no quantized matrix, or others."""
    _KEPT.buffers.clear()
    drop_workspace()
