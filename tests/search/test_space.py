"""`--over`: what it may say, what it comes to in a configuration, and points that are spread evenly."""

from __future__ import annotations

import math
import re

import pytest

from backhand.errors import UsageError
from backhand.options.config import TrainConfig
from backhand.search.space import applied, evenly, grid, largest, parse_dimensions


def test_ranges_and_choices_are_read() -> None:
    rate, rank, dropout, layers = parse_dimensions(
        ["learning_rate=1e-4:1e-2:log", "--rank=8,16,32", "dropout=0:0.2", "layers=last:8,last:16"]
    )
    assert (rate.low, rate.high, rate.log, rate.whole, rate.choices) == (1e-4, 1e-2, True, False, ())
    assert rank.choices == (8, 16, 32)
    assert (dropout.low, dropout.high, dropout.log) == (0.0, 0.2, False)
    assert layers.choices == ("last:8", "last:16")


def test_a_trials_values_are_in_the_configuration_with_their_own_types() -> None:
    dimensions = parse_dimensions(
        ["learning_rate=1e-4:1e-2", "rank=4:64:log", "use_dora=true,false", "target_modules=q_proj+v_proj,all-linear"]
    )
    values = {"learning_rate": 1e-3, "rank": 12, "use_dora": True, "target_modules": "q_proj+v_proj"}
    config = applied(TrainConfig(), dimensions, values)
    assert (config.optimization.learning_rate, config.adapter.rank, config.adapter.use_dora) == (1e-3, 12, True)
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert applied(config, dimensions, {"target_modules": "all-linear"}).adapter.target_modules == "all-linear"
    assert [one.of(config) for one in dimensions] == list(values.values())
    assert largest(TrainConfig(), dimensions).adapter.rank == 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank"], "not of the form NAME=VALUES"),
        (["rank="], "not of the form NAME=VALUES"),
        (["learning_rat=1e-4:1e-3"], "did you mean learning_rate?"),
        (["max_length=64,128"], "others decide which losses are compared"),
        (["learning_rate=1e-3:1e-4"], "not a range of learning_rate"),
        (["learning_rate=1e-3:1e-4:log"], "the first number is the larger one\n  next: write 1e-4:1e-3:log"),
        (["learning_rate=0:1e-3:log"], "starts above 0"),
        (["rank=8,many"], "expected a whole number"),
        (["rank=8", "rank=16"], "given twice"),
        (["schedule=1:2"], "not a range of schedule"),
        (["learning_rate=1e-4:nan"], "'1e-4:nan' is not a range of learning_rate"),
        (["learning_rate=nan:1e-4"], "not a range of learning_rate"),
        (["learning_rate=1e-4:fast"], "not a range of learning_rate"),
        (["learning_rate=1e-4:1e400"], "not a range of learning_rate"),
        (["learning_rate=1e-4:1e-3:lin"], "'1e-4:1e-3:lin' is not a number or auto"),
        (["learning_rate=1e-4,fast"], "'fast' is not a number or auto"),
        (["dropout=,"], "not of the form NAME=VALUES"),
        (["rank=" + "[" * 100_000], "expected a whole number"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_dimensions(words)
    assert said in str(raised.value)


def test_an_option_that_has_no_value_yet_has_none_to_be_typed() -> None:
    dimensions = parse_dimensions(["warmup_steps=0:5", "max_steps=3,6", "exclude_modules=q_proj,k_proj", "rank=4:8"])
    assert [one.of(TrainConfig()) for one in dimensions] == [None, None, None, TrainConfig().adapter.rank]


def test_first_points_of_one_range_leave_no_large_gap() -> None:
    dimensions = parse_dimensions(["learning_rate=1e-4:1e-2:log"])
    for count in (3, 5, 8, 13):
        shares = sorted(
            0.5 * (2 + math.log10(float(evenly(dimensions, number)["learning_rate"]) / 1e-2)) for number in range(count)
        )
        gaps = [after - before for before, after in zip([0.0, *shares], [*shares, 1.0], strict=True)]
        assert max(gaps) < 2.2 / count


def test_points_of_two_dimensions_take_every_choice() -> None:
    dimensions = parse_dimensions(["learning_rate=1e-4:1e-2:log", "rank=8,16,32"])
    points = [evenly(dimensions, number) for number in range(9)]
    assert {point["rank"] for point in points} == {8, 16, 32}
    assert len({point["learning_rate"] for point in points}) == 9


def test_a_grid_has_both_ends_and_every_choice() -> None:
    dimensions = parse_dimensions(["learning_rate=1e-4:1e-2:log", "rank=8,16"])
    points = grid(dimensions, 12)
    assert len(points) == 12
    assert {point["learning_rate"] for point in points} >= {1e-4, 1e-2}
    assert {point["rank"] for point in points} == {8, 16}
    with pytest.raises(UsageError, match=re.escape("a grid has 4 points or more")):
        grid(dimensions, 3)
