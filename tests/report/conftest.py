"""Finished runs of a tiny model for all tests of this room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backhand.report.train import train
from support.tiny_run import TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def _finished(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(tmp_path_factory.mktemp("runs")) / "run"
    train(tiny.config(run, epochs=4, learning_rate=1e-2))
    return run


@pytest.fixture
def finished(_finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(_finished, tmp_path / "run"))
