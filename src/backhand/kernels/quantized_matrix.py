"""A frozen matrix in the blocks of its file: (out, in), dequantised piece by piece when a product needs it.

It consists of parts whose rows are stacked, each with its own block type, since q/k/v and gate/up have different types
in real files. A part may store its rows in another order (llama's q and k), or its columns (Qwen3.5's delta rule). A
block holds several columns, so that columns are reordered after a piece is dequantised. Nothing is copied: blocks are
views, usually of a mapped file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from backhand.kernels.dequantize import Bytes, block_shape, dequantize, is_compiled
from backhand.kernels.pieces import piece_size

NUMBERS_OF_PART = 6
"""Integers per part in `QuantizedMatrix.table`."""

# Rows that are dequantised at a time if their columns have to be reordered.
_ROWS_IN_ORDER = 512


@dataclass(frozen=True, eq=False)
class StoredRows:
    """One part of the matrix."""

    blocks: Bytes  # (rows, bytes of a row) uint8, contiguous
    type_id: int  # ggml's number of the type
    order: Tensor | None = None  # (out,) int64, the stored row of row 0, 1, …; None for all rows in stored order
    column_order: Tensor | None = None  # (in,) int64, the stored column of column 0, 1, …; None for stored order

    @property
    def row_count(self) -> int:
        """The number of rows of this part."""
        return len(self.blocks) if self.order is None else len(self.order)

    @property
    def columns(self) -> int:
        """The number of values of a row."""
        values, size = block_shape(self.type_id)
        return int(self.blocks.shape[1]) // size * values

    def part(self, start: int, stop: int) -> StoredRows:
        """Return rows start to stop."""
        if self.order is not None:
            return replace(self, order=self.order[start:stop])
        return replace(self, blocks=self.blocks[start:stop])


class QuantizedMatrix:
    """Stacked parts, read as numbers of one dtype.

    Args:
        parts: at least one part, all with rows of the same length.
        dtype: the dtype to which values are rounded.
        device: the device of products; the blocks stay in the processor's memory.

    Attributes:
        shape: (out, in).

    Raises:
        ValueError: rows of different lengths.
    """

    def __init__(self, parts: Sequence[StoredRows], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        columns = {part.columns for part in parts}
        if len(columns) != 1:
            raise ValueError(f"parts with rows of {sorted(columns)} values cannot be stacked")
        self.parts = tuple(parts)
        self._ends = list(accumulate(part.row_count for part in parts))
        self.shape = torch.Size((self._ends[-1], columns.pop()))
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def stored_bytes(self) -> int:
        """The bytes of the blocks."""
        return sum(part.row_count * int(part.blocks.shape[1]) for part in self.parts)

    def rows_into(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write rows start to stop to `out`, (stop - start, in), and return it."""
        for part, first, place in self._between(start, stop):
            _fill(part.part(first, first + place.stop - place.start), out[place], 0)
        return out

    def columns_into(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Write columns start to stop, which are whole blocks, to `out`, (out, stop - start), and return it."""
        for part, _, place in self._between(0, self.shape[0]):
            _fill(part, out[place, : stop - start], start)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows with these ids, (..., in).

        Args:
            ids: (...) integers in [0, out).

        Raises:
            ValueError: for ids outside that range.
        """
        flat = ids.reshape(-1).to("cpu", torch.int64).contiguous()
        if len(flat) and (int(flat.min()) < 0 or int(flat.max()) >= self.shape[0]):
            raise ValueError(f"rows {int(flat.min())} to {int(flat.max())} of a matrix with {self.shape[0]}")
        out = torch.empty(len(flat), self.shape[1], dtype=self.dtype, device=self.device)
        for part, _, place in self._between(0, self.shape[0]):
            if len(self.parts) == 1:
                _fill_listed(part, flat, out)
                break
            inside = ((flat >= place.start) & (flat < place.stop)).nonzero().squeeze(1)
            found = torch.empty(len(inside), self.shape[1], dtype=self.dtype, device=self.device)
            out[inside.to(self.device)] = _fill_listed(part, flat[inside] - place.start, found)
        return out.view(*ids.shape, self.shape[1])

    def split(self, sizes: Sequence[int]) -> tuple[QuantizedMatrix, ...]:
        """Split into matrices with these numbers of rows, which share the blocks.

        Raises:
            ValueError: sizes that do not add up to the rows.
        """
        if sum(sizes) != self.shape[0]:
            raise ValueError(f"{self.shape[0]} rows cannot be split into {list(sizes)}")
        ends = list(accumulate(sizes))
        return tuple(self.part(end - size, end) for end, size in zip(ends, sizes, strict=True))

    def part(self, start: int, stop: int) -> QuantizedMatrix:
        """Return rows start to stop, which share the blocks."""
        parts = [
            part.part(first, first + place.stop - place.start) for part, first, place in self._between(start, stop)
        ]
        return QuantizedMatrix(parts or [self.parts[0].part(0, 0)], self.dtype, self.device)

    def dense(self) -> Tensor:
        """Return the whole matrix in dense form, (out, in)."""
        return self.rows_into(0, self.shape[0], torch.empty(self.shape, dtype=self.dtype, device=self.device))

    @cached_property
    def table(self) -> list[int] | None:
        """The description for kernels that unpack the blocks themselves; valid while the matrix exists.

        For each part: ggml's type, address, bytes of a row, stored rows, address of the order or 0, and rows. None if
        no kernel can unpack it, because of columns in another order or a type that is not compiled.
        """
        numbers: list[int] = []
        for part in self.parts:
            blocks, order = part.blocks, part.order
            if part.column_order is not None or not is_compiled(part.type_id) or not blocks.flags.c_contiguous:
                return None
            if order is not None and (order.dtype != torch.int64 or not order.is_contiguous() or not order.is_cpu):
                return None
            numbers += (part.type_id, blocks.ctypes.data, blocks.shape[1], len(blocks))
            numbers += (0 if order is None or not len(order) else order.data_ptr(), part.row_count)
        return numbers

    def _between(self, start: int, stop: int) -> Iterator[tuple[StoredRows, int, slice]]:
        """Yield (part, its first row, the range of its rows in the result) for all parts of rows start to stop."""
        first = bisect_right(self._ends, start)
        above = self._ends[first - 1] if first else 0
        for part in self.parts[first:]:
            if above >= stop:
                break
            low, high = max(start, above), min(stop, above + part.row_count)
            if low < high:
                yield part, low - above, slice(low - start, high - start)
            above += part.row_count


def dequantized_rows(part: StoredRows, out: Tensor, ids: Tensor | None) -> Tensor:
    """Write the part's stored rows with these indices, or all for None, to `out` of shape (rows, in) and return it."""
    if part.column_order is None:
        return dequantize(part.blocks, part.type_id, out, row_ids=ids)
    count, step = len(out), piece_size(_ROWS_IN_ORDER)
    stored = torch.empty(min(count, step), part.columns, dtype=out.dtype, device=out.device)
    for start in range(0, count, step):
        stop = min(start + step, count)
        if ids is None:
            dequantize(part.blocks[start:stop], part.type_id, stored[: stop - start])
        else:
            dequantize(part.blocks, part.type_id, stored[: stop - start], row_ids=ids[start:stop])
        out[start:stop] = stored[: stop - start].index_select(1, part.column_order.to(out.device))
    return out


def _fill(part: StoredRows, out: Tensor, first_value: int) -> None:
    if part.column_order is None:
        dequantize(part.blocks, part.type_id, out, row_ids=part.order, first_value=first_value)
        return
    wanted = part.column_order[first_value : first_value + out.shape[1]]
    dequantized_rows(replace(part, column_order=wanted), out, part.order)


def _fill_listed(part: StoredRows, ids: Tensor, out: Tensor) -> Tensor:
    stored = ids if part.order is None else part.order[ids]
    return dequantized_rows(part, out, stored)
