"""The KV cache: keys and values of every token so far, so that a new token costs one position.

Keys and values are stored in pages of a few tokens [arXiv:2309.06180, §4.1], and a row is a list of pages. Rows with a
common prefix share pages: a prompt with several answers is stored once. When a row continues after a shared prefix, the
page in which the rows diverge is copied. A page that no row uses is free. Page 0 belongs to no row: it contains zeros
for the masked positions after the end of shorter rows.

A layer whose mixer is not attention has no keys. It has a state of fixed size per row instead, which belongs to the
current length of the row. The state of a shorter row cannot be computed from it, so a row that would be truncated is
emptied instead.

Rows have different lengths. The rows in use are always the first ones: when a row is removed, the last row in use takes
its number (`remove`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from backhand.nn.decoder.block import MIXERS
from backhand.nn.families.family import DecoderConfig

# Tokens per page. A row wastes at most this many at its end, and copying a diverging page costs at most this many.
PAGE = 16
Where = Tensor | slice
"""Positions of several rows in the cache, (rows, tokens) int64 on its device, or the slice of one contiguous row."""


class KVCache:
    """Keys and values of each layer, (key/value heads, places, head_dim). Keys are normalized and rotated.

    A layer with another mixer has states instead, and its keys have zero heads. So do those of a layer that uses
    another layer's keys.

    Args:
        config: number of layers and head sizes.
        rows: number of sequences that fit at once.
        capacity: initial number of tokens of all rows together. The cache grows if necessary.

    Attributes:
        rows: number of sequences that fit at once.
        lengths: tokens in each row in use.
        places: positions of each row's tokens in the cache, (rows, tokens of the longest row or more) int64. 0 after
            the end of a row.
        states: for each layer, its mixer's states of every row, see `nn.decoder.mixer`. Empty for attention.
        tokens: ids of each row in use, which may already contain tokens of the step in progress.
        rope_regimes: for each row, the index of the length range for which its keys were rotated, see
            `IncrementalDecoder`.
    """

    def __init__(
        self, config: DecoderConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        pages = 1 + _pages(capacity)
        shapes = []
        for layer in config.layers:
            sized, keeps = config.at(layer), MIXERS[layer.mixer].qkv is not None and layer.kv_source is None
            shapes.append((sized.num_key_value_heads if keeps else 0, pages * PAGE, sized.head_dim))
        # Zeros, because masked positions are multiplied by 0, and 0 times a stray NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        makers = [MIXERS[layer.mixer].states for layer in config.layers]
        self.states = [() if make is None else make(config, rows, dtype, device) for make in makers]
        self.rows = rows
        self.places = torch.zeros(rows, 0, dtype=torch.int64)
        self.lengths: list[int] = []
        self.tokens: list[list[int]] = []
        self.rope_regimes: list[int] = []
        # Length of each row for which its states are valid; None during a step, and after an interrupted one.
        self._states_at: list[int | None] = []
        # Pages of each row, number of rows that use each page, and free pages, of which the last is allocated next.
        self._pages: list[list[int]] = []
        self._holders = [0] * pages
        self._free = list(range(pages - 1, 0, -1))

    @property
    def rows_in_use(self) -> int:
        """Number of sequences in the cache: rows 0 … rows_in_use - 1."""
        return len(self.lengths)

    @property
    def pages_in_use(self) -> int:
        """Number of pages that rows use. Shared pages count once."""
        return len(self._holders) - 1 - len(self._free)

    def add_rows(self, count: int) -> range:
        """Take `count` empty rows into use and return their numbers.

        Raises:
            ValueError: fewer rows are left.
        """
        first = self.rows_in_use
        if first + count > self.rows:
            raise ValueError(f"{count} rows do not fit: {first} of {self.rows} are in use")
        self.lengths += [0] * count
        self.tokens += [[] for _ in range(count)]
        self.rope_regimes += [0] * count
        self._states_at += [0] * count
        self._pages += [[] for _ in range(count)]
        for state in self._all_states():
            state[first : first + count] = 0
        return range(first, first + count)

    def remove(self, row: int) -> int | None:
        """Remove a row.

        The last row in use takes its number. Return its old number, or None if it was the removed row.
        """
        last = self.rows_in_use - 1
        self._release_pages(row, 0)
        row_lists: tuple[list[Any], ...] = self.lengths, self.tokens, self.rope_regimes, self._states_at, self._pages
        last_values = [each.pop() for each in row_lists]
        if row == last:
            return None
        for state in self._all_states():
            state[row] = state[last]
        for each, value in zip(row_lists, last_values, strict=True):
            each[row] = value
        self.places[row] = self.places[last]
        self.places[last] = 0
        return last

    def truncate(self, row: int, length: int) -> int:
        """Drop all but the first `length` tokens of a row, or all of them if the mixers' states are of another length.

        Returns:
            the number of tokens in the row afterwards.
        """
        length = min(length, self.lengths[row])
        if any(self.states) and self._states_at[row] != length:
            length = self._states_at[row] = 0
            for state in self._all_states():
                state[row] = 0
        self.lengths[row] = length
        self._release_pages(row, length)
        del self.tokens[row][length:]
        return length

    def begin_append(self, rows: Iterable[int]) -> None:
        """Mark the states of these rows as changing. Until `finish_append`, they are valid for no length.

        Raises:
            ValueError: an earlier append to the row was interrupted. `truncate` the row first.
        """
        for row in rows:
            if any(self.states) and self._states_at[row] != self.lengths[row]:
                raise ValueError(f"row {row} was interrupted during an append: truncate it first")
            self._states_at[row] = None

    def finish_append(self, rows: Iterable[int], tokens: Iterable[int]) -> None:
        """Record that all layers contain these numbers of new tokens for these rows."""
        for row, count in zip(rows, tokens, strict=True):
            self.lengths[row] += count
            self._states_at[row] = self.lengths[row]

    def _all_states(self) -> Iterator[Tensor]:
        """Return the states of all layers, (rows, …) each."""
        return (state for states in self.states for state in states)

    def copy_row(self, origin: KVCache, row: int, targets: range) -> None:
        """Copy a row into empty neighbouring rows. Keys and values are shared, and stored once.

        Args:
            origin: this cache, or another one, from which the row is copied once.
            row: number of the row in `origin`.
            targets: rows of this cache without tokens.
        """
        length = origin.lengths[row]
        if origin is self:
            first, others = row, targets
        else:
            first, others = targets[0], targets[1:]
            self.reserve([first], [length])
            places, origin_places = self.places[first, :length], origin.places[row, :length]
            for layer, (keys, values) in enumerate(zip(origin.keys, origin.values, strict=True)):
                self.write(layer, places, *(part[:, origin_places].transpose(0, 1) for part in (keys, values)))
        for target in others:
            self._release_pages(target, 0)
            # Without pages that an interrupted step has reserved after the end: both rows would write to them.
            self._pages[target] = self._pages[first][: _pages(length)]
            for page in self._pages[target]:
                self._holders[page] += 1
            self.places[target, :length] = self.places[first, :length]
        span = slice(targets.start, targets.stop)
        for mine, theirs in zip(self._all_states(), origin._all_states(), strict=True):
            mine[span] = theirs[row]
        self.lengths[span] = [length] * len(targets)
        self._states_at[span] = [origin._states_at[row]] * len(targets)
        self.tokens[span] = [list(origin.tokens[row]) for _ in targets]
        self.rope_regimes[span] = [origin.rope_regimes[row]] * len(targets)

    def reserve(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Allocate room for these numbers of new tokens, in pages that no other row uses."""
        longest = max(self.lengths[row] + more for row, more in zip(rows, tokens, strict=True))
        if longest > self.places.shape[1]:
            old = self.places
            self.places = old.new_zeros(self.rows, _pages(longest * 5 // 4) * PAGE)
            self.places[:, : old.shape[1]] = old
        needed = sum(
            self._needs_copy(row) + max(0, _pages(self.lengths[row] + more) - len(self._pages[row]))
            for row, more in zip(rows, tokens, strict=True)
        )
        self._grow(needed - len(self._free))
        copied: list[tuple[int, int]] = []
        where: list[tuple[int, int, int]] = []
        for row, more in zip(rows, tokens, strict=True):
            pages, begin, end = self._pages[row], self.lengths[row], self.lengths[row] + more
            if self._needs_copy(row):
                last = begin // PAGE
                copied.append((pages[last], self._allocate_page()))
                self._holders[pages[last]] -= 1
                pages[last] = copied[-1][1]
                begin = last * PAGE
            pages += [self._allocate_page() for _ in range(_pages(end) - len(pages))]
            where += [(row, token, pages[token // PAGE] * PAGE + token % PAGE) for token in range(begin, end)]
        if copied:
            origins, copies = map(list, zip(*copied, strict=True))
            for buffer in (*self.keys, *self.values):
                by_page = buffer.view(buffer.shape[0], len(self._holders), PAGE, buffer.shape[2])
                by_page[:, copies] = by_page[:, origins]
        if where:
            row_index, token_index, place = torch.tensor(where).T
            self.places[row_index, token_index] = place

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, (tokens, key/value heads, head_dim), to these places, (tokens,).

        `lengths` is not changed.
        """
        places = places.to(keys.device)
        self.keys[layer][:, places] = keys.transpose(0, 1)
        self.values[layer][:, places] = values.transpose(0, 1)

    def where(self, places: Tensor) -> Where:
        """Return these places, (rows, tokens), in the form for `read`: a slice for one row with contiguous places."""
        if len(places) == 1:
            first, count = int(places[0, 0]), places.shape[1]
            if torch.equal(places[0], torch.arange(first, first + count)):
                return slice(first, first + count)
        return places.to(self.keys[0].device)

    def read(self, layer: int, where: Where) -> tuple[Tensor, Tensor]:
        """Return keys and values, (rows, key/value heads, tokens, head_dim) each: views for a slice, else copies."""
        buffers = self.keys[layer], self.values[layer]
        if isinstance(where, slice):
            keys, values = (buffer[:, where].unsqueeze(0) for buffer in buffers)
        else:
            flat, shape = where.flatten(), tuple(where.shape)  # `index_select` is four times as fast as indexing
            keys, values = (buffer.index_select(1, flat).unflatten(1, shape).transpose(0, 1) for buffer in buffers)
        return keys, values

    def _needs_copy(self, row: int) -> bool:
        """Return True if the row's next token falls into a page that other rows use too."""
        last, inside = divmod(self.lengths[row], PAGE)
        return inside > 0 and self._holders[self._pages[row][last]] > 1

    def _allocate_page(self) -> int:
        """Take a free page for one row."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release_pages(self, row: int, length: int) -> None:
        """Drop the places of the row's tokens after the first `length`, and free pages that no other row uses."""
        pages = self._pages[row]
        # the first page is allocated next, so a row that continues stays contiguous
        for page in reversed(pages[_pages(length) :]):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        del pages[_pages(length) :]
        self.places[row, length:] = 0

    def _grow(self, missing: int) -> None:
        """Add at least `missing` free pages. One layer at a time is stored twice meanwhile."""
        if missing <= 0:
            return
        before = len(self._holders)
        after = before + max(missing, before // 8)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = old.new_zeros(old.shape[0], after * PAGE, old.shape[2])
                buffers[layer][:, : old.shape[1]] = old
        self._holders += [0] * (after - before)
        self._free[:0] = range(after - 1, before - 1, -1)


def _pages(tokens: int) -> int:
    """Return the number of pages of a row with this many tokens."""
    return -(-tokens // PAGE)


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token in one row: keys and values of all layers."""
    cache = KVCache(config, 1, 0, dtype=dtype, device="meta")
    return sum(part.nbytes for part in (*cache.keys, *cache.values)) // PAGE


def state_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the states of one row, in all layers."""
    cache = KVCache(config, 1, 0, dtype=dtype, device="meta")
    return sum(part.nbytes for part in cache._all_states())
