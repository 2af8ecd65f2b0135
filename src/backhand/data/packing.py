"""Which rows a step trains on, and how they become packed batches, without padding, what documents share once.

    step ── Sampler ──► rows ── micro_batches ──► groups of rows ── RowPacker.packed: pack, filled_up ──► PackedBatch

A row is a number here, the index of an `Example` in a list. An `Example` is one document as token ids, each supervised
or not; a pair is two documents, which always stand in one micro-batch. (`data.examples` makes them before the first
step; a conversation may become several.) A step reads a document as it is stored, the ids that are supervised as ~id
(`data.stored_examples`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from backhand.data.examples import Example
from backhand.data.stored_examples import random_order, stored
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


def pack(examples: Iterable[Example], *, share: bool = False, device: torch.device | str = "cpu") -> PackedBatch:
    """Documents behind one another, shortest first, so that equal lengths are neighbours.

    labels[i] is token i + 1 of the same document where that token is supervised. Attention is causal, so nothing behind
    the last such i can change the loss, and a document enters only up to there. Its last token, and whatever the
    template puts behind the last reply, are labels at most and never inputs. A document without a supervised token has
    no positions at all.

    Args:
        examples: any number, in any order, which the batch's `ends` keep.
        share: whether tokens with which several of them begin stand in the batch once, where that saves enough.

    Returns:
        input_ids and labels (tokens,) int64, and the segments that the documents consist of.
    """
    documents = list(examples)
    written = [np.where(one.supervised, ~one.input_ids, one.input_ids) for one in documents]
    return _joined(written, _forest(written, [trained_length(one) for one in documents], share=share), device)


def _joined(documents: Sequence[Written], forest: Forest, device: torch.device | str) -> PackedBatch:
    parts = [_inputs_and_labels(documents[number][begin : end + 1]) for number, begin, end in forest.sources]
    ids, labels = (
        torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *each])).to(device)
        for each in (zip(*parts, strict=True) if parts else ((), ()))
    )
    return PackedBatch(ids, labels, forest.lengths, forest.parents, forest.ends)


def _inputs_and_labels(written: Written) -> tuple[Written, Written]:
    """(positions,) each, of one token more: the label of a position is the next token, where that is supervised."""
    return _ids(written[:-1]), np.where(written[1:] < 0, ~written[1:], IGNORE_INDEX)


def _ids(written: Written) -> Written:
    return np.where(written < 0, ~written, written)


def trained_length(example: Example) -> int:
    """Tokens of the example that enter the model: those before its last supervised token."""
    places = np.flatnonzero(example.supervised)
    return int(places[-1]) if len(places) else 0


Lengths = Sequence[int] | npt.NDArray[np.int64]
Written = npt.NDArray[np.int32]
"""Tokens as `StoredExamples` has them."""


def micro_batches(rows: Iterable[int], lengths: Lengths, *, max_rows: int | None = None) -> list[list[int]]:
    """Divide the rows of one optimizer step, longest first.

    So the largest micro-batch, the one that may not fit in memory, comes first, and documents of similar length meet.

    Args:
        rows: indices into `lengths`.
        lengths: tokens of every example.
        max_rows: no more rows in one than this.

    Returns:
        Indices, each of `rows` once, in groups.
    """
    order = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    most = max_rows or max(1, len(order))
    return [order[first : first + most] for first in range(0, len(order), most)]


# What documents begin with in common: a system prompt, a prompt, the first words of two answers to it.
#
# Attention is causal, so documents that begin with the same tokens have the same hidden states there. A micro-batch
# holds those tokens once, as a segment that all of them continue (`PackedBatch`). Positions are the same where their
# tokens and their labels are: a token before which answers part ways predicts another one in each, and stands in each.

MIN_SAVED_TOKENS = 32
"""Fewer tokens than this are not worth what a segment costs: copies of keys and values, and gradients to add up."""
_AT_ONCE = 2**20


class Forest(NamedTuple):
    """Documents as segments.

    Attributes:
        lengths, parents, ends: as in `PackedBatch`, where `ends` are `documents`.
        sources: where each segment's tokens are found: a document, its first position, and the end.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    ends: tuple[int, ...]
    sources: list[tuple[int, int, int]]


