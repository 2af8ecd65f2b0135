"""Does a product give a row the same bits among few rows as among many? Asked of a library, not of our own loops.

    y = x Wᵀ,   y[i] is a function of x[i] and W alone, and so are its bits if each sum is added up in one order

A library chooses kernels and blocks by the number of rows: MKL and oneDNN with AVX-512 and AVX2 keep the order within a
row's sums from 9 rows on (fewer take `kernels.few_rows`), with AMX some sums in ten thousand have been seen to end in
another bit. So it is looked at with the products of a block, which are those of every block with its mixer,
in the forms that `nn.decoder.block` takes. What holds for two numbers of rows against a third one holds between these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import BlockWeights
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_linear

REFERENCE_ROWS = 64


def keeps_rows(weights: BlockWeights, config: DecoderConfig, rows: int) -> bool:
    """Whether the products of so many rows give each of them the bits that it has among `REFERENCE_ROWS`.

    Args:
        weights: of a block.
        config: the family, which says how a block joins its stream.
        rows: at least 1.
    """
    plain = config.residual_multiplier == 1.0
    return all(
        _same(weight, bias, rows, joined=joined)
        for weight, bias, joined in (
            (weights.input, weights.input_bias, False),
            (weights.output, weights.output_bias, plain and weights.after_attention_norm is None),
            (weights.gate_up, weights.gate_up_bias, False),
            (weights.down, weights.down_bias, plain and weights.after_mlp_norm is None),
            (weights.per_layer_gate, None, False),
            (weights.per_layer_projection, None, False),
        )
        if weight is not None
    )


def _same(weight: FrozenMatrix, bias: Tensor | None, rows: int, *, joined: bool) -> bool:
    """Of one product; `joined` to a residual, as the sums of a block are."""
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(rows)
    count = max(rows, REFERENCE_ROWS)
    x = torch.randn(count, inputs, generator=generator).to(weight.device, weight.dtype)
    residual = torch.randn(count, outputs, generator=generator).to(x) if joined else None

    def product(first: int, last: int) -> Tensor:
        return frozen_linear(x[first:last], weight, bias, None if residual is None else residual[first:last])

    y = product(0, rows)
    # From the front, and where there are more rows from the end: kernels treat the last ones apart.
    same = torch.equal(y[:REFERENCE_ROWS], product(0, REFERENCE_ROWS)[:rows])
    return same and (rows <= REFERENCE_ROWS or torch.equal(y[-REFERENCE_ROWS:], product(rows - REFERENCE_ROWS, rows)))
