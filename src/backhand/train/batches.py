"""Micro-batches of examples: what they begin with alike computed once, and filled up to few different sizes.

oneDNN compiles its matrix products for every number of rows anew: about 35 kernels, 20 MB and 0.05 to 0.1 s for each
size of micro-batch that comes up, and rows of text make a new size in nearly every step. So a filler document rounds
each micro-batch up, by 2 % at most where it has some hundred tokens. It carries no loss and no other document sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from backhand.data.examples import Example
from backhand.data.packing import pack, trained_length
from backhand.data.shared_prefix import shared_tokens
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


class RowPacker:
    """The rows of a run, to be packed into micro-batches.

    Args:
        examples: the rows.
        share_prefixes: whether a micro-batch holds the tokens with which all its rows begin once; where dropout draws a
            mask for each row these are not alike.

    Attributes:
        lengths: tokens of every row that enter the model.
    """

    def __init__(self, examples: Sequence[Example], *, share_prefixes: bool) -> None:
        self._examples = examples
        self.lengths = [trained_length(example) for example in examples]
        self._share_prefixes = share_prefixes

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """These rows behind one another, and a filler document where their tokens are not a round number."""
        shared = self.shared(rows)
        return filled_up(pack([self._examples[row] for row in rows], shared=shared, device=device))

    def shared(self, rows: Sequence[int]) -> int:
        """Tokens with which all of these rows begin, and which stand in their micro-batch once."""
        return shared_tokens([self._examples[row] for row in rows]) if self._share_prefixes else 0

    def positions(self, rows: Sequence[int]) -> int:
        """Tokens that a micro-batch of these rows computes, without a filler."""
        return self.tokens(rows) - (len(rows) - 1) * self.shared(rows)

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of these rows, each counted as often as it is trained on."""
        return sum(self.lengths[row] for row in rows)


def filled_up(batch: PackedBatch) -> PackedBatch:
    """The batch with a filler document of zeros at the end, up to `round_size` tokens."""
    tokens = int(batch.input_ids.shape[0])
    missing = round_size(tokens) - tokens
    if not missing:
        return batch
    return replace(
        batch,
        input_ids=torch.cat((batch.input_ids, batch.input_ids.new_zeros(missing))),
        labels=torch.cat((batch.labels, batch.labels.new_full((missing,), IGNORE_INDEX))),
        document_lengths=(*batch.document_lengths, missing),
    )


def round_size(tokens: int) -> int:
    """The number of positions that a micro-batch of so many tokens is computed with."""
    multiple = 16 if tokens < 1024 else 32 if tokens < 2048 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple
