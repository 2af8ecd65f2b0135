"""The KV cache: keys and values of every token seen so far, one row a sequence, so that a new token costs one position.

A layer whose mixer is not attention has no keys there, but a state of fixed size for each row: it belongs to the row's
length as it is, and none shorter can be had from it, so that such a row is emptied where it would be cut.

Rows have their own lengths; what lies behind a row's length is room, not content. Rows in use are always the first
ones: a row that is done is overwritten by the last row in use (`remove`), so that every product runs over a
contiguous part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from backhand.nn.decoder.block import MIXERS
from backhand.nn.decoder.family import DecoderConfig

# Room is added in steps of this many tokens at least.
GROWTH_TOKENS = 64


class KVCache:
    """Keys and values of each layer, (rows, key/value heads, capacity, head_dim), keys already normed and rotated.

    A layer with another mixer has none, of no heads, and its states instead; one that uses another layer's has none.

    Args:
        config: number of layers and head sizes.
        rows: how many sequences fit at once.
        capacity: tokens of room a row has at first; it grows when needed.

    Attributes:
        lengths: tokens in each row in use; their number is the number of rows in use.
        states: of each layer, what its mixer keeps for every row, see `nn.decoder.mixer`; nothing of attention.
        tokens: the ids of each row in use, perhaps with some that are just being computed behind them.
        sides: for which lengths of document each row's keys were rotated, see `IncrementalDecoder`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        rows: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros, since the room behind a shorter row is masked, not left out, and 0 times a stray NaN would be NaN.
        shapes = []
        for layer in config.layers:
            sized, keeps = config.at(layer), MIXERS[layer.mixer].attending is not None and layer.keys_of is None
            shapes.append((rows, sized.num_key_value_heads if keeps else 0, capacity, sized.head_dim))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        makers = [MIXERS[layer.mixer].states for layer in config.layers]
        self.states = [() if make is None else make(config, rows, dtype, device) for make in makers]
        self.lengths: list[int] = []
        self.tokens: list[list[int]] = []
        self.sides: list[int] = []
        # For which length of each row its states hold: None while they go on, and so where that was interrupted.
        self._states_at: list[int | None] = []

    @property
    def rows(self) -> int:
        """Sequences that fit at once."""
        return self.keys[0].shape[0]

    @property
    def rows_in_use(self) -> int:
        """Sequences in the cache: rows 0 … rows_in_use - 1."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens that fit into a row without growing."""
        return self.keys[0].shape[2]

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
        for state in self._all_states():
            state[first : first + count] = 0
        return range(first, first + count)

    def remove(self, row: int) -> int | None:
        """Drop a row; the last row in use takes its number. Returns the number that one had, None if it was this."""
        last = self.rows_in_use - 1
        length, tokens, side, at = self.lengths.pop(), self.tokens.pop(), self.sides.pop(), self._states_at.pop()
        if row == last:
            return None
        for state in self._all_states():
            state[row] = state[last]
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                buffer[row, :, :length] = buffer[last, :, :length]
        self.lengths[row], self.tokens[row], self.sides[row], self._states_at[row] = length, tokens, side, at
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
        """Give neighbouring rows the content of a row of another cache: a prefix that they share is computed once."""
        length = origin.lengths[row]
        self.reserve(length)
        span = slice(targets.start, targets.stop)
        for mine, theirs in ((self.keys, origin.keys), (self.values, origin.values)):
            for target, source in zip(mine, theirs, strict=True):
                target[span, :, :length] = source[row, :, :length]
        for mine_too, theirs_too in zip(self._all_states(), origin._all_states(), strict=True):
            mine_too[span] = theirs_too[row]
        self.lengths[span] = [length] * len(targets)
        self._states_at[span] = [origin._states_at[row]] * len(targets)
        self.tokens[span] = [list(origin.tokens[row]) for _ in targets]
        self.sides[span] = [origin.sides[row]] * len(targets)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in every row; what is in the rows in use is kept."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens, self.capacity + max(GROWTH_TOKENS, self.capacity // 2))
        used, length = self.rows_in_use, max(self.lengths, default=0)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros(old.shape[0], old.shape[1], capacity, old.shape[3])
                new[:used, :, :length] = old[:used, :, :length]
                buffers[layer] = new

    def write(self, layer: int, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values, (tokens, key/value heads, head_dim), at positions start … of a row; `lengths` stay."""
        span = slice(start, start + keys.shape[0])
        self.keys[layer][row, :, span] = keys.transpose(0, 1)
        self.values[layer][row, :, span] = values.transpose(0, 1)

    def write_next(self, layer: int, positions: Tensor | int, keys: Tensor, values: Tensor) -> None:
        """Put one token a row in use, (rows in use, key/value heads, head_dim), at its position; `lengths` stay.

        Args:
            layer: whose keys and values these are.
            positions: (rows in use,), or one number where all rows are equally long, which is faster.
            keys, values: the new tokens'.
        """
        if isinstance(positions, int):
            self.keys[layer][: keys.shape[0], :, positions] = keys
            self.values[layer][: keys.shape[0], :, positions] = values
            return
        rows = torch.arange(positions.shape[0], device=positions.device)
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values


def bytes_per_row(config: DecoderConfig, dtype: torch.dtype, tokens: int) -> int:
    """What one row of so many tokens takes: keys, values and states of all layers together."""
    cache = KVCache(config, 1, tokens, dtype=dtype, device="meta")
    return sum(part.nbytes for part in (*cache.keys, *cache.values, *cache._all_states()))
