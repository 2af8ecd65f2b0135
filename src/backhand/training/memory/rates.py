"""How fast this machine multiplies a model's matrices, dense and in their blocks, measured on pieces of both.

Unpacking a matrix takes its own time, whatever the number of rows it is multiplied with, so that its share of the
products falls with the tokens T of a micro-batch. For both products of the pieces, forward and backward, with q(T)
seconds where they are unpacked first and d(T) where they are dense,

    share(T) = Σ (q(t) - d(t)) · passes(T') / (Σ d(t) · T' / t),    t = min(T', ENOUGH_TOKENS)

T' is T, but for an expert T · chosen / experts. passes(T') is 1 in the blocks, which take all tokens at once (a loop of
ours thousands, beside whose products unpacking is nothing), and ⌈T / `chunk_rows`⌉ for the head, which is unpacked for
each chunk of its logits; an expert that nobody chooses stays packed, so that of less than one token its passes are T'
too. Both q and d depend on processor, types and shapes by factors of two and more, and not on unpacking alone: a dense
matrix comes from memory, an unpacked one lies in the cache. So no constant holds on two machines, and the pieces are
taken from all over the file, more of them than most caches hold. What counts is the process's own time on its
processors, shared by its threads, so that a busy machine gives nearly the figures of a free one.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.quantized_matrix import QuantizedMatrix, StoredRows
from backhand.nn.decoder.experts import mixture_of
from backhand.nn.decoder.family import EXPERT_GROUPS, DecoderConfig
from backhand.nn.decoder.family_parsing import decoder_config
from backhand.nn.decoder.weights import empty_weights
from backhand.nn.loading.expert_tensors import matrices_of
from backhand.nn.loading.source import EMBEDDING_WEIGHT, HEAD_WEIGHT, ModelSource
from backhand.ops.frozen_matrix import FrozenMatrix, drop_scratch, frozen_input_gradient, frozen_linear
from backhand.ops.linear_cross_entropy import chunk_rows

ENOUGH_TOKENS = 256
"""From here on a product takes about as long a token."""
_SAMPLE_VALUES = 1 << 24
_PIECE_VALUES = 1 << 23
_ROUNDS = 3
Clock = Callable[[], float]


def unpacking_share(source: ModelSource, dtype: torch.dtype, tokens: float, clock: Clock = time.process_time) -> float:
    """What unpacking adds to the products of a micro-batch of so many tokens, as a share of dense products' time.

    Args:
        source: an opened model with matrices in blocks, of a family that the decoder engine knows.
        dtype: the compute dtype.
        tokens: of a micro-batch.
        clock: seconds of all threads together.

    Returns:
        the share; 0 where the dense products are too small for the clock to tell.
    """
    tokens = max(1.0, tokens)
    config = decoder_config(source.config)
    samples = sampled(source, config)
    rows = [tokens * sample.met for sample in samples]
    xs: dict[tuple[int, int], Tensor] = {}
    works: list[Callable[[], object]] = []
    for sample, own in zip(samples, rows, strict=True):
        stack = QuantizedMatrix(sample.parts, dtype)
        size = measured_tokens(own), stack.shape[1]
        if size not in xs:
            xs[size] = drawn(*size, dtype)
        works += [partial(_both, xs[size], matrix) for matrix in (stack, stack.dense())]
    taken = fastest(works, clock)
    drop_scratch()
    passes = [*(min(1.0, own) for own in rows[:-1]), math.ceil(tokens / chunk_rows(config.hidden_size, dtype))]
    more_s = dense_s = 0.0
    for own, times, quantized, dense in zip(rows, passes, taken[::2], taken[1::2], strict=True):
        more_s += (quantized - dense) * times
        dense_s += dense * own / measured_tokens(own)
    return max(0.0, more_s / dense_s) if dense_s > 0 else 0.0


def measured_tokens(tokens: float) -> int:
    """How many tokens are measured in place of so many."""
    return max(1, min(ENOUGH_TOKENS, round(tokens)))


class Sample(NamedTuple):
    """Matrices that lie stacked, or the first rows of each, and which share of all tokens is multiplied with them."""

    parts: list[StoredRows]
    met: float = 1.0


def sampled(source: ModelSource, config: DecoderConfig) -> list[Sample]:
    """The stacks of some blocks, in them those of some experts, and last the head: the same share of each.

    Args:
        source: an opened model.
        config: its family.
    """
    head = source.stored_rows(HEAD_WEIGHT if HEAD_WEIGHT in source.tensor_names() else EMBEDDING_WEIGHT)
    layers = len(config.layers)
    names = [name for group in _stacks(source, config, 0) for stack in group for name in stack]
    block = sum(math.prod(source.shape(name)) for name in names)
    share = min(1.0, _SAMPLE_VALUES / (layers * block + _values(head)))
    count = math.ceil(share * layers)
    in_block = min(1.0, share * layers / count)
    samples = []
    for layer in _evenly(layers, count):
        for group in _stacks(source, config, layer):
            chosen = math.ceil(in_block * len(group))
            of_each = in_block * len(group) / chosen
            met = 1.0 if len(group) == 1 else mixture_of(config).chosen / len(group)
            samples += [
                Sample([_first(source.stored_rows(name), of_each) for name in group[number]], met)
                for number in _evenly(len(group), chosen)
            ]
    return [*samples, Sample([_first(head, share)])]


def _evenly(count: int, chosen: int) -> list[int]:
    """Numbers below `count`, so many of them."""
    return [(2 * number + 1) * count // (2 * chosen) for number in range(chosen)]


def _stacks(source: ModelSource, config: DecoderConfig, layer: int) -> list[list[list[str]]]:
    """Of the groups that are matrices in this layer, the names of these: one stack of them, or each expert's."""
    there = set(source.tensor_names())
    found = []
    for group in config.layer_groups[layer]:
        paths = [f"model.layers.{layer}.{part}" for part in group]
        if group in EXPERT_GROUPS:
            modules = matrices_of(paths[0], mixture_of(config).experts, 1)  # for their names alone
            stacks = [[path for path, _ in own] for _, own in groupby(modules, lambda module: module[1].expert)]
        else:
            stacks = [paths]
        named = [[f"{path}.weight" for path in stack] for stack in stacks]
        if there.issuperset(name for stack in named for name in stack):
            found.append(named)
    return found


