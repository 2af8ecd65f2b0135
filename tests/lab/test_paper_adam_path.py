from __future__ import annotations

import pytest
import torch

from backhand.lab.paper_adam_path import LARGEST_DIFFERENCE, adam_path, compare_paths, largest_difference
from backhand.lab.paper_one_layer import OneLayer


def layer() -> OneLayer:
    return OneLayer.on(torch.randn(12, 20, generator=torch.Generator().manual_seed(2)), seed=1)


@pytest.mark.parametrize(("p", "q"), [(3.0, 0.5), (0.25, 4.0), (1.0, 8.0), (7.0, 2.0)])
def test_rescaled_path_is_the_plain_one(p: float, q: float) -> None:
    comparison = compare_paths(layer(), 60, p, q)
    assert comparison.difference < 1e-9
    assert comparison.control > 0.1
    assert comparison.passed


def test_it_is_a_path_that_goes_somewhere() -> None:
    path = adam_path(layer(), 60)
    assert path.losses[-1] < 0.97 * path.losses[0]
    assert len(path.updates) == 60 and len(path.losses) == 61
    assert float(path.updates[0].norm()) > 0


@pytest.mark.parametrize(("p", "q", "q_of_rate"), [(3.0, 1.0, 2.0), (1.0, 3.0, 1.0), (2.0, 2.0, 1.0)])
def test_another_rate_of_one_factor_is_another_path(p: float, q: float, q_of_rate: float) -> None:
    plain, other = adam_path(layer(), 30), adam_path(layer(), 30, p, q, q_of_rate)
    assert largest_difference(plain, other) > 1000 * LARGEST_DIFFERENCE
