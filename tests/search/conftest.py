"""A tiny model with its rows, and a finished search over them, made once."""

from __future__ import annotations

import pytest

from backhand.search.command import search_command
from backhand.search.result import SearchResult
from tests.support.finished_runs import tiny
from tests.support.searches import search_config
from tests.support.tiny_run import TinyRun

__all__ = ["tiny"]


@pytest.fixture(scope="session")
def found(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search_command(search_config(tiny, tmp_path_factory.mktemp("searches") / "search"))
