"""How much memory it takes to answer with a model: known from its files' headers, before any weight is read."""

from __future__ import annotations

import math

import torch

from backhand.nn.loading.source import ModelSource


def answering_bytes(source: ModelSource, dtype: torch.dtype) -> int:
    """Bytes of all weights in the compute dtype; keys and values of a short answer and its adapter are small beside it.

    Args:
        source: the opened base model.
        dtype: the compute dtype.
    """
    return sum(math.prod(source.shape(name)) for name in source.tensor_names()) * dtype.itemsize
