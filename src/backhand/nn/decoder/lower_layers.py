"""The layers of a decoder below the lowest adapted one, by themselves: states that a run may keep in place of them.

What a row comes to there is the same in each epoch, and so are its bits if they do not depend on the other rows of its
batch. All kernels beside the products compute each document by itself; for which batches products do is
`row_products`'s.
"""

from __future__ import annotations

from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.row_products import keeps_rows


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