def _forest(documents: Sequence[Written], lengths: Sequence[int], *, share: bool) -> Forest:
    """Documents of so many positions each: sorted, so that those that begin alike are neighbours, then divided.

    A beginning of some neighbours is a segment where it saves `MIN_SAVED_TOKENS`: its own tokens, behind those of the
    segment before it, in all documents but one.
    """
    there = [number for number, length in enumerate(lengths) if length]
    together = _alike(documents, there) if share else []
    alone = sorted({*there}.difference(*together), key=lambda number: (lengths[number], number))
    found = [(number, 0, lengths[number]) for number in alone]  # of each segment: a document, begin and end
    parents = [-1] * len(found)
    end_of = {number: place for place, number in enumerate(alone)}
    for group in together:
        order = sorted(group, key=lambda number: _as_bytes(documents[number][: lengths[number] + 1]))
        pairs = itertools.pairwise(order)
        common = [0, *(_common_positions(documents[a], documents[b], min(lengths[a], lengths[b])) for a, b in pairs)]
        waiting = [(0, len(order), 0, -1)]  # of `order` from … to, who have so many positions in segments up to one
        while waiting:
            first, last, done, parent = waiting.pop()
            depth = min(common[first + 1 : last], default=lengths[order[first]])
            alone_here = last - first == 1
            if (alone_here and depth > done) or (depth - done) * (last - first - 1) >= MIN_SAVED_TOKENS:
                parents.append(parent)
                found.append((min(order[first:last]), done, depth))
                done, parent = depth, len(found) - 1
            if alone_here:
                end_of[order[first]] = parent
                continue
            cuts = [first, *(place for place in range(first + 1, last) if common[place] <= depth), last]
            waiting += [(begin, end, done, parent) for begin, end in itertools.pairwise(cuts)]
    return _in_order(found, parents, [end_of.get(number, -1) for number in range(len(documents))])


