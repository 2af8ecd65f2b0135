"""Observers of a run: the terminal, the metrics file, callbacks and loggers receive its events.

The keys of records are those of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from backhand.runs.directory import METRICS, RunDirectory
from backhand.runs.summary import RunSummary


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step."""

    total_steps: int
    step: int  # steps done before, in a run that is continued
    facts: tuple[str, ...]  # lines for a reader: model, engine, data, adapter, plan
    directory: Path
    # every option by the name of its part and its own, such as `optimization.learning_rate`
    config: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """Base of all observers; each method does nothing. Records have the keys of metrics.jsonl."""

    def started(self, start: RunStart) -> None:
        """The run is about to make its first step."""

    def stepped(self, record: Mapping[str, Any]) -> None:
        """A step is done: step, epoch, loss, learning_rate, grad_norm, tokens, supervised_tokens, tokens_per_s, …."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """A held-out evaluation is done: step, eval_loss."""

    def noted(self, text: str) -> None:
        """Something worth a line: a warning, a checkpoint that is skipped."""

    def ended(self, summary: RunSummary) -> None:
        """The run is over."""

    def closed(self) -> None:
        """Nothing will come after this, whatever happened."""


class Observers(Observer):
    """Several observers as one, told in the order given."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = tuple(observers)
        for method in ("started", "stepped", "evaluated", "noted", "ended", "closed"):
            setattr(self, method, partial(self._tell, method))

    def _tell(self, method: str, *told: object) -> None:
        for observer in self.observers:
            getattr(observer, method)(*told)


Callback = Observer | Callable[[Mapping[str, Any]], object]


class _RecordFunction(Observer):
    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self._function = function

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._function(record)

    evaluated = stepped


def as_observers(callbacks: Iterable[Callback]) -> list[Observer]:
    """Functions wrapped, observers as they are."""
    return [callback if isinstance(callback, Observer) else _RecordFunction(callback) for callback in callbacks]


def metrics_file(directory: RunDirectory) -> Observer:
    """Appends a line to the run's metrics.jsonl for each logged step and each evaluation."""
    return _RecordFunction(partial(directory.append, METRICS))
