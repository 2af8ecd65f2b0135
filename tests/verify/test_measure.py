from __future__ import annotations

import math

import pytest
import torch

from backhand.verify.measure import relative_error, worst_row


def test_relative_error_is_relative_to_the_truth():
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth * (1 + 1e-3), truth.double()) == pytest.approx(1e-3, rel=1e-4)
    assert relative_error(-1e-9 * truth, 1e-9 * truth) == pytest.approx(2.0)
    assert relative_error(torch.zeros(2), truth) == 1.0


def test_zero_truth():
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(torch.full((3,), 1e-30, dtype=torch.float64), zero) == math.inf
    assert relative_error(torch.full((3,), 1e-17), zero, zero_scale=2.0) < 1e-16
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_passes_no_bound(bad):
    truth = torch.ones(3)
    spoiled = torch.tensor([1.0, bad, 1.0])
    assert not relative_error(spoiled, truth) <= 1e9
    assert not relative_error(truth, spoiled) <= 1e9
    assert not relative_error(spoiled, spoiled) <= 1e9


def test_shapes_that_differ_are_infinitely_wrong():
    assert relative_error(torch.ones(3), torch.ones(1, 3)) == math.inf


def test_worst_row_is_named():
    truth = torch.zeros(4, 3, 5)
    measured = truth.clone()
    measured[2, 1, 3] = 0.5
    measured[0, 0] = 0.1
    assert worst_row(measured, truth) == ((2, 1), 0.5)
    measured[3, 0, 0] = math.nan
    found = worst_row(measured, truth)
    assert found is not None
    assert found.position == (3, 0)


def test_worst_row_of_vectors_numbers_and_nothing():
    assert worst_row(torch.tensor([0.0, 2.0]), torch.zeros(2)) == ((1,), 2.0)
    assert worst_row(torch.tensor(2.0), torch.tensor(0.5)) == ((), 1.5)
    assert worst_row(torch.zeros(0, 3), torch.zeros(0, 3)) is None
    assert worst_row(torch.zeros(2), torch.zeros(3)) is None
