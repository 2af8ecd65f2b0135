from __future__ import annotations

import pytest
import torch

from backhand.lab.paper.adam_path import (
    ALPHA,
    LARGEST_DIFFERENCE,
    LEARNING_RATE,
    RANK,
    AdamPath,
    PathComparison,
    adam_path,
    compare_paths,
    path_differences,
)
from backhand.lab.paper.one_layer import NAME, OneLayer


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
    assert max(path_differences(plain, other)) > 1000 * LARGEST_DIFFERENCE


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (3.0, 0.5)])
def test_the_path_is_that_of_adams_own_formulas_on_autograds_gradients(p: float, q: float) -> None:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← θ − lr m̂ / (√v̂ + ε) [arXiv:1412.6980, algorithm 1]."""
    problem, scaling = layer(), ALPHA / (p * q) / RANK
    lora = problem.parameters(RANK, scaling, seed=0)
    factors = [p * lora.lora_A(NAME).clone(), lora.lora_B(NAME).clone()]
    first, second = ([torch.zeros_like(factor) for factor in factors] for _ in range(2))
    measured = adam_path(problem, 12, p, q)
    for step in range(1, 13):
        lora_A, lora_B = (factor.requires_grad_() for factor in factors)
        y = problem.x @ (problem.weight + scaling * lora_B @ lora_A).T
        loss = ((y - problem.target) ** 2).sum() / len(problem.x)
        assert measured.losses[step - 1] == pytest.approx(loss.item(), rel=1e-10)
        for index, gradient in enumerate(torch.autograd.grad(loss, factors)):
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            mean, square = first[index] / (1 - 0.9**step), second[index] / (1 - 0.999**step)
            rate = LEARNING_RATE * (p, q)[index]
            factors[index] = (factors[index] - rate * mean / (square.sqrt() + 1e-14)).detach()
        expected = scaling * factors[1] @ factors[0]
        assert torch.allclose(measured.updates[step - 1], expected, rtol=1e-8, atol=1e-12)


def test_differences_are_relative_and_step_by_step() -> None:
    plain = AdamPath((), (torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 10.0]])))
    other = AdamPath((), (torch.tensor([[3.0, 5.0]]), torch.tensor([[0.0, 11.0]])))
    assert path_differences(plain, other) == pytest.approx((1 / 5, 1 / 10))
    comparison = PathComparison(2.0, 3.0, (0.0, 1e-9, 1e-12), (0.2, 0.5, 0.3))
    assert (comparison.difference, comparison.control, comparison.passed) == (1e-9, 0.5, True)
    assert not PathComparison(2.0, 3.0, (0.0, 1e-3), (0.2, 0.5)).passed
    assert not PathComparison(2.0, 3.0, (0.0, 0.0), (0.0, 0.0)).passed  # the control would have to differ
    assert PathComparison(2.0, 1.0, (0.0, 0.0), (0.0, 0.0)).passed
