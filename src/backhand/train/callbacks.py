"""Callbacks of one's own: an observer, or a plain function that gets every record of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from backhand.train.observer import Observer

Callback = Observer | Callable[[Mapping[str, Any]], object]


class _RecordFunction(Observer):
    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self._function = function

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Pass on."""
        self._function(record)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Pass on."""
        self._function(record)


def as_observers(callbacks: Iterable[Callback]) -> list[Observer]:
    """Functions wrapped, observers as they are."""
    return [callback if isinstance(callback, Observer) else _RecordFunction(callback) for callback in callbacks]
