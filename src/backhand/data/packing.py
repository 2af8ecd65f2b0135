"""Which rows a step trains on, and how they become packed batches, without padding and with a shared prefix only once.

    step ── Sampler ──► rows ── micro_batches ──► groups of rows ── RowPacker.packed: pack, filled_up ──► PackedBatch

A row is a number here, the index of an `Example` in a list. An `Example` is one document as token ids, each supervised
or not; a pair is two documents, which always stand in one micro-batch. (`data.examples` makes them before the first
step; a conversation may become several.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from backhand.data.examples import Example, documents_of
from backhand.data.split import random_order
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


def pack(examples: Iterable[Example], *, shared: int = 0, device: torch.device | str = "cpu") -> PackedBatch:
    """Documents behind one another, shortest first, so that equal lengths are neighbours.

    labels[i] is token i + 1 of the same document where that token is supervised. Attention is causal, so nothing behind
    the last such i can change the loss, and a document enters only up to there. Its last token, and whatever the
    template puts behind the last reply, are labels at most and never inputs. A document without a supervised token has
    no positions at all.

    Args:
        examples: any number, in any order; documents of equal length keep theirs.
        shared: tokens, none of which predicts a supervised one, with which all of them begin: they stand in the batch
            once.
        device: where the tensors go.

    Returns:
        input_ids and labels (tokens,) int64, and the length of each document behind what is shared.

    Raises:
        ValueError: not all documents begin with the same `shared` tokens, or one of these predicts a supervised token.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    prefix = np.zeros(0, dtype=np.int64)
    for example in sorted(examples, key=trained_length):
        length = trained_length(example)
        if length:
            targets = example.input_ids[1 : length + 1].astype(np.int64)
            beginning = example.input_ids[:shared].astype(np.int64)
            if example.supervised[: shared + 1].any() or (ids and not np.array_equal(beginning, prefix)):
                raise ValueError(f"{example.source}: the first {shared} tokens are not shared, or carry loss")
            prefix = beginning
            ids.append(example.input_ids[shared:length].astype(np.int64))
            labels.append(np.where(example.supervised[1 : length + 1], targets, IGNORE_INDEX)[shared:])
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([prefix, *ids])).to(device),
        labels=torch.from_numpy(np.concatenate([np.full_like(prefix, IGNORE_INDEX), *labels])).to(device),
        document_lengths=tuple(len(document) for document in ids),
        shared_prefix=len(prefix),
    )


