"""Divide documents into segments, so that a prefix that several documents share is computed once.

Attention is causal, so documents that start with the same tokens have the same hidden states there. A micro-batch
contains those tokens once, as a segment that other segments continue. Three documents with a common system prompt S, of
which two have a common prompt P as well. Small letters are supervised tokens, and a dot is a position without loss:

    document 0   S S S S P P P a a          tokens    S S S S | P P | P a | P b b | Q Q
    document 1   S S S S P P P b b b        labels    . . . . | . . | a a | b b b | . c
    document 2   S S S S Q Q c              segment      0    |  1  |  2  |   3   |  4
                                            parent      -1    |  0  |  1  |   1   |  0

    0 ──┬── 1 ──┬── 2    end of document 0
        │       └── 3    end of document 1
        └── 4            end of document 2

A document is the path from a root to its last segment. Positions are shared if their tokens and their labels are equal.
The third P has a different label in documents 0 and 1, so each of them has its own. The last token of a document is
only a label, because nothing is predicted from it.

Documents are int32 arrays of token ids in which the id of a supervised token is stored as ~id
(`data.stored_examples`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from backhand.nn.batch import IGNORE_INDEX

SignedTokens = npt.NDArray[np.int32]
"""(tokens,) token ids of one document; the id of a supervised token is stored as ~id."""

MIN_SAVED_TOKENS = 32
"""Smallest number of saved tokens for which a segment is created. A segment costs copies of keys and values, and
gradients to add up."""


class Forest(NamedTuple):
    """Documents as segments, in the order of a `PackedBatch`.

    Attributes:
        lengths: number of tokens per segment.
        parents: the segment that each segment continues, or -1; empty if no segment continues another.
        ends: the last segment of each document, or -1 for a document without positions.
        sources: the tokens of each segment as (document, first position, end position).
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    ends: tuple[int, ...]
    sources: list[tuple[int, int, int]]


def prefix_forest(documents: Sequence[SignedTokens], lengths: Sequence[int], *, share: bool) -> Forest:
    """Divide documents into segments.

    The documents of a group are sorted, so that documents with a common prefix are neighbours. A prefix of some
    neighbours becomes a segment if it saves at least `MIN_SAVED_TOKENS`: the number of its tokens that are in no
    earlier segment, times the number of these documents minus one.

    Args:
        documents: tokens of each document, at least one more than its `lengths`.
        lengths: number of positions per document that enter the model.
        share: False to give each document a segment of its own.
    """
    present = [number for number, length in enumerate(lengths) if length]
    groups = prefix_groups(documents, present) if share else []
    single = sorted({*present}.difference(*groups), key=lambda number: (lengths[number], number))
    segments = [(number, 0, lengths[number]) for number in single]  # (document, first position, end position)
    parents = [-1] * len(segments)
    end_of = {number: segment for segment, number in enumerate(single)}
    for group in groups:
        order = sorted(group, key=lambda number: _sort_key(documents[number][: lengths[number] + 1]))
        pairs = itertools.pairwise(order)
        # common[i]: number of positions that documents i - 1 and i of `order` share
        common = [0, *(shared_prefix_length(documents[a], documents[b], min(lengths[a], lengths[b])) for a, b in pairs)]
        # Ranges [first, last) of `order` whose first `done` positions are in segments that end with `parent`.
        ranges = [(0, len(order), 0, -1)]
        while ranges:
            first, last, done, parent = ranges.pop()
            depth = min(common[first + 1 : last], default=lengths[order[first]])
            one_document = last - first == 1
            if (one_document and depth > done) or worth_sharing(depth - done, last - first):
                parents.append(parent)
                segments.append((min(order[first:last]), done, depth))
                done, parent = depth, len(segments) - 1
            if one_document:
                end_of[order[first]] = parent
                continue
            cuts = [first, *(place for place in range(first + 1, last) if common[place] <= depth), last]
            ranges += [(start, end, done, parent) for start, end in itertools.pairwise(cuts)]
    return _in_batch_order(segments, parents, [end_of.get(number, -1) for number in range(len(documents))])


