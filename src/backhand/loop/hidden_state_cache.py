"""The hidden states that enter the lowest adapted layer, kept: each row goes through the layers below it once in a run.

    x = block_{c-1}(… block_0(embedding(ids)))        c the lowest adapted layer

Nothing below c is trained and no dropout is drawn there, so x of a row is the same in every epoch. In a packed batch a
document is computed by itself in every op; what it is packed with decides nothing but the number of rows of the matrix
products. Where these give each row the same bits whatever their number, and attention the same into whatever segments a
document is divided, x is a function of the row alone, to the bit, and may be put together from rows of any batches:

    x(batch) = [x(row of segment 1)[its positions] | x(row of segment 2)[its positions] | … | 0 for the filler]

Of the rows that share a segment, any will do.

The engine says where its own kernels promise that (`memory.plan`). A library chooses its kernels by the number of
rows. So each number of tokens is compared with the usual number before it is first used
(`FrozenPrefix`), and batches of a size that differs are computed as without cached states. Besides, the 1st,
32nd, 1024th … batch that is put together is computed as well, through all layers below c, and compared bit by bit.

What all rows of a set begin with is kept once. A filler's states are never read by another document and carry no loss;
zeros stand for them.

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
    """One tensor for all rows, in the compute dtype; pages are taken as they are written.

    Args:
        lengths: tokens of each number.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype) -> None:
        self._starts = [0, *accumulate(lengths)]
        self._states = torch.empty(self._starts[-1], width, dtype=dtype)
        self._there = [False] * len(lengths)

    def __contains__(self, number: int) -> bool:
        return self._there[number]

    def get(self, number: int) -> Tensor | None:
        """The states, (tokens, hidden), to be read only; None where they are not there."""
        return self._states[self._starts[number] : self._starts[number + 1]] if self._there[number] else None

    def put(self, number: int, states: Tensor) -> None:
        """Keep a copy."""
        self._states[self._starts[number] : self._starts[number + 1]].copy_(states)
        self._there[number] = True


