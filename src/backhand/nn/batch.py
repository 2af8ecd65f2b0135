"""What a pass takes: documents packed behind one another, no padding, no mask; and buffers that its blocks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

TokenLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(supervised tokens,) log-probabilities of a batch, in the order of its positions → the batch's loss, 0-d float64, and
its gradient with respect to each of them, (supervised tokens,)."""


class Entering(NamedTuple):
    """Hidden states that are known already: `states`, (tokens, hidden), enter block `layer`, counted from 0."""

    layer: int
    states: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several documents, concatenated.

    Attributes:
        input_ids: (tokens,) int64.
        labels: (tokens,) int64; `labels[i]` is the next token after position i of the same document,
            or `IGNORE_INDEX` where position i carries no loss. At a document's last position it is a token that
            was left out because nothing could be predicted from it, or `IGNORE_INDEX`.
        document_lengths: tokens of each document, in order, behind the shared prefix.
        shared_prefix: tokens at the front with which every document begins, so that they are computed once; they and
            `document_lengths` sum to `tokens`.
        entering: what the blocks below some layer come to, so that a pass begins there; None to begin at the ids.
    """

    input_ids: Tensor
    labels: Tensor
    document_lengths: tuple[int, ...]
    shared_prefix: int = 0
    entering: Entering | None = None

    def __post_init__(self) -> None:
        if self.shared_prefix + sum(self.document_lengths) != len(self.input_ids):
            raise ValueError(
                f"{len(self.input_ids)} tokens are not a prefix of {self.shared_prefix} and documents of "
                f"{sum(self.document_lengths)}"
            )

    @cached_property
    def supervised_positions(self) -> Tensor:
        """(supervised tokens,) int64: the positions that carry loss."""
        return (self.labels != IGNORE_INDEX).nonzero().squeeze(1)

    @property
    def supervised_tokens(self) -> int:
        """How many positions carry loss."""
        return self.supervised_positions.numel()

    @property
    def attends(self) -> bool:
        """Whether some supervised position has a position before it, so that queries and keys decide anything."""
        return bool((self.positions[self.supervised_positions] > 0).any())

    @cached_property
    def positions(self) -> Tensor:
        """(tokens,) int64, restarting in each document: at 0, or where the shared prefix ends."""
        shared, device = self.shared_prefix, self.input_ids.device
        return torch.cat(
            [torch.arange(shared, device=device)]
            + [torch.arange(shared, shared + n, device=device) for n in self.document_lengths]
        )

    @cached_property
    def reach(self) -> Tensor:
        """(tokens,) int64: how long each token's document is, the shared prefix in it; of the prefix, the longest."""
        shared, device = self.shared_prefix, self.input_ids.device
        lengths = torch.tensor([shared + n for n in self.document_lengths], dtype=torch.int64, device=device)
        own = lengths.repeat_interleave(lengths - shared)
        return torch.cat([own.new_full((shared,), max(self.document_lengths, default=0) + shared), own])

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring documents of equal length as (start token, documents, length), for batched attention calls."""
        return document_runs(self.document_lengths, self.shared_prefix)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        entering = None if self.entering is None else self.entering._replace(states=self.entering.states.to(device))
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device), entering=entering)


def document_runs(document_lengths: tuple[int, ...], start: int = 0) -> tuple[tuple[int, int, int], ...]:
    """Group neighbouring equal lengths: (start token, number of documents, length) each; empty documents vanish."""
    runs: list[tuple[int, int, int]] = []
    for length, group in groupby(document_lengths):
        count = len(list(group))
        if length:
            runs.append((start, count, length))
        start += count * length
    return tuple(runs)


# Elements at whose multiples a buffer in the room begins: whole lines of the caches, whatever the dtype.
_LINE = 64


class Scratch:
    """Buffers that every block's forward fills and leaves behind: n₁ and n₂ ("normed"), p ("product"), o ("attended").

    There is one a name, for a whole pass; what it held is lost as soon as the name is asked for again. If each block
    allocated its own, they would be freed between tensors that are kept for the backward pass, and their gaps in the
    allocator's heap would rarely be filled: a freed gap does not even fit a tensor of its own size, since aligned
    allocations ask for a little more. Over 30 blocks of SmolLM2 with 1,024 tokens in float32 the gaps come to 80 MB of
    900. The head's logits, larger than any gap, would find no place among them: where `reserve` has made room for them
    before the first block, the blocks' buffers stand in it as well.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}  # of the buffers, as last taken
        self._room: Tensor | None = None
        self._taken = 0

    def reserve(self, shape: Sequence[int], like: Tensor) -> None:
        """Make room for a tensor of this shape, which others may use until `let_go`; of `like`'s dtype and device."""
        self._room = torch.empty(math.prod(shape), dtype=like.dtype, device=like.device)

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, of `like`'s dtype and device."""
        view = self._views.get(name)
        if view is not None and view.shape == shape:
            return view
        elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[name] = self._new(elements, like)
        view = self._views[name] = buffer[:elements].view(*shape)
        return view

    def _new(self, elements: int, like: Tensor) -> Tensor:
        end = self._taken + elements
        if self._room is None or end > self._room.numel() or self._room.dtype != like.dtype:
            return torch.empty(elements, dtype=like.dtype, device=like.device)
        found = self._room[self._taken : end]
        self._taken = -(-end // _LINE) * _LINE
        return found

    def let_go(self, *, room: bool = False) -> None:
        """Forget the buffers: whoever takes one next gets a new one; with `room`, what is reserved as well."""
        self._buffers.clear()
        self._views.clear()
        self._taken = 0
        if room:
            self._room = None
