"""Vectors of texts, for search and duplicates.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _Embed(Spec):
    name = "embed"
    row_kinds = {
        "embeddings": "backhand.objectives.vectors.rows:EMBEDDINGS",
        "texts": "backhand.objectives.vectors.rows:TEXTS",
    }

    def traits(self, options: Any) -> Traits:
        return Traits(rows="embeddings", predicts_tokens=False, has_targets=False, compares_rows=True)


EMBED = _Embed()
