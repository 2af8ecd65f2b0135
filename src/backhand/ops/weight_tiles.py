"""Tiles of a frozen matrix in dense form, so that a quantized matrix is never in memory as a whole.

W is cut into tiles of at most TILE_BYTES in the compute dtype. For a library's products (`frozen_matrix`) a dense
matrix is cut in the same way, although it need not be. How a library adds up a product depends on the product's width:
in oneDNN with AMX some sums in ten thousand differ in the last bit. Equal tiles guarantee that

    the same calls on the same numbers give dense and quantized the same bits, on every processor.

    forward     y[:, t] = x W[t, :]ᵀ           t a range of rows of W, which are outputs
    backward    d_x[:, t] = G W[:, t]          t a range of columns of W, which are inputs
                d_x = Σ_t G[:, t] W[t, :]      t a range of rows of W, which are outputs

The columns of d_x are independent, while a sum over row tiles is rounded to the compute dtype once per tile. That would
cost bfloat16 its precision, but costs float32 nothing, since a library's sums are in float32 anyway. In float32, W is
therefore cut into rows if it has more rows than columns and its column tiles would be as narrow as possible, like those
of a head. (SmolLM2's 49,152 × 576 with 256 rows of G takes 1.17 times the whole product in columns, and 1.06 in rows.)
If one or a few wide column tiles suffice, these are faster: 17,920 × 1,536 takes 611 ms in columns and 631 in rows;
9,728 × 896 with 64 rows of G, a single tile, takes 20.7 and 27.9. Tiles begin at multiples of 64 rows and of 256
columns, which are multiples of every block.

Sizes. The library works best on wide products. Column tiles are as large as allowed, 64 MB, since narrow ones cost more
than they save. Row tiles have 16 MB but at least 2,048 rows. This many rows are about as fast as all of them, and what
is unpacked is multiplied before it has left the caches. A head of 151,936 × 1,536 with 512 rows of x takes 175 ms with
AMX in tiles of 64 MB, and 146 in these; the dense head takes 136 and 143.
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
"""A matrix (out, in); both types have `shape`, `dtype` and `device`."""

TILE_BYTES = 64 << 20
ROWS_BYTES, FEWEST_ROWS = 16 << 20, 2048
ROW_EDGE, COLUMN_EDGE = 64, 256
TILES = ContextVar("tile_bytes", default=TILE_BYTES)


def frozen_split(weight: FrozenMatrix, sizes: Sequence[int]) -> tuple[FrozenMatrix, ...]:
    """Split a stacked weight into matrices with these numbers of rows, without copying."""
    return tuple(weight.split(list(sizes))) if isinstance(weight, Tensor) else weight.split(sizes)


def frozen_part(weight: FrozenMatrix, start: int, stop: int) -> FrozenMatrix:
    """Return rows start to stop as a matrix, without copying."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.part(start, stop)


def frozen_dense(weight: FrozenMatrix) -> Tensor:
    """Return the whole matrix as a dense tensor, which is `weight` itself if that is dense."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def frozen_tiles(weight: FrozenMatrix) -> Iterator[tuple[slice, Tensor]]:
    """Yield each range of rows with its dense form; a quantized one is valid until the next tile or product."""
    for tile in row_tiles(weight):
        yield tile, rows_of(weight, tile)


def row_tiles(weight: FrozenMatrix) -> list[slice]:
    """Return ranges of rows of about equal size, at most ROWS_BYTES or FEWEST_ROWS; a single empty one without rows."""
    outputs, inputs = weight.shape
    row_bytes = inputs * weight.dtype.itemsize
    most_bytes = min(_most_bytes(), max(ROWS_BYTES, FEWEST_ROWS * row_bytes))
    return _tiles(outputs, row_bytes, ROW_EDGE, most_bytes)


def column_tiles(weight: FrozenMatrix) -> list[slice]:
    """Return ranges of columns of about equal size, at most TILE_BYTES; a single empty one without columns."""
    outputs, inputs = weight.shape
    return _tiles(inputs, outputs * weight.dtype.itemsize, COLUMN_EDGE, _most_bytes())


def _most_bytes() -> int:
    """Return the most bytes of a tile."""
    # torch.compile traces no context variable.
    return TILE_BYTES if torch.compiler.is_compiling() else TILES.get()


@contextmanager
def tiles_of(tile_bytes: int) -> Iterator[None]:
    """Inside, cut matrices into tiles of at most `tile_bytes`, for proofs and measurements."""
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
    """Return two booleans: True if a dense matrix is a single tile of rows, and True if of columns."""
    rows, columns = shape
    row_bytes = columns * dtype.itemsize
    row_tile_bytes = min(most_bytes, max(ROWS_BYTES, FEWEST_ROWS * row_bytes))
    by_rows = _tiles(rows, row_bytes, ROW_EDGE, row_tile_bytes)
    return len(by_rows) == 1, len(_tiles(columns, rows * dtype.itemsize, COLUMN_EDGE, most_bytes)) == 1


def sums_over_rows(weight: FrozenMatrix) -> bool:
    """Return True if a library's G W is computed as a sum over row tiles of W, False if by column tiles."""
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
    """Compute `frozen_linear` by one call of `multiply` per tile of rows, with the tile's dense weight."""
    tiles = row_tiles(weight)
    if len(tiles) == 1:
        return multiply(x, rows_of(weight, tiles[0]), bias, residual, out, updates)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    for tile in tiles:
        part_bias, residual_part = None if bias is None else bias[tile], None if residual is None else residual[:, tile]
        multiply(x, rows_of(weight, tile), part_bias, residual_part, y[:, tile], updates_of(updates, tile))
    return y