def worth_sharing(tokens: int, documents: int) -> bool:
    """Return True if storing this number of tokens once, for all these documents, saves enough."""
    return tokens * (documents - 1) >= MIN_SAVED_TOKENS


def prefix_groups(documents: Sequence[SignedTokens], numbers: Sequence[int]) -> list[list[int]]:
    """Group documents whose first N tokens are equal, where N is the shortest prefix worth sharing."""
    if len(numbers) < 2:
        return []
    shortest = -(-MIN_SAVED_TOKENS // (len(numbers) - 1))
    groups: dict[bytes, list[int]] = {}
    for number in numbers:
        groups.setdefault(token_ids(documents[number][:shortest]).tobytes(), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def split_by_prefix(documents: Sequence[SignedTokens], count: int) -> list[list[int]]:
    """Divide the numbers of documents into up to `count` groups, between which the common prefixes are shortest.

    Documents that begin with one of `count` long texts are divided by these texts. Neighbours that have half of their
    tokens in common stay together, if there are fewer texts.
    """
    order = sorted(range(len(documents)), key=lambda number: documents[number].tobytes())
    pairs = [(documents[one], documents[other]) for one, other in itertools.pairwise(order)]
    common = [shared_prefix_length(one, other, min(len(one), len(other)) - 1) for one, other in pairs]
    different = [place for place, (one, other) in enumerate(pairs) if 2 * common[place] < min(len(one), len(other))]
    shortest = sorted(different, key=common.__getitem__)[: count - 1]
    cuts = [0, *sorted(place + 1 for place in shortest), len(order)]
    return [order[first:last] for first, last in itertools.pairwise(cuts)]


def shared_prefix_length(one: SignedTokens, other: SignedTokens, longest: int) -> int:
    """Return the number of leading positions, at most `longest`, with equal tokens and labels."""
    different = mismatch(one[: longest + 1], other[: longest + 1])
    return int(different.argmax()) if different.any() else longest


def mismatch(one: SignedTokens, other: SignedTokens) -> npt.NDArray[np.bool_]:
    """Compare two arrays of documents, (…, positions + 1), position by position.

    Returns:
        (…, positions), True where the tokens differ, or the labels do and at least one of them is supervised.
    """
    labels_differ = (one != other) & ((one < 0) | (other < 0))
    different: npt.NDArray[np.bool_] = (token_ids(one) != token_ids(other))[..., :-1] | labels_differ[..., 1:]
    return different


def inputs_and_labels(tokens: SignedTokens) -> tuple[SignedTokens, SignedTokens]:
    """Return input ids and labels, (positions,) each, of a document with one token more.

    The label of a position is the next token if that token is supervised, otherwise `IGNORE_INDEX`.
    """
    return token_ids(tokens[:-1]), np.where(tokens[1:] < 0, ~tokens[1:], IGNORE_INDEX)


def token_ids(tokens: SignedTokens) -> SignedTokens:
    """Return the token ids without the mark of supervision."""
    return np.where(tokens < 0, ~tokens, tokens)


def _sort_key(tokens: SignedTokens) -> bytes:
    """Return the token and label of each position as bytes. Documents with a common prefix sort together."""
    return np.stack(inputs_and_labels(tokens), axis=1).tobytes()


def _in_batch_order(segments: list[tuple[int, int, int]], parents: list[int], ends: list[int]) -> Forest:
    """Sort segments in preorder: after a parent its children, first those that end a document, shortest first."""
    children: dict[int, list[int]] = {}
    for number, parent in enumerate(parents):
        children.setdefault(parent, []).append(number)

    def rank(number: int) -> tuple[bool, int, int]:
        document, start, end = segments[number]
        return number in children, end - start, document

    order: list[int] = []
    stack = sorted(children.get(-1, ()), key=rank, reverse=True)
    while stack:
        number = stack.pop()
        order.append(number)
        stack += sorted(children.get(number, ()), key=rank, reverse=True)
    place_of = {number: place for place, number in enumerate(order)} | {-1: -1}
    sources = [segments[number] for number in order]
    return Forest(
        tuple(end - start for _, start, end in sources),
        tuple(place_of[parents[number]] for number in order) if len(children) > 1 else (),
        tuple(place_of[end] for end in ends),
        sources,
    )
