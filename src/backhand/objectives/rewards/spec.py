"""Rewards of sampled answers.

This module imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from typing import Any

from backhand.errors import UsageError
from backhand.objective.spec import Spec, Traits
from backhand.objectives.kinds.checks import check_sampling
from backhand.objectives.kinds.options import check_size


class _GRPO(Spec):
    name = "grpo"
    training = "backhand.objectives.rewards.training:RewardTraining"
    page = "backhand.objectives.rewards.page:PAGE"
    has_rewards = True
    options = "backhand.objectives.rewards.options:RewardLossOptions"
    reads = ("beta",)
    row_kinds = {"prompts": "backhand.objectives.rewards.rows:PROMPTS"}

    def traits(self, options: Any) -> Traits:
        return Traits(rows="prompts", samples=True, trains_on_samples=True)

    def defaults(self, options: Any) -> dict[str, Any]:
        return {"beta": options.beta or 0.0}

    def check_options(self, options: Any) -> None:
        check_size(options.beta)

    def check(self, config: Any) -> None:
        super().check(config)
        if not config.rewards.reward and not config.run.resume:
            raise UsageError(
                "grpo rewards nothing", where="reward", next_step="give --reward NAME or --reward FILE.py:FUNCTION"
            )
        check_sampling(config)


GRPO = _GRPO()
