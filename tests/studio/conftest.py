"""A server of the studio on an empty directory, and finished runs of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backhand.studio.command import serving
from backhand.studio.workspace import Workspace
from tests.support.finished_runs import finished, finished_once, tiny
from tests.support.studio_client import Client
from tests.support.tiny_run import TinyRun

__all__ = ["client", "finished", "finished_once", "space", "tiny"]


@pytest.fixture
def space(tmp_path: Path, tiny: TinyRun) -> Workspace:
    """A directory from which the tiny model may be named by path."""
    return Workspace(tmp_path / "studio", [tiny.model])


@pytest.fixture
def client(space: Workspace) -> Iterator[Client]:
    with serving(space, host="127.0.0.1", port=0) as address:
        yield Client(address).enter()
