"""Amplification against worked examples and against the formed update."""

from __future__ import annotations

import math

import pytest
import torch

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.low_rank import update_directions
from backhand.lab.paper.amplification import (
    Amplification,
    amplification,
    largest_norm_along,
    norm_along,
    random_norm_along,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def factors(rank: int = 3, outputs: int = 8, inputs: int = 11, scaling: float = 1.7) -> ModuleFactors:
    source = generator()
    lora_A, lora_B = torch.randn(rank, inputs, generator=source), torch.randn(outputs, rank, generator=source)
    return ModuleFactors(lora_A, lora_B, scaling)


def test_worked_example() -> None:
    """ΔW = 2 · (0, 0, 3)ᵀ (0, 1, 0, 0) = 6 e₃ e₂ᵀ; along it W = 0.5 there: 6 / 0.5 = 12."""
    update = ModuleFactors(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0], [0.0], [3.0]]), scaling=2.0)
    weight = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    found = amplification("q_proj", update, weight, generator())
    assert found.directions == 1
    assert found.update_norm == pytest.approx(6)
    assert found.along_update == pytest.approx(0.5)
    assert found.factor == pytest.approx(12)
    assert found.along_weight == pytest.approx(math.sqrt(16.25))  # the second column, (0, 4, 0.5)
    assert found.weight_norm == pytest.approx(math.sqrt(9 + 16 + 0.25))


@pytest.mark.parametrize(("update", "along", "factor"), [(6.91, 0.32, 21.5), (3.57, 1.90, 1.9)])
def test_the_papers_own_numbers(update: float, along: float, factor: float) -> None:
    found = Amplification("wq, layer 48", 4, update, 61.95, along, 21.67, 0.02)
    assert found.factor == pytest.approx(factor, rel=0.02)
    assert found.random_factor == pytest.approx(update / 0.02)


def test_from_the_formed_update() -> None:
    module = factors()
    weight = torch.randn(8, 11, generator=generator(), dtype=torch.float64)
    formed = module.scaling * module.lora_B.double() @ module.lora_A.double()
    left, values, right = torch.linalg.svd(formed)
    found = amplification("m", module, weight, generator())
    assert found.directions == 3
    assert found.update_norm == pytest.approx(float(formed.norm()), rel=1e-12)
    assert found.along_update == pytest.approx(float((left[:, :3].T @ weight @ right[:3].T).norm()), rel=1e-10)
    top = amplification("m", module, weight, generator(), directions=2)
    assert top.directions == 2
    assert top.along_update == pytest.approx(float((left[:, :2].T @ weight @ right[:2].T).norm()), rel=1e-10)
    assert top.update_norm == found.update_norm
    directions = update_directions(module)
    assert torch.allclose(directions.values, values[:3])
    assert torch.allclose(directions.left @ directions.values.diag() @ directions.right.T, formed)


def test_rank_above_the_smaller_side() -> None:
    module = factors(rank=12)
    weight = torch.randn(8, 11, generator=generator(), dtype=torch.float64)
    found = amplification("m", module, weight, generator())
    assert found.directions == 8
    # All directions of the output: what is left of W is its projection on the update's row space.
    formed = module.scaling * module.lora_B.double() @ module.lora_A.double()
    projector = torch.linalg.pinv(formed) @ formed
    assert found.along_update == pytest.approx(float((weight @ projector).norm()), rel=1e-9)


def test_leading_directions_of_the_weight() -> None:
    for shape in ((8, 11), (11, 8)):
        weight = torch.randn(shape, generator=generator(), dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight)
        expected = norm_along(weight, left[:, :3], right[:3].T)
        assert largest_norm_along(weight, 3) == pytest.approx(expected, rel=1e-10)
        assert largest_norm_along(weight, 3) == pytest.approx(float(values[:3].norm()), rel=1e-10)


def test_random_directions_see_their_share_of_the_weight() -> None:
    weight = torch.randn(20, 30, generator=generator(), dtype=torch.float64)
    measured = random_norm_along(weight, 4, generator(), draws=500)
    assert measured == pytest.approx(float(weight.norm()) * 4 / math.sqrt(20 * 30), rel=0.05)


def test_an_untrained_adapter_amplifies_nothing() -> None:
    module = factors()
    module.lora_B.zero_()
    found = amplification("m", module, torch.ones(8, 11), generator())
    assert (found.directions, found.update_norm, found.along_update) == (0, 0.0, 0.0)
    assert math.isnan(found.factor) and math.isnan(found.random_factor)
