"""Labels or a number, by a head on hidden states.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _Classify(Spec):
    name = "classify"
    training = "backhand.objectives.classes.training:ClassifyTraining"
    page = "backhand.objectives.classes.page:PAGE"
    options = "backhand.objectives.classes.options:ClassOptions"
    reads = ("problem_type", "class_labels")
    row_kinds = {"classes": "backhand.objectives.classes.rows:CLASSES"}

    def traits(self, options: Any) -> Traits:
        return Traits(rows="classes", predicts_tokens=False, has_targets=False, head="always", rate_rule=True)

    def check(self, config: Any) -> None:
        super().check(config)
        config.check_states()


CLASSIFY = _Classify()
