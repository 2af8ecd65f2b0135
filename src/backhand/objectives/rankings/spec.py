"""Scores of a document and a query.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _Rank(Spec):
    name = "rank"
    row_kinds = {
        "rankings": "backhand.objectives.rankings.rows:RANKINGS",
        "candidates": "backhand.objectives.rankings.rows:CANDIDATES",
    }

    def traits(self, options: Any) -> Traits:
        return Traits(rows="rankings", has_targets=False, is_supervised=True, fewest_steps=100)


RANK = _Rank()
