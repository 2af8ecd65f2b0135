"""Principal angles against SciPy and against constructed ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from backhand.arithmetic.low_rank import principal_angles, subspace_similarity


def basis(columns: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(13, columns, generator=source, dtype=torch.float64)).Q


@pytest.mark.parametrize(("first", "second"), [(4, 4), (2, 5), (6, 3), (1, 1)])
def test_against_scipy(first: int, second: int) -> None:
    u, v = basis(first, 1), basis(second, 2)
    expected = np.sort(np.degrees(scipy.linalg.subspace_angles(u.numpy(), v.numpy())))
    found = principal_angles(u, v)
    assert found.numpy() == pytest.approx(expected, rel=1e-9)
    mean_squared_cosine = (torch.cos(torch.deg2rad(found)) ** 2).mean()
    assert float(mean_squared_cosine) == pytest.approx(float(subspace_similarity(u, v)[-1, -1]), rel=1e-12)


@pytest.mark.parametrize("degrees", [1e-9, 1e-5, 10.0, 44.9, 45.1, 89.9, 90.0])
def test_one_direction_turned_by_a_known_angle(degrees: float) -> None:
    """Also angles whose cosine is 1 in float64."""
    turn = math.radians(degrees)
    u = torch.eye(13, dtype=torch.float64)[:, :2]
    v = u.clone()
    v[0, 0], v[5, 0] = math.cos(turn), math.sin(turn)
    found = principal_angles(u, v)
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert float(found[1]) == pytest.approx(degrees, rel=1e-6)
