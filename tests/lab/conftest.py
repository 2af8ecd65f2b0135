"""One tiny model and its rows for the paper's analyses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_run import TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))
