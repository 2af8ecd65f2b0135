"""How many matrix kernels oneDNN compiles in a run, and keeps: one for each product of each size, half a megabyte each.

A micro-batch brings products of four kinds, each kind with sizes of its own:
    the projections and their adapters    by the micro-batch's tokens (`batches.round_size` keeps these few);
    those of the last block               by its supervised tokens, behind attention;
    attention by blocks of queries        by documents, queries and keys of each block (`ops.attention_blocks`);
    the head                              by the supervised rows of its last chunk (`ops.linear_cross_entropy`).
Rows of many lengths therefore compile new ones for a long time, until as many are there as oneDNN keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from backhand.nn.loading.compute_dtype import onednn_takes_bf16
from backhand.ops.linear_cross_entropy import CHUNK_ROWS

Shape = TypeVar("Shape")

# Measured with oneDNN 3.12 on AVX512-BF16, an adapter on every linear module of a block: kernels of a training pass and
# of a forward pass. Half a megabyte each, since every kernel takes its code's greatest size from the heap.
KERNEL_BYTES = 580_000
_PER_SIZE = (31, 12)
_PER_LAST_BLOCK = (20, 8)
_PER_BLOCK = (6, 2)
_PER_CHUNK = (2, 1)
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
    """

    def __init__(self, like: Tensor) -> None:
        self._compiles = compiles_kernels(like)
        self._sizes = _Seen[int](*_PER_SIZE)
        self._last_sizes = _Seen[int](*_PER_LAST_BLOCK)
        self._blocks = _Seen[Block](*_PER_BLOCK)
        self._chunks = _Seen[int](*_PER_CHUNK)

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
        chunks = {min(supervised_tokens, CHUNK_ROWS), supervised_tokens % CHUNK_ROWS} - {0}
        self._chunks.add(chunks, trained)

    @property
    def total(self) -> int:
        """Kernels that are there in the end."""
        if not self._compiles:
            return 0
        kinds = (self._sizes, self._last_sizes, self._blocks, self._chunks)
        return min(kept_kernels(), sum(kind.kernels for kind in kinds))


class _Seen(Generic[Shape]):
    """Shapes of one kind of product, and what each of them compiles."""

    def __init__(self, per_training: int, per_forward: int) -> None:
        self._per_training, self._per_forward = per_training, per_forward
        self._trained: set[Shape] = set()
        self._measured: set[Shape] = set()

    def add(self, shapes: Iterable[Shape], trained: bool) -> None:
        (self._trained if trained else self._measured).update(shapes)

    @property
    def kernels(self) -> int:
        forward_only = len(self._measured - self._trained)
        return len(self._trained) * self._per_training + forward_only * self._per_forward