def tiled_input_gradient(
    multiply: Callable[..., Tensor],
    d_y: Tensor,
    weight: FrozenMatrix,
    out: Tensor | None,
    updates: Sequence[LowRankUpdate],
) -> Tensor:
    """Compute `frozen_input_gradient` by one call of `multiply` per tile of columns, with the tile's dense weight."""
    tiles = column_tiles(weight)
    if len(tiles) == 1:
        return multiply(d_y, columns_of(weight, tiles[0]), out, updates)
    d_x = torch.empty(d_y.shape[0], weight.shape[1], dtype=d_y.dtype, device=d_y.device) if out is None else out
    for tile in tiles:
        multiply(d_y, columns_of(weight, tile), d_x[:, tile], updates_of(updates, tile))
    return d_x


def summed_over_rows(d_y: Tensor, weight: FrozenMatrix, out: Tensor | None) -> Tensor:
    """Compute G W, (rows, in), as the sum over tiles of rows."""
    first, *others = row_tiles(weight)
    d_x = torch.mm(d_y[:, first], rows_of(weight, first), out=out)
    for tile in others:
        torch.addmm(d_x, d_y[:, tile], rows_of(weight, tile), out=d_x)
    return d_x


def updates_of(updates: Sequence[LowRankUpdate], tile: slice) -> list[LowRankUpdate]:
    """Return the parts of the updates in these columns of the result; the first tile computes the h of all updates."""
    parts, first = [], tile.start == 0
    for update in updates:
        begin = min(max(update.column, tile.start), tile.stop)
        end = max(begin, min(update.column + update.outputs, tile.stop))
        if begin < end or (first and update.lora_A is not None):
            own = slice(begin - update.column, end - update.column) if begin < end else slice(0, 0)
            part = update.factor[:, own] if update.transposed else update.factor[own]
            lora_A = update.lora_A if first else None
            parts.append(update._replace(column=begin - tile.start, factor=part, lora_A=lora_A))
    return parts


def rows_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    """Return the tile's rows in dense form, (rows, in); for a quantized matrix they are valid until the next call."""
    rows = tile.stop - tile.start
    if isinstance(weight, Tensor):
        return weight if rows == weight.shape[0] else weight[tile]
    return weight.rows_into(tile.start, tile.stop, _scratch(rows, weight.shape[1], weight))


def columns_of(weight: FrozenMatrix, tile: slice) -> Tensor:
    """Return the tile's columns in dense form, (out, columns); for a quantized matrix valid until the next call."""
    columns = tile.stop - tile.start
    if isinstance(weight, Tensor):
        return weight if columns == weight.shape[1] else weight[:, tile]
    return weight.columns_into(tile.start, tile.stop, _scratch(weight.shape[0], columns, weight))


class _Scratch(threading.local):
    """One buffer per dtype, device and thread, reused from product to product."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_SCRATCH = _Scratch()


def _scratch(rows: int, columns: int, like: FrozenMatrix) -> Tensor:
    """Return a buffer (rows, columns) with undefined contents; the previous contents are lost."""
    key, elements = (like.dtype, like.device), rows * columns
    buffer = _SCRATCH.buffers.get(key)
    if buffer is None or buffer.numel() < elements:
        _SCRATCH.buffers.pop(key, None)
        buffer = _SCRATCH.buffers[key] = _elements(elements, like)
    return buffer[:elements].view(rows, columns)


def _elements(count: int, like: FrozenMatrix) -> Tensor:
    if like.device.type == "cpu":
        return in_large_pages(count, like.dtype)
    return torch.empty(count, dtype=like.dtype, device=like.device)


def drop_scratch() -> None:
    """Free this thread's tile buffers and workspace."""
    _SCRATCH.buffers.clear()
    drop_workspace()
