"""Cache of the hidden states that enter the lowest adapted layer: each row passes the frozen layers once per run.

    x = block_{c-1}(… block_0(embedding(ids)))        c the lowest adapted layer

No layer below c is trained or uses dropout, so x of a row is the same in every epoch. In a packed batch, every op
computes each document separately. The other documents influence only the number of rows of the matrix products.
Therefore x is a function of the row alone, bit for bit, under two conditions. A matrix product must give a row the same
bits for any number of rows, and attention must give the same bits for any division of a document into segments. The
states of a batch can then be assembled from rows that were computed in any batches:

    x(batch) = [x(row of segment 1)[its positions] | x(row of segment 2)[its positions] | … | 0 for the padding]

If several rows share a segment, the states of any of them are used.

The engine knows whether its own kernels meet the conditions (`engines.memory.hidden_states.FrozenLayers`). A matrix
library may choose kernels by the number of rows. Two checks cover this:

- Before a batch size is used for the first time, products of this size are compared with products of the usual size
  (`FrozenPrefix`). Batches of a size that differs are computed without the cache.
- The 1st, 32nd, 1024th, … assembled batch is also computed through all layers below c and compared bit by bit.

A prefix that all rows of a set share is stored once. The padding at the end of a batch has no loss, and no document
reads its states, so they are zeros.

Rows need not be computed in the batch that they are trained in. A pass through the frozen layers therefore includes
rows of the next batches, up to `tokens_per_pass` tokens. Each weight is then read, unpacked and packed once for all of
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.errors import CheckError
from backhand.files import FileLayer, write_all
from backhand.nn.batch import PackedBatch, StartStates, bucket_size
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from backhand.runs.directory import Proof, ProofLog
from backhand.system import read_at


class MemoryStateStore:
    """Hidden states in memory: one tensor in the compute dtype. The system allocates its pages when they are written.

    Args:
        lengths: number of tokens per entry.
        width: hidden size.
        dtype: the compute dtype.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._starts = [0, *accumulate(lengths)]
        self._states = torch.empty(self._starts[-1], width, dtype=dtype)
        self._stored = [False] * len(lengths)

    def __contains__(self, number: int) -> bool:
        return self._stored[number]

    def get(self, number: int) -> Tensor | None:
        """Return the states of an entry, (tokens, hidden), read-only; None if they are not stored."""
        return self._states[self._starts[number] : self._starts[number + 1]] if self._stored[number] else None

    def put(self, number: int, states: Tensor) -> None:
        """Store a copy of the states."""
        self._states[self._starts[number] : self._starts[number + 1]].copy_(states)
        self._stored[number] = True


