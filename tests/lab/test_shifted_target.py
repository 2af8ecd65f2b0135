from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from backhand.errors import UsageError
from backhand.lab.sine.options import ShiftedTargetOptions
from backhand.lab.sine.points import make_points
from backhand.lab.sine.shifted_target import ShiftedResult, ShiftedRow, run_shifted_target

SHORT = ShiftedTargetOptions(
    shifted_widths=(12, 9), shifted_ranks=(3, 1), shifted_seeds=3, shifted_base_epochs=60, shifted_epochs=60
)


def test_error_falls_with_rank_beyond_the_spread() -> None:
    options = ShiftedTargetOptions()
    base, shifted = make_points("sin", 100, "float64"), make_points(options.shifted_target, 100, "float64")
    result = run_shifted_target(base, shifted, options, seed=0)
    assert [row.label for row in result.rows] == ["rank 1", "rank 2", "rank 4", "rank 8", "full"]
    assert [row.trained_parameters for row in result.rows] == [128, 256, 512, 1024, 4096]
    assert all(len(row.errors) == 5 for row in result.rows)
    for lower, higher in pairwise(result.rows):
        assert lower.gap(higher) > 1.5, (lower, higher)
        assert all(below > above for below, above in zip(lower.errors, higher.errors, strict=True))
    assert result.falls_beyond_spread
    assert max(result.base_errors) < 1e-4
    assert min(result.unadapted_errors) > 2 * max(result.rows[0].errors)


def test_every_seed_has_its_own_base_and_the_same_one_for_all_ranks() -> None:
    points = make_points("cos", 30, "float64")
    first = run_shifted_target(make_points("sin", 30, "float64"), points, SHORT, seed=5)
    second = run_shifted_target(make_points("sin", 30, "float64"), points, SHORT, seed=6)
    assert len(set(first.base_errors)) == 3
    assert first.base_errors[1:] == second.base_errors[:2]
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.errors[1:] == other.errors[:2]
    assert [row.rank for row in first.rows] == [1, 3, None]
    assert [row.trained_parameters for row in first.rows] == [21, 63, 108]


def test_errors_are_those_of_the_predictions() -> None:
    points = make_points("cos", 30, "float64")
    result = run_shifted_target(make_points("sin", 30, "float64"), points, SHORT, seed=5)
    for row in result.rows:
        assert row.errors[0] == pytest.approx(float(np.mean((result.predictions[row.label] - points.y) ** 2)))
    assert result.unadapted_errors[0] == pytest.approx(float(np.mean((result.predictions["base"] - points.y) ** 2)))


def test_mean_spread_and_gap() -> None:
    row, following = ShiftedRow(1, 10, (0.1, 0.001)), ShiftedRow(2, 20, (1e-4, 1e-4))
    assert row.mean == pytest.approx(0.01)
    assert row.spread == pytest.approx(2**0.5)
    assert row.gap(following) == pytest.approx(2 / 2**0.5)
    near = ShiftedRow(4, 40, (0.9e-4, 0.2e-4))
    for rows, falls in (((row, following), True), ((row, following, near), False), ((following, row), False)):
        result = ShiftedResult("sin x", make_points("cos", 3, "float64"), (0.0,), (1.0,), rows, {})
        assert result.falls_beyond_spread is falls


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shifted_widths", (64,)),
        ("shifted_ranks", ()),
        ("shifted_ranks", (0,)),
        ("shifted_ranks", (5000,)),
        ("shifted_seeds", 1),
        ("shifted_epochs", 0),
        ("shifted_learning_rate", float("nan")),
        ("shifted_scaling", 0.0),
    ],
)
def test_bad_option_names_itself(field: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        ShiftedTargetOptions(**{field: value}).validate()  # type: ignore[arg-type]
    assert caught.value.where == field
