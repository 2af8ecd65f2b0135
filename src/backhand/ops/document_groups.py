"""Which documents attention takes together, and how they get there from the packed tokens and back.

Attention is computed for (documents, length) at once. Neighbouring documents of one length are a view of the packed
tokens; short ones of about one length are copied, each with some token of its own repeated behind its end. Causality
hides what stands there from every real query, and with a ∂L/∂O of zero it adds nothing to any gradient.

Documents that begin alike are a tree of segments (`Run`): the queries of a segment are its own tokens, its keys those
of all segments before it on the way from the root, then its own.
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


class Run(NamedTuple):
    """Neighbouring segments of one length that continue the same tokens; documents where none continues them."""

    start: int  # the first one's first token
    number: int  # how many they are
    length: int  # tokens of each
    # what stands before them in their documents, segment by segment; empty where documents begin
    before: tuple[Span, ...] = ()


# Groups of fewer tokens go to torch's kernels.
FEW_TOKENS = 128
# Documents up to this length may be joined in a group, if at most this share of its tokens is added behind their ends.
# In low precision their common length is rounded up likewise: softmax takes twice as long over rows of 55 as of 64.
JOINED_UP_TO_TOKENS = 160
ADDED_SHARE = 0.35
FLOAT32_BYTES = 4


def segments(runs: tuple[Run, ...]) -> list[tuple[Span, list[int]]]:
    """Every segment, (first token, end), with the tokens before it in its documents."""
    return [
        ((start + index * length, start + (index + 1) * length), tokens_of(before))
        for start, number, length, before in runs
        for index in range(number)
    ]


def tokens_of(spans: Iterable[Span]) -> list[int]:
    """All of their tokens, in order."""
    return [token for begin, end in spans for token in range(begin, end)]


def continued_end(runs: tuple[Run, ...]) -> int:
    """The end of the last segment that another one continues; 0 where none is."""
    return max((run.before[-1][1] for run in runs if run.before), default=0)


class Places(NamedTuple):
    """Which token lies where, as rows to copy: torch copies rows by index far faster than it writes to indices."""

    of_token: Tensor  # (tokens,) the place of each token
    token_at: Tensor  # (places,) the token at each place, and behind a document's end some token of it
    behind: Tensor  # (places without a token,) these places


class Group(NamedTuple):
    """Neighbouring segments attended together as (documents, length); what they hold is `tokens` from `start` on."""

    start: int
    tokens: int
    documents: int
    length: int
    before: tuple[Span, ...]  # what stands before each of them
    places: Places | None  # where they do not fill documents · length places; else None
    keys: Tensor | None  # (documents · (before + length),) the token of each key where something stands before


def groups(runs: tuple[Run, ...], like: Tensor, kernels: bool = True) -> tuple[Group, ...]:
    """The runs, with short ones of about one length behind the same tokens together where blocks attend them.

    kernels: whether torch's kernels can attend: they know neither a cap nor sinks.
    """
    return _groups(runs, _few_tokens(like, kernels), like.element_size() < FLOAT32_BYTES, like.device)


# Every layer asks for the same groups, forward and backward; a few micro-batches in turn at most.
@functools.lru_cache(maxsize=4)
def _groups(runs: tuple[Run, ...], few_tokens: int, aligned: bool, device: torch.device) -> tuple[Group, ...]:
    joined: list[list[Run]] = []
    for run in runs:
        if joined and joined[-1][0].before == run.before and _may_join(joined[-1], run):
            joined[-1].append(run)
        else:
            joined.append([run])
    found: list[Group] = []
    for neighbours in joined:
        if neighbours[0].before or _tokens(neighbours) >= few_tokens:
            found.append(_group(neighbours, aligned, device))
        else:
            found.extend(_group([run], False, device) for run in neighbours)
    return tuple(found)


def _tokens(runs: Sequence[Run]) -> int:
    return sum(run.number * run.length for run in runs)


def _may_join(neighbours: list[Run], run: Run) -> bool:
    runs = [*neighbours, run]
    longest, documents = max(run.length for run in runs), sum(run.number for run in runs)
    return longest <= JOINED_UP_TO_TOKENS and documents * longest <= (1 + ADDED_SHARE) * _tokens(runs)


def _group(runs: Sequence[Run], aligned: bool, device: torch.device) -> Group:
    """One group, its documents' common length aligned where that adds little."""
    start, documents, tokens = runs[0].start, sum(run.number for run in runs), _tokens(runs)
    before = tokens_of(runs[0].before)
    length = max(run.length for run in runs)
    rounded = -(-(len(before) + length) // ALIGNMENT) * ALIGNMENT - len(before)
    if aligned and length <= JOINED_UP_TO_TOKENS and documents * rounded <= (1 + ADDED_SHARE) * tokens:
        length = rounded
    token_at, places = torch.arange(tokens, device=device), None
    if tokens != documents * length:
        lengths = torch.tensor([run.length for run in runs for _ in range(run.number)], device=device)
        inside = (torch.arange(length, device=device) < lengths[:, None]).flatten()
        token_at = inside.cumsum(0) - 1
        places = Places(inside.nonzero().squeeze(1), token_at, (~inside).nonzero().squeeze(1))
    keys = None
    if before:
        seen = torch.tensor(before, device=device).expand(documents, -1)
        keys = torch.cat([seen, start + token_at.view(documents, length)], dim=1).flatten()
    return Group(start, tokens, documents, length, runs[0].before, places, keys)


def uses_blocks(q: Tensor, group: Group, kernels: bool = True) -> bool:
    """Whether a group is attended by blocks of queries, or by torch's kernels: see `ops.attention`."""
    return group.keys is not None or group.tokens >= _few_tokens(q, kernels)


def _few_tokens(q: Tensor, kernels: bool) -> int:
    """From how many tokens on blocks are the faster way, or the only one."""
    if not kernels:
        return 0
    kernels_are_slow = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return 0 if kernels_are_slow or q.device.type != "cpu" else FEW_TOKENS


def together(x: Tensor, group: Group, *, zero_behind: bool = False) -> Tensor:
    """The group's part of x, (documents, length, heads, head_dim): a view, or a copy where places stay empty.

    Behind a document's end stand numbers that no real query sees: any finite ones do for q, k and v, but a gradient
    has to be zero there.
    """
    part = x[group.start : group.start + group.tokens]
    if group.places is not None:
        part = part.index_select(0, group.places.token_at)
        if zero_behind:
            part.index_fill_(0, group.places.behind, 0)
    documents: Tensor = part.unflatten(0, (group.documents, group.length))
    return documents


def kv_source(x: Tensor, group: Group) -> Tensor:
    """k or v of all that the group's queries may see, (documents, before + length, key/value heads, head_dim)."""
    if group.keys is None:
        return together(x, group)
    documents: Tensor = x.index_select(0, group.keys).unflatten(0, (group.documents, -1))
    return documents


def scatter_documents(x: Tensor, group: Group, out: Tensor) -> None:
    """Write (documents, length, heads, head_dim) into the group's part of `out`, without what lies behind the ends."""
    part = out[group.start : group.start + group.tokens]
    if group.places is None:
        part.unflatten(0, (group.documents, group.length)).copy_(x)
    else:
        torch.index_select(x.flatten(0, 1), 0, group.places.of_token, out=part)


def scatter_key_grads(x: Tensor, group: Group, out: Tensor, shares: Tensor) -> None:
    """The same for a gradient of `kv_source`; the part of what stands before is added to `shares`.

    Args:
        x: (documents, before + length, key/value heads, head_dim).
        out: (tokens, key/value heads, head_dim).
        shares: (tokens that others continue, key/value heads, head_dim), float32 or wider, where they add up.
    """
    place = 0
    for begin, end in group.before:
        shares[begin:end] += x[:, place : place + end - begin].sum(0, dtype=shares.dtype)
        place += end - begin
    scatter_documents(x[:, place:], group, out)
