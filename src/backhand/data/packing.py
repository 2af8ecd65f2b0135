"""Choose each step's rows and pack them into batches in which shared prefixes are stored once.

    step ── Sampler ──► row numbers ── micro_batches ──► groups of row numbers ── RowPacker.packed ──► PackedBatch

A row here is one `Example` of the list that `data.prepare` makes before the first step, and its row number is its index
in that list. Most rows are one document: token ids with a mask of the supervised tokens. A preference pair is one row
of two documents, which are therefore in the same micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from backhand.data.even_micro_batches import even_micro_batches
from backhand.data.examples import Example
from backhand.data.prefix_forest import Forest, SignedTokens, inputs_and_labels, mismatch, prefix_forest, worth_sharing
from backhand.data.random_order import random_order
from backhand.data.stored_examples import stored
from backhand.nn.batch import PackedBatch, pad_to_bucket

Lengths = Sequence[int] | npt.NDArray[np.int64]
_COMPARED_TOKENS = 2**20
"""Number of tokens that `RowPacker.common_prefix` compares at once."""


@dataclass(frozen=True)
class Sampler:
    """Assign rows to steps: every epoch is a new permutation of the data. The last step of an epoch may be smaller.

    If the rows of a step are compared with each other, a last step of one row would learn nothing. `even` divides an
    epoch into the same number of steps, whose numbers of rows differ by at most one. With at least three rows per step,
    no step then has a single row.

    The order depends only on seed and epoch, so a resumed run finds its position in the data from the step number.

    A record of the data may have several forms, such as a question with its options in several orders. Each form is a
    row of its own. The list of rows contains all records in form 0, then all records in form 1, and so on. Form f of
    record r has the row number r + f · (number of records). Each epoch uses all records in one form, and the next
    epoch uses the next form.
    """

    records: int  # number of records, at least 1; the list of rows has records · forms entries
    batch_rows: int  # number of rows per step, at least 1
    seed: int  # determines the permutations
    forms: int = 1  # number of forms of each record, at least 1
    even: bool = False  # True: all steps of an epoch have the same number of rows, or one more

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch."""
        return -(-self.records // self.batch_rows)

    def rows_of(self, step: int) -> list[int]:
        """Return the row numbers of this step, where 0 is the first step."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.seed, epoch, self.records)[self._start(rest) : self._start(rest + 1)]
        return list(map(int, order + epoch % self.forms * self.records))

    def _start(self, rest: int) -> int:
        """Return the number of rows in this many steps from the beginning of an epoch."""
        if self.even:
            return rest * self.records // self.steps_per_epoch
        return min(rest * self.batch_rows, self.records)

    @property
    def steps_before_repeats(self) -> int:
        """Number of steps until every form of every record has been used once. Later steps repeat rows."""
        return self.forms * self.steps_per_epoch

    def epochs_done(self, steps: int) -> float:
        """Return the number of epochs after this many steps, including the fraction of the current one."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs + self._start(rest) / self.records

    def position(self, steps: int) -> dict[str, int]:
        """Return the place in the data after this many steps. A checkpoint's manifest shows it to people."""
        epoch, rest = divmod(steps, self.steps_per_epoch)
        place = {"epoch": epoch, "row": self._start(rest)}
        return {**place, "rows": self.records, "batch_rows": self.batch_rows, "seed": self.seed}


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    return random_order(rows, seed, "epoch order", epoch)


def micro_batches(rows: Iterable[int], lengths: Lengths, *, max_rows: int | None = None) -> list[list[int]]:
    """Divide the rows of one optimizer step into micro-batches, longest rows first.

    Rows of similar length are in the same micro-batch. The first micro-batch is the largest, so a step that does not
    fit in memory fails at once.

    Args:
        rows: row numbers.
        lengths: number of tokens per row, indexed by row number.
        max_rows: largest number of rows per micro-batch; None for no limit.

    Returns:
        the row numbers of each micro-batch.
    """
    order = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    size = max_rows or max(1, len(order))
    return [order[first : first + size] for first in range(0, len(order), size)]


class RowPacker:
    """Pack rows into micro-batches.

    Args:
        examples: the rows.
        share_prefixes: in each micro-batch, store the common prefix of several documents once. Must be False with
            dropout, which gives the same token different hidden states in different rows.
        even_tokens: divide steps into micro-batches of similar numbers of tokens.

    Attributes:
        examples: the rows.
        lengths: number of tokens per row that enter the model, over all its documents.
        by_document: a packer of the same documents, with one document per row; `self` if every row is one document.
    """

    def __init__(self, examples: Iterable[Example], *, share_prefixes: bool, even_tokens: bool = False) -> None:
        self.examples = examples = stored(examples)
        self._share_prefixes, self._even_tokens = share_prefixes, even_tokens
        self.by_document = self
        self.lengths = examples.column("input_tokens").astype(np.int64)
        self._supervised = examples.column("supervised").astype(np.int64)
        # Index of a row's first token in `examples.tokens`, and number of its tokens. `lengths` counts only the tokens
        # before the last supervised one. That token is only a label, and no loss depends on the tokens after it.
        self._begins, self._sizes = examples.column("begin"), examples.column("tokens")
        # For encoders that read two texts in one document: the index of the second text's first token; 0 for one text.
        self._second_texts = examples.column("second_text")
        # For each row, the index of its first document, and as a last entry the number of documents. None if every row
        # is one document.
        self._first_documents: npt.NDArray[np.int64] | None = None
        if ((counts := examples.document_counts) > 1).any():
            self.by_document = RowPacker(examples.documents, share_prefixes=share_prefixes)
            self._first_documents = first = np.concatenate(([0], np.cumsum(counts)))
            self.lengths = np.add.reduceat(self.by_document.lengths, first[:-1])
            self._supervised = np.add.reduceat(self.by_document._supervised, first[:-1])

    def micro_batches(self, rows: Iterable[int], max_rows: int) -> list[list[int]]:
        """Divide rows into micro-batches of at most `max_rows` rows."""
        return (even_micro_batches if self._even_tokens else micro_batches)(rows, self.lengths, max_rows=max_rows)

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """Return the micro-batch of these rows, with its documents in the order of the rows.

        A padding segment at the end rounds the batch's number of tokens up to a bucket size.
        """
        second_texts = self.by_document._second_texts[self.documents(rows)]
        return pad_to_bucket(to_batch(self._signed_tokens(rows), self.forest(rows), device, second_texts))

    def forest(self, rows: Sequence[int]) -> Forest:
        """Return the segments of the micro-batch of these rows, without the padding segment."""
        lengths = [int(self.by_document.lengths[document]) for document in self.documents(rows)]
        return prefix_forest(self._signed_tokens(rows), lengths, share=self._share_prefixes)

    def documents(self, rows: Iterable[int]) -> list[int]:
        """Return the indices of these rows' documents in `by_document`; the chosen side of a pair comes first."""
        first = self._first_documents
        if first is None:
            return list(rows)
        return [document for row in rows for document in range(int(first[row]), int(first[row + 1]))]

    def _signed_tokens(self, rows: Iterable[int]) -> list[SignedTokens]:
        """Return the tokens of these rows' documents; the id of a supervised token is stored as ~id."""
        packer = self.by_document
        spans = [(int(packer._begins[document]), int(packer._sizes[document])) for document in self.documents(rows)]
        return [packer.examples.tokens[begin : begin + size] for begin, size in spans]

    @cached_property
    def common_prefix(self) -> int:
        """Number of leading positions that all documents of the run share; 0 if sharing them saves too little."""
        packer = self.by_document
        if not self._share_prefixes or len(packer.lengths) < 2:
            return 0
        begins, tokens = packer._begins, packer.examples.tokens
        length = int(packer.lengths.min())
        if not length:
            return 0
        for some_begins in np.array_split(begins, -(-len(begins) * (length + 1) // _COMPARED_TOKENS)):
            offsets = np.arange(length + 1)
            different = mismatch(tokens[some_begins[:, None] + offsets], tokens[begins[0] + offsets])
            length = int(different.any(0).argmax()) if different.any() else length
        return length if worth_sharing(length, len(packer.lengths)) else 0

    def packed_tokens(self, rows: Sequence[int]) -> int:
        """Return the number of tokens in the micro-batch of these rows, without padding; a shared token counts once."""
        return sum(self.forest(rows).lengths)

    def tokens(self, rows: Sequence[int]) -> int:
        """Return the number of tokens of these rows that enter the model; a shared token counts once per document."""
        return sum(int(self.lengths[row]) for row in rows)

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Return the number of supervised tokens of these rows; a shared token counts once per document."""
        return sum(int(self._supervised[row]) for row in rows)


def to_batch(
    documents: Sequence[SignedTokens], forest: Forest, device: torch.device | str, second_texts: npt.NDArray[np.int32]
) -> PackedBatch:
    """Return the packed batch of these segments, without a padding segment.

    Args:
        documents: tokens per document, in which the id of a supervised token is stored as ~id.
        forest: the division of the documents into segments.
        second_texts: for each document that has two texts, such as a query and a passage, the index of the first
            token of the second one (`Example.second_text`); 0 for all other documents.
    """
    # sources: for each segment, a document that contains it, and its positions start to end - 1 there. The token at
    # index end is the label of the last position.
    parts = [inputs_and_labels(documents[document][start : end + 1]) for document, start, end in forest.sources]
    ids, labels = (
        torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays])).to(device)
        for arrays in (zip(*parts, strict=True) if parts else ((), ()))
    )
    types = None
    if second_texts.any():
        begins = [second_texts[number] or documents[number].size for number, _, _ in forest.sources]
        spans = [np.arange(start, end) for _, start, end in forest.sources]
        of_spans = [(span >= begin).astype(np.int64) for span, begin in zip(spans, begins, strict=True)]
        types = torch.from_numpy(np.concatenate(of_spans)).to(device)
    return PackedBatch(ids, labels, forest.lengths, forest.parents, forest.ends, token_types=types)
