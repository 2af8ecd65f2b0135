from __future__ import annotations

import pytest
import torch

from backhand.training import facts


def test_the_norm_of_a_large_base_weight_is_that_of_float64() -> None:
    weight = torch.randn(4096, 6144, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert facts._norm(weight) == pytest.approx(float(weight.double().norm()), rel=1e-6)
