"""The device that these tests are for, `BACKHAND_TEST_DEVICE`: `cuda`, `mps`, or `pretend`, which is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.tiny_run import TinyRun

NAME = os.environ.get("BACKHAND_TEST_DEVICE")
if NAME is None:  # by `make test-cuda` and `make test-mps`, and in a process of its own by test_devices.py
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """A device that is not the processor."""
    assert NAME is not None
    if NAME != "pretend":
        yield torch.device(NAME)
        return
    from support.pretend_card import card

    with card() as found:
        yield found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny model and its rows, made on the processor."""
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))
