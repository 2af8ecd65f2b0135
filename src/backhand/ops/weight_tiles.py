"""A frozen matrix in tiles of its dense form, so that a quantized one never stands in memory in full.

W is cut into pieces of at most TILE_BYTES in the compute dtype. For a library's products (`frozen_matrix`) a dense one
is cut in the same way, although it need not be: how a library adds up a product depends on the product's width (oneDNN
with AMX: some sums in ten thousand end in another bit), and then

    the same calls on the same numbers give dense and quantized the same bits, on every processor.

    forward     y[:, t] = x W[t, :]ᵀ           t a range of rows of W, of outputs
    backward    d_x[:, t] = G W[:, t]          t a range of columns of W, of inputs
                d_x = Σ_t G[:, t] W[t, :]      t a range of rows of W, of outputs

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from backhand.kernels.dense_product import LowRankUpdate, drop_workspace
from backhand.kernels.large_pages import in_large_pages
from backhand.kernels.quantized_matrix import QuantizedMatrix

FrozenMatrix = Tensor | QuantizedMatrix
"""(out, in); both have shape, dtype and device."""

TILE_BYTES = 64 << 20
ROWS_BYTES, FEWEST_ROWS = 16 << 20, 2048
ROW_EDGE, COLUMN_EDGE = 64, 256
TILES = ContextVar("tile_bytes", default=TILE_BYTES)


def frozen_split(weight: FrozenMatrix, sizes: Sequence[int]) -> tuple[FrozenMatrix, ...]:
    """The members of a stacked weight, of so many rows each; nothing is copied."""
    return tuple(weight.split(list(sizes))) if isinstance(weight, Tensor) else weight.split(sizes)


def frozen_part(weight: FrozenMatrix, start: int, stop: int) -> FrozenMatrix:
    """Rows start to stop as a matrix of its own; nothing is copied."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.part(start, stop)


def frozen_dense(weight: FrozenMatrix) -> Tensor:
    """All of it as a tensor: itself where it is one."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def frozen_tiles(weight: FrozenMatrix) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their dense form) from top to bottom; a quantized one lasts until the next product or tile."""
    for tile in row_tiles(weight):
        yield tile, rows_of(weight, tile)


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
    return TILE_BYTES if torch.compiler.is_compiling() else TILES.get()


@contextmanager
def tiles_of(tile_bytes: int) -> Iterator[None]:
    """Cut matrices into tiles of so many bytes at most inside, for proofs and measurements."""
    before = TILES.set(tile_bytes)
    try:
        yield
    finally:
        TILES.reset(before)


def _tiles(count: int, bytes_each: int, edge: int, most_bytes: int) -> list[slice]:
    most = max(edge, most_bytes // max(bytes_each, 1) // edge * edge)
    if count <= most:
        return [slice(0, count)]
    pieces = -(-count // most)
    step = -(-count // (pieces * edge)) * edge
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@lru_cache(maxsize=1024)
def is_whole(shape: torch.Size, dtype: torch.dtype, most_bytes: int) -> tuple[bool, bool]:
    """Whether a dense matrix is one tile of rows, and one of columns: a step asks once for each kind of weight."""
    rows, columns = shape
    row_bytes = columns * dtype.itemsize
    of_rows = min(most_bytes, max(ROWS_BYTES, FEWEST_ROWS * row_bytes))
    by_rows = _tiles(rows, row_bytes, ROW_EDGE, of_rows)
    return len(by_rows) == 1, len(_tiles(columns, rows * dtype.itemsize, COLUMN_EDGE, most_bytes)) == 1


def sums_over_rows(weight: FrozenMatrix) -> bool:
    """Whether a library's G W is the sum over row tiles of W, rather than put together from column tiles."""
    if weight.shape[0] <= weight.shape[1] or weight.dtype not in (torch.float32, torch.float64):
        return False
    first, *others = column_tiles(weight)
    return len(others) > 0 and first.stop <= COLUMN_EDGE


def tiled_linear(
    multiply: Callable[..., Tensor],
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    updates: Sequence[LowRankUpdate],
) -> Tensor:
    """`frozen_linear` with a product for each tile of rows: `multiply` of what is named here, weight dense."""
    tiles = row_tiles(weight)
    if len(tiles) == 1:
        return multiply(x, rows_of(weight, tiles[0]), bias, residual, out, updates)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    for tile in tiles:
        part_bias, around = None if bias is None else bias[tile], None if residual is None else residual[:, tile]
        multiply(x, rows_of(weight, tile), part_bias, around, y[:, tile], updates_of(updates, tile))
    return y


def tiled_input_gradient(
    multiply: Callable[..., Tensor],
    d_y: Tensor,
    weight: FrozenMatrix,
    out: Tensor | None,
    updates: Sequence[LowRankUpdate],
) -> Tensor:
    """`frozen_input_gradient` with a product for each tile of columns; likewise."""
    tiles = column_tiles(weight)
    if len(tiles) == 1:
        return multiply(d_y, columns_of(weight, tiles[0]), out, updates)
    d_x = torch.empty(d_y.shape[0], weight.shape[1], dtype=d_y.dtype, device=d_y.device) if out is None else out
    for tile in tiles:
        multiply(d_y, columns_of(weight, tile), d_x[:, tile], updates_of(updates, tile))
    return d_x


def summed_over_rows(d_y: Tensor, weight: FrozenMatrix, out: Tensor | None) -> Tensor:
    """G W, (rows, in), as the sum over tiles of rows."""
    first, *others = row_tiles(weight)
    d_x = torch.mm(d_y[:, first], rows_of(weight, first), out=out)
    for tile in others:
        torch.addmm(d_x, d_y[:, tile], rows_of(weight, tile), out=d_x)
    return d_x


def updates_of(updates: Sequence[LowRankUpdate], tile: slice) -> list[LowRankUpdate]:
    """What of them falls on these columns of the result; in the first tile every h is formed, that of others too."""
    found, first = [], tile.start == 0
    for update in updates:
        begin = min(max(update.column, tile.start), tile.stop)
        end = max(begin, min(update.column + update.outputs, tile.stop))
        if begin < end or (first and update.lora_A is not None):
            own = slice(begin - update.column, end - update.column) if begin < end else slice(0, 0)
            part = update.factor[:, own] if update.transposed else update.factor[own]
            lora_A = update.lora_A if first else None
            found.append(update._replace(column=begin - tile.start, factor=part, lora_A=lora_A))
    return found


def rows_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    """(rows, in) of this tile, dense; of a quantized matrix until the next."""
    rows = tile.stop - tile.start
    if isinstance(weight, Tensor):
        return weight if rows == weight.shape[0] else weight[tile]
    return weight.rows_into(tile.start, tile.stop, _scratch(rows, weight.shape[1], weight))


def columns_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    """(out, columns) of this tile, dense; likewise."""
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
