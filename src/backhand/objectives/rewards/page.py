"""Rewards of tried answers on the studio's page."""

from __future__ import annotations

from typing import Any

from backhand.objective.page import QUESTION, Fields, Page, Role
from backhand.options.rewards import SAMPLING

CHECKS = {
    "exact": "The answer is exactly that of the row",
    "number": "The last number of the answer is the last number of the row's answer",
}
"""Built-in rewards without an argument. Rewards that are code or name a file are not offered."""


class _Rewards(Page):
    title = "Rewards: the model tries answers, and checks reward the right ones (GRPO)"
    roles = (QUESTION, Role("answer", "Right answer, for the checks that compare with it", optional=True))
    fields = "fields_rewards.html.j2"
    reads = ("group", *SAMPLING)
    checks = CHECKS

    def words(self, fields: Fields, context: Any) -> list[str]:
        rewards = [name for name in CHECKS if fields.get(f"reward_{name}")]
        if fields.get("reward_length"):
            rewards.append(f"length:{fields.number('reward_length')}")
        if pattern := fields.get("reward_regex"):
            rewards.append(f"regex:{pattern}")
        if not rewards:
            raise fields.refused("reward_exact", "no check is chosen", "choose a check")
        return [f"--reward={name}" for name in rewards]

    def numbers(self) -> tuple[str, ...]:
        return ("reward_length",)


PAGE = _Rewards()
