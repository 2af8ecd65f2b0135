from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backhand.verify.comparison import compare


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equal_tensors_are_exact():
    x = normal(3, 5)
    found = compare("dx", x, x.clone())
    assert (found.exact, found.approximate, found.largest_difference, found.relative_error) == (True, True, 0.0, 0.0)
    assert found.shape == (3, 5)


def test_arrays_and_lists_are_taken_as_tensors():
    found = compare("dx", np.array([1.0, 2.0]), [1.0, 2.5])
    assert (found.exact, found.largest_difference) == (False, 0.5)


@pytest.mark.parametrize(("by_hand", "autograd", "side"), [(None, normal(3), "by hand"), (normal(3), None, "autograd")])
def test_no_gradient_agrees_with_nothing(by_hand, autograd, side):
    found = compare("dx", by_hand, autograd)
    assert not found.exact and not found.approximate and found.note == f"{side} is None: there is no gradient"


def test_a_factor_one_plus_1e_6_is_seen():
    x = normal(3, 5)
    found = compare("dx", x * (1 + 1e-6), x)
    assert not found.exact
    assert found.approximate
    assert found.relative_error == pytest.approx(1e-6, rel=1e-6)
    assert found.largest_difference == pytest.approx(1e-6 * x.abs().max().item(), rel=1e-6)


def test_tiny_gradients_are_judged_by_their_own_size():
    x = 1e-12 * normal(7)
    found = compare("dx", -x, x)
    assert found.approximate, "allclose's absolute tolerance hides a wrong sign here"
    assert found.relative_error == pytest.approx(2.0)


def test_the_printed_line_is_the_experiments():
    line = str(compare("dlora_A", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])))
    assert line == "dlora_A         | exact: False | approximate: False | maxdiff: 0.5"


def test_a_tensor_with_a_gradient_is_compared_by_it():
    a = normal(2, 3).requires_grad_()
    (a * a).sum().backward()
    assert compare("da", 2 * a.detach(), a).exact
    middle = a * 2
    middle.retain_grad()
    middle.sum().backward()
    assert compare("dmiddle", torch.ones(2, 3), middle).exact


def test_shapes_are_not_broadcast():
    found = compare("db", torch.ones(3), torch.ones(2, 3))
    assert not found.exact
    assert not found.approximate
    assert math.isnan(found.largest_difference)
    assert "shapes differ: by hand (3,), autograd (2, 3)" in str(found)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors_agree(shape):
    found = compare("empty", torch.zeros(shape), torch.zeros(shape, dtype=torch.float64))
    assert found.exact
    assert found.approximate
    assert found.largest_difference == 0.0


def test_nan_never_agrees():
    x = torch.tensor([1.0, math.nan])
    found = compare("nan", x, x.clone())
    assert not found.exact
    assert not found.approximate
    assert math.isnan(found.largest_difference)
    assert math.isnan(found.relative_error)
    assert "1 NaN" in str(found)


def test_equal_infinities_are_equal_and_have_no_relative_error():
    x = torch.tensor([math.inf, -math.inf, 1.0])
    found = compare("inf", x, x.clone())
    assert found.exact
    assert found.largest_difference == 0.0
    assert math.isnan(found.relative_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_dtypes_may_differ(dtype):
    values = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=dtype)
    assert compare("mixed", values, values.double()).exact
    assert compare("mixed", values, 1 - values.double()).largest_difference == 1.0


def test_rounding_to_bfloat16_is_measured():
    x = normal(11, 13)
    found = compare("bf16", x.bfloat16(), x)
    assert 1e-4 < found.relative_error < 2**-8


def test_complex_sparse_scalar_and_noncontiguous_tensors():
    z = torch.complex(normal(4), normal(4, seed=1))
    assert compare("z", z, z.clone()).exact
    assert compare("z", z * (1 + 1e-6), z).relative_error == pytest.approx(1e-6, rel=1e-5)
    x = normal(3, 4)
    assert compare("sparse", x.to_sparse(), x).exact
    assert compare("transposed", x.T, x.T.contiguous()).exact
    assert compare("scalar", torch.tensor(2.0), torch.tensor(2.0)).exact
