"""Digest and weight scale of base tensors, computed while the weights are loaded, so that their file is read once.

A tensor is examined just before it is copied into its place. Its pages then come from the disk once for both. Whoever
asks later gets what was computed then, and the file may have changed or gone meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from backhand.adapters.record import digest_of_hashes, in_threads, pieces_of, tensor_hash
from backhand.nn.loading.source import ModelSource
from backhand.ops.weight_tiles import FrozenMatrix


class BaseFacts:
    """SHA-256 and mean square of those tensors of one base that were requested.

    A tensor that is asked for and was not examined is read when it is asked for.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._to_hash: set[str] = set()
        self._to_square: set[str] = set()
        self._hashes: dict[str, bytes] = {}
        self._mean_squares: dict[str, float] = {}

    def request(self, hashed: Iterable[str] = (), squared: Iterable[str] = ()) -> None:
        """Name the tensors whose hash and whose mean square will be asked for."""
        self._to_hash |= set(hashed) - self._hashes.keys()
        self._to_square |= set(squared) - self._mean_squares.keys()

    def examine(self, names: Collection[str] | None = None) -> None:
        """Compute what was requested of these tensors, or of all of them if None; each is read once, by one thread."""
        requested = self._to_hash | self._to_square
        in_threads(self._examine, sorted(requested if names is None else requested & set(names)))

    def digest(self, names: Collection[str]) -> str | None:
        """Return `record.base_digest` of these tensors, or None for none."""
        if not names:
            return None
        self.request(hashed=names)
        self.examine(names)
        return digest_of_hashes({name: self._hashes[name] for name in names})

    def mean_square(self, name: str) -> float:
        """Return the mean of the squares of a tensor's values."""
        self.request(squared=[name])
        self.examine([name])
        return self._mean_squares[name]

    def _examine(self, name: str) -> None:
        tensor = self._source.load_in_pieces(name)
        if name in self._to_square:
            self._mean_squares[name] = _mean_square(tensor)
            self._to_square.discard(name)
        if name in self._to_hash:
            self._hashes[name] = tensor_hash(name, tensor)
            self._to_hash.discard(name)


_ROWS_AT_ONCE = 256


def _mean_square(tensor: FrozenMatrix) -> float:
    total, count = 0.0, 0
    for piece in pieces_of(tensor):
        rows: Tensor
        for rows in piece.split(_ROWS_AT_ONCE):
            total += float(rows.double().square().sum())
            count += rows.numel()
    return total / max(1, count)