def _alike(documents: Sequence[Written], there: Sequence[int]) -> list[list[int]]:
    """Those of several that begin with the same tokens, so many as they need to have in common to share any."""
    if len(there) < 2:
        return []
    needed = -(-MIN_SAVED_TOKENS // (len(there) - 1))
    groups: dict[bytes, list[int]] = {}
    for number in there:
        groups.setdefault(_ids(documents[number][:needed]).tobytes(), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _as_bytes(written: Written) -> bytes:
    """Token and label of each position: documents that begin alike do so here, and sort together."""
    return np.stack(_inputs_and_labels(written), axis=1).tobytes()


def _common_positions(one: Written, other: Written, most: int) -> int:
    """How many positions of two documents, at most so many, have the same tokens and labels."""
    parting = _parting(one[: most + 1], other[: most + 1])
    return int(parting.argmax()) if parting.any() else most


def _parting(one: Written, other: Written) -> npt.NDArray[np.bool_]:
    """(…, positions) of (…, positions + 1): where tokens differ, or labels, of which one is there at least."""
    labelled = (one != other) & ((one < 0) | (other < 0))
    parting: npt.NDArray[np.bool_] = (_ids(one) != _ids(other))[..., :-1] | labelled[..., 1:]
    return parting


def _in_order(found: list[tuple[int, int, int]], parents: list[int], ends: list[int]) -> Forest:
    """Segments in the order of a batch: each behind its parent, shortest first, what none continues before the rest."""
    children: dict[int, list[int]] = {}
    for number, parent in enumerate(parents):
        children.setdefault(parent, []).append(number)

    def rank(number: int) -> tuple[bool, int, int]:
        document, begin, end = found[number]
        return number in children, end - begin, document

    order: list[int] = []
    waiting = sorted(children.get(-1, ()), key=rank, reverse=True)
    while waiting:
        number = waiting.pop()
        order.append(number)
        waiting += sorted(children.get(number, ()), key=rank, reverse=True)
    place_of = {number: place for place, number in enumerate(order)} | {-1: -1}
    sources = [found[number] for number in order]
    continued = tuple(place_of[parents[number]] for number in order)
    return Forest(
        tuple(end - begin for _, begin, end in sources),
        continued if len(children) > 1 else (),
        tuple(place_of[end] for end in ends),
        sources,
    )


class RowPacker:
    """The rows of a run, to be packed into micro-batches, what documents share once and a filler at the end.

    Args:
        share_prefixes: whether tokens with which several documents of a micro-batch begin stand in it once; not where
            dropout draws a mask for each row, since their hidden states differ then.

    Attributes:
        examples: the rows.
        lengths: tokens of every row that enter the model, of all its documents.
        by_document: the same with a row for each document; itself where no row has two.
    """

    def __init__(self, examples: Iterable[Example], *, share_prefixes: bool) -> None:
        self.examples = examples = stored(examples)
        self._share_prefixes = share_prefixes
        self.by_document = self
        self.lengths = examples.column("trained").astype(np.int64)
        self._supervised = examples.column("supervised").astype(np.int64)
        self._begins, self._sizes = examples.column("begin"), examples.column("tokens")
        self._starts: npt.NDArray[np.int64] | None = None  # of each row's documents, where rows have several
        if (pairs := examples.pairs).any():
            self.by_document = whole = RowPacker(examples.documents, share_prefixes=share_prefixes)
            self._starts = np.concatenate(([0], np.cumsum(1 + pairs)))
            self.lengths = np.add.reduceat(whole.lengths, self._starts[:-1])
            self._supervised = np.add.reduceat(whole._supervised, self._starts[:-1])

    def documents(self, rows: Iterable[int]) -> list[int]:
        """Places in `by_document` of the documents of these rows, in the order of the rows, the chosen side first."""
        starts = self._starts
        if starts is None:
            return list(rows)
        return [place for row in rows for place in range(int(starts[row]), int(starts[row + 1]))]

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """The documents of these rows, and a filler where their tokens are not a round number (`filled_up`).

        The batch's documents are those of `documents`, in their order.
        """
        return filled_up(_joined(self._written(rows), self.forest(rows), device))

    def forest(self, rows: Sequence[int]) -> Forest:
        """The segments of these rows' micro-batch, without a filler."""
        lengths = [int(self.by_document.lengths[place]) for place in self.documents(rows)]
        return _forest(self._written(rows), lengths, share=self._share_prefixes)

    def _written(self, rows: Iterable[int]) -> list[Written]:
        """The tokens of these rows' documents."""
        whole = self.by_document
        spans = [(int(whole._begins[place]), int(whole._sizes[place])) for place in self.documents(rows)]
        return [whole.examples.tokens[begin : begin + size] for begin, size in spans]

    @cached_property
    def common(self) -> int:
        """Positions with which all documents of the run begin; 0 where that saves too little to be kept once."""
        whole = self.by_document
        if not self._share_prefixes or len(whole.lengths) < 2:
            return 0
        begins, tokens = whole._begins, whole.examples.tokens
        common = int(whole.lengths.min())
        if not common:
            return 0
        for some in np.array_split(begins, -(-len(begins) * (common + 1) // _AT_ONCE)):
            reach = np.arange(common + 1)
            parting = _parting(tokens[some[:, None] + reach], tokens[begins[0] + reach])
            common = int(parting.any(0).argmax()) if parting.any() else common
        return common if common * (len(whole.lengths) - 1) >= MIN_SAVED_TOKENS else 0

    def positions(self, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows computes, without a filler."""
        return sum(self.forest(rows).lengths)

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Supervised tokens of these rows."""
        return sum(int(self._supervised[row]) for row in rows)

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows, each counted as often as it is trained on."""
        return sum(int(self.lengths[row]) for row in rows)


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
        lengths=(*batch.lengths, missing),
        parents=(*batch.parents, -1) if batch.parents else (),
        documents=batch.ends,
    )


def round_size(tokens: int) -> int:
    """The number of positions that a micro-batch of so many tokens is computed with."""
    multiple = 16 if tokens < 1024 else 32 if tokens < 2048 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True)
class Sampler:
    """Every epoch is a new permutation of all rows, cut into steps; the last step of an epoch may be smaller.

    The order follows from seed and epoch alone, so the position in the data is one number, the step.
    """

    rows: int  # how many rows there are, at least 1
    batch_rows: int  # rows per step, at least 1
    seed: int  # of the order

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over all rows."""
        return -(-self.rows // self.batch_rows)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers of this step, counted from 0."""
        order = _epoch_order(self.seed, step // self.steps_per_epoch, self.rows)
        start = step % self.steps_per_epoch * self.batch_rows
        return list(map(int, order[start : start + self.batch_rows]))

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
def _epoch_order(seed: int, epoch: int, rows: int) -> npt.NDArray[np.int64]:
    return random_order(rows, seed, "epoch order", epoch)
