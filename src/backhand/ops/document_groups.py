"""Group packed documents for attention, and copy tokens to a group and back.

Attention is computed for (documents, length) at once. Neighbouring documents of one length are a view of the packed
tokens. Short documents of similar length are copied, and padded with some token of their own after their end. The
padding is hidden from every real query: by causality, or in both directions by a mask. With a ∂L/∂O of zero it adds
nothing to any gradient.

Documents with a common prefix are a tree of segments (`SegmentRun`). The queries of a segment are its own tokens. Its
keys are those of all segments before it on the path from the root, followed by its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.attention_blocks import ALIGNMENT

Span = tuple[int, int]
"""First token and end."""


class SegmentRun(NamedTuple):
    """Neighbouring segments of one length that continue the same segments."""

    start: int  # the first token of the first segment
    number: int  # of segments
    length: int  # of each segment, in tokens
    before: tuple[Span, ...] = ()  # the segments before them in their documents; empty if they begin documents


# Documents up to this length may form one group, if padding adds at most this share of its tokens. In low precision
# their common length is rounded up within the same share: softmax takes twice as long over rows of 55 as of 64.
JOINED_UP_TO_TOKENS = 160
ADDED_SHARE = 0.35
FLOAT32_BYTES = 4


def segments(runs: tuple[SegmentRun, ...]) -> list[tuple[Span, list[int]]]:
    """Return every segment, (first token, end), with the tokens before it in its documents."""
    return [
        ((start + index * length, start + (index + 1) * length), tokens_of(before))
        for start, number, length, before in runs
        for index in range(number)
    ]


def tokens_of(spans: Iterable[Span]) -> list[int]:
    """Return all tokens of the spans, in order."""
    return [token for begin, end in spans for token in range(begin, end)]


def continued_end(runs: tuple[SegmentRun, ...]) -> int:
    """Return the end of the last segment that another segment continues, or 0."""
    return max((run.before[-1][1] for run in runs if run.before), default=0)


class Places(NamedTuple):
    """Row indices that map tokens to places and back; torch reads rows by index far faster than it writes them."""

    of_token: Tensor  # (tokens,) the place of each token
    token_at: Tensor  # (places,) the token at each place; some token of the same document where there is padding
    padding: Tensor  # the places of padding


class Group(NamedTuple):
    """Neighbouring segments that are attended together as (documents, length): `tokens` tokens from `start` on."""

    start: int
    tokens: int
    documents: int
    length: int
    before: tuple[Span, ...]  # the segments before each of them
    places: Places | None  # None if the tokens fill all documents · length places
    keys: Tensor | None  # (documents · (before + length),) each key's token; None if `before` is empty
    lengths: Tensor | None  # (documents,) tokens of each document; None without padding


def groups(runs: tuple[SegmentRun, ...], like: Tensor) -> tuple[Group, ...]:
    """Group the runs: short segments of similar length that continue the same tokens are attended together."""
    return _groups(runs, like.element_size() < FLOAT32_BYTES, like.device)


# Cached, since every layer needs the same groups in forward and backward; a few micro-batches alternate at most.
@functools.lru_cache(maxsize=4)
def _groups(runs: tuple[SegmentRun, ...], aligned: bool, device: torch.device) -> tuple[Group, ...]:
    joined: list[list[SegmentRun]] = []
    for run in runs:
        if joined and joined[-1][0].before == run.before and _may_join(joined[-1], run):
            joined[-1].append(run)
        else:
            joined.append([run])
    return tuple(_group(neighbours, aligned, device) for neighbours in joined)


def _tokens(runs: Sequence[SegmentRun]) -> int:
    return sum(run.number * run.length for run in runs)


def _may_join(neighbours: list[SegmentRun], run: SegmentRun) -> bool:
    runs = [*neighbours, run]
    longest, documents = max(run.length for run in runs), sum(run.number for run in runs)
    return longest <= JOINED_UP_TO_TOKENS and documents * longest <= (1 + ADDED_SHARE) * _tokens(runs)


def _group(runs: Sequence[SegmentRun], aligned: bool, device: torch.device) -> Group:
    """Return one group, with its documents' common length aligned if that adds little padding."""
    start, documents, tokens = runs[0].start, sum(run.number for run in runs), _tokens(runs)
    before = tokens_of(runs[0].before)
    length = max(run.length for run in runs)
    rounded = -(-(len(before) + length) // ALIGNMENT) * ALIGNMENT - len(before)
    if aligned and length <= JOINED_UP_TO_TOKENS and documents * rounded <= (1 + ADDED_SHARE) * tokens:
        length = rounded
    token_at, places, lengths = torch.arange(tokens, device=device), None, None
    if tokens != documents * length:
        lengths = torch.tensor([run.length for run in runs for _ in range(run.number)], device=device)
        inside = (torch.arange(length, device=device) < lengths[:, None]).flatten()
        token_at = inside.cumsum(0) - 1
        places = Places(inside.nonzero().squeeze(1), token_at, (~inside).nonzero().squeeze(1))
    keys = None
    if before:
        seen = torch.tensor(before, device=device).expand(documents, -1)
        keys = torch.cat([seen, start + token_at.view(documents, length)], dim=1).flatten()
    return Group(start, tokens, documents, length, runs[0].before, places, keys, lengths)


def gather_documents(x: Tensor, group: Group, *, zero_padding: bool = False) -> Tensor:
    """Return the group's part of x, (documents, length, heads, head_dim): a view, or a copy if there is padding.

    No real query sees the padding. For q, k and v it may hold any finite numbers, but in a gradient it must be zero.
    """
    part = x[group.start : group.start + group.tokens]
    if group.places is not None:
        part = part.index_select(0, group.places.token_at)
        if zero_padding:
            part.index_fill_(0, group.places.padding, 0)
    documents: Tensor = part.unflatten(0, (group.documents, group.length))
    return documents


def gather_keys(x: Tensor, group: Group) -> Tensor:
    """Return k or v of what the group's queries may see, (documents, before + length, key/value heads, head_dim)."""
    if group.keys is None:
        return gather_documents(x, group)
    documents: Tensor = x.index_select(0, group.keys).unflatten(0, (group.documents, -1))
    return documents


def scatter_documents(x: Tensor, group: Group, out: Tensor) -> None:
    """Write (documents, length, heads, head_dim) to the group's part of `out`, without the padding."""
    part = out[group.start : group.start + group.tokens]
    if group.places is None:
        part.unflatten(0, (group.documents, group.length)).copy_(x)
    else:
        torch.index_select(x.flatten(0, 1), 0, group.places.of_token, out=part)


def scatter_key_grads(x: Tensor, group: Group, out: Tensor, shares: Tensor) -> None:
    """Write the gradient of `gather_keys` to `out`, and add the part of the segments before the group to `shares`.

    Args:
        x: (documents, before + length, key/value heads, head_dim).
        out: (tokens, key/value heads, head_dim).
        shares: (tokens of continued segments, key/value heads, head_dim), float32 or wider.
    """
    place = 0
    for begin, end in group.before:
        shares[begin:end] += x[:, place : place + end - begin].sum(0, dtype=shares.dtype)
        place += end - begin
    scatter_documents(x[:, place:], group, out)
