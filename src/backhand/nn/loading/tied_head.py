"""Tied output heads: detect a stored head that differs from the embedding.

Following transformers 5, a stored head whose values differ from the embedding's is a matrix of its own, whatever
`tie_word_embeddings` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from backhand.nn.loading.source import ModelSource

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
_BLOCK_ELEMENTS = 1 << 24
"""Elements compared at once, so that the two mapped matrices are never resident as a whole."""


def ties_head(config: Mapping[str, Any]) -> bool:
    """Return True if a config ties the head to the embedding. Gemma's configs do so by default."""
    stated = config.get("tie_word_embeddings")
    return stated is True or (stated is None and str(config.get("model_type")).startswith("gemma"))


def has_separate_head(source: ModelSource) -> bool:
    """Return True if a source has a head whose values differ from the embedding's.

    The matrices are compared block by block, up to the first difference.

    Raises:
        ArtifactError: if one of them cannot be read.
    """
    if not {EMBEDDING_WEIGHT, HEAD_WEIGHT} <= set(source.tensor_names()):
        return False
    shape = source.shape(EMBEDDING_WEIGHT)
    if source.shape(HEAD_WEIGHT) != shape:
        return True
    if len(shape) != 2 or 0 in shape:
        return False
    rows = max(_BLOCK_ELEMENTS // shape[1], 1)
    return any(_differ(source, slice(start, start + rows)) for start in range(0, shape[0], rows))


def _differ(source: ModelSource, rows: slice) -> bool:
    # Loaded again for each block, because the pages read through a mapping stay resident until it is closed.
    embedding, head = source.load(EMBEDDING_WEIGHT)[rows], source.load(HEAD_WEIGHT)[rows]
    if embedding.data_ptr() == head.data_ptr() and embedding.dtype == head.dtype:
        return False
    common = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(common), head.to(common))
