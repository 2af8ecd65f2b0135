"""Searches of a tiny model that take a few seconds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from backhand.options.config import TrainConfig
from backhand.search.options import SearchConfig, SearchOptions
from tests.support.tiny_run import TinyRun

OVER = ("learning_rate=1e-3:1e-1:log", "rank=2,4")


def search_config(tiny: TinyRun, output: Path, search: dict[str, Any] | None = None, **options: Any) -> SearchConfig:
    """Return a search of five trials over rate and rank; `options` are those of the runs."""
    config = tiny.config(output, **{"eval_every": 3, **options})
    parts = {part.name: getattr(config, part.name) for part in fields(TrainConfig)}
    return SearchConfig(**parts, search=SearchOptions(**{"over": OVER, "trials": 5, **(search or {})}))