@dataclass(eq=False)
class DiskStateStore:
    """Hidden states in an unlinked temporary file, which the system removes when the process ends for any reason.

    If the disk is full, the file is closed and the run goes on without it, because checkpoints need the space.

    Raises:
        OSError: the file cannot be created.
    """

    files: FileLayer  # the file layer
    directory: Path  # the file is on this directory's disk
    lengths: Sequence[int]  # number of tokens per entry
    width: int  # hidden size
    dtype: torch.dtype  # the compute dtype
    notify: Callable[[str], None]  # receives a sentence if the disk is full

    def __post_init__(self) -> None:
        self._starts = [0, *(self.width * self.dtype.itemsize * tokens for tokens in accumulate(self.lengths))]
        self._stored: set[int] = set()
        self._descriptor: int | None = self.files.open_unnamed(self.directory)

    def __contains__(self, number: int) -> bool:
        return number in self._stored

    def get(self, number: int) -> Tensor | None:
        """Return the states of an entry, (tokens, hidden), read-only; None if they are not stored or not readable."""
        if self._descriptor is None or number not in self._stored:
            return None
        data = bytearray(self._starts[number + 1] - self._starts[number])
        with suppress(OSError):
            if read_at(self._descriptor, data, self._starts[number]) == len(data):
                return torch.frombuffer(data, dtype=self.dtype).view(-1, self.width)
        return None

    def put(self, number: int, states: Tensor) -> None:
        """Store a copy of the states. Do nothing if the file is closed."""
        if self._descriptor is None:
            return
        try:
            os.lseek(self._descriptor, self._starts[number], os.SEEK_SET)
            write_all(self.files, self._descriptor, states.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._stored.add(number)
        except OSError as error:
            self.notify(f"hidden states are no longer cached but computed in each epoch: {error.strerror or error}")
            self.close()

    def close(self) -> None:
        """Close the file and forget all entries."""
        descriptor, self._descriptor = self._descriptor, None
        self._stored.clear()
        if descriptor is not None:
            with suppress(OSError):
                self.files.close(descriptor)


StateStore = MemoryStateStore | DiskStateStore
"""Hidden states by row number, (tokens, hidden) each. The last entry is the prefix that all rows share."""


@dataclass(eq=False)
class HiddenStateCache:
    """Packs rows into batches that start at the lowest adapted layer, with cached hidden states."""

    model: FrozenPrefix  # the layers below c
    layer: int  # c; no layer below it is trained
    rows: RowPacker  # packs the rows
    store: StateStore  # entries by row number, and finally the prefix that all rows share
    _: KW_ONLY
    tokens_per_pass: int = 0  # up to this number of tokens, a pass includes rows of the next batches
    log: ProofLog  # receives the result of comparing cached with computed states
    notify: Callable[[str], None]  # receives a sentence if states are computed in each epoch

    def __post_init__(self) -> None:
        self._packer, self._common = self.rows.by_document, self.rows.common_prefix
        self._assembled, self._next_comparison = 0, 1  # numbers of assembled batches
        self._invariant: dict[int, bool] = {}  # by batch size
        self._notified = False
        self._useful = True  # False once the store is full, or its states differ from computed ones

    def packed(self, rows: Sequence[int], coming: Iterable[Sequence[int]] = ()) -> PackedBatch:
        """Return the batch that `RowPacker.packed` returns, with the hidden states that enter layer c if possible.

        Args:
            rows: the numbers of the rows.
            coming: the rows of the next batches. It is consumed only as far as a pass has room for them.

        Raises:
            CheckError: cached states differ from the computed ones, and earlier batches of the run used the cache.
        """
        batch = self.rows.packed(rows, "cpu")
        if not self._useful or not self._check_size(batch.input_ids.shape[0]):
            return batch
        # From here on, `rows` are the numbers of documents, in the order of the batch's `ends`.
        rows = [row for row in self.rows.documents(rows) if self._packer.lengths[row]]
        cached = self._cached(rows)
        if missing := [row for row in rows if cached[row] is None]:
            to_compute = self._add_coming(missing, coming)
            if to_compute == rows:
                return replace(batch, start=StartStates(self.layer, self._compute(rows, batch)))
            together = self._packer.packed(to_compute, "cpu")
            if not self._check_size(together.input_ids.shape[0]):
                return batch
            self._compute(to_compute, together)
            cached |= self._cached(missing)
        states = _assemble(batch, [cached[row] for row in rows])
        if states is None:  # the store is full, and without it every batch would compute its rows twice
            self._useful = False
            return batch
        self._assembled += 1
        if self._assembled == self._next_comparison:
            self._next_comparison *= _COMPARISON_FACTOR
            states = self._compared(batch, states, self._packer.packed_tokens(rows))
        return replace(batch, start=StartStates(self.layer, states))

    def _cached(self, rows: Sequence[int]) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Return (prefix, rest) of each document, (tokens, hidden) each, or None if one of them is not stored."""
        prefix = self.store.get(len(self._packer.lengths)) if self._common else None
        if self._common and prefix is None:
            return dict.fromkeys(rows)
        rests = ((row, self.store.get(row)) for row in rows)
        return {row: None if rest is None else (rest[:0] if prefix is None else prefix, rest) for row, rest in rests}

    def _add_coming(self, missing: list[int], coming: Iterable[Sequence[int]]) -> list[int]:
        """Return the missing rows and as many rows of the next batches as fit in one pass, in order."""
        rows, tokens = list(missing), self._common + sum(self._packer.lengths[row] - self._common for row in missing)
        later = chain.from_iterable(map(self.rows.documents, coming)) if tokens < self.tokens_per_pass else ()
        for row in later:
            rest = self._packer.lengths[row] - self._common
            if rest > 0 and row not in self.store:
                tokens += rest
                if tokens > self.tokens_per_pass:
                    break
                rows.append(row)
        together = len(rows) > len(missing) and self._is_invariant(bucket_size(self._packer.packed_tokens(rows)))
        return rows if together else missing

    def _check_size(self, size: int) -> bool:
        """Return `_is_invariant(size)`. Send one note for the first size that is not."""
        if not self._is_invariant(size) and not self._notified:
            self._notified = True
            self.notify(
                f"products of {size} rows end in other bits than products of other sizes on this machine: "
                f"batches of such sizes go through the layers below {self.layer} in each epoch"
            )
        return self._is_invariant(size)

    def _is_invariant(self, size: int) -> bool:
        """Return True if matrix products of `size` rows give a row the same bits as products of the usual size."""
        if size not in self._invariant:
            self._invariant[size] = self.model.is_batch_invariant(size, self.layer)
        return self._invariant[size]

    def _compute(self, rows: Sequence[int], batch: PackedBatch) -> Tensor:
        """Compute and store the states of the batch, whose documents are `rows`. Return them, (tokens, hidden)."""
        store, common, starts = self.store, self._common, batch.offsets
        states = self.model.layer_input(batch, self.layer)
        prefix_entry = len(self._packer.lengths)
        for row, end in zip(rows, _ends(batch), strict=True):
            of_row = torch.cat([states[starts[segment] : starts[segment + 1]] for segment in batch.path(end)])
            if common and store.get(prefix_entry) is None:
                store.put(prefix_entry, of_row[:common])
            store.put(row, of_row[common:])
        return states

    def _compared(self, batch: PackedBatch, states: Tensor, positions: int) -> Tensor:
        """Compute the states of the batch, compare the first `positions` of them with the cached ones, and return them.

        Raises:
            CheckError: they differ, and this is not the first assembled batch.
        """
        computed = self.model.layer_input(batch, self.layer)
        different = int((_bits(computed[:positions]) != _bits(states[:positions])).sum())
        if self._assembled == 1 or different:
            self.log(Proof("cached hidden states equal the computed ones, bit by bit", not different, different, 0))
        if different and self._assembled > 1:
            raise CheckError(
                f"{different:,} of {states.numel():,} cached hidden states differ from the computed ones",
                where=f"layer {self.layer}",
                why="on this machine a row's last bits depend on the other rows of its batch, or the cache is damaged",
                next_step="continue from the checkpoint before with --resume --cache-frozen off",
            )
        if different:
            self._useful = False
            self.notify(
                "on this machine a row's last bits depend on the other rows of its batch: "
                f"the layers below {self.layer} are computed in each epoch"
            )
        return computed


_COMPARISON_FACTOR = 32
"""The 1st, 32nd, 1024th, … assembled batch is also computed."""


def _assemble(batch: PackedBatch, documents: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor | None:
    """Return the states of the batch, (tokens, hidden), from (prefix, rest) of its documents; None if one is None."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for document, end in zip(documents, _ends(batch), strict=True):
        if document is None:
            return None
        prefix, rest = document
        for segment in batch.path(end):
            first, last = batch.first_positions[segment], batch.first_positions[segment] + batch.lengths[segment]
            in_rest = (max(0, position - len(prefix)) for position in (first, last))
            parts[segment] = prefix[first:last], rest[slice(*in_rest)]
    states = torch.cat([part for segment in sorted(parts) for part in parts[segment]])
    return torch.cat([states, states.new_zeros(batch.input_ids.shape[0] - states.shape[0], states.shape[1])])


def _ends(batch: PackedBatch) -> list[int]:
    """Return the last segment of each document that has positions."""
    return [end for end in batch.ends if end >= 0]


def _bits(states: Tensor) -> Tensor:
    """Return the states as integers. As integers, -0 differs from 0, and NaN equals itself."""
    return states.view(torch.int16 if states.dtype.itemsize == 2 else torch.int32)


class HiddenStateCaches(NamedTuple):
    """The caches of training and held-out rows; None for rows without a cache."""

    train: HiddenStateCache | None = None
    held_out: HiddenStateCache | None = None
