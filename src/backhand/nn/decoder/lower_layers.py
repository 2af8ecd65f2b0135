"""The layers of a decoder below the lowest adapted one, by themselves: states that a run may keep in place of them.

What a row comes to there is the same in each epoch, and so are its bits if they do not depend on the other rows of its
batch. All loops beside the products compute each document by itself; how products are made to agree is
`row_products`'s.
"""

from __future__ import annotations

from torch import Tensor

from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.row_products import LOOKED_AT, RowProducts, keeps_rows


class LowerLayers:
    """Those of a decoder, which takes the way to multiply that is found here.

    Args:
        decoder: with whatever adapter.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._settled = LOOKED_AT[0]
        self._products: RowProducts | None = None

    def entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """See `Decoder.entering`."""
        return self._decoder.entering(batch, layer)

    def settle_rows(self, layer: int, tokens: int) -> None:
        """From here on, give each row the same bits below block `layer`, in whatever batch it is.

        The way that is found is taken by `Decoder.entering`, `token_losses` and `loss_and_gradients`. None is needed
        where products of any number of rows agree.

        Args:
            layer: c.
            tokens: which the batches mostly have; others are multiplied so that they agree with it.
        """
        self._settled = tokens
        self._products = None if self._agree(LOOKED_AT) else RowProducts(tokens)
        self._decoder.multiply_below(layer, self._products)

    def keeps_rows(self, tokens: int) -> bool:
        """Whether products of so many rows give each the bits that it has among others, see `settle_rows`."""
        return self._products is not None or self._agree((tokens,))

    def _agree(self, numbers: tuple[int, ...]) -> bool:
        """Whether products of so many rows do, in a block of each mixer and size; those with experts are left out."""
        config, weights = self._decoder.config, self._decoder.weights
        blocks = zip(config.layers, weights.blocks, strict=True)
        kinds = {(layer.mixer, layer.sizes): block for layer, block in blocks if not layer.experts}
        return all(keeps_rows(block, config, numbers, self._settled) for block in kinds.values())
