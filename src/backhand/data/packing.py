"""Choose each step's rows and pack them into batches without padding. Shared prefixes are stored once.

    step ── Sampler ──► rows ── micro_batches ──► groups of rows ── RowPacker.packed ──► PackedBatch

A row is a number here: the index of an `Example` in a list. An `Example` is one document as token ids with a mask of
the supervised ones. A pair is two documents, which are always in the same micro-batch. `data.prepare` makes the
examples before the first step; a conversation may become several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from backhand.data.examples import Example
from backhand.data.prefix_forest import Forest, SignedTokens, inputs_and_labels, mismatch, prefix_forest, worth_sharing
from backhand.data.random_order import random_order
from backhand.data.stored_examples import stored
from backhand.nn.batch import PackedBatch, pad_to_bucket

Lengths = Sequence[int] | npt.NDArray[np.int64]
_COMPARED_TOKENS = 2**20
"""Number of tokens that `RowPacker.common` compares at once."""


@dataclass(frozen=True)
class Sampler:
    """Assign rows to steps: every epoch is a new permutation of all rows. The last step of an epoch may be smaller.

    The order is a function of seed and epoch, so the step number alone is the position in the data.
    """

    rows: int  # number of rows, at least 1
    batch_rows: int  # rows per step, at least 1
    seed: int  # of the permutations

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch."""
        return -(-self.rows // self.batch_rows)

    def rows_of(self, step: int) -> list[int]:
        """Return the row numbers of a step, counted from 0."""
        order = _epoch_order(self.seed, step // self.steps_per_epoch, self.rows)
        start = step % self.steps_per_epoch * self.batch_rows
        return list(map(int, order[start : start + self.batch_rows]))

    def epochs_done(self, steps: int) -> float:
        """Return the number of epochs after this many steps, including the fraction of the current one."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + rest * self.batch_rows / self.rows

    def position(self, steps: int) -> dict[str, int]:
        """Return the position in the data after this many steps, for a checkpoint's manifest."""
        epoch, rest = divmod(steps, self.steps_per_epoch)
        row = rest * self.batch_rows
        return {"epoch": epoch, "row": row, "rows": self.rows, "batch_rows": self.batch_rows, "seed": self.seed}


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    return random_order(rows, seed, "epoch order", epoch)


def micro_batches(rows: Iterable[int], lengths: Lengths, *, max_rows: int | None = None) -> list[list[int]]:
    """Divide the rows of one optimizer step into micro-batches, longest rows first.

    The largest micro-batch, the one that may not fit in memory, is therefore the first. Rows of similar length are in
    the same micro-batch.

    Args:
        rows: indices into `lengths`.
        lengths: number of tokens per row.
        max_rows: largest number of rows per micro-batch; None for no limit.

    Returns:
        the indices in groups; each index occurs once.
    """
    order = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    size = max_rows or max(1, len(order))
    return [order[first : first + size] for first in range(0, len(order), size)]


class RowPacker:
    """Pack rows of a run into micro-batches.

    Args:
        examples: the rows.
        share_prefixes: store a prefix that several documents of a micro-batch share once. Must be False with dropout,
            which draws a mask per row, so that the hidden states of equal tokens differ.

    Attributes:
        examples: the rows.
        lengths: number of tokens per row that enter the model, over all its documents.
        by_document: a packer with one row per document; this packer itself if no row is a pair.
    """

    def __init__(self, examples: Iterable[Example], *, share_prefixes: bool) -> None:
        self.examples = examples = stored(examples)
        self._share_prefixes = share_prefixes
        self.by_document = self
        self.lengths = examples.column("trained").astype(np.int64)
        self._supervised = examples.column("supervised").astype(np.int64)
        self._begins, self._sizes = examples.column("begin"), examples.column("tokens")
        self._starts: npt.NDArray[np.int64] | None = None  # first document of each row; None if rows are documents
        if (pairs := examples.pairs).any():
            self.by_document = whole = RowPacker(examples.documents, share_prefixes=share_prefixes)
            self._starts = np.concatenate(([0], np.cumsum(1 + pairs)))
            self.lengths, self._supervised = (
                np.add.reduceat(counts, self._starts[:-1]) for counts in (whole.lengths, whole._supervised)
            )

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """Return the micro-batch of these rows, padded to a bucket size. Its documents are in the order of the rows."""
        return pad_to_bucket(to_batch(self._tokens(rows), self.forest(rows), device))

    def forest(self, rows: Sequence[int]) -> Forest:
        """Return the segments of these rows' micro-batch, without padding."""
        lengths = [int(self.by_document.lengths[place]) for place in self.documents(rows)]
        return prefix_forest(self._tokens(rows), lengths, share=self._share_prefixes)

    def documents(self, rows: Iterable[int]) -> list[int]:
        """Return the indices of these rows' documents in `by_document`; the chosen side of a pair comes first."""
        starts = self._starts
        if starts is None:
            return list(rows)
        return [place for row in rows for place in range(int(starts[row]), int(starts[row + 1]))]

    def _tokens(self, rows: Iterable[int]) -> list[SignedTokens]:
        whole = self.by_document
        spans = [(int(whole._begins[place]), int(whole._sizes[place])) for place in self.documents(rows)]
        return [whole.examples.tokens[begin : begin + size] for begin, size in spans]

    @cached_property
    def common(self) -> int:
        """Number of leading positions that all documents of the run share; 0 if sharing them saves too little."""
        whole = self.by_document
        if not self._share_prefixes or len(whole.lengths) < 2:
            return 0
        begins, tokens = whole._begins, whole.examples.tokens
        common = int(whole.lengths.min())
        if not common:
            return 0
        for some in np.array_split(begins, -(-len(begins) * (common + 1) // _COMPARED_TOKENS)):
            reach = np.arange(common + 1)
            different = mismatch(tokens[some[:, None] + reach], tokens[begins[0] + reach])
            common = int(different.any(0).argmax()) if different.any() else common
        return common if worth_sharing(common, len(whole.lengths)) else 0

    def positions(self, rows: Sequence[int]) -> int:
        """Return the number of tokens that a micro-batch of these rows computes, without padding."""
        return sum(self.forest(rows).lengths)

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Return the number of supervised tokens of these rows."""
        return sum(int(self._supervised[row]) for row in rows)

    def tokens(self, rows: Sequence[int]) -> int:
        """Return the number of tokens of these rows; a shared token counts once per document."""
        return sum(int(self.lengths[row]) for row in rows)


def to_batch(documents: Sequence[SignedTokens], forest: Forest, device: torch.device | str) -> PackedBatch:
    """Return the packed batch of a forest's segments, without padding."""
    parts = [inputs_and_labels(documents[number][start : end + 1]) for number, start, end in forest.sources]
    ids, labels = (
        torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays])).to(device)
        for arrays in (zip(*parts, strict=True) if parts else ((), ()))
    )
    return PackedBatch(ids, labels, forest.lengths, forest.parents, forest.ends)
