"""The KV cache: keys and values of every token seen so far, one row a sequence, so that a new token costs one position.

Keys and values lie in pages of a few tokens [arXiv:2309.06180, §4.1], and a row is a list of pages. Rows that begin
alike hold the same pages: what several answers have in common, their prompt, is there once. A row that goes on behind
such a beginning has the page in which they part copied; a page that no row holds any more is free for others. The first
page is no row's: zeros, where the tokens of a shorter row would be.

A layer whose mixer is not attention has no keys there, but a state of fixed size for each row: it belongs to the row's
length as it is, and none shorter can be had from it, so that such a row is emptied where it would be cut.

Rows have their own lengths. Rows in use are always the first ones: a row that is done is overwritten by the last row in
use (`remove`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from backhand.nn.decoder.block import MIXERS
from backhand.nn.decoder.family import DecoderConfig

# Tokens of a page: what a row wastes at its end, and what a copy of a beginning's last page costs, at most.
PAGE = 16
Where = Tensor | slice
"""Places of several rows, (rows, tokens) int64 on the cache's device, or those of one row that are consecutive."""


class KVCache:
    """Keys and values of each layer, (key/value heads, places, head_dim), keys already normed and rotated.

    A layer with another mixer has none, of no heads, and its states instead; one that uses another layer's has none.

    Args:
        config: number of layers and head sizes.
        rows: how many sequences fit at once.
        capacity: tokens for which there is room at first, of all rows together; it grows when needed.

    Attributes:
        rows: sequences that fit at once.
        lengths: tokens in each row in use; their number is the number of rows in use.
        places: where each row's tokens lie, (rows, tokens of the longest or more) int64; 0 behind a row's end.
        states: of each layer, what its mixer keeps for every row, see `nn.decoder.mixer`; nothing of attention.
        tokens: the ids of each row in use, perhaps with some that are just being computed behind them.
        sides: for which lengths of document each row's keys were rotated, see `IncrementalDecoder`.
    """

    def __init__(
        self, config: DecoderConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        pages = 1 + _pages(capacity)
        shapes = []
        for layer in config.layers:
            sized, keeps = config.at(layer), MIXERS[layer.mixer].qkv is not None and layer.kv_source is None
            shapes.append((sized.num_key_value_heads if keeps else 0, pages * PAGE, sized.head_dim))
        # Zeros, since what stands at no token's place is masked, not left out, and 0 times a stray NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        makers = [MIXERS[layer.mixer].states for layer in config.layers]
        self.states = [() if make is None else make(config, rows, dtype, device) for make in makers]
        self.rows = rows
        self.places = torch.zeros(rows, 0, dtype=torch.int64)
        self.lengths: list[int] = []
        self.tokens: list[list[int]] = []
        self.sides: list[int] = []
        # For which length of each row its states hold: None while they go on, and so where that was interrupted.
        self._states_at: list[int | None] = []
        # Each row's pages, how many rows hold each, and which are free, the next one last.
        self._pages: list[list[int]] = []
        self._holders = [0] * pages
        self._free = list(range(pages - 1, 0, -1))

    @property
    def rows_in_use(self) -> int:
        """Sequences in the cache: rows 0 … rows_in_use - 1."""
        return len(self.lengths)

    @property
    def pages_in_use(self) -> int:
        """Pages that rows hold, those of several once."""
        return len(self._holders) - 1 - len(self._free)

    def add_rows(self, count: int) -> range:
        """Take `count` empty rows into use and return their numbers.

        Raises:
            ValueError: there are not as many left.
        """
        first = self.rows_in_use
        if first + count > self.rows:
            raise ValueError(f"{count} rows do not fit: {first} of {self.rows} are in use")
        self.lengths += [0] * count
        self.tokens += [[] for _ in range(count)]
        self.sides += [0] * count
        self._states_at += [0] * count
        self._pages += [[] for _ in range(count)]
        for state in self._all_states():
            state[first : first + count] = 0
        return range(first, first + count)

    def remove(self, row: int) -> int | None:
        """Drop a row; the last row in use takes its number. Returns the number that one had, None if it was this."""
        last = self.rows_in_use - 1
        self._let_go(row, 0)
        of_rows: tuple[list[Any], ...] = self.lengths, self.tokens, self.sides, self._states_at, self._pages
        of_last = [each.pop() for each in of_rows]
        if row == last:
            return None
        for state in self._all_states():
            state[row] = state[last]
        for each, value in zip(of_rows, of_last, strict=True):
            each[row] = value
        self.places[row] = self.places[last]
        self.places[last] = 0
        return last

    def truncate(self, row: int, length: int) -> int:
        """Forget what the row holds behind its first `length` tokens, and all of it where a state would be left over.

        Returns:
            how many tokens it holds then.
        """
        length = min(length, self.lengths[row])
        if any(self.states) and self._states_at[row] != length:
            length = self._states_at[row] = 0
            for state in self._all_states():
                state[row] = 0
        self.lengths[row] = length
        self._let_go(row, length)
        del self.tokens[row][length:]
        return length

    def go_on(self, rows: Iterable[int]) -> None:
        """The states of these rows are about to change; until `arrive`, they hold for no length.

        Raises:
            ValueError: a row has no state to go on from, since that was interrupted: `truncate` it first.
        """
        for row in rows:
            if any(self.states) and self._states_at[row] != self.lengths[row]:
                raise ValueError(f"row {row} was left in the middle: truncate it first")
            self._states_at[row] = None

    def arrive(self, rows: Iterable[int], tokens: Iterable[int]) -> None:
        """So many tokens have come to each of these rows, and all layers have them."""
        for row, count in zip(rows, tokens, strict=True):
            self.lengths[row] += count
            self._states_at[row] = self.lengths[row]

    def _all_states(self) -> Iterator[Tensor]:
        """The states of all layers, (rows, …) each."""
        return (state for states in self.states for state in states)

    def copy_row(self, origin: KVCache, row: int, targets: range) -> None:
        """Give empty neighbouring rows the content of a row: a prefix that they share is computed once, and kept once.

        Args:
            origin: this cache, or another one, from which it is copied, once.
            row: of the origin.
            targets: rows of this cache without tokens.
        """
        length = origin.lengths[row]
        if origin is self:
            first, others = row, targets
        else:
            first, others = targets[0], targets[1:]
            self.reserve([first], [length])
            where, there = self.places[first, :length], origin.places[row, :length]
            for layer, (keys, values) in enumerate(zip(origin.keys, origin.values, strict=True)):
                self.write(layer, where, *(part[:, there].transpose(0, 1) for part in (keys, values)))
        for target in others:
            self._let_go(target, 0)
            # Not what an interrupted step has reserved behind the row's end: that would be written to by both.
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
        self.sides[span] = [origin.sides[row]] * len(targets)

    def reserve(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Make room for so many more tokens in each of these rows: their places, and pages that are the row's alone."""
        longest = max(self.lengths[row] + more for row, more in zip(rows, tokens, strict=True))
        if longest > self.places.shape[1]:
            old = self.places
            self.places = old.new_zeros(self.rows, _pages(longest * 5 // 4) * PAGE)
            self.places[:, : old.shape[1]] = old
        needed = sum(
            self._parts(row) + max(0, _pages(self.lengths[row] + more) - len(self._pages[row]))
            for row, more in zip(rows, tokens, strict=True)
        )
        self._grow(needed - len(self._free))
        copied: list[tuple[int, int]] = []
        where: list[tuple[int, int, int]] = []
        for row, more in zip(rows, tokens, strict=True):
            pages, begin, end = self._pages[row], self.lengths[row], self.lengths[row] + more
            if self._parts(row):
                last = begin // PAGE
                copied.append((pages[last], self._taken()))
                self._holders[pages[last]] -= 1
                pages[last] = copied[-1][1]
                begin = last * PAGE
            pages += [self._taken() for _ in range(_pages(end) - len(pages))]
            where += [(row, token, pages[token // PAGE] * PAGE + token % PAGE) for token in range(begin, end)]
        if copied:
            origins, copies = map(list, zip(*copied, strict=True))
            for buffer in (*self.keys, *self.values):
                by_page = buffer.view(buffer.shape[0], len(self._holders), PAGE, buffer.shape[2])
                by_page[:, copies] = by_page[:, origins]
        if where:
            of_row, of_token, place = torch.tensor(where).T
            self.places[of_row, of_token] = place

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (tokens, key/value heads, head_dim), at these places, (tokens,); `lengths` stay."""
        places = places.to(keys.device)
        self.keys[layer][:, places] = keys.transpose(0, 1)
        self.values[layer][:, places] = values.transpose(0, 1)

    def where(self, places: Tensor) -> Where:
        """These places, (rows, tokens), as `read` takes them: of a row whose tokens lie behind one another a slice."""
        if len(places) == 1:
            first, count = int(places[0, 0]), places.shape[1]
            if torch.equal(places[0], torch.arange(first, first + count)):
                return slice(first, first + count)
        return places.to(self.keys[0].device)

    def read(self, layer: int, where: Where) -> tuple[Tensor, Tensor]:
        """Keys and values there: (rows, key/value heads, tokens, head_dim) each, a view of a slice and else a copy."""
        buffers = self.keys[layer], self.values[layer]
        if isinstance(where, slice):
            keys, values = (buffer[:, where].unsqueeze(0) for buffer in buffers)
        else:
            flat, shape = where.flatten(), tuple(where.shape)  # by `index_select`, four times as fast as an index
            keys, values = (buffer.index_select(1, flat).unflatten(1, shape).transpose(0, 1) for buffer in buffers)
        return keys, values

    def _parts(self, row: int) -> bool:
        """Whether the row's next token would come into a page that others hold too."""
        last, inside = divmod(self.lengths[row], PAGE)
        return inside > 0 and self._holders[self._pages[row][last]] > 1

    def _taken(self) -> int:
        """A free page, held from now on by one row."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _let_go(self, row: int, length: int) -> None:
        """Forget where the row's tokens behind so many lie, and free the pages that no other row holds."""
        pages = self._pages[row]
        for page in reversed(pages[_pages(length) :]):  # the first is taken next: a row that goes on stays in one piece
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        del pages[_pages(length) :]
        self.places[row, length:] = 0

    def _grow(self, missing: int) -> None:
        """Add at least so many free pages; of one layer at a time keys are there twice."""
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
    """How many pages so many tokens of a row take."""
    return -(-tokens // PAGE)


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one token of one row takes: keys and values of all layers together."""
    cache = KVCache(config, 1, 0, dtype=dtype, device="meta")
    return sum(part.nbytes for part in (*cache.keys, *cache.values)) // PAGE


def state_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one row of any length takes: states of all layers together."""
    cache = KVCache(config, 1, 0, dtype=dtype, device="meta")
    return sum(part.nbytes for part in cache._all_states())
