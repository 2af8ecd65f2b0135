"""What a logger is, and how one takes part in a run.

The names it is given are those of metrics.jsonl. A logger that fails is put aside with a note: it must not take a run
with it that has nothing else wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from backhand.train.observer import Observer, RunStart
from backhand.train.summary import RunSummary


class Logger(Protocol):
    """Something that keeps figures over steps. Its methods may raise anything."""

    def begin(self, start: RunStart) -> None:
        """A run begins, or is continued from `start.step`."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep these finite figures of a step."""
        ...

    def end(self, summary: Mapping[str, Any]) -> None:
        """The run is over; `summary` is as in summary.json, empty where the run did not reach its end."""
        ...


class LoggerObserver(Observer):
    """Tells a logger of a run.

    Args:
        name: for notes.
        logger: to be told.
        note: told, in a sentence, that the logger failed.
    """

    def __init__(self, name: str, logger: Logger, note: Callable[[str], None]) -> None:
        self._name = name
        self._logger: Logger | None = logger
        self._note = note
        self._begun = False
        self._summary: Mapping[str, Any] = {}

    def started(self, start: RunStart) -> None:
        """Begin."""
        self._begun = True
        self._tell(lambda logger: logger.begin(start))

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Log the step's figures."""
        self._tell(lambda logger: logger.log(figures(record), record["step"]))

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Log the evaluation's figures."""
        self._tell(lambda logger: logger.log(figures(record), record["step"]))

    def ended(self, summary: RunSummary) -> None:
        """Keep the summary for the end."""
        self._summary = asdict(summary)

    def closed(self) -> None:
        """End, if the run ever began."""
        if self._begun:
            self._begun = False
            self._tell(lambda logger: logger.end(self._summary))

    def _tell(self, call: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            call(self._logger)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on
            self._logger = None
            self._note(f"{self._name} failed and is left out from here on: {type(error).__name__}: {error}")


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record but the step, which is their place."""
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
