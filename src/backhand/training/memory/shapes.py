"""The micro-batches of a run as far as its memory depends on them, for any number of rows in one."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from backhand.data.packing import micro_batches, round_size
from backhand.kernels.dense_product import is_taken
from backhand.kernels.library import loops_are_there
from backhand.nn.batch import document_runs
from backhand.nn.compute import multiplies_tiles, onednn_takes_bf16
from backhand.ops.attention_blocks import block_bounds
from backhand.ops.delta_steps import CHUNK_TOKENS
from backhand.ops.document_groups import Group, groups, takes_blocks
from backhand.ops.linear_cross_entropy import CHUNK_ROWS


@dataclass(frozen=True)
class StepShape:
    """The micro-batches of a run under some number of rows.

    Attributes:
        tokens, supervised_tokens: of the largest one.
        mean_tokens: of all of them.
        micro_batches: how many they are, of the steps that were looked at.
        gradient_copies: buffers that adding up the micro-batches of a step takes.
        kernels: that oneDNN compiles for all of them, and for what is measured in between, of a usual block's products.
        kernel_sizes: how many sizes of micro-batch these are of, see `KernelCount`.
        run_tokens: of the largest group of documents that attention takes at once, fillers behind their ends included.
        run_products: queries by keys of one head's block of queries in the largest group, over its documents.
        copied_tokens: as run_tokens, of groups whose documents do not fill them: these are copies.
        step_tokens: that the gated delta rule takes in one step at most (`ops.delta_steps`).
        longest_tokens: of the longest document, with what is shared before it.
        shared_tokens: that stand before all documents of a micro-batch, at most.
        neutral_tokens: of the longest neutral text; 0 where forgetting is not measured.
    """

    tokens: int
    supervised_tokens: int
    kernels: int = 0
    run_tokens: int = 0
    run_products: int = 0
    copied_tokens: int = 0
    step_tokens: int = 0
    longest_tokens: int = 0
    neutral_tokens: int = 0
    mean_tokens: float = 0.0
    gradient_copies: int = 0
    kernel_sizes: tuple[int, int, int, int] = (0, 0, 0, 0)
    shared_tokens: int = 0
    micro_batches: int = 0


def gradient_copies(micro_batches: int, processes: int, *, ordered: bool) -> int:
    """How many buffers as large as the gradient a process holds beside it to add it up, at most.

    See `step.OneProcessSum`, and `gradient_sum` for several processes.
    """
    if processes == 1:
        return int(micro_batches > 1)
    own = -(-micro_batches // processes)
    return 2 * own + 2 if ordered else 1


@dataclass(frozen=True)
class Rows:
    """Rows by their numbers.

    Attributes:
        lengths: tokens of each that enter the model.
        supervised: of each.
        shared: tokens with which all of some rows begin, and which stand in their micro-batch once.
        documents: lengths of these rows' documents without what is shared; None where each row is one.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    shared: Callable[[Sequence[int]], int] = lambda _rows: 0
    documents: Callable[[Sequence[int]], Sequence[int]] | None = None


_NO_ROWS = Rows((), ())


def largest_shapes(
    steps: Sequence[Sequence[int]],
    rows: Rows,
    rows_options: Iterable[int],
    like: Tensor,
    *,
    held_out: Rows = _NO_ROWS,
    neutral: Sequence[int] = (),
    chunk: int = CHUNK_ROWS,
) -> dict[int, StepShape]:
    """For each number of rows per micro-batch, what micro-batches these steps will make.

    Args:
        steps: row numbers of each step.
        rows: to train on.
        rows_options: numbers of rows to look at.
        like: anything with the compute dtype and device.
        held_out: rows that are measured in between.
        neutral: tokens of the neutral texts, which are measured one by one.
        chunk: rows that go through the head at once.
    """
    return {count: _shape(steps, rows, count, like, held_out, neutral, chunk) for count in rows_options}


def _shape(
    steps: Iterable[Sequence[int]],
    rows: Rows,
    count: int,
    like: Tensor,
    held_out: Rows,
    neutral: Sequence[int],
    chunk: int,
) -> StepShape:
    kernels = KernelCount(like, chunk)
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
        kernel_sizes=kernels.sizes,
        run_tokens=max((group.documents * group.length for group in attending), default=0),
        run_products=max((math.prod(block) for block in _blocks(attending)), default=0),
        copied_tokens=max((_copied(group) for group in attending), default=0),
        step_tokens=max(sum(min(length, CHUNK_TOKENS) for length in one.lengths) for one in trained),
        shared_tokens=max(one.shared for one in trained),
        longest_tokens=max(one.shared + max(one.lengths, default=0) for one in trained),
        neutral_tokens=max(neutral, default=0),
        mean_tokens=sum(micro_batch.tokens for micro_batch in trained) / len(trained),
        micro_batches=len(trained),
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
            own = rows.documents(group) if rows.documents else [rows.lengths[row] - shared for row in group]
            lengths = sorted(own)
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


# ---------------------------------------------------------------------------------------------------------------------
# How many matrix kernels oneDNN compiles in a run, and keeps: one for each product of each size, half a megabyte each.
#
# A micro-batch brings products of four kinds, each kind with sizes of its own:
#     the projections and their adapters    by the micro-batch's tokens (`data.packing.round_size` keeps these few);
#     those of the last block               by its supervised tokens, behind attention;
#     attention by blocks of queries        by documents, queries and keys of each block (`ops.attention_blocks`);
#     the head                              by the supervised rows of its last chunk (`ops.linear_cross_entropy`).
# Rows of many lengths therefore compile new ones for a long time, until as many are there as oneDNN keeps.


Shape = TypeVar("Shape")
_KERNEL_BYTES, _TILE_KERNEL_BYTES = 580_000, 1_000_000


