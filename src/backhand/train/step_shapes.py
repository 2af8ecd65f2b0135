"""The micro-batches of a run as far as its memory depends on them, for any number of rows in one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from backhand.data.packing import micro_batches
from backhand.nn.batch import document_runs
from backhand.ops.attention_blocks import block_bounds
from backhand.ops.document_groups import Group, groups, takes_blocks
from backhand.train.batches import round_size
from backhand.train.kernel_count import Block, KernelCount


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run under some number of rows.

    Attributes:
        tokens, supervised_tokens: of the largest one.
        mean_tokens: of all of them.
        kernels: that oneDNN compiles for all of them, and for what is measured in between.
        run_tokens: of the largest group of documents that attention takes at once, fillers behind their ends included.
        run_products: queries by keys of one head's block of queries in the largest group, over its documents.
        copied_tokens: as run_tokens, of groups whose documents do not fill them: these are copies.
        neutral_tokens: of the longest neutral text; 0 where forgetting is not measured.
    """

    tokens: int
    supervised_tokens: int
    kernels: int = 0
    run_tokens: int = 0
    run_products: int = 0
    copied_tokens: int = 0
    neutral_tokens: int = 0
    mean_tokens: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Rows by their numbers.

    Attributes:
        lengths: tokens of each that enter the model.
        supervised: of each.
        shared: tokens with which all of some rows begin, and which stand in their micro-batch once.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    shared: Callable[[Sequence[int]], int] = lambda _rows: 0


_NO_ROWS = Rows((), ())


def largest_shapes(
    steps: Sequence[Sequence[int]],
    rows: Rows,
    rows_options: Iterable[int],
    like: Tensor,
    *,
    held_out: Rows = _NO_ROWS,
    neutral: Sequence[int] = (),
) -> dict[int, StepShape]:
    """For each number of rows per micro-batch, what micro-batches these steps will make.

    Args:
        steps: row numbers of each step.
        rows: to train on.
        rows_options: numbers of rows to look at.
        like: anything with the compute dtype and device.
        held_out: rows that are measured in between.
        neutral: tokens of the neutral texts, which are measured one by one.
    """
    return {count: _shape(steps, rows, count, like, held_out, neutral) for count in rows_options}


def _shape(
    steps: Iterable[Sequence[int]], rows: Rows, count: int, like: Tensor, held_out: Rows, neutral: Sequence[int]
) -> StepShape:
    kernels = KernelCount(like)
    trained = _cut(steps, rows, count)
    attending: list[Group] = []
    for number, micro_batch in enumerate(trained):
        # Attention of the largest ones says what the others' takes at most.
        attended = _attended(micro_batch, like) if number < _LOOKED_INTO else []
        attending += attended
        kernels.add(micro_batch.tokens, _blocks(attended), micro_batch.supervised_tokens)
    for micro_batch in _cut([range(len(held_out.lengths))], held_out, count):
        blocks = _blocks(_attended(micro_batch, like))
        kernels.add(micro_batch.tokens, blocks, micro_batch.supervised_tokens, trained=False)
    for length in neutral:
        kernels.add(length, (), 0, trained=False)  # all rows pass all blocks
    return StepShape(
        tokens=trained[0].tokens,
        supervised_tokens=max(micro_batch.supervised_tokens for micro_batch in trained),
        kernels=kernels.total,
        run_tokens=max((group.documents * group.length for group in attending), default=0),
        run_products=max((math.prod(block) for block in _blocks(attending)), default=0),
        copied_tokens=max((_copied(group) for group in attending), default=0),
        neutral_tokens=max(neutral, default=0),
        mean_tokens=sum(micro_batch.tokens for micro_batch in trained) / len(trained),
    )


_LOOKED_INTO = 64


class _MicroBatch(NamedTuple):
    """Tokens, those supervised, the shared prefix, and the documents' lengths behind it; a filler counts as well."""

    tokens: int
    supervised_tokens: int
    shared: int
    lengths: tuple[int, ...]


def _cut(steps: Iterable[Sequence[int]], rows: Rows, count: int) -> list[_MicroBatch]:
    """The micro-batches of the steps, of so many rows each, largest first."""
    cut = []
    for step in steps:
        for group in micro_batches(step, rows.lengths, max_rows=count):
            shared = rows.shared(group)
            lengths = sorted(rows.lengths[row] - shared for row in group)
            tokens = shared + sum(lengths)
            filler = round_size(tokens) - tokens
            supervised = sum(rows.supervised[row] for row in group)
            documents = (*lengths, filler) if filler else tuple(lengths)
            cut.append(_MicroBatch(tokens + filler, supervised, shared, documents))
    return sorted(cut, key=lambda micro_batch: -micro_batch.tokens)


def _attended(micro_batch: _MicroBatch, like: Tensor) -> list[Group]:
    """What attention takes at once, without what it leaves to torch's kernels, which is little."""
    runs = document_runs(micro_batch.lengths, micro_batch.shared)
    return [group for group in groups(runs, micro_batch.shared, like) if takes_blocks(like, group)]


def _copied(group: Group) -> int:
    """Places of a group whose documents do not fill them all, or see a shared prefix: its tokens are copied there."""
    copied = group.places is not None or group.keys is not None
    return group.documents * (group.before + group.length) if copied else 0


def _blocks(attending: Iterable[Group]) -> set[Block]:
    """Documents, queries and keys of every block; a window's fewer keys are not told apart."""
    return {
        (group.documents, stop - start, group.before + stop)
        for group in attending
        for start, stop in itertools.pairwise(block_bounds(group.length))
    }
