"""Scores of a document and a query.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.data.options import check_ranking_system
from backhand.objective.spec import Spec, Traits
from backhand.objectives.rankings.options import check_weight


class _Rank(Spec):
    name = "rank"
    training = "backhand.objectives.rankings.training:RankTraining"
    page = "backhand.objectives.rankings.page:PAGE"
    options = "backhand.objectives.rankings.options:RankingOptions"
    reads = ("ranking_loss", "positive_weight", "instruction")
    row_kinds = {
        "rankings": "backhand.objectives.rankings.rows:RANKINGS",
        "candidates": "backhand.objectives.rankings.rows:CANDIDATES",
    }

    def traits(self, options: Any) -> Traits:
        return Traits(rows="rankings", has_targets=False, head="encoders", rate_rule=True, fewest_steps=100)

    def check_options(self, options: Any) -> None:
        check_weight(options)

    def check(self, config: Any) -> None:
        super().check(config)
        check_ranking_system(config.data.system)


RANK = _Rank()
