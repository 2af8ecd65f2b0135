"""What tests of the product share: each build in which it is ours, in force, and as many threads as before."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels.builds import load, using
from backhand.kernels.library import proving_kernels
from tests.support.product_builds import ALIKE, PRODUCT_BUILDS, build_id


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what one build does like another: all but bfloat16 on those that differ in bfloat16 alone."""
    repeated = [item for item in items if _repeats(item)]
    config.hook.pytest_deselected(items=repeated)
    left_out = set(repeated)
    items[:] = [item for item in items if item not in left_out]


def _repeats(item: pytest.Item) -> bool:
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    takes_one = "float64" in item.name or given.get("dtype") in (torch.float32, torch.float64)
    return given.get("build") in ALIKE and takes_one


@pytest.fixture(params=PRODUCT_BUILDS, ids=build_id)
def dtype(request):
    """Each build and dtype in which the product is ours, in force."""
    build, found = request.param
    with using(load(build)), proving_kernels(), torch.no_grad():
        yield found


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
