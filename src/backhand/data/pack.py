"""Pack a few documents into one batch, outside of a run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from backhand.data.examples import Example
from backhand.data.packing import to_batch
from backhand.data.prefix_forest import prefix_forest
from backhand.nn.batch import PackedBatch


def pack(examples: Iterable[Example], *, share: bool = False, device: torch.device | str = "cpu") -> PackedBatch:
    """Concatenate documents, shortest first, so that documents of equal length are neighbours.

    labels[i] is token i + 1 of the same document if that token is supervised. Attention is causal, so a document enters
    the model only up to the position before its last supervised token: no later position can change the loss. A
    document without supervised tokens has no positions.

    Args:
        examples: the documents, in any order, which the batch's `ends` keep.
        share: store a prefix that several documents share once, if that saves enough.
        device: of the batch's tensors.

    Returns:
        input_ids and labels, (tokens,) int64, and the segments of the documents.
    """
    documents = list(examples)
    tokens = [np.where(document.supervised, ~document.input_ids, document.input_ids) for document in documents]
    forest = prefix_forest(tokens, [trained_length(one) for one in documents], share=share)
    return to_batch(tokens, forest, device, np.array([one.second_text for one in documents], dtype=np.int32))


def trained_length(example: Example) -> int:
    """Return the number of tokens that enter the model: those before the last supervised token."""
    places = np.flatnonzero(example.supervised)
    return int(places[-1]) if len(places) else 0
