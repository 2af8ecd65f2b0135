"""What tests of the product share: each build in which it is ours, in force, and as many threads as before."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels.library import load, proving_loops, using
from support.product_builds import PRODUCT_BUILDS, build_id


@pytest.fixture(params=PRODUCT_BUILDS, ids=build_id)
def dtype(request):
    """Each build and dtype in which the product is ours, in force."""
    build, found = request.param
    with using(load(build)), proving_loops(), torch.no_grad():
        yield found


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
