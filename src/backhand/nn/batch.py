"""What a pass takes: documents packed behind one another, no padding, no mask; and buffers that its blocks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.document_groups import Run, Span

IGNORE_INDEX = -100

TokenLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(supervised tokens,) log-probabilities of a batch, document by document in the order of `PackedBatch.ends`, whatever
documents share → the batch's loss, 0-d float64, and its gradient with respect to each of them, (supervised tokens,)."""


class StartStates(NamedTuple):
    """Cached input of block `layer`, counted from 0: `states`, (tokens, hidden)."""

    layer: int
    states: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several documents, in segments that stand behind one another.

    Documents that begin alike share segments: a segment continues its parent, and a document is a segment with all that
    it continues, from a root on. Each segment stands behind its parent, with nothing between the two but other segments
    that continue the parent, and theirs. A document that shares nothing is one segment.
    """

    input_ids: Tensor  # (tokens,) int64
    # (tokens,) int64; `labels[i]` is the next token after position i of every document that holds it, or `IGNORE_INDEX`
    # where position i carries no loss. At a document's last position it is a token that was left out because nothing
    # could be predicted from it, or `IGNORE_INDEX`
    labels: Tensor
    lengths: tuple[int, ...]  # tokens of each segment; they sum to `tokens`
    # the segment that each continues, by its number, or -1; nothing where none continues another
    parents: tuple[int, ...] = ()
    # the segment that each document ends with, in the caller's order, or -1 for one without positions; None where these
    # are the segments that none continues
    documents: tuple[int, ...] | None = None
    # cached hidden states with which the forward pass starts at a higher layer; None to start at the token ids
    start: StartStates | None = None

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.input_ids):
            raise ValueError(f"{len(self.input_ids)} tokens are not segments of {sum(self.lengths)}")
        if len(self.parents) not in (0, len(self.lengths)):
            raise ValueError(f"{len(self.lengths)} segments have not {len(self.parents)} parents")
        open_ones: list[int] = []
        for number, parent in enumerate(self.parents):
            while open_ones and open_ones[-1] != parent:
                open_ones.pop()
            if parent != (open_ones[-1] if open_ones else -1):
                raise ValueError(f"segment {number} does not stand behind segment {parent}, which it continues")
            open_ones.append(number)

    @cached_property
    def supervised_positions(self) -> Tensor:
        """(supervised positions,) int64: those that carry loss."""
        return (self.labels != IGNORE_INDEX).nonzero().squeeze(1)

    @property
    def supervised_tokens(self) -> int:
        """How many supervised tokens all documents have: one that several share counts in each."""
        return self._of_documents[0].numel()

    @property
    def attends(self) -> bool:
        """Whether some supervised position has a position before it, so that queries and keys decide anything."""
        return bool((self.positions[self.supervised_positions] > 0).any())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The segment that each document ends with, -1 for one without positions."""
        if self.documents is not None:
            return self.documents
        continued = set(self.parents)
        return tuple(number for number in range(len(self.lengths)) if number not in continued)

    def path(self, segment: int) -> list[int]:
        """The segments of a document that ends with this one, from the root on; nothing for -1."""
        path: list[int] = []
        while segment >= 0:
            path.append(segment)
            segment = self.parents[segment] if self.parents else -1
        return path[::-1]

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each segment, and the end of the last one."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def begins(self) -> list[int]:
        """The position of each segment's first token in its documents."""
        begins: list[int] = []
        for parent in self.parents or (-1,) * len(self.lengths):
            begins.append(begins[parent] + self.lengths[parent] if parent >= 0 else 0)
        return begins

    @cached_property
    def positions(self) -> Tensor:
        """(tokens,) int64, from 0 in each document."""
        parts = [torch.arange(begin, begin + n) for begin, n in zip(self.begins, self.lengths, strict=True)]
        return torch.cat([torch.arange(0), *parts]).to(self.input_ids.device)

    @cached_property
    def reach(self) -> Tensor:
        """(tokens,) int64: how long each token's document is, the longest where it is in several."""
        reach = [begin + n for begin, n in zip(self.begins, self.lengths, strict=True)]
        for number in reversed(range(len(self.parents))):
            if self.parents[number] >= 0:
                reach[self.parents[number]] = max(reach[self.parents[number]], reach[number])
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.tensor(reach, dtype=torch.int64).repeat_interleave(lengths).to(self.input_ids.device)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring segments of equal length that continue the same one, for batched attention calls."""
        return document_runs(self.lengths, self.parents)

    @cached_property
    def _of_documents(self) -> tuple[Tensor, tuple[int, ...]]:
        """The supervised tokens of each document in turn, as places in `supervised_positions`; how many each has."""
        ends = torch.tensor(self.starts, device=self.labels.device)
        bounds = torch.searchsorted(self.supervised_positions, ends).tolist()
        found = [[range(bounds[one], bounds[one + 1]) for one in self.path(end)] for end in self.ends]
        places = [place for document in found for one in document for place in one]
        counts = tuple(sum(map(len, document)) for document in found)
        return torch.tensor(places, dtype=torch.int64, device=self.labels.device), counts

    @property
    def document_tokens(self) -> tuple[int, ...]:
        """Supervised tokens of each document."""
        return self._of_documents[1]

    def of_documents(self, values: Tensor) -> Tensor:
        """(supervised positions,) as (supervised tokens,), document by document: what several share is in each."""
        return values[self._of_documents[0]]

    def at_positions(self, values: Tensor) -> Tensor:
        """The transposed map of `of_documents`: (supervised tokens,) summed at their (supervised positions,)."""
        total = values.new_zeros(self.supervised_positions.shape, dtype=torch.float64)
        return total.index_add_(0, self._of_documents[0], values.double()).to(values.dtype)

    @cached_property
    def weights(self) -> Tensor | None:
        """(supervised positions,) float64: in how many documents each counts; None where each counts once."""
        if not self.parents and len(self.ends) == len(set(self.ends)):
            return None
        weights = self.at_positions(torch.ones(self.supervised_tokens, dtype=torch.float64, device=self.labels.device))
        return None if bool((weights == 1).all()) else weights

    def loss_multiplier(self, loss_scaling: float, dtype: torch.dtype) -> float | Tensor:
        """What multiplies the nats of supervised positions: of all, or (supervised positions,) in float32 or wider."""
        weights = self.weights
        return (
            loss_scaling if weights is None else (loss_scaling * weights).to(torch.promote_types(dtype, torch.float32))
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        start = None if self.start is None else self.start._replace(states=self.start.states.to(device))
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device), start=start)


def document_runs(lengths: Sequence[int], parents: Sequence[int] = ()) -> tuple[Run, ...]:
    """Segments as ops take them (`Run`), equal neighbours together; empty ones vanish.

    Args:
        lengths: tokens of each segment.
        parents: as in `PackedBatch`.
    """
    runs: list[Run] = []
    spans: list[tuple[Span, ...]] = []  # of each segment's documents, up to its end
    start = 0
    for length, parent in zip(lengths, parents or (-1,) * len(lengths), strict=True):
        before = spans[parent] if parent >= 0 else ()
        if runs and runs[-1][2:] == (length, before) and runs[-1].start + runs[-1].number * length == start:
            runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
        elif length:
            runs.append(Run(start, 1, length, before))
        spans.append((*before, (start, start + length)) if length else before)
        start += length
    return tuple(runs)


def pad_to_bucket(batch: PackedBatch) -> PackedBatch:
    """Pad the batch to `bucket_size` tokens with a document of zeros, which carries no loss.

    oneDNN compiles its matrix products for every number of tokens: about 35 kernels, 20 MB and 0.05 to 0.1 s per size.
    Rows of text would give a new size in nearly every step. The padding is at most 2 % of some hundred tokens, and no
    other document attends to it.
    """
    tokens = int(batch.input_ids.shape[0])
    missing = bucket_size(tokens) - tokens
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


def bucket_size(tokens: int) -> int:
    """Return the number of positions with which a micro-batch of this many tokens is computed."""
    multiple = 16 if tokens < 1024 else 32 if tokens < 2048 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple
