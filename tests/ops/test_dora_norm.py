"""The lengths of an adapted weight's rows, from its factors."""

from __future__ import annotations

import pytest
import torch

from backhand.ops.dora import dora_norm

SCALING = 1.7


def drawn(outputs: int = 11, inputs: int = 7, rank: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = ((outputs, inputs), (rank, inputs), (outputs, rank))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def formed(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    return (weight.double() + SCALING * lora_B.double() @ lora_A.double()).norm(dim=1)


@pytest.mark.parametrize("sizes", [(11, 7, 3), (3, 4, 5), (1, 7, 1), (160, 96, 8)])
def test_the_lengths_are_those_of_the_formed_weight(sizes):
    weight, lora_A, lora_B = drawn(*sizes)
    got = dora_norm(weight, lora_A, lora_B, SCALING)
    assert torch.allclose(got, formed(weight, lora_A, lora_B), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_computed_in_float32_at_least(dtype):
    factors = drawn(160, 96, 8, dtype)
    got = dora_norm(*factors, SCALING)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), formed(*factors), rtol=1e-5, atol=0)


def test_a_row_that_cancels_has_no_negative_square():
    weight, lora_A, lora_B = drawn()
    weight = -SCALING * lora_B @ lora_A
    got = dora_norm(weight, lora_A, lora_B, SCALING)
    assert not got.isnan().any() and got.max() < 1e-6


def test_fresh_factors_leave_the_lengths_of_the_base():
    weight, lora_A, lora_B = drawn()
    assert torch.allclose(dora_norm(weight, lora_A, 0 * lora_B, SCALING), weight.norm(dim=1), rtol=1e-14)
