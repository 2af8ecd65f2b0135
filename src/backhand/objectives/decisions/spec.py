"""Questions with a fixed set of answers, and the probability of each.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _Decide(Spec):
    name = "decide"
    training = "backhand.objectives.decisions.training:DecideTraining"
    page = "backhand.objectives.decisions.page:PAGE"
    options = "backhand.objectives.decisions.options:DecisionOptions"
    reads = ("label_smoothing",)
    row_kinds = {
        "decisions": "backhand.objectives.decisions.rows:DECISIONS",
        "states": "backhand.objectives.decisions.rows:STATES",
    }

    def traits(self, options: Any) -> Traits:
        # The labels mean nothing to a model before it is trained, and few steps leave it close to guessing.
        return Traits(rows="decisions", rate_rule=True, short_run_factor=2.0, fewest_steps=100, average_share=0.6)


DECIDE = _Decide()
