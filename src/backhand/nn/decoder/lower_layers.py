"""The layers of a decoder below the lowest adapted one, by themselves: states that a run may keep in place of them.

What a row comes to there is the same in each epoch, and so are its bits if they do not depend on the other rows of its
batch. All kernels beside the products compute each document by itself. For which batches products do:

    y = x Wᵀ,   y[i] is a function of x[i] and W alone, and so are its bits if each sum is added up in one order

A library chooses kernels, blocks and threads by the number of rows. MKL and oneDNN with AVX-512 and AVX2 keep the order
within a row's sums from 9 rows on (fewer take `kernels.few_rows`), and so does our own product with AMX, by its making
(`kernels.dense_product`). oneDNN with AMX, where our kernels are not there, goes along the rows or along the
outputs, as there are more of these or those for a thread, and cuts the sums otherwise then: numbers of rows fall into
two or three classes, and between classes one element in ten thousand ends in another bit. So it is looked at, with the
products of a block, in the forms that `nn.decoder.block` takes. What holds for two numbers against a third one holds
between these.

It is looked at by bits and never by the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.frozen_matrix import library_product, takes_tiles
from backhand.ops.weight_tiles import frozen_tiles

_ENOUGH = 1 << 18
"""Of so many elements of two classes some differ, where one in ten thousand does: all but certainly."""
Multiply = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""y = residual + x Wᵀ + bias of x, W dense, bias, residual and where to write y; each of the last three may be None."""


class LowerLayers:
    """Those of a decoder.

    Args:
        decoder: with whatever adapter.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._usual = 1

    def compare_with(self, tokens: int) -> None:
        """See `keeps_rows`: the number of tokens that batches mostly have."""
        self._usual = tokens

    def entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """See `Decoder.entering`."""
        return self._decoder.entering(batch, layer)

    def keeps_rows(self, tokens: int) -> bool:
        """Whether products of so many rows give each the bits that it has among the usual number.

        Looked at in a block of each mixer and size; those with experts are left out.
        """
        config, weights = self._decoder.config, self._decoder.weights
        blocks = zip(config.layers, weights.blocks, strict=True)
        kinds = {(layer.mixer, layer.sizes): block for layer, block in blocks if not layer.experts}
        return all(keeps_rows(block, config, (tokens,), self._usual) for block in kinds.values())


def keeps_rows(weights: BlockWeights, config: DecoderConfig, numbers: Iterable[int], reference: int) -> bool:
    """Whether a block's products of so many rows give each of them the bits that it has among `reference`.

    Args:
        weights: of a block.
        config: the family, which says how a block joins its stream.
        numbers: of rows, each at least 1.
        reference: rows, at least 1.
    """
    if takes_tiles(weights.input):
        return True
    plain = config.residual_multiplier == 1.0
    sizes = tuple(numbers)
    return all(
        not disagreeing(library_product, tile, sizes, reference, bias=part, joined=joined, width=weight.shape[0])
        for weight, bias, joined in (
            (weights.input, weights.input_bias, False),
            (weights.output, weights.output_bias, plain and weights.after_attention_norm is None),
            (weights.gate_up, weights.gate_up_bias, False),
            (weights.down, weights.down_bias, plain and weights.after_mlp_norm is None),
            (weights.per_layer_gate, None, False),
            (weights.per_layer_projection, None, False),
        )
        if weight is not None
        for rows, tile in frozen_tiles(weight)
        for part in (None if bias is None else bias[rows],)
    )


def disagreeing(
    multiply: Multiply,
    weight: Tensor,
    numbers: Sequence[int],
    reference: int,
    *,
    bias: Tensor | None,
    joined: bool,
    width: int | None = None,
) -> list[int]:
    """Those of these numbers of rows whose products give some row other bits than it has among `reference`.

    Args:
        multiply: the library's.
        weight: (out, in), dense.
        numbers: of rows, each at least 1.
        reference: rows, at least 1.
        bias: (out,) or None.
        joined: whether a residual is added, as the sums of a block are.
        width: of the matrix that y becomes a part of; None where it is all of it.
    """
    outputs, inputs = weight.shape
    enough = -(-_ENOUGH // outputs) if weight.dtype.itemsize == 2 else 1  # in float32 most elements differ
    compared = -(-max(enough, reference) // reference) * reference
    rows = max(compared, *numbers)
    x = _drawn(rows, inputs, weight)
    residual = _drawn(rows, outputs, weight) if joined else None

    def by(start: int, size: int) -> Tensor:
        part = None if residual is None else residual[start : start + size]
        out = None if width in (None, outputs) else x.new_empty(size, width or 0)[:, :outputs]
        return multiply(x[start : start + size], weight, bias, part, out)

    y = torch.cat([by(start, reference) for start in range(0, compared, reference)])

    def agrees(size: int) -> bool:
        if size >= compared:
            return torch.equal(by(0, size)[:compared], y)
        # As many as there is room for, up to the end: kernels treat the last rows apart.
        starts = range(compared % size, compared - size + 1, size)
        return all(torch.equal(by(start, size), y[start : start + size]) for start in starts)

    return [size for size in numbers if size != reference and not agrees(size)]


def _drawn(rows: int, width: int, like: Tensor) -> Tensor:
    """(rows, width) random numbers, no row like another: few, repeated, since most of the time would go to drawing."""
    few = _few_drawn().to(like.device, like.dtype)
    return few.repeat(-(-rows * width // len(few)))[: rows * width].view(rows, width)


@lru_cache(maxsize=1)
def _few_drawn() -> Tensor:
    return torch.randn(65521, generator=torch.Generator().manual_seed(0))  # a prime, so that rows begin anywhere
