"""φ against its definition, against principal angles, against worked examples and against chance."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_config import PEFTConfig
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.low_rank import input_directions, output_directions, subspace_similarity
from backhand.lab.paper.similarity import compare_adapters, expected_random_similarity, random_similarity


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_worked_example() -> None:
    """In the plane of e1 and e2 against e1 turned by 60° towards e3, then e2."""
    u = torch.eye(4, dtype=torch.float64)[:, :2]
    turned = torch.tensor([0.5, 0.0, math.sqrt(0.75), 0.0], dtype=torch.float64)
    v = torch.stack([turned, u[:, 1]], dim=1)
    #  i = 1: ‖(½, 0)‖² = ¼ for j = 1; ¼ / min(1, 2) for j = 2.  i = 2: ¼ / 1, then (¼ + 1) / 2.
    assert torch.allclose(subspace_similarity(u, v), torch.tensor([[0.25, 0.25], [0.25, 0.625]], dtype=torch.float64))


def test_definition_element_by_element() -> None:
    lora_A, other = torch.randn(5, 11, generator=generator()), torch.randn(3, 11, generator=generator())
    u, v = (np.linalg.svd(factor.double().numpy())[2].T for factor in (lora_A, other))
    measured = subspace_similarity(input_directions(lora_A), input_directions(other))
    assert measured.shape == (5, 3)
    for i in range(1, 6):
        for j in range(1, 4):
            expected = np.linalg.norm(u[:, :i].T @ v[:, :j], "fro") ** 2 / min(i, j)
            assert float(measured[i - 1, j - 1]) == pytest.approx(expected, rel=1e-10)


def test_mean_squared_cosine_of_the_principal_angles() -> None:
    lora_B, other = torch.randn(13, 6, generator=generator()), torch.randn(13, 4, generator=generator())
    u, v = output_directions(lora_B), output_directions(other)
    angles = scipy.linalg.subspace_angles(u.numpy(), v.numpy())
    assert float(subspace_similarity(u, v)[-1, -1]) == pytest.approx(float(np.mean(np.cos(angles) ** 2)), rel=1e-10)


def test_bounds_identity_and_right_angles() -> None:
    u = input_directions(torch.randn(4, 9, generator=generator()))
    same = subspace_similarity(u, u)
    assert torch.allclose(
        same, torch.ones(4, 4, dtype=torch.float64)
    )  # the smaller of two nested ones lies in the larger
    basis = torch.linalg.qr(torch.randn(9, 9, generator=generator(), dtype=torch.float64)).Q
    assert float(subspace_similarity(basis[:, :4], basis[:, 4:]).abs().max()) < 1e-12
    other = subspace_similarity(u, input_directions(torch.randn(3, 9, generator=torch.Generator().manual_seed(4))))
    assert float(other.min()) > 0 and float(other.max()) < 1


def test_the_other_singular_vectors_would_say_nothing() -> None:
    """Directions of the rank × rank side span a full basis: φ at full rank is 1 for any factors."""
    square = [output_directions(torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    assert float(subspace_similarity(*square)[-1, -1]) == pytest.approx(1)
    right = [input_directions(torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    assert float(subspace_similarity(*right)[-1, -1]) < 0.5


def test_only_the_subspace_counts_at_full_rank() -> None:
    lora_A, other = (
        torch.randn(3, 9, generator=generator()),
        torch.randn(4, 9, generator=torch.Generator().manual_seed(1)),
    )
    mixed = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 5.0], [1.0, 0.0, 1.0]]) @ lora_A
    one = subspace_similarity(input_directions(lora_A), input_directions(other))[-1, -1]
    assert float(subspace_similarity(input_directions(mixed), input_directions(other))[-1, -1]) == pytest.approx(
        float(one)
    )


def test_chance_is_the_larger_rank_over_the_dimension() -> None:
    source = generator()
    mean = torch.stack([random_similarity(30, 3, 5, source) for _ in range(400)]).mean(0)
    expected = expected_random_similarity(30, 3, 5)
    assert expected[0, 0] == 1 / 30 and expected[2, 4] == 5 / 30 and expected[2, 0] == 3 / 30
    assert float(((mean - expected) / expected).abs().max()) < 0.15


def adapter(seed: int, rank: int, modules: tuple[str, ...]) -> AdapterFactors:
    source = torch.Generator().manual_seed(seed)
    factors = {
        name: ModuleFactors(torch.randn(rank, 12, generator=source), torch.randn(9, rank, generator=source), 2.0)
        for name in modules
    }
    return AdapterFactors(f"adapter {seed}", Path(), PEFTConfig(LoRAConfig()), factors, (), 0)


def test_adapters_are_compared_on_the_modules_of_both() -> None:
    first, second = adapter(1, 2, ("a", "b", "c")), adapter(2, 5, ("c", "x", "a"))
    found = compare_adapters(first, second)
    assert [(row.module, row.factor, row.dimension) for row in found] == [
        ("a", "lora_A", 12),
        ("a", "lora_B", 9),
        ("c", "lora_A", 12),
        ("c", "lora_B", 9),
    ]
    assert all(row.similarity.shape == row.random.shape == (2, 5) for row in found)
    again = compare_adapters(first, second)
    assert all(torch.equal(one.random, other.random) for one, other in zip(found, again, strict=True))


def test_a_factor_that_is_zero_has_no_directions() -> None:
    first, second = adapter(1, 2, ("a",)), adapter(2, 5, ("a",))
    first.modules["a"].lora_B.zero_()
    assert [row.factor for row in compare_adapters(first, second)] == ["lora_A"]
