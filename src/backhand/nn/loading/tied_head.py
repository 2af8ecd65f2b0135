"""Whether a stored head is the embedding once more, where the config says that the two are one matrix.

As transformers 5 has it: a head that is stored with other values than the embedding is a matrix of its own, whatever
the config says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from backhand.nn.loading.source import ModelSource

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
_BLOCK_ELEMENTS = 1 << 24
"""Compared at once: few enough that two mapped matrices are never in memory whole."""


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding; where Gemma's are silent, it is."""
    stated = config.get("tie_word_embeddings")
    return stated is True or (stated is None and str(config.get("model_type")).startswith("gemma"))


def stores_another_head(source: ModelSource) -> bool:
    """Whether a source has both matrices with different values; it reads them block by block, up to a difference.

    Raises:
        ArtifactError: one of them cannot be read.
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
    # Loaded anew for each block: what was read of a mapping stays in memory until the mapping ends.
    embedding, head = source.load(EMBEDDING_WEIGHT)[rows], source.load(HEAD_WEIGHT)[rows]
    if embedding.data_ptr() == head.data_ptr() and embedding.dtype == head.dtype:
        return False
    common = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(common), head.to(common))
