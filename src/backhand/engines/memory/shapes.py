"""The shapes of a run's largest micro-batches, which determine its memory, for several numbers of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from backhand.data.packing import RowPacker
from backhand.data.prefix_forest import MIN_SAVED_TOKENS
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, bucket_size


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run with a given number of rows."""

    # tokens, supervised_tokens: upper bounds for the largest micro-batch
    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...] = ()  # number of tokens per segment of the largest micro-batch, including padding
    parents: tuple[int, ...] = ()  # parents of these segments, see `PackedBatch`
    mean_tokens: float = 0.0  # mean number of tokens per micro-batch in the first steps
    sizes: int = 1  # number of different sizes of micro-batches, in tokens or in supervised tokens
    micro_batches: int = 1  # largest number of micro-batches of a step
    # number of additional buffers of the adapter's size, for summing the gradients of micro-batches and for averages
    adapter_copies: int = 0
    neutral_tokens: int = 0  # number of tokens of the longest neutral text; 0 if forgetting is not measured
    # sampled_rows, sampled_tokens: number of answers that are sampled together, and of their tokens, prompts once
    sampled_rows: int = 0
    sampled_tokens: int = 0
    teacher_tokens: int = 0  # number of tokens of the largest pass of the teacher in distillation; 0 without a teacher

    def cut(self, limit: int) -> StepShape:
        """Return the longest documents that have at most `limit` tokens together, or a part of the longest document.

        If documents share segments, keep all segments and as much of the longest document as possible, since attention
        saves more of long documents. Shorten the segments of this document by the same factor, and all others too.
        """
        if self.tokens <= limit:
            return self
        if self.parents and len(self.lengths) <= limit:
            longest = self._longest_document()
            others = [i for i in range(len(self.lengths)) if i not in longest]
            lengths = [1] * len(self.lengths)
            remaining = limit - len(self.lengths)
            for segments in (longest, others):
                more = sum(self.lengths[i] for i in segments) - len(segments)
                part = min(remaining, more)
                shares = [(self.lengths[i] - 1) * part // max(more, 1) for i in segments]
                if segments:
                    shares[0] += part - sum(shares)
                for i, share in zip(segments, shares, strict=True):
                    lengths[i] += share
                remaining -= part
            supervised = min(self.supervised_tokens, limit)
            return replace(self, tokens=limit, supervised_tokens=supervised, lengths=tuple(lengths))
        remaining, taken = limit, list[int]()
        longest_first = sorted(self.lengths or (self.tokens,), reverse=True)
        for length in [min(longest_first[0], limit), *longest_first[1:]]:
            if length <= remaining:
                taken.append(length)
                remaining -= length
        lengths = sorted(taken)
        tokens = sum(lengths)
        supervised = min(self.supervised_tokens, tokens)
        return replace(self, tokens=tokens, supervised_tokens=supervised, lengths=tuple(lengths), parents=())

    def _longest_document(self) -> list[int]:
        """Return the segments of the longest document, from its last segment to its first."""
        ends: list[int] = []
        for length, parent in zip(self.lengths, self.parents, strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        segment, segments = ends.index(max(ends)), list[int]()
        while segment >= 0:
            segments.append(segment)
            segment = self.parents[segment]
        return segments

    def batch(self, vocab_size: int, device: torch.device) -> PackedBatch:
        """Return a micro-batch of this shape with arbitrary tokens. Its last positions are supervised."""
        ids = torch.arange(self.tokens, device=device) % vocab_size
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[self.tokens - min(self.supervised_tokens, self.tokens) :] = 0
        return PackedBatch(ids, labels, self.lengths or (self.tokens,), self.parents)


def gradient_copies(micro_batches: int, processes: int, *, ordered: bool) -> int:
    """Return the largest number of additional buffers of the gradient's size that a process needs to sum gradients.

    `distributed.gradient_sums` allocates them. A float64 buffer counts twice.
    """
    if processes == 1:
        return 2 * int(micro_batches > 1)
    per_process = -(-micro_batches // processes)
    return 2 * per_process + 3 if ordered else 1


def largest_shapes(
    steps: Iterable[Sequence[int]], packer: RowPacker, rows_options: Iterable[int]
) -> dict[int, StepShape]:
    """Return the shape of the steps' micro-batches for each number of rows per micro-batch.

    All micro-batches of the first steps are packed, and means and counts are over these. For a later micro-batch, an
    upper bound of its tokens is computed first, with the prefix of all rows counted once. It is packed only if this
    bound or its supervised tokens exceed the largest so far.

    Args:
        steps: row numbers of each step.
        packer: the rows.
        rows_options: the numbers of rows per micro-batch.
    """
    cut: dict[int, list[StepShape]] = {count: [] for count in rows_options}
    later: dict[int, list[StepShape]] = {count: [] for count in cut}
    largest, most_groups = dict.fromkeys(cut, (0, 0)), dict.fromkeys(cut, 1)
    for number, step in enumerate(steps):
        for count, shapes in cut.items():
            groups = packer.micro_batches(step, count)
            most_groups[count] = max(most_groups[count], len(groups))
            for group in groups:
                shared = (len(group) - 1) * packer.common_prefix
                most = packer.tokens(group) - (shared if shared >= MIN_SAVED_TOKENS else 0)
                tokens, supervised = largest[count]
                more = bucket_size(most) > tokens or packer.supervised_tokens(group) > supervised
                if number < _STEPS_PACKED or more:
                    lengths, parents, *_ = packer.forest(group)
                    if padding := bucket_size(sum(lengths)) - sum(lengths):
                        lengths, parents = (*lengths, padding), (*parents, -1) if parents else ()
                    targets = min(packer.supervised_tokens(group), sum(lengths) - padding)
                    shape = StepShape(sum(lengths), targets, lengths, parents)
                    (shapes if number < _STEPS_PACKED else later[count]).append(shape)
                    largest[count] = max(tokens, shape.tokens), max(supervised, shape.supervised_tokens)
    return {
        count: replace(
            max([*shapes, *later[count]], key=lambda one: one.tokens),
            supervised_tokens=largest[count][1],
            mean_tokens=sum(one.tokens for one in shapes) / len(shapes),
            micro_batches=most_groups[count],
            sizes=_OTHER_SIZES
            + max(len({one.tokens for one in shapes}), len({one.supervised_tokens for one in shapes})),
        )
        for count, shapes in cut.items()
    }


_STEPS_PACKED = 1000
_OTHER_SIZES = 2
"""Number of further sizes, of held-out rows and neutral texts."""
