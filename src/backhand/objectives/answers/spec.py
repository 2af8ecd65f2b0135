"""Supervised fine-tuning on the answers of the rows.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _SFT(Spec):
    name = "sft"
    page = "backhand.objectives.answers.page:PAGE"
    row_kinds = {"answers": "backhand.objectives.answers.rows:ANSWERS"}

    def traits(self, options: Any) -> Traits:
        return Traits(rate_rule=True)

    def check(self, config: Any) -> None:
        """Accept all options: prompts and whole texts can be trained on as well."""


SFT = _SFT()
