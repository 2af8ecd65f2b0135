"""Products that give a row the same bits, however many rows are multiplied with it: numbers of rows that agree.

    y = x Wᵀ,   y[i] is a function of x[i] and W alone, and so are its bits if each sum is added up in one order

A library chooses kernels, blocks and threads by the number of rows. MKL and oneDNN with AVX-512 and AVX2 keep the order
within a row's sums from 9 rows on (fewer take `kernels.few_rows`), and so does our own product with AMX, by its making
(`kernels.dense_product`). oneDNN with AMX, where our loops are not there, goes along the rows or along the
outputs, as there are more of these or those for a thread, and cuts the sums otherwise then: numbers of rows fall into
two or three classes, and between classes one element in ten thousand ends in another bit. So it is looked at, with the
products of a block, in the forms that `nn.decoder.block` takes. What holds for two numbers against a third one holds
between these.

Where some do not agree, `RowProducts` takes those that do with the one that the run mostly has, `reference`:

    rows = size_1 + size_2 + …      each agrees with the reference; the last piece is filled up with zeros

the way that should cost least, at worst pieces of `reference` rows, which is always there. It is chosen by bits alone
and never by the clock, so that a run that keeps hidden states and one that computes them multiply the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.frozen_matrix import Multiply, frozen_tiles, library_product, takes_tiles

LOOKED_AT = (16, 48, 128, 256, 512, 1024)
"""Where these agree with each other, a machine is taken to have no classes."""
_ENOUGH = 1 << 18
"""Of so many elements of two classes some differ, where one in ten thousand does: all but certainly."""
_CALL_ROWS = 128
"""What a product costs beside its rows, in rows: reading W, and blocks that are not full."""
_FILLED_TO = 64
"""Pieces are filled up to multiples of it, so that few sizes are looked at and compiled."""
_EVENLY = 16


def keeps_rows(
    weights: BlockWeights, config: DecoderConfig, numbers: Iterable[int], reference: int = LOOKED_AT[0]
) -> bool:
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


class RowProducts:
    """Multiplies any number of rows in pieces of sizes that agree; see `ops.frozen_matrix.products_by`.

    Args:
        reference: the number of rows that the others have to agree with.
    """

    def __init__(self, reference: int) -> None:
        self.reference = reference
        self._found: dict[tuple[object, ...], dict[int, bool]] = {}
        self._ways: dict[tuple[object, ...], tuple[int, ...]] = {}

    def __call__(
        self,
        multiply: Multiply,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """residual + x Wᵀ + bias, of x's rows; arguments as `ops.frozen_matrix.Multiply` has them."""
        if out is not None and not out.is_contiguous():
            # What is looked at is a y of its own, not a part of a wider matrix.
            return out.copy_(self(multiply, x, weight, bias, residual, None))
        sizes = self._way(multiply, x, weight, bias, residual)
        rows = x.shape[0]
        if sizes == (rows,):
            return multiply(x, weight, bias, residual, out)
        y = x.new_empty(rows, weight.shape[0]) if out is None else out
        start = 0
        for size in sizes:
            stop = start + size
            if stop <= rows:
                part = None if residual is None else residual[start:stop]
                multiply(x[start:stop], weight, bias, part, y[start:stop])
            else:
                part = None if residual is None else _filled_up(residual[start:], size)
                y[start:].copy_(multiply(_filled_up(x[start:], size), weight, bias, part, None)[: rows - start])
            start = stop
        return y

    def _way(
        self, multiply: Multiply, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[int, ...]:
        """The sizes of the pieces of x's rows; the last one may be larger than what is left for it."""
        rows, threads = x.shape[0], torch.get_num_threads()
        product = (weight.shape, weight.stride(), weight.dtype, bias is not None, residual is not None, threads)
        key = (*product, rows)
        if key not in self._ways:
            found = self._found.setdefault(product, {self.reference: True})

            def agrees(size: int) -> bool:
                if size not in found:
                    joined = residual is not None
                    found[size] = not disagreeing(multiply, weight, (size,), self.reference, bias=bias, joined=joined)
                return found[size]

            self._ways[key] = next(way for way in ways(rows, self.reference) if all(map(agrees, way)))
        return self._ways[key]


def ways(rows: int, reference: int) -> list[tuple[int, ...]]:
    """Sizes of pieces to multiply so many rows in, what should cost least first; last, pieces of `reference` rows.

    Args:
        rows: at least 1.
        reference: at least 1.
    """

    def cost(way: tuple[int, ...]) -> int:
        return sum(way) + _CALL_ROWS * len(way)

    surely = (reference,) * -(-rows // reference)
    found: dict[tuple[int, ...], int] = {(rows,): cost((rows,))}
    for size in range((rows // _FILLED_TO + 1) * _FILLED_TO, cost(surely), _FILLED_TO):
        found[size,] = cost((size,))
    for count in range(2, rows // _CALL_ROWS + 1):
        size = -(-rows // (count * _EVENLY)) * _EVENLY
        way = (*(size,) * (count - 1), rows - size * (count - 1))
        if way[-1] > 0:
            found[way] = cost(way)
    cheaper = sorted((way for way in found if found[way] < cost(surely)), key=found.__getitem__)
    return [*cheaper, surely]


def _filled_up(x: Tensor, rows: int) -> Tensor:
    """x, and zeros behind it."""
    filled = x.new_zeros(rows, x.shape[1])
    filled[: x.shape[0]] = x
    return filled


def _drawn(rows: int, width: int, like: Tensor) -> Tensor:
    """(rows, width) random numbers, no row like another: few, repeated, since most of the time would go to drawing."""
    few = _few_drawn().to(like.device, like.dtype)
    return few.repeat(-(-rows * width // len(few)))[: rows * width].view(rows, width)


@lru_cache(maxsize=1)
def _few_drawn() -> Tensor:
    return torch.randn(65521, generator=torch.Generator().manual_seed(0))  # a prime, so that rows begin anywhere
