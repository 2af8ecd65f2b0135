from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

from backhand.lab.paper.adam_path import LEARNING_RATE
from backhand.lab.paper.first_update import (
    FIRST_UPDATE_ALPHA,
    LARGEST_STANDARD_ERRORS,
    FirstUpdates,
    first_updates,
    largest_disagreement,
)
from backhand.lab.paper.one_layer import NAME, OneLayer


def layer() -> OneLayer:
    return OneLayer.on(torch.randn(40, 64, generator=torch.Generator().manual_seed(2)), seed=1)


def test_means_agree_and_single_runs_differ() -> None:
    updates = first_updates(layer(), (1, 4, 16), seeds=40)
    assert largest_disagreement(updates) < LARGEST_STANDARD_ERRORS
    for update in updates:
        assert update.mean > 10 * update.standard_error  # it is a descent, not noise around zero
        assert len(set(update.along_descent)) == 40
    for smaller, larger in pairwise(updates):
        assert smaller.deviation / larger.deviation == pytest.approx(2, rel=0.5)  # 1/√r, and r four times as large


def test_rank_stabilised_scaling_would_be_found() -> None:
    """With alpha / √r instead of alpha / r the update is √r times as large."""
    stabilised = [
        FirstUpdates(update.rank, tuple(value * math.sqrt(update.rank) for value in update.along_descent))
        for update in first_updates(layer(), (1, 4, 16), seeds=40)
    ]
    assert largest_disagreement(stabilised) > 5 * LARGEST_STANDARD_ERRORS


def test_one_update_is_the_formula() -> None:
    """b_k = −lr · sign(Gᵀ x a_k), so that ΔW = −lr · (alpha / r) Σ sign(Gᵀ x a_k) a_kᵀ."""
    problem = layer()
    update = first_updates(problem, (3,), seeds=2)[0]
    gradient = problem.weight_gradient()
    for seed, measured in enumerate(update.along_descent):
        lora_A = problem.parameters(3, FIRST_UPDATE_ALPHA / 3, seed).lora_A(NAME)
        delta = -LEARNING_RATE * (FIRST_UPDATE_ALPHA / 3) * torch.sign(gradient @ lora_A.T) @ lora_A
        assert measured == pytest.approx(float(-(delta * gradient).sum() / gradient.norm()), rel=1e-6)


def test_gradients_are_those_of_autograd() -> None:
    problem = layer()
    lora = problem.parameters(3, 1.7, seed=0)
    lora.values.copy_(torch.randn(lora.values.shape, generator=torch.Generator().manual_seed(0)))
    loss = problem.add_gradients(lora, 1.7)
    A, B = (factor(NAME).clone().requires_grad_() for factor in (lora.lora_A, lora.lora_B))
    y = problem.x @ (problem.weight + 1.7 * B @ A).T
    truth = ((y - problem.target) ** 2).sum() / len(problem.x)
    truth.backward()
    assert loss == pytest.approx(truth.item(), rel=1e-12)
    assert A.grad is not None and torch.allclose(lora.d_lora_A(NAME), A.grad, rtol=1e-10)
    assert B.grad is not None and torch.allclose(lora.d_lora_B(NAME), B.grad, rtol=1e-10)
    weight = problem.weight.clone().requires_grad_()
    (((problem.x @ weight.T - problem.target) ** 2).sum() / len(problem.x)).backward()
    assert weight.grad is not None and torch.allclose(problem.weight_gradient(), weight.grad, rtol=1e-10)


def test_mean_deviation_and_standard_errors() -> None:
    one, other = FirstUpdates(1, (1.0, 2.0, 4.0, 5.0)), FirstUpdates(4, (2.0, 2.5, 3.5))
    assert one.mean == 3 and one.deviation == pytest.approx(math.sqrt(10 / 3))
    assert one.standard_error == pytest.approx(math.sqrt(10 / 12))
    welch = scipy.stats.ttest_ind(one.along_descent, other.along_descent, equal_var=False).statistic
    assert one.standard_errors_apart(other) == pytest.approx(abs(welch))
    assert other.standard_error == pytest.approx(scipy.stats.sem(np.array(other.along_descent)))
    far = FirstUpdates(2, (9.0, 9.5, 10.0))
    assert largest_disagreement([one, other, far]) == pytest.approx(far.standard_errors_apart(other))
