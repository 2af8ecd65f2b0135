"""metrics.jsonl: a line for each logged step and each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backhand.train.observer import Observer
from backhand.train.run_directory import METRICS, RunDirectory


class MetricsFile(Observer):
    """Appends to the run's metrics.jsonl."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Write the step's line."""
        self._directory.append(METRICS, record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Write the evaluation's line."""
        self._directory.append(METRICS, record)
