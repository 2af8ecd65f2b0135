"""The micro-batches of a run as far as its memory depends on them, for any number of rows in one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from backhand.data.packing import Forest, micro_batches, round_size
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run under some number of rows.

    Attributes:
        tokens, supervised_tokens: of the largest one, at most.
        lengths: of the largest one's segments; a filler counts as well.
        parents: of these segments, as in `PackedBatch`.
        mean_tokens: of all of them.
        micro_batches: how many they are, of the steps that were looked at.
        sizes: how many numbers of tokens, or of supervised tokens where these are more, they come in.
        gradient_copies: buffers that adding up the micro-batches of a step takes.
        neutral_tokens: of the longest neutral text; 0 where forgetting is not measured.
        sampled_rows, sampled_tokens: answers that are sampled at once, and tokens of the longest with its prompt.
    """

    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    mean_tokens: float = 0.0
    micro_batches: int = 1
    sizes: int = 1
    gradient_copies: int = 0
    neutral_tokens: int = 0
    sampled_rows: int = 0
    sampled_tokens: int = 0

    def cut(self, limit: int) -> StepShape:
        """The longest documents that come to no more than so many tokens, or a part of the longest one.

        Of documents that share segments, all of these, each as much shorter.
        """
        if self.tokens <= limit:
            return self
        if self.parents and len(self.lengths) <= limit:
            lengths = [max(1, length * (limit - len(self.lengths)) // self.tokens) for length in self.lengths]
            lengths[0] += limit - sum(lengths)
            supervised = min(self.supervised_tokens, limit)
            return replace(self, tokens=limit, supervised_tokens=supervised, lengths=tuple(lengths))
        left, taken = limit, list[int]()
        for length in sorted(self.lengths or (self.tokens,), reverse=True):
            if length <= left:
                taken.append(length)
                left -= length
        lengths = sorted(taken) or [left]
        tokens = sum(lengths)
        supervised = min(self.supervised_tokens, tokens)
        return replace(self, tokens=tokens, supervised_tokens=supervised, lengths=tuple(lengths), parents=())

    def batch(self, vocab_size: int, device: torch.device) -> PackedBatch:
        """Such a micro-batch, of tokens one like another; its last positions carry loss."""
        ids = torch.arange(self.tokens, device=device) % vocab_size
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[self.tokens - min(self.supervised_tokens, self.tokens) :] = 0
        return PackedBatch(ids, labels, self.lengths or (self.tokens,), self.parents)

    def kernels_bytes(self, left: int) -> int:
        """Of all kernels that are compiled, where a micro-batch of a size of its own leaves so many bytes."""
        return min(self.sizes * left, kept_kernels() * _KERNEL_BYTES)


_KERNEL_BYTES = 1_200_000
"""Of a kernel that oneDNN keeps, at most, with what those leave behind that were compiled before in its place."""
_KEPT = 1024
"""oneDNN's own limit, where the environment names no other."""


def kept_kernels() -> int:
    """How many compiled kernels oneDNN keeps."""
    stated = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    return int(stated) if stated.isdecimal() else _KEPT


def gradient_copies(micro_batches: int, processes: int, *, ordered: bool) -> int:
    """How many buffers as large as the gradient a process holds beside it to add it up, at most.

    See `step.OneProcessSum`, and `gradient_sum` for several processes. What is added up in float64 counts twice.
    """
    if processes == 1:
        return 2 * int(micro_batches > 1)
    own = -(-micro_batches // processes)
    return 2 * own + 3 if ordered else 1


@dataclass(frozen=True)
class Rows:
    """Rows by their numbers.

    Attributes:
        lengths: tokens of each that enter the model.
        supervised: of each.
        forest: the segments of these rows' micro-batch; None where nothing is shared and each row is one.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    forest: Callable[[Sequence[int]], Forest] | None = None


NO_ROWS = Rows((), ())


def largest_shapes(
    steps: Sequence[Sequence[int]],
    rows: Rows,
    rows_options: Iterable[int],
    *,
    held_out: Rows = NO_ROWS,
    neutral: Sequence[int] = (),
) -> dict[int, StepShape]:
    """For each number of rows per micro-batch, what micro-batches these steps will make.

    Args:
        steps: row numbers of each step.
        rows: to train on.
        rows_options: numbers of rows to look at.
        held_out: rows that are measured in between.
        neutral: tokens of the neutral texts, which are measured one by one.
    """
    return {count: _shape(steps, rows, count, held_out, neutral) for count in rows_options}


def _shape(steps: Iterable[Sequence[int]], rows: Rows, count: int, held_out: Rows, neutral: Sequence[int]) -> StepShape:
    trained = [one for step in steps for one in _cut(step, rows, count)]
    every = [*trained, *_cut(range(len(held_out.lengths)), held_out, count)]
    largest = max(trained, key=lambda one: one.tokens)
    return StepShape(
        tokens=largest.tokens,
        supervised_tokens=max(one.supervised_tokens for one in trained),
        lengths=largest.lengths,
        parents=largest.parents,
        mean_tokens=sum(one.tokens for one in trained) / len(trained),
        micro_batches=len(trained),
        sizes=max(len({*(one.tokens for one in every), *neutral}), len({one.supervised_tokens for one in every})),
        neutral_tokens=max(neutral, default=0),
    )


class _MicroBatch(NamedTuple):
    """Tokens, those supervised, and the segments; a filler counts as well."""

    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...]
    parents: tuple[int, ...]


def _cut(step: Sequence[int], rows: Rows, count: int) -> list[_MicroBatch]:
    """The micro-batches of a step, of so many rows each."""
    cut = []
    for group in micro_batches(step, rows.lengths, max_rows=count):
        lengths, parents = tuple(sorted(rows.lengths[row] for row in group)), tuple[int, ...]()
        if rows.forest is not None:
            lengths, parents, *_ = rows.forest(group)
        tokens = sum(lengths)
        filler = round_size(tokens) - tokens
        supervised = min(sum(rows.supervised[row] for row in group), tokens)
        if filler:
            lengths, parents = (*lengths, filler), (*parents, -1) if parents else ()
        cut.append(_MicroBatch(tokens + filler, supervised, lengths, parents))
    return cut