def _values(stored: StoredRows) -> int:
    return stored.row_count * stored.columns


def _first(stored: StoredRows, share: float) -> StoredRows:
    return stored.part(0, math.ceil(share * stored.row_count))


# ---------------------------------------------------------------------------------------------------------------------
# Dense products in the shapes of a model of which nothing is read.


Matrices = Counter[tuple[int, int]]
"""(out, in) of the frozen matrices that a token is multiplied with, and how many such there are."""


def products_of(config: DecoderConfig) -> Matrices:
    """Of a family's blocks, as they lie stacked, and its head."""
    return blocks_of(config) + Counter({(config.vocab_size, config.hidden_size): 1})


def blocks_of(config: DecoderConfig) -> Matrices:
    """Of its blocks alone; of a layer's experts as many rows as those have that a token goes to."""
    found: Matrices = Counter()
    for layer, block in zip(config.layers, empty_weights(config, torch.float32, "meta").blocks, strict=True):
        for field in fields(block):
            matrix = getattr(block, field.name)
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                rows, columns = matrix.shape
                if layer.experts and field.name in ("gate_up", "down"):
                    mixture = mixture_of(config)
                    rows = rows // mixture.experts * mixture.chosen
                found[rows, columns] += 1
    return found


class Rates:
    """What products take here, as far as it was measured; a second model of the same shapes measures nothing again.

    Args:
        dtype: the compute dtype.
        clock: seconds of all threads together.
    """

    def __init__(self, dtype: torch.dtype, clock: Clock = time.process_time) -> None:
        self._dtype = dtype
        self._clock = clock
        self._measured: dict[tuple[int, int, int], float] = {}

    def products_s(self, matrices: Matrices, tokens: float) -> float:
        """Seconds of a token's products with all frozen matrices, forward and backward, among so many tokens."""
        return sum(count * self._matrix_s(shape, measured_tokens(tokens)) for shape, count in matrices.items())

    def _matrix_s(self, shape: tuple[int, int], tokens: int) -> float:
        """Seconds of a token's two products with a matrix, from those with its first rows."""
        key = (*shape, tokens)
        if key not in self._measured:
            outputs, inputs = shape
            rows = min(outputs, max(1, _PIECE_VALUES // inputs))
            weight, x = drawn(rows, inputs, self._dtype), drawn(tokens, inputs, self._dtype)
            (taken_s,) = fastest([lambda: _both(x, weight)], self._clock)
            self._measured[key] = taken_s / tokens * outputs / rows
        return self._measured[key]


def _both(x: Tensor, weight: FrozenMatrix) -> Tensor:
    return frozen_input_gradient(frozen_linear(x, weight), weight)


def drawn(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers like those of weights; with zeros or denormals a processor may be faster or slower."""
    return torch.empty(rows, columns).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(dtype)


def fastest(works: Sequence[Callable[[], object]], clock: Clock) -> list[float]:
    """Seconds of the fastest of a few times of each, in turns, after one that compiles kernels and reads pages.

    In turns also so that what each of them reads has left the cache in between, as in a step.
    """
    fastest = [math.inf] * len(works)
    for done in range(1 + _ROUNDS):
        for number, work in enumerate(works):
            began = clock()
            work()
            if done:
                fastest[number] = min(fastest[number], clock() - began)
    return [taken / torch.get_num_threads() for taken in fastest]
