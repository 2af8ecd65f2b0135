"""Rewards of sampled answers.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.objective.spec import Spec, Traits


class _GRPO(Spec):
    name = "grpo"
    row_kinds = {"prompts": "backhand.objectives.rewards.rows:PROMPTS"}

    def traits(self, options: Any) -> Traits:
        return Traits(rows="prompts", samples=True, trains_on_samples=True)


GRPO = _GRPO()
