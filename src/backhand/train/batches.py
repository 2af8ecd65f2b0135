"""Micro-batches of examples, filled up to few different sizes.

oneDNN compiles its matrix products for every number of rows anew: about 35 kernels, 20 MB and 0.05 to 0.1 s for each
size of micro-batch that comes up, and rows of text make a new size in nearly every step. So a filler document of up to
31 tokens (63 from 1,024 tokens on, 127 from 4,096 on) rounds each micro-batch up. It carries no loss and no other
document sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from backhand.data.examples import Example
from backhand.data.packing import pack
from backhand.nn.batch import IGNORE_INDEX, PackedBatch


def packed(examples: Iterable[Example], device: torch.device | str) -> PackedBatch:
    """Examples behind one another, with a filler document at the end where their tokens are not a round number."""
    return filled_up(pack(examples, device=device))


def filled_up(batch: PackedBatch) -> PackedBatch:
    """The batch with a filler document of zeros at the end, up to `round_size` tokens."""
    tokens = int(batch.input_ids.shape[0])
    missing = round_size(tokens) - tokens
    if not missing:
        return batch
    return PackedBatch(
        torch.cat((batch.input_ids, batch.input_ids.new_zeros(missing))),
        torch.cat((batch.labels, batch.labels.new_full((missing,), IGNORE_INDEX))),
        (*batch.document_lengths, missing),
    )


def round_size(tokens: int) -> int:
    """The number of positions that a micro-batch of so many tokens is computed with."""
    multiple = 32 if tokens < 1024 else 64 if tokens < 4096 else 128
    return -(-tokens // multiple) * multiple


def real_tokens(lengths: Sequence[int], rows: Iterable[int]) -> int:
    """Tokens of these rows that enter the model, without fillers."""
    return sum(lengths[row] for row in rows)
