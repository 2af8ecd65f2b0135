"""The micro-batches of a run as far as its memory depends on them, for any number of rows in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from backhand.data.packing import RowPacker, micro_batches
from backhand.data.prefix_forest import MIN_SAVED_TOKENS
from backhand.nn.batch import IGNORE_INDEX, PackedBatch, bucket_size


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run under some number of rows."""

    # tokens, supervised_tokens: of the largest one, at most
    tokens: int
    supervised_tokens: int
    lengths: tuple[int, ...] = ()  # of the largest one's segments; a filler counts as well
    parents: tuple[int, ...] = ()  # of these segments, as in `PackedBatch`
    mean_tokens: float = 0.0  # of all of them, or of those of the first steps
    sizes: int = 1  # how many numbers of tokens, or of supervised tokens where these are more, they come in
    gradient_copies: int = 0  # buffers that adding up the micro-batches of a step takes
    neutral_tokens: int = 0  # of the longest neutral text; 0 where forgetting is not measured
    # sampled_rows, sampled_tokens: answers that are sampled at once, and their tokens, those of a prompt once
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


def gradient_copies(micro_batches: int, processes: int, *, ordered: bool) -> int:
    """Return the largest number of additional buffers of the gradient's size that a process needs to sum gradients.

    `distributed.gradient_sums` allocates them. A float64 buffer counts twice.
    """
    if processes == 1:
        return 2 * int(micro_batches > 1)
    own = -(-micro_batches // processes)
    return 2 * own + 3 if ordered else 1


def largest_shapes(
    steps: Iterable[Sequence[int]], packer: RowPacker, rows_options: Iterable[int]
) -> dict[int, StepShape]:
    """For each number of rows per micro-batch, what micro-batches these steps will make.

    Those of the first steps are laid out, and what is counted of all is counted of them. A later one has at most the
    tokens of its rows, with what all rows begin with once: it is laid out where that, or what it supervises, is more
    than the most so far.

    Args:
        steps: row numbers of each step.
        rows_options: numbers of rows to look at.
    """
    cut: dict[int, list[StepShape]] = {count: [] for count in rows_options}
    later: dict[int, list[StepShape]] = {count: [] for count in cut}
    largest = dict.fromkeys(cut, (0, 0))
    for number, step in enumerate(steps):
        for count, shapes in cut.items():
            for group in micro_batches(step, packer.lengths, max_rows=count):
                shared = (len(group) - 1) * packer.common
                most = packer.tokens(group) - (shared if shared >= MIN_SAVED_TOKENS else 0)
                tokens, supervised = largest[count]
                more = bucket_size(most) > tokens or packer.supervised_tokens(group) > supervised
                if number < _STEPS_LAID_OUT or more:
                    lengths, parents, *_ = packer.forest(group)
                    if filler := bucket_size(sum(lengths)) - sum(lengths):
                        lengths, parents = (*lengths, filler), (*parents, -1) if parents else ()
                    targets = min(packer.supervised_tokens(group), sum(lengths) - filler)
                    shape = StepShape(sum(lengths), targets, lengths, parents)
                    (shapes if number < _STEPS_LAID_OUT else later[count]).append(shape)
                    largest[count] = max(tokens, shape.tokens), max(supervised, shape.supervised_tokens)
    return {
        count: replace(
            max([*shapes, *later[count]], key=lambda one: one.tokens),
            supervised_tokens=largest[count][1],
            mean_tokens=sum(one.tokens for one in shapes) / len(shapes),
            sizes=_OTHER_SIZES
            + max(len({one.tokens for one in shapes}), len({one.supervised_tokens for one in shapes})),
        )
        for count, shapes in cut.items()
    }


_STEPS_LAID_OUT = 1000
_OTHER_SIZES = 8
"""Of held-out rows and neutral texts."""