@dataclass(eq=False)
class DiskStateStore:
    """The same in a file without a name, which is gone when the process is, however that ends.

    A disk that takes no more ends the keeping and not the run: checkpoints need the room.

    Raises:
        OSError: there can be no such file.
    """

    files: FileLayer
    directory: Path  # on whose disk it is
    lengths: Sequence[int]  # tokens of each number
    width: int
    dtype: torch.dtype
    notify: Callable[[str], None]  # told in a sentence where it takes no more

    def __post_init__(self) -> None:
        self._starts = [0, *(self.width * self.dtype.itemsize * tokens for tokens in accumulate(self.lengths))]
        self._there: set[int] = set()
        self._descriptor: int | None = self.files.open_unnamed(self.directory)

    def __contains__(self, number: int) -> bool:
        return number in self._there

    def get(self, number: int) -> Tensor | None:
        """The states, (tokens, hidden), to be read only; None where they are not there, or cannot be read."""
        if self._descriptor is None or number not in self._there:
            return None
        data = bytearray(self._starts[number + 1] - self._starts[number])
        with suppress(OSError):
            if read_at(self._descriptor, data, self._starts[number]) == len(data):
                return torch.frombuffer(data, dtype=self.dtype).view(-1, self.width)
        return None

    def put(self, number: int, states: Tensor) -> None:
        """Keep a copy; without effect where nothing more can be kept."""
        if self._descriptor is None:
            return
        try:
            os.lseek(self._descriptor, self._starts[number], os.SEEK_SET)
            write_all(self.files, self._descriptor, states.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._there.add(number)
        except OSError as error:
            self.notify(f"no more hidden states are kept, they are computed in each epoch: {error.strerror or error}")
            self.close()

    def close(self) -> None:
        """Let go of everything."""
        descriptor, self._descriptor = self._descriptor, None
        self._there.clear()
        if descriptor is not None:
            with suppress(OSError):
                self.files.close(descriptor)


StateStore = MemoryStateStore | DiskStateStore
"""Hidden states by a row's number, (tokens, hidden) each; behind the rows comes what all of them begin with."""


@dataclass(eq=False)
class HiddenStateCache:
    """A set of rows whose hidden states are kept."""

    model: FrozenPrefix
    layer: int  # c, below which nothing is trained
    rows: RowPacker
    store: StateStore  # by the rows' numbers, and behind them what all rows begin with
    _: KW_ONLY
    tokens_per_pass: int = 0  # tokens that a pass through the lower blocks may have where its own batch has fewer
    log: ProofLog  # told that what is kept was found to be what is computed
    notify: Callable[[str], None]  # told in a sentence where it is not

    def __post_init__(self) -> None:
        self._packer, self._common = self.rows.by_document, self.rows.common
        self._put_together, self._next_look = 0, 1
        self._agreeing: dict[int, bool] = {}
        self._told = False
        self._useful = True  # whether the store takes what it is given, and has it as it is computed

    def packed(self, rows: Sequence[int], coming: Iterable[Sequence[int]] = ()) -> PackedBatch:
        """These rows as `RowPacker.packed` packs them, with the hidden states that enter layer c.

        Args:
            coming: the rows of the batches behind it, asked for no further than they are computed along with it.

        Raises:
            CheckError: what was kept is not what is computed now, and batches of the run have used it.
        """
        batch = self.rows.packed(rows, "cpu")
        if not self._useful or not self._agrees(batch.input_ids.shape[0]):
            return batch
        # From here on each document is one, as they stand in the batch's `ends`.
        rows = [row for row in self.rows.documents(rows) if self._packer.lengths[row]]
        kept = self._kept(rows)
        if missing := [row for row in rows if kept[row] is None]:
            wanted = self._with_coming(missing, coming)
            if wanted == rows:
                return replace(batch, start=StartStates(self.layer, self._compute(rows, batch)))
            together = self._packer.packed(wanted, "cpu")
            if not self._agrees(together.input_ids.shape[0]):
                return batch
            self._compute(wanted, together)
            kept |= self._kept(missing)
        states = _joined(batch, [kept[row] for row in rows])
        if states is None:  # the store takes no more: without it, rows would be computed in vain from batch to batch
            self._useful = False
            return batch
        self._put_together += 1
        if self._put_together == self._next_look:
            self._next_look *= _LOOK_EVERY
            states = self._compared(batch, states, self._packer.positions(rows))
        return replace(batch, start=StartStates(self.layer, states))

    def _kept(self, rows: Sequence[int]) -> dict[int, tuple[Tensor, Tensor] | None]:
        """What all documents begin with and the rest of each, (tokens, hidden) each; None where one is not there."""
        beginning = self.store.get(len(self._packer.lengths)) if self._common else None
        if self._common and beginning is None:
            return dict.fromkeys(rows)
        found = ((row, self.store.get(row)) for row in rows)
        return {row: None if own is None else (own[:0] if beginning is None else beginning, own) for row, own in found}

    def _with_coming(self, missing: list[int], coming: Iterable[Sequence[int]]) -> list[int]:
        """These rows, and as many of those that come next as one pass takes, in order."""
        wanted, tokens = list(missing), self._common + sum(self._packer.lengths[row] - self._common for row in missing)
        later = chain.from_iterable(map(self.rows.documents, coming)) if tokens < self.tokens_per_pass else ()
        for row in later:
            own = self._packer.lengths[row] - self._common
            if own > 0 and row not in self.store:
                tokens += own
                if tokens > self.tokens_per_pass:
                    break
                wanted.append(row)
        together = len(wanted) > len(missing) and self._keeps(bucket_size(self._packer.positions(wanted)))
        return wanted if together else missing

    def _agrees(self, size: int) -> bool:
        """`_keeps`, and where it does not, that is said once."""
        if not self._keeps(size) and not self._told:
            self._told = True
            self.notify(
                f"products of {size} rows end in other bits than those of others on this machine: "
                f"batches of such sizes go through the layers below {self.layer} in each epoch"
            )
        return self._keeps(size)

    def _keeps(self, size: int) -> bool:
        """Whether products of so many rows give a row the bits that it has in other batches."""
        if size not in self._agreeing:
            self._agreeing[size] = self.model.is_batch_invariant(size, self.layer)
        return self._agreeing[size]

    def _compute(self, rows: Sequence[int], batch: PackedBatch) -> Tensor:
        """The states of the batch, whose documents these rows are, (tokens, hidden); theirs are put into the store."""
        store, g, starts = self.store, self._common, batch.offsets
        states = self.model.layer_input(batch, self.layer)
        beginning = len(self._packer.lengths)
        for row, end in zip(rows, _ends(batch), strict=True):
            own = torch.cat([states[starts[one] : starts[one + 1]] for one in batch.path(end)])
            if g and store.get(beginning) is None:
                store.put(beginning, own[:g])
            store.put(row, own[g:])
        return states

    def _compared(self, batch: PackedBatch, states: Tensor, there: int) -> Tensor:
        """The states that the batch comes to now; those of its first `there` positions are held against the kept ones.

        Raises:
            CheckError: they differ, and it is not the first batch that is put together.
        """
        computed = self.model.layer_input(batch, self.layer)
        different = int((_bits(computed[:there]) != _bits(states[:there])).sum())
        if self._put_together == 1 or different:
            self.log(Proof("kept hidden states are those computed again, bit by bit", not different, different, 0))
        if different and self._put_together > 1:
            raise CheckError(
                f"{different:,} of {states.numel():,} kept hidden states are not those that are computed now",
                where=f"layer {self.layer}",
                why="a row's last bits depend on the rows beside it here, or what was kept has been damaged",
                next_step="continue from the checkpoint before with --resume --cache-frozen off",
            )
        if different:
            self._useful = False
            self.notify(
                f"a row's last bits depend on the rows beside it here: the layers below {self.layer} are computed in "
                "each epoch"
            )
        return computed


_LOOK_EVERY = 32
"""Of the batches that are put together the 1st, 32nd, 1024th … is computed as well."""


def _joined(batch: PackedBatch, kept: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor | None:
    """The states of the batch, (tokens, hidden), from those of its documents; None where some are not there."""
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for found, end in zip(kept, _ends(batch), strict=True):
        if found is None:
            return None
        beginning, own = found
        for one in batch.path(end):
            first, last = batch.first_positions[one], batch.first_positions[one] + batch.lengths[one]
            behind = (max(0, place - len(beginning)) for place in (first, last))
            parts[one] = beginning[first:last], own[slice(*behind)]
    states = torch.cat([part for one in sorted(parts) for part in parts[one]])
    return torch.cat([states, states.new_zeros(batch.input_ids.shape[0] - states.shape[0], states.shape[1])])


def _ends(batch: PackedBatch) -> list[int]:
    """The segment that each document ends with, of those with positions."""
    return [end for end in batch.ends if end >= 0]


def _bits(states: Tensor) -> Tensor:
    """The states as integers: -0 is not 0, and NaN is itself."""
    return states.view(torch.int16 if states.dtype.itemsize == 2 else torch.int32)
