"""Steps of the gated delta rule: which chunks of which documents are computed together, and how tokens are copied.

The chunks of a document follow one another, but documents are independent. Step i takes chunk i of every document that
has one. Documents are sorted by length, longest first, so that the documents with a chunk in the next step are the
first ones of this step. Places after a document's end hold zeros, which change neither its state nor any gradient.

If documents begin alike, steps are made per level of their trees: the segments with the same number of segments before
them.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.document_groups import Places, SegmentRun, Span

CHUNK_TOKENS = 64


class GatedDeltaRuleSaved(NamedTuple):
    """q, k (tokens, key heads, key width); v (tokens, value heads, value width); decay, beta (tokens, value heads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    runs: tuple[SegmentRun, ...]
    chunk: int = CHUNK_TOKENS


class GatedDeltaRuleGrads(NamedTuple):
    """d_q, d_k, d_v, d_decay, d_beta in the shapes of the inputs."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    d_decay: Tensor
    d_beta: Tensor


class Step(NamedTuple):
    """One chunk each of several documents, (documents, length)."""

    order: Tensor  # the indices of the documents in their level, longest first
    documents: int
    length: int
    start: int  # the first token of the first chunk
    # The distance from there to the first token of the next chunk. If chunks are full and evenly spaced, for example in
    # documents of one length, the step is a view of the tokens.
    stride: int
    places: Places | None  # None if the step is a view


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


def _steps_of(documents: list[tuple[int, int]], chunk: int, device: torch.device) -> list[Step]:
    order = sorted(range(len(documents)), key=lambda number: documents[number][0] - documents[number][1])
    steps: list[Step] = []
    longest = max((stop - start for start, stop in documents), default=0)
    for first in range(0, longest, chunk):
        taking = [number for number in order if documents[number][1] - documents[number][0] > first]
        starts = [documents[number][0] + first for number in taking]
        ends = [documents[number][1] for number in taking]
        length = min(max(end - start for start, end in zip(starts, ends, strict=True)), chunk)
        strides = {after - before for before, after in itertools.pairwise(starts)}
        full = all(end - start >= length for start, end in zip(starts, ends, strict=True))
        places = None
        if not full or len(strides) > 1 or min(strides, default=1) < 0:
            places = _places(torch.tensor(starts), torch.tensor(ends), length, device)
        numbers = torch.tensor(taking, dtype=torch.int64, device=device)
        steps.append(Step(numbers, len(taking), length, starts[0], min(strides, default=0), places))
    return steps


def _places(starts: Tensor, ends: Tensor, length: int, device: torch.device) -> Places:
    token_at = starts[:, None] + torch.arange(length)
    inside = (token_at < ends[:, None]).flatten()
    token_at = token_at.minimum(ends[:, None] - 1).flatten()
    filled, padding = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
    return Places(*(x.to(device) for x in (filled, token_at, padding)))


def _view(x: Tensor, step: Step) -> Tensor:
    """View the step's tokens of x (tokens, heads, …) as (documents, length, heads, …)."""
    sizes = (step.documents, step.length, *x.shape[1:])
    offset = x.storage_offset() + step.start * x.stride(0)
    return x.as_strided(sizes, (step.stride * x.stride(0), *x.stride()), offset)


def gather(x: Tensor, step: Step, out: Tensor) -> None:
    """Write the step's tokens of x, (tokens, heads, …), to `out` (documents, heads, length, …), padded with zeros."""
    if step.places is None:
        out.copy_(_view(x, step).transpose(1, 2))
        return
    part = x.index_select(0, step.places.token_at)
    part.index_fill_(0, step.places.padding, 0)
    out.copy_(part.unflatten(0, (step.documents, step.length)).transpose(1, 2))


def scatter(x: Tensor, step: Step, out: Tensor) -> None:
    """Write (documents, heads, length, …) to the step's tokens of `out`, (tokens, heads, …)."""
    if step.places is None:
        _view(out, step).copy_(x.transpose(1, 2))
        return
    filled = step.places.of_token
    flat = x.transpose(1, 2).flatten(0, 1).index_select(0, filled)
    out.index_copy_(0, step.places.token_at.index_select(0, filled), flat.to(out.dtype))
