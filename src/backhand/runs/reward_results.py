"""The gain in reward on held-out rows, with its interval over the rows, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from backhand.words import mean_interval

ROW_REWARDS = "row_rewards"
"""Key in metrics.jsonl of the held-out rewards of an evaluation, one per row in the order of the rows."""


def reward_gain(base: Sequence[float], adapted: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean gain of reward per row and its 95 % interval, or None for fewer than two rows."""
    if len(base) < 2 or len(base) != len(adapted):
        return None
    return mean_interval([after - before for before, after in zip(base, adapted, strict=True)])


def recorded_gain(records: Iterable[Mapping[str, Any]], best_step: int | None) -> tuple[float, float, float] | None:
    """Return the `reward_gain` from the first evaluation to the best one, or None if either was not recorded.

    Args:
        records: lines of metrics.jsonl.
        best_step: the step whose adapter is kept.
    """
    rewards = {line["step"]: line[ROW_REWARDS] for line in records if ROW_REWARDS in line}
    return None if best_step is None else reward_gain(rewards.get(0, ()), rewards.get(best_step, ()))


def gain_verdict(gain: Sequence[float] | None) -> Literal["helped", "hurt", "unclear"]:
    """Judge a `reward_gain`: `helped` or `hurt` only if its interval does not contain 0."""
    if gain is None or gain[1] <= 0 <= gain[2]:
        return "unclear"
    return "helped" if gain[1] > 0 else "hurt"


def gain_words(gain: Sequence[float] | None) -> str:
    """Return a clause about a `reward_gain`."""
    if gain is None:
        return "too few rows to compare the rewards"
    if not any(gain):
        return "the reward of no held-out row changed"
    mean, low, high = gain
    verdict = ": too few rows to tell the change from chance" if gain_verdict(gain) == "unclear" else ""
    return f"reward gained per row {mean:+.4g} (95 % interval {low:+.4g} to {high:+.4g}){verdict}"


_FEWEST_COMPARED_STEPS = 20
"""In a shorter run, the first and last tenth are one step each, whose rewards depend on their few prompts."""


def training_reward_words(first: float, last: float, steps: int) -> str:
    """Return a clause about the rewards of sampled answers at the beginning and at the end of a run.

    Args:
        first, last: mean reward in the first and in the last tenth of the steps.
        steps: number of steps of the run.
    """
    compared = "first and last tenth of the steps, whose prompts differ"
    if steps < _FEWEST_COMPARED_STEPS:
        compared = "first and last step, whose prompts differ: too few to tell a change from chance"
    return f"reward of its own answers to training rows {first:.4f} → {last:.4f} ({compared})"
