"""A batch of documents, packed one after another, without padding between them and without an attention mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.document_groups import SegmentRun, Span
from backhand.ops.linear_divergence import Divergence

IGNORE_INDEX = -100

TokenLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from log-probabilities, (supervised tokens,), to the batch's loss, 0-d float64, and its gradient.

The log-probabilities are ordered document by document, as in `PackedBatch.ends`. A token that several documents share
occurs once per document. The gradient has the shape of the log-probabilities.
"""

StateLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function from final hidden states, (positions, hidden), to a loss, 0-d, and its gradient of the states' shape.

The gradient has the dtype of the states and may be the memory of the states.
"""


class TeacherStates(NamedTuple):
    """The teacher's hidden states at the supervised positions of a distilled batch, and the loss."""

    hidden: Tensor  # after the final norm, (supervised positions, hidden)
    divergence: Divergence
    temperature: float


class StartStates(NamedTuple):
    """Cached input of block `layer`, counted from 0: `states` of shape (tokens, hidden)."""

    layer: int
    states: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several documents, packed one after another in segments.

    A document that shares nothing is one segment. Documents with a common prefix share segments: a segment continues
    its parent, and a document is the path of segments from a root to its last segment. A segment comes after its
    parent, and only other descendants of the parent lie between them.
    """

    input_ids: Tensor  # (tokens,) int64
    # (tokens,) int64; `labels[i]` is the token that position i has to predict, or `IGNORE_INDEX` if position i carries
    # no loss. It is the same in all documents that contain the position. The last token of a text is only a label
    labels: Tensor
    lengths: tuple[int, ...]  # tokens of each segment; the sum is `tokens`
    # number of each segment's parent, or -1; empty if no segment has a parent
    parents: tuple[int, ...] = ()
    # number of the last segment of each document, in the caller's order; -1 for an empty document. None if the segments
    # without children are the last segments of the documents, in this order
    document_ends: tuple[int, ...] | None = None
    # cached hidden states with which the forward pass starts at a higher layer; None to start at the token ids
    start: StartStates | None = None
    # (tokens,) int64, the number of the text of a pair to which each token belongs, for encoders with token types; None
    # if all are 0
    token_types: Tensor | None = None
    # for distillation: the loss is the divergence from these states instead of the cross-entropy; else None
    teacher: TeacherStates | None = None

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.input_ids):
            raise ValueError(f"{len(self.input_ids)} tokens cannot be segments of {sum(self.lengths)} tokens")
        if len(self.parents) not in (0, len(self.lengths)):
            raise ValueError(f"{len(self.lengths)} segments cannot have {len(self.parents)} parents")
        open_segments: list[int] = []
        for number, parent in enumerate(self.parents):
            while open_segments and open_segments[-1] != parent:
                open_segments.pop()
            if parent != (open_segments[-1] if open_segments else -1):
                raise ValueError(f"segment {number} does not follow segment {parent}, which it continues")
            open_segments.append(number)

    @cached_property
    def supervised_positions(self) -> Tensor:
        """Positions that carry loss, (supervised positions,) int64."""
        return (self.labels != IGNORE_INDEX).nonzero().squeeze(1)

    @property
    def supervised_tokens(self) -> int:
        """Number of supervised tokens of all documents.

        A token that several documents share counts once per document.
        """
        return self._document_index[0].numel()

    @property
    def uses_attention(self) -> bool:
        """True if a supervised position has a position before it, so that queries and keys affect the loss."""
        return bool((self.positions[self.supervised_positions] > 0).any())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Number of the last segment of each document, -1 for an empty document."""
        if self.document_ends is not None:
            return self.document_ends
        continued = set(self.parents)
        return tuple(number for number in range(len(self.lengths)) if number not in continued)

    def path(self, segment: int) -> list[int]:
        """Return the segments of a document from the root to this last segment; nothing for -1."""
        path: list[int] = []
        while segment >= 0:
            path.append(segment)
            segment = self.parents[segment] if self.parents else -1
        return path[::-1]

    @cached_property
    def offsets(self) -> list[int]:
        """First token of each segment in the batch, and the end of the last segment."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def first_positions(self) -> list[int]:
        """Position of each segment's first token in its documents."""
        first_positions: list[int] = []
        for parent in self.parents or (-1,) * len(self.lengths):
            first_positions.append(first_positions[parent] + self.lengths[parent] if parent >= 0 else 0)
        return first_positions

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its document, (tokens,) int64, counted from 0."""
        parts = [torch.arange(begin, begin + n) for begin, n in zip(self.first_positions, self.lengths, strict=True)]
        return torch.cat([torch.arange(0), *parts]).to(self.input_ids.device)

    @cached_property
    def document_lengths(self) -> Tensor:
        """Length of each token's document, (tokens,) int64; the longest one if several documents contain the token."""
        longest = [begin + n for begin, n in zip(self.first_positions, self.lengths, strict=True)]  # by segment
        for number in reversed(range(len(self.parents))):
            if (parent := self.parents[number]) >= 0:
                longest[parent] = max(longest[parent], longest[number])
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.tensor(longest, dtype=torch.int64).repeat_interleave(lengths).to(self.input_ids.device)

    @cached_property
    def segment_runs(self) -> tuple[SegmentRun, ...]:
        """Runs of neighbouring segments with equal length and parent, which ops compute in one call."""
        return document_runs(self.lengths, self.parents)

    @cached_property
    def _document_index(self) -> tuple[Tensor, tuple[int, ...]]:
        """The supervised tokens of each document in turn, as indices into `supervised_positions`, and their number."""
        ends = torch.tensor(self.offsets, device=self.labels.device)
        bounds = torch.searchsorted(self.supervised_positions, ends).tolist()
        ranges = [[range(bounds[one], bounds[one + 1]) for one in self.path(end)] for end in self.ends]
        places = [place for document in ranges for segment in document for place in segment]
        counts = tuple(sum(map(len, document)) for document in ranges)
        return torch.tensor(places, dtype=torch.int64, device=self.labels.device), counts

    @property
    def document_tokens(self) -> tuple[int, ...]:
        """Number of supervised tokens of each document."""
        return self._document_index[1]

    def per_document(self, values: Tensor) -> Tensor:
        """Map (supervised positions, …) to (supervised tokens, …), by document. Shared positions are repeated."""
        return values[self._document_index[0]]

    def at_positions(self, values: Tensor) -> Tensor:
        """Map (supervised tokens, …), document by document, to (supervised positions, …).

        Documents that share a position must have equal values there: any of them is used.
        """
        result = values.new_empty(len(self.supervised_positions), *values.shape[1:])
        return result.index_copy_(0, self._document_index[0], values)

    def sum_at_positions(self, values: Tensor) -> Tensor:
        """Map (supervised tokens, …) to sums at (supervised positions, …): the transpose of `per_document`."""
        total = values.new_zeros(len(self.supervised_positions), *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, self._document_index[0], values.double()).to(values.dtype)

    @cached_property
    def weights(self) -> Tensor | None:
        """Number of documents in which each supervised position counts, float64; None if each counts once."""
        if not self.parents and len(self.ends) == len(set(self.ends)):
            return None
        weights = self.sum_at_positions(
            torch.ones(self.supervised_tokens, dtype=torch.float64, device=self.labels.device)
        )
        return None if bool((weights == 1).all()) else weights

    def loss_multiplier(self, loss_scaling: float, dtype: torch.dtype) -> float | Tensor:
        """Return the multiplier of the nats: one number, or (supervised positions,) in float32 or wider."""
        weights = self.weights
        return (
            loss_scaling if weights is None else (loss_scaling * weights).to(torch.promote_types(dtype, torch.float32))
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the same batch on another device."""
        start = None if self.start is None else self.start._replace(states=self.start.states.to(device))
        teacher = None if self.teacher is None else self.teacher._replace(hidden=self.teacher.hidden.to(device))
        ids, labels = self.input_ids.to(device), self.labels.to(device)
        types = None if self.token_types is None else self.token_types.to(device)
        return replace(self, input_ids=ids, labels=labels, start=start, token_types=types, teacher=teacher)


def document_runs(lengths: Sequence[int], parents: Sequence[int] = ()) -> tuple[SegmentRun, ...]:
    """Return segments in the form of the ops (`SegmentRun`), with equal neighbours grouped and without empty segments.

    Args:
        lengths: tokens of each segment.
        parents: as in `PackedBatch`.
    """
    runs: list[SegmentRun] = []
    spans: list[tuple[Span, ...]] = []  # spans of each segment's document up to the end of the segment
    start = 0
    for length, parent in zip(lengths, parents or (-1,) * len(lengths), strict=True):
        before = spans[parent] if parent >= 0 else ()
        if runs and runs[-1][2:] == (length, before) and runs[-1].start + runs[-1].number * length == start:
            runs[-1] = runs[-1]._replace(number=runs[-1].number + 1)
        elif length:
            runs.append(SegmentRun(start, 1, length, before))
        spans.append((*before, (start, start + length)) if length else before)
        start += length
    return tuple(runs)


def pad_to_bucket(batch: PackedBatch) -> PackedBatch:
    """Pad the batch to `bucket_size` tokens with one more segment of zeros, which carries no loss.

    oneDNN compiles its matrix products for every number of tokens: about 35 kernels, 20 MB and 0.05 to 0.1 s per size.
    Without buckets, nearly every step would have a new size. The padding is at most 2 % of some hundred tokens. It
    belongs to no document, and no document attends to it.
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
        token_types=None if batch.token_types is None else functional.pad(batch.token_types, (0, missing)),
        parents=(*batch.parents, -1) if batch.parents else (),
        document_ends=batch.ends,
    )


def bucket_size(tokens: int) -> int:
    """Return the number of positions with which a micro-batch of this many tokens is computed."""
    multiple = 16 if tokens < 1024 else 32 if tokens < 2048 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple
