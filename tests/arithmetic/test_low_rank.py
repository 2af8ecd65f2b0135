"""Everything computed from factors, against the same from the formed update by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.low_rank import (
    difference_norm,
    inner_product,
    product_directions,
    terms,
    update_directions,
    writable_factors,
)

FloatArray = np.ndarray


def module(rank: int, seed: int, outputs: int = 17, inputs: int = 23, scaling: float = 1.7) -> ModuleFactors:
    source = torch.Generator().manual_seed(seed)
    lora_A, lora_B = torch.randn(rank, inputs, generator=source), torch.randn(outputs, rank, generator=source)
    return ModuleFactors(lora_A, lora_B, scaling)


def formed(factors: ModuleFactors) -> FloatArray:
    return factors.scaling * factors.lora_B.numpy().astype(np.float64) @ factors.lora_A.numpy().astype(np.float64)


def test_singular_values_and_vectors() -> None:
    one, other = module(3, 1), module(5, 2, scaling=0.3)
    dense = 2.0 * formed(one) - 0.7 * formed(other)
    found = product_directions(*terms([(2.0, one), (-0.7, other)]))
    assert found.values.numpy() == pytest.approx(np.linalg.svd(dense)[1][:8], rel=1e-12)
    again = found.left.numpy() @ np.diag(found.values.numpy()) @ found.right.numpy().T
    assert np.linalg.norm(again - dense) <= 1e-13 * np.linalg.norm(dense)
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-13)
    assert found.rank == 8


@pytest.mark.parametrize("rank", [0, 1, 4, 8])
def test_the_best_approximation_and_what_it_loses(rank: int) -> None:
    """Eckart and Young: no other matrix of the rank is nearer, and NumPy's truncation is the nearest."""
    one, other = module(3, 1), module(5, 2)
    dense = formed(one) + formed(other)
    found = product_directions(*terms([(1.0, one), (1.0, other)]))
    lora_A, lora_B = writable_factors(found, rank)
    left, values, right = np.linalg.svd(dense)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert np.linalg.norm(lora_B.numpy() @ lora_A.numpy() - best) <= 1e-13 * np.linalg.norm(dense)
    assert found.lost_beyond(rank) == pytest.approx(
        np.linalg.norm(dense - best), rel=1e-12, abs=1e-14 * np.linalg.norm(dense)
    )
    reference = np.sqrt(values[:rank]) if rank else [0.0]  # a file holds no rank of 0
    assert torch.linalg.vector_norm(lora_A, dim=1).numpy() == pytest.approx(reference)


def test_smallest_rank_for_an_error() -> None:
    """Singular values 8, 4, 1: ‖ΔW‖ = 9; beyond rank 1 √17, beyond rank 2 exactly 1 = 9 / 9."""
    basis = torch.eye(5)
    found = update_directions(ModuleFactors(basis[:3], basis[:, :3] * torch.tensor([4.0, 8.0, 1.0]), 1.0))
    assert found.values.tolist() == pytest.approx([8, 4, 1])
    assert found.needed_rank(1.0) == 0
    assert found.needed_rank(0.46) == 1  # √17 / 9 = 0.458
    assert found.needed_rank(0.45) == 2
    assert found.needed_rank(1 / 9 + 1e-9) == 2
    assert found.needed_rank(0.11) == 3
    assert found.needed_rank(0.0) == 3


def test_terms_that_repeat_or_cancel_have_no_rank() -> None:
    one = module(3, 1)
    doubled = product_directions(*terms([(1.0, one), (1.0, one)]))
    assert len(doubled.values) == 6 and doubled.rank == 3
    assert doubled.values[:3].numpy() == pytest.approx(2 * update_directions(one).values.numpy())
    nothing = product_directions(*terms([(1.0, one), (-1.0, one)]))
    assert nothing.rank == 0 and nothing.needed_rank(0.01) == 0
    zero = ModuleFactors(one.lora_A, torch.zeros(17, 3), 1.0)
    assert update_directions(zero).rank == 0


def test_factors_of_very_unequal_size_lose_no_term() -> None:
    """1e-9 · lora_B with 1e9 · lora_A is the same update; unbalanced, rounding would hide the other term."""
    one, other = module(2, 1), module(2, 2)
    skewed = ModuleFactors(other.lora_A * 1e12, other.lora_B * 1e-12, other.scaling)
    plain = product_directions(*terms([(1.0, one), (1.0, other)]))
    found = product_directions(*terms([(1.0, one), (1.0, skewed)]))
    assert found.values.numpy() == pytest.approx(plain.values.numpy(), rel=1e-6)  # the factors are float32
    assert found.rank == 4


def test_difference_and_inner_product() -> None:
    one, other = module(3, 1), module(5, 2, scaling=0.3)
    assert difference_norm(one, other) == pytest.approx(np.linalg.norm(formed(one) - formed(other)), rel=1e-13)
    assert inner_product(one, other) == pytest.approx(float((formed(one) * formed(other)).sum()), rel=1e-12)
    nudged = ModuleFactors(one.lora_A, one.lora_B.clone(), one.scaling)
    nudged.lora_B[0, 0] += 2**-20  # a difference far below what subtracting squared norms could see
    expected = np.linalg.norm(formed(nudged) - formed(one))
    assert difference_norm(one, nudged) == pytest.approx(expected, rel=1e-6)


def test_rank_above_the_smaller_side() -> None:
    wide = module(30, 4)
    found = update_directions(wide)
    assert len(found.values) == 17
    assert found.values.numpy() == pytest.approx(np.linalg.svd(formed(wide))[1], rel=1e-11)
