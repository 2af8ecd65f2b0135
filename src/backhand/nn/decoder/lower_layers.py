"""The layers of a decoder below the lowest adapted one, by themselves: states that a run may keep in place of them.

What a row comes to there is the same in each epoch, and so are its bits if they do not depend on the other rows of its
batch. All kernels beside the products compute each document by itself. Our own product gives a row the same bits among
any number of rows. A library chooses kernels, blocks and threads by that number: with AVX-512 oneDNN and MKL keep to
one order within a row's sums, with AMX or AVX2 not always. So it is looked at, by bits and never by the clock.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.frozen_matrix import takes_tiles

_DOCUMENT = 8
"""Tokens of a document that numbers of rows are compared with; of a batch what remains is one more."""


class LowerLayers:
    """Those of a decoder.

    Args:
        decoder: with whatever adapter.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._usual = 1
        self._of_usual: Tensor | None = None

    def compare_with(self, tokens: int) -> None:
        """See `keeps_rows`: the number of tokens that batches mostly have."""
        self._usual, self._of_usual = tokens, None

    def entering(self, batch: PackedBatch, layer: int) -> Tensor:
        """See `Decoder.entering`."""
        return self._decoder.entering(batch, layer)

    def keeps_rows(self, tokens: int, layer: int) -> bool:
        """Whether what enters a layer has, in a batch of so many tokens, the bits that it has among the usual number.

        Where products differ, one element in ten thousand does, and all behind it: nearly every row in the end.
        """
        fewer = min(tokens, self._usual)
        if tokens == self._usual or (fewer > 1 and takes_tiles(self._decoder.weights.blocks[0].input)):
            return True
        alike = fewer // _DOCUMENT * _DOCUMENT
        if alike == 0:
            return False  # without a whole document there is nothing to compare
        if self._of_usual is None:
            self._of_usual = self._looked_at(self._usual, layer)
        found = self._looked_at(tokens, layer)
        return torch.equal(found[:alike], self._of_usual[:alike])

    def _looked_at(self, tokens: int, layer: int) -> Tensor:
        """What enters the layer in a batch of so many tokens, documents of which begin every other one."""
        ids = torch.arange(tokens, device=self._decoder.device) * 7919 % self._decoder.config.vocab_size
        lengths = (_DOCUMENT,) * (tokens // _DOCUMENT) + ((tokens % _DOCUMENT,) if tokens % _DOCUMENT else ())
        return self.entering(PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), lengths), layer)