def kernel_bytes() -> int:
    """Of a kernel: every one takes its code's greatest size from the heap; a product by AMX's tiles has several."""
    return _TILE_KERNEL_BYTES if multiplies_tiles() else _KERNEL_BYTES


_EXPERT_KERNEL_BYTES, _LEFT_BYTES = 660_000, 400_000


def expert_kernel_bytes(compiled: int, kept: int) -> int:
    """Of so many kernels that are compiled for an expert's few rows, of which oneDNN keeps no more than `kept`.

    Each that is compiled in the place of another leaves something for good until most kinds of tails have come up.
    """
    there = min(compiled, kept)
    replaced = min(compiled - there, _LEFT_AT_MOST * kept_kernels() // 4)
    return there * _EXPERT_KERNEL_BYTES + replaced * _LEFT_BYTES


_LEFT_AT_MOST = 5
"""Quarters of the number of kernels that are kept."""


class Products(NamedTuple):
    """How many products of other sizes a micro-batch brings with an adapter on every linear module, by their kind.

    What compiles a kernel is a product's sizes and the distances of its rows, however many layers it comes in.

    Attributes:
        frozen: x Wᵀ of matrices as they lie stacked; as many are G W.
        inputs: x Aᵀ of modules that share an input; as many are (∂L/∂h) A.
        outputs: h Bᵀ of modules; as many are G B.
        gradients: those of lora_A and of lora_B.
    """

    frozen: int
    inputs: int
    outputs: int
    gradients: int

    def kernels(self, dtype: torch.dtype) -> tuple[int, int]:
        """Compiled in a training pass and in a forward pass, but for those that compiled loops take (`ops.low_rank`).

        The loops take all products with factors, but in float32 what is added to another product; and all others too
        where they multiply by tiles.
        """
        if not loops_are_there():
            forward = self.frozen + self.inputs + self.outputs
            return forward + self.frozen + self.inputs + self.outputs + self.gradients, forward
        if is_taken(dtype):
            return 0, 0
        if dtype == torch.float32:
            return 2 * self.frozen + self.inputs + self.outputs, self.frozen + self.outputs
        return 2 * self.frozen, self.frozen


# As counted with oneDNN 3.12 (ONEDNN_VERBOSE=2). In a Llama the gradients of o_proj's lora_A and lora_B are one size.
USUAL, USUAL_LAST = Products(4, 4, 4, 7), Products(3, 3, 2, 4)
"""Of blocks of one kind, and of what the last one multiplies supervised tokens with."""
_PER_BLOCK, _PER_CHUNK = (6, 2), (2, 1)


_KEPT = 1024
"""oneDNN's own limit, where the environment names no other."""

Block = tuple[int, int, int]
"""Documents, queries and keys of a block of attention."""


def kept_kernels() -> int:
    """How many compiled kernels oneDNN keeps."""
    stated = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    return int(stated) if stated.isdecimal() else _KEPT


def compiles_kernels(like: Tensor) -> bool:
    """Whether products of such tensors go to oneDNN, which compiles them; MKL and graphics cards do not."""
    if like.device.type != "cpu":
        return False
    if like.dtype == torch.bfloat16:
        return onednn_takes_bf16()
    return like.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


class KernelCount:
    """Counts the kernels of all micro-batches it is shown.

    Args:
        like: anything with the compute dtype and device.
        chunk: rows that go through the head at once.
    """

    def __init__(self, like: Tensor, chunk: int = CHUNK_ROWS) -> None:
        self._compiles, self._chunk = compiles_kernels(like), chunk
        self._sizes = _Seen[int](*USUAL.kernels(like.dtype))
        self._last_sizes = _Seen[int](*USUAL_LAST.kernels(like.dtype))
        self._blocks = _Seen[Block](*((0, 0) if loops_are_there() else _PER_BLOCK))
        self._chunks = _Seen[int](*((0, 0) if is_taken(like.dtype) else _PER_CHUNK))

    def add(self, tokens: int, blocks: Iterable[Block], supervised_tokens: int, *, trained: bool = True) -> None:
        """Count a micro-batch.

        Args:
            tokens: fillers included.
            blocks: of its attention.
            supervised_tokens: rows of the head and, from its attention's output on, of the last block; 0 if it computes
                no loss.
            trained: forward and backward; else forward alone.
        """
        self._sizes.add((tokens,), trained)
        self._last_sizes.add({supervised_tokens} - {0}, trained)
        self._blocks.add(blocks, trained)
        chunks = {min(supervised_tokens, self._chunk), supervised_tokens % self._chunk} - {0}
        self._chunks.add(chunks, trained)

    @property
    def total(self) -> int:
        """Kernels that are compiled with an adapter on every linear module, however many of them are kept."""
        if not self._compiles:
            return 0
        return sum(kind.kernels for kind in (self._sizes, self._last_sizes, self._blocks, self._chunks))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Numbers of tokens that are trained on, and that pass forward alone; and likewise of the last block's."""
        return (*self._sizes.counts, *self._last_sizes.counts) if self._compiles else (0, 0, 0, 0)


class _Seen(Generic[Shape]):
    """Shapes of one kind of product, and what each of them compiles."""

    def __init__(self, per_training: int, per_forward: int) -> None:
        self._per_training, self._per_forward = per_training, per_forward
        self._trained: set[Shape] = set()
        self._measured: set[Shape] = set()

    def add(self, shapes: Iterable[Shape], trained: bool) -> None:
        (self._trained if trained else self._measured).update(shapes)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self._trained), len(self._measured - self._trained)

    @property
    def kernels(self) -> int:
        trained, forward_only = self.counts
        return trained * self._per_training + forward_only * self._per_forward