def trained_length(example: Example) -> int:
    """Tokens of the example that enter the model: those before its last supervised token."""
    places = np.flatnonzero(example.supervised)
    return int(places[-1]) if len(places) else 0


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], *, max_rows: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Divide the rows of one optimizer step, longest first.

    So the largest micro-batch, the one that may not fit in memory, comes first, and documents of similar length meet.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of every example.
        max_rows: no more rows in one than this.
        max_tokens: no more tokens in one than this, unless a single row has more.

    Returns:
        Indices, each of `rows` once, in groups.
    """
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        full = (
            not groups or len(groups[-1]) == max_rows or (max_tokens is not None and tokens + lengths[row] > max_tokens)
        )
        if full:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += lengths[row]
    return groups


# The shared prefix: what a chat template, a system prompt or an instruction puts before each row.
#
# Attention is causal, so rows that begin with the same tokens have the same hidden states there. A micro-batch holds
# those tokens once (`PackedBatch.shared_prefix`), as long as none of them predicts a supervised token.

# Fewer tokens than this are not worth the copies of keys and values that a shared prefix costs.
MIN_SAVED_TOKENS = 32


def common_tokens(examples: Sequence[Example]) -> int:
    """The length of the longest shared prefix of these examples, none of whose tokens predicts a supervised one."""
    if not examples:
        return 0
    first = examples[0].input_ids
    common = len(first)
    for example in examples:
        # Token i - 1 predicts token i; the first token is never supervised.
        common = min(common, max(int(example.supervised.argmax()) - 1, 0))
        # Most rows begin alike, and comparing bytes is faster than searching for the first difference.
        if example.input_ids[:common].tobytes() != first[:common].tobytes():
            common = int(np.argmax(example.input_ids[:common] != first[:common]))
    return common


def shared_tokens(examples: Sequence[Example]) -> int:
    """How many tokens these examples are to share in one micro-batch; 0 where that saves too little."""
    if len(examples) < 2:
        return 0  # a common case that needs no comparison
    common = common_tokens(examples)
    return common if common * (len(examples) - 1) >= MIN_SAVED_TOKENS else 0


class RowPacker:
    """The rows of a run, to be packed into micro-batches with their shared prefix once and a filler at the end.

    Args:
        share_prefixes: whether tokens with which all rows of a micro-batch begin stand in it once; not where dropout
            draws a mask for each row, since their hidden states differ then.

    Attributes:
        examples: the rows.
        lengths: tokens of every row that enter the model, of all its documents.
        by_document: the same with a row for each document; itself where no row has two.
    """

    def __init__(self, examples: Sequence[Example], *, share_prefixes: bool) -> None:
        self.examples = examples
        self._share_prefixes = share_prefixes
        self._supervised = [example.supervised_tokens for example in examples]
        self._documents = [example.documents for example in examples]
        ends = np.cumsum([len(documents) for documents in self._documents], dtype=np.int64).tolist()
        self._places = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        self.by_document = self
        self.lengths: list[int] = []
        if any(example.rejected is not None for example in examples):
            documents = [replace(document, rejected=None) for document in documents_of(examples)]
            self.by_document = RowPacker(documents, share_prefixes=share_prefixes)
            lengths = self.by_document.lengths
            self.lengths = [sum(lengths[place] for place in places) for places in self._places]
        else:
            self.lengths = [trained_length(example) for example in examples]

    def documents(self, rows: Iterable[int]) -> list[int]:
        """Places in `by_document` of the documents of these rows, in the order of the rows, the chosen side first."""
        return [place for row in rows for place in self._places[row]]

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """The documents of these rows, and a filler where their tokens are not a round number (`filled_up`)."""
        documents = [document for row in rows for document in self._documents[row]]
        return filled_up(pack(documents, shared=self.shared(rows), device=device))

    @cached_property
    def common(self) -> int:
        """Tokens with which all rows of the run begin, and which every micro-batch of several of them shares."""
        return self.shared(range(len(self.lengths)))

    def in_order(self, rows: Iterable[int]) -> list[int]:
        """Places of these rows' documents as they stand in a micro-batch, without those that have no place in it."""
        lengths = self.by_document.lengths
        return sorted((place for place in self.documents(rows) if lengths[place]), key=lengths.__getitem__)

    def document_lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each document of these rows, what is shared left out."""
        lengths, shared = self.by_document.lengths, self.shared(rows)
        return [lengths[place] - shared for place in self.documents(rows)]

    def shared(self, rows: Sequence[int]) -> int:
        """Tokens with which all documents of these rows begin, and which stand in their micro-batch once."""
        if not self._share_prefixes:
            return 0
        return shared_tokens([document for row in rows for document in self._documents[row]])

    def may_share(self, count: int) -> bool:
        """Whether some micro-batch of at most `count` rows would have a shared prefix, whichever rows come together."""
        if not self._share_prefixes:
            return False
        documents = self.by_document.examples
        count *= max((len(places) for places in self._places), default=1)
        looked_at = 0
        for together in range(2, min(count, len(documents)) + 1):
            needed = -(-MIN_SAVED_TOKENS // (together - 1))
            if needed != looked_at:
                beginnings = Counter(
                    document.input_ids[:needed].tobytes()
                    for document in documents
                    if common_tokens([document]) >= needed
                )
                if max(beginnings.values(), default=0) >= together:
                    return True
            looked_at = needed
        return False

    def positions(self, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows computes, without a filler."""
        return self.tokens(rows) - (len(self.documents(rows)) - 1) * self.shared(rows)

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Supervised tokens of these rows."""
        return sum(self._supervised[row] for row in rows)

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows, each counted as often as it is trained on."""
        return sum(self.lengths[row] for row in rows)


def filled_up(batch: PackedBatch) -> PackedBatch:
    """The batch with a filler document of zeros at the end, up to `round_size` tokens.

    oneDNN compiles its matrix products anew for every number of tokens: about 35 kernels, 20 MB and 0.05 to 0.1 s for
    each size of micro-batch, and rows of text make a new size in nearly every step. So a filler rounds each micro-batch
    up, by 2 % at most where it has some hundred tokens. It carries no loss, and no other document attends to it.
    """
    tokens = int(batch.input_ids.shape[0])
    missing = round_size(tokens) - tokens
    if not missing:
        return batch
    return replace(
        batch,
        input_ids=torch.cat((batch.input_ids, batch.input_ids.new_zeros(missing))),
        labels=torch.cat((batch.labels, batch.labels.new_full((missing,), IGNORE_INDEX))),
        document_lengths=(*batch.document_lengths, missing),
    )


def round_size(tokens: int) -> int:
    """The number of positions that a micro-batch of so many tokens is computed with."""
    multiple = 16 if tokens < 1024 else 32 if tokens < 2048 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True)
class Sampler:
    """Every epoch is a new permutation of all rows, cut into steps; the last step of an epoch may be smaller.

    The order follows from seed and epoch alone, so the position in the data is one number, the step.

    Attributes:
        rows: how many rows there are, at least 1.
        batch_rows: rows per step, at least 1.
        seed: of the order.
    """

    rows: int
    batch_rows: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over all rows."""
        return -(-self.rows // self.batch_rows)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of this step, counted from 0."""
        order = _epoch_order(self.seed, step // self.steps_per_epoch, self.rows)
        start = step % self.steps_per_epoch * self.batch_rows
        return list(order[start : start + self.batch_rows])

    def epochs_done(self, steps: int) -> float:
        """Epochs done after this many steps, with the fraction of the current one."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + rest * self.batch_rows / self.rows

    def position(self, steps: int) -> dict[str, int]:
        """The position in the data after this many steps, for a checkpoint's manifest."""
        epoch, rest = divmod(steps, self.steps_per_epoch)
        return {
            "epoch": epoch,
            "row": rest * self.batch_rows,
            "rows": self.rows,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
        }


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    return tuple(random_order(rows, seed, "epoch order", epoch).tolist())
