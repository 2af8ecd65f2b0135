"""Observers of a run: the terminal, the metrics file, callbacks and loggers receive its events.

The keys of records are those of metrics.jsonl.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from backhand.bounds import plain_value
from backhand.errors import UsageError
from backhand.loop.forecast import Forecast
from backhand.other_names import method_answers
from backhand.runs.directory import METRICS, RunDirectory
from backhand.runs.summary import RunSummary
from backhand.words import nearest_names, shorten


@dataclass(frozen=True)
class RunStart:
    """Facts about a run before its first step."""

    total_steps: int  # number of steps of the run
    step: int  # number of steps done before; positive in a resumed run
    facts: tuple[str, ...]  # lines for people: model, engine, data, adapter, plan
    directory: Path  # the run directory
    config: Mapping[str, Any] = field(default_factory=dict)  # every option, such as `optimization.learning_rate`
    forecast: Forecast | None = None  # of the duration; None if the run is quiet


class Observer:
    """Base class of all observers. Its methods do nothing. Records have the keys of metrics.jsonl.

    `stepped` and `evaluated` may return False: the run then ends after the step, as early stopping does.
    """

    def started(self, start: RunStart) -> None:
        """Called before the first step."""

    def stepped(self, record: dict[str, Any]) -> bool | None:
        """Called after a logged step: step, epoch, loss, learning_rate, grad_norm, tokens, tokens_per_s, …."""

    def evaluated(self, record: dict[str, Any]) -> bool | None:
        """Called after an evaluation: step, eval_loss, …."""

    def noted(self, text: str) -> None:
        """Called with a line for people, such as a warning or a skipped checkpoint."""

    def ended(self, summary: RunSummary) -> None:
        """Called when the run has finished."""

    def closed(self) -> None:
        """Called last, also after an error."""


_METHODS = tuple(name for name in vars(Observer) if not name.startswith("_"))


class Observers(Observer):
    """Several observers as one. Each event is passed to them in order.

    Attributes:
        failed: the observer that has raised an exception, or None.
    """

    def __init__(self, observers: Iterable[Observer]) -> None:
        self.observers = tuple(observers)
        self.failed: Observer | None = None
        for method in _METHODS:
            setattr(self, method, partial(self._notify, method))

    def _notify(self, method: str, *args: object) -> bool:
        """Return False if an observer has returned False."""
        results = []
        for observer in self.observers:
            try:
                results.append(getattr(observer, method)(*args))
            except Exception:
                self.failed = observer
                raise
        return all(plain_value(result) is not False for result in results)


Callback = Observer | Callable[[dict[str, Any]], object]


class _RecordFunction(Observer):
    """Calls a function with each record. Each has a loss: that of an evaluation is the newest step's."""

    def __init__(self, function: Callable[[dict[str, Any]], object]) -> None:
        self._function = function
        self._loss: dict[str, Any] = {}  # empty before the first step

    def stepped(self, record: Mapping[str, Any]) -> Any:
        self._loss = {"loss": record["loss"]}
        return self._function(dict(record))

    def evaluated(self, record: Mapping[str, Any]) -> Any:
        return self._function({**self._loss, **record}) if self._loss else None


def as_callbacks(callbacks: Iterable[Callback] | Callback | None) -> tuple[Callback, ...]:
    """Return the callbacks that a program gives: several, one, or None.

    Raises:
        UsageError: the value is neither a callback nor a list, or a callback cannot be called with a record.
    """
    if callbacks is None:
        return ()
    if isinstance(callbacks, Observer) or callable(callbacks):
        callbacks = (callbacks,)
    if not isinstance(callbacks, Iterable):
        raise UsageError(
            f"{shorten(repr(callbacks))} is neither a function nor a list of functions",
            where="callbacks",
            next_step="write callbacks=[function]",
        )
    given = tuple(callbacks)
    for number, callback in enumerate(given):
        if problem := _callback_problem(callback):
            name = type(callback).__name__ if isinstance(callback, Observer) else shorten(repr(callback))
            raise UsageError(f"{name} {problem[0]}", where=f"callbacks[{number}]", next_step=problem[1])
    return given


def _callback_problem(callback: Any) -> tuple[str, str] | None:
    """Return a clause about a value that cannot be a callback, and what to give instead; None if it can be one."""
    if isinstance(callback, Observer):
        return _observer_problem(callback)
    if isinstance(callback, type) and issubclass(callback, Observer):
        return "is a class, not an observer", f"give an object of it: {callback.__name__}()"
    takes_record = "give a function that is called with each record, a dict"
    if not callable(callback):
        return "is neither a function nor an Observer", takes_record
    if _does_nothing(callback) or _does_nothing(type(callback).__call__):
        return "is async or has a yield, so that a call does not run its body", "write it as a plain function"
    try:
        inspect.signature(callback).bind({})
    except TypeError as error:
        return f"cannot be called with a record: {error}", takes_record
    except ValueError:  # a function in C without a signature
        return None
    return None


def _does_nothing(function: object) -> bool:
    """Return True if a call of a function does not run its body."""
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    return any(is_kind(function) for is_kind in kinds)


def _observer_problem(observer: Observer) -> tuple[str, str] | None:
    """Return a clause and a next step if an observer has methods of other tools, or none that is ever called."""
    given = {name for name in dir(observer) if not name.startswith("_") and callable(getattr(observer, name, None))}
    own = [name for name in _METHODS if getattr(getattr(observer, name), "__func__", None) is not vars(Observer)[name]]
    others, answers = sorted(given.difference(_METHODS)), method_answers()
    for name in others:
        if name in answers and answers[name] not in own:
            return f"has {name}, which is never called", f"write {answers[name]} instead of {name}"
    if lazy := next((name for name in own if _does_nothing(getattr(observer, name))), None):
        return f"has {lazy}, which is async or has a yield, so that a call does not run its body", "write it without"
    if own:
        return None
    near = ((name, one) for name in others for one in nearest_names(name, _METHODS, count=1))
    name, meant = next(near, ("", ""))
    return (
        f"has none of the methods {', '.join(_METHODS)}",
        f"did you mean {meant} instead of {name}?" if meant else "write at least one of them",
    )


def as_observers(callbacks: Iterable[Callback]) -> list[Observer]:
    """Return an observer for each callback. A function is called with the records of steps and evaluations."""
    return [one if isinstance(one, Observer) else _RecordFunction(one) for one in callbacks]


class MetricsFile(Observer):
    """Appends a line to metrics.jsonl for each logged step and each evaluation."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._directory.append(METRICS, record)

    evaluated = stepped
