"""Fixtures: a tiny model with its rows, and a finished run of it, made once for all tests of a room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backhand.report.train import train
from tests.support.tiny_run import TinyRun


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def finished_once(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(tmp_path_factory.mktemp("runs")) / "run"
    train(tiny.config(run, epochs=4, learning_rate=1e-2, answers=4))
    return run


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))
