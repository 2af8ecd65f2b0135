"""The frozen layers below the lowest adapted layer, whose output a run may cache.

Their output for a row is the same in every epoch. It can be cached if its bits do not depend on the other rows of the
batch. All kernels other than matrix products compute each document by itself. Backhand's own product gives a row the
same bits for any number of rows. A library chooses kernels, blocks and threads by the number of rows: with AVX-512,
oneDNN and MKL keep one summation order per row, with AMX or AVX2 they do not always. So the bits are compared, and
timing is never used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.frozen_matrix import uses_amx

_DOCUMENT = 8
"""Tokens of each document in the probe batches. The last document of a batch may be shorter."""


class FrozenPrefix:
    """The layers of a decoder below the lowest adapted one, and a test of batch invariance."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._usual_tokens = 1
        self._usual_states: Tensor | None = None

    def set_usual_tokens(self, tokens: int) -> None:
        """Set the number of tokens that most batches have, which `is_batch_invariant` compares with."""
        self._usual_tokens, self._usual_states = tokens, None

    def layer_input(self, batch: PackedBatch, layer: int) -> Tensor:
        """Return x₀ of block `layer`. See `Decoder.layer_input`."""
        return self._decoder.layer_input(batch, layer)

    def is_batch_invariant(self, tokens: int, layer: int) -> bool:
        """Return True if the input of `layer` has the same bits in a batch of this size as in one of the usual size.

        If products differ, one element in ten thousand does, and with it everything computed from it. In the end nearly
        every row differs.
        """
        common = min(tokens, self._usual_tokens)
        if tokens == self._usual_tokens or uses_amx(self._decoder.weights.blocks[0].input):
            return True
        compared = common // _DOCUMENT * _DOCUMENT
        if compared == 0:
            return False  # without a whole document there is nothing to compare
        if self._usual_states is None:
            self._usual_states = self._probe(self._usual_tokens, layer)
        states = self._probe(tokens, layer)
        return torch.equal(states[:compared], self._usual_states[:compared])

    def _probe(self, tokens: int, layer: int) -> Tensor:
        """Return the input of `layer` for a probe batch of this size.

        All probe batches start with the same documents.
        """
        ids = torch.arange(tokens, device=self._decoder.device) * 7919 % self._decoder.config.vocab_size
        lengths = (_DOCUMENT,) * (tokens // _DOCUMENT) + ((tokens % _DOCUMENT,) if tokens % _DOCUMENT else ())
        return self.layer_input(PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), lengths), layer)
