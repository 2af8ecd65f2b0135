"""The share of elements that a dropout mask keeps, which a proof does not see: op and reference draw the same mask."""

from __future__ import annotations

import pytest

from backhand.ops.dropout import dropout_mask

COUNT = 1 << 20


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.05, 0.3, 0.5, 0.95, 1 - 1e-4])
def test_a_mask_keeps_the_share_that_the_probability_says(probability):
    kept = int(dropout_mask((COUNT,), probability, 3).sum())
    deviation = (COUNT * probability * (1 - probability)) ** 0.5
    assert abs(kept - COUNT * (1 - probability)) <= 5 * deviation + COUNT * 2**-17


def test_a_probability_that_rounds_to_one_still_keeps_some_elements():
    assert 0 < int(dropout_mask((COUNT,), 1 - 1e-9, 3).sum()) < 50


def test_a_mask_follows_its_seed_alone():
    assert dropout_mask((5, 7), 0.3, 3).equal(dropout_mask((35,), 0.3, 3).view(5, 7))
    assert not dropout_mask((5, 7), 0.3, 3).equal(dropout_mask((5, 7), 0.3, 4))
