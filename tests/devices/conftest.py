"""The device that these tests are for, `BACKHAND_TEST_DEVICE`: `cuda`, `mps`, or `pretend`, which is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny_run import TinyRun


def pytest_ignore_collect() -> bool | None:
    """Collect these tests for `make test-cuda` and `make test-mps`, and in test_devices.py's own process, alone."""
    return None if "BACKHAND_TEST_DEVICE" in os.environ else True


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """A device that is not the processor."""
    name = os.environ["BACKHAND_TEST_DEVICE"]
    if name != "pretend":
        yield torch.device(name)
        return
    from tests.support.pretend_card import card

    with card() as found:
        yield found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny model and its rows, made on the processor."""
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))
