"""Vectors of texts, for search and duplicates.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import UsageError
from backhand.objective.spec import Spec, Traits
from backhand.objectives.vectors.options import check_loss


class _Embed(Spec):
    name = "embed"
    training = "backhand.objectives.vectors.training:EmbedTraining"
    page = "backhand.objectives.vectors.page:PAGE"
    options = "backhand.objectives.vectors.options:VectorOptions"
    reads = (
        *("pooling", "embedding_loss", "similarity_scale", "triplet_margin", "matryoshka_dims"),
        *("query_prompt", "document_prompt"),
    )
    row_kinds = {
        "embeddings": "backhand.objectives.vectors.rows:EMBEDDINGS",
        "texts": "backhand.objectives.vectors.rows:TEXTS",
    }

    def traits(self, options: Any) -> Traits:
        return Traits(rows="embeddings", predicts_tokens=False, has_targets=False, compares_rows=True)

    def check_options(self, options: Any) -> None:
        check_loss(options)

    def check(self, config: Any) -> None:
        super().check(config)
        config.check_states("; --query-prompt and --document-prompt are put in front of texts")
        if config.optimization.batch_rows < 2:
            raise UsageError(
                "batch_rows 1 leaves nothing to compare",
                where="batch_rows",
                why="the other rows of a step are the negatives of a row",
                next_step="give as many as you have time for: memory does not depend on it",
            )


EMBED = _Embed()
