"""Chunks of packed documents, for recurrences that are computed chunk by chunk in torch.

The chunks of a document follow one another, but documents are independent. Step i takes chunk i of every document that
has one. Documents are sorted by length, longest first, so that the documents with a chunk in the next step are the
first ones of this step. Places after a document's end hold zeros.

If documents begin alike, steps are made per level of their trees: the segments with the same number of segments before
them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.document_groups import SegmentRun, Span

CHUNK_TOKENS = 64


class Step(NamedTuple):
    """One chunk each of several documents, at places (documents, length)."""

    order: Tensor  # the indices of the documents in their level, longest first
    length: int
    token_at: Tensor  # (places,) the token at each place; some token of the same document where there is padding
    filled: Tensor  # the places without padding
    padding: Tensor  # the places of padding

    @property
    def documents(self) -> int:
        return len(self.order)


class Level(NamedTuple):
    """The steps of the segments that have the same number of segments before them."""

    steps: list[Step]
    segments: int  # the number of segments
    parents: Tensor | None  # (segments,) the index in the level before of the one continued; None in the first


# Cached, since every layer needs the same steps in forward and backward; a few micro-batches alternate at most.
@functools.lru_cache(maxsize=4)
def levels_of(runs: tuple[SegmentRun, ...], chunk: int, device: torch.device) -> list[Level]:
    """Return the levels, the first of which are the segments that begin documents."""
    spans: list[list[Span]] = []
    parents: list[list[int]] = []
    number_of: dict[int, int] = {}  # index in its level, by a segment's end
    for start, count, length, before in runs:
        while len(spans) <= len(before):
            spans.append([])
            parents.append([])
        for first in (start + place * length for place in range(count)):
            number_of.setdefault(first + length, len(spans[len(before)]))  # an empty segment after it has the same end
            spans[len(before)].append((first, first + length))
            parents[len(before)].append(number_of[before[-1][1]] if before else -1)
    return [
        Level(_steps_of(own, chunk, device), len(own), torch.tensor(above, device=device) if depth else None)
        for depth, (own, above) in enumerate(zip(spans, parents, strict=True))
    ]


def _steps_of(documents: list[Span], chunk: int, device: torch.device) -> list[Step]:
    if not documents:
        return []
    starts, ends = torch.tensor(documents).unbind(1)
    order = (starts - ends).argsort(stable=True)
    steps = []
    for first in range(0, int((ends - starts).max()), chunk):
        order = order[(ends - starts)[order] > first]
        begin, end = starts[order] + first, ends[order]
        length = min(int((end - begin).max()), chunk)
        token_at = begin[:, None] + torch.arange(length)
        inside = (token_at < end[:, None]).flatten()
        token_at = token_at.minimum(end[:, None] - 1).flatten()
        filled, padding = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
        steps.append(Step(order.to(device), length, *(x.to(device) for x in (token_at, filled, padding))))
    return steps


def gather(x: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
    """Return the step's tokens of x of shape (tokens, heads, …) as (documents, heads, length, …), padded with zeros."""
    part = x.index_select(0, step.token_at)
    part.index_fill_(0, step.padding, 0)
    by_head = part.unflatten(0, (step.documents, step.length)).transpose(1, 2)
    return torch.empty(by_head.shape, dtype=dtype, device=x.device).copy_(by_head)


def scatter(x: Tensor, step: Step, out: Tensor) -> None:
    """Write (documents, heads, length, …) to the step's tokens of `out`, (tokens, heads, …)."""
    flat = x.transpose(1, 2).flatten(0, 1).index_select(0, step.filled)
    out.index_copy_(0, step.token_at.index_select(0, step.filled), flat.to(out.dtype))


@functools.lru_cache(maxsize=16)
def future_mask(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix with -∞ above the diagonal and 0 elsewhere."""
    return torch.full((n, n), float("-inf"), dtype=dtype, device=device).triu_(1)
