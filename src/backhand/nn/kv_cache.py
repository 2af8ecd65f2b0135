"""The KV cache: keys and values of every token seen so far, one row a sequence, so that a new token costs one position.

Rows have their own lengths; what lies behind a row's length is room, not content. Rows in use are always the first
ones: a row that is done is overwritten by the last row in use (`remove`), so that every product runs over a contiguous
part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.family import DecoderConfig

# Room is added in steps of this many tokens at least.
GROWTH_TOKENS = 64


class KVCache:
    """Keys and values of each layer, (rows, key/value heads, capacity, head_dim), keys already normed and rotated.

    Args:
        config: number of layers and head sizes.
        rows: how many sequences fit at once.
        capacity: tokens of room a row has at first; it grows when needed.
        dtype: of keys and values, the compute dtype.
        device: where they live.

    Attributes:
        lengths: tokens in each row in use; their number is the number of rows in use.
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
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self.lengths: list[int] = []

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
        return range(first, first + count)

    def remove(self, row: int) -> int | None:
        """Drop a row; the last row in use takes its number. Returns the number that one had, None if it was this."""
        last = self.rows_in_use - 1
        length = self.lengths.pop()
        if row == last:
            return None
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                buffer[row, :, :length] = buffer[last, :, :length]
        self.lengths[row] = length
        return last

    def truncate(self, row: int, length: int) -> None:
        """Forget what the row holds behind its first `length` tokens."""
        self.lengths[row] = min(length, self.lengths[row])

    def copy_row(self, origin: KVCache, row: int, targets: range) -> None:
        """Give neighbouring rows the content of a row of another cache: a prefix that they share is computed once."""
        length = origin.lengths[row]
        self.reserve(length)
        span = slice(targets.start, targets.stop)
        for mine, theirs in ((self.keys, origin.keys), (self.values, origin.values)):
            for target, source in zip(mine, theirs, strict=True):
                target[span, :, :length] = source[row, :, :length]
        self.lengths[span] = [length] * len(targets)

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


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one token of one row takes, keys and values of all layers together."""
    return 2 * len(config.layers) * config.num_key_value_heads * config.head_dim * dtype.itemsize
