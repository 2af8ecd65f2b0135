"""The learning rate of every step, against worked values."""

from __future__ import annotations

import math

import pytest

from backhand.loop.step_plan import LearningRate, default_warmup_steps


def rates(schedule: str, warmup: int, total: int) -> list[float]:
    rate = LearningRate(2.0, schedule, warmup, total)  # type: ignore[arg-type]
    return [rate.at(step) for step in range(total)]


def test_linear_rises_to_the_highest_rate_and_never_reaches_zero() -> None:
    assert rates("linear", 3, 7) == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5])


def test_linear_without_warmup_starts_at_the_highest_rate() -> None:
    assert rates("linear", 0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates("cosine", 1, 5)
    assert found == pytest.approx([1.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 1 + math.cos(3 * math.pi / 4)])


def test_constant_stays() -> None:
    assert rates("constant", 1, 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (5, 3), (10, 100)])
def test_every_step_has_a_rate_above_zero_and_at_most_the_highest(schedule: str, warmup: int, total: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(schedule, warmup, total))


@pytest.mark.parametrize(("total", "steps"), [(1, 0), (2, 1), (30, 1), (100, 3), (101, 4)])
def test_default_warmup(total: int, steps: int) -> None:
    assert default_warmup_steps(total) == steps
