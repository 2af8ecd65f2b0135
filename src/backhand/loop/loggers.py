"""Loggers of a run: MLflow, TensorBoard, trackio and Weights & Biases.

The names of logged values are those of metrics.jsonl. If a logger fails, it is dropped with a note, and the run goes
on.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Protocol

from backhand.errors import UsageError
from backhand.loop.observers import Observer, RunStart
from backhand.runs.directory import LOGS
from backhand.runs.summary import RunSummary
from backhand.system import install


class Logger(Protocol):
    """A logger of numbers by step. Its methods may raise any exception."""

    def begin(self, start: RunStart) -> None:
        """Begin a run, or continue it from `start.step`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the finite values of a step."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """End the run. `summary` has the contents of summary.json, or is empty if the run has not finished."""


class LoggerObserver(Observer):
    """Passes the events of a run to a logger, and drops the logger if it fails.

    Args:
        name: the logger's name.
        logger: the logger.
        notify: receives a sentence if the logger fails.
    """

    def __init__(self, name: str, logger: Logger, notify: Callable[[str], None]) -> None:
        self._name, self._notify, self._started = name, notify, False
        self._logger: Logger | None = logger
        self._summary: Mapping[str, Any] = {}

    def started(self, start: RunStart) -> None:
        self._started = True
        self._call(lambda logger: logger.begin(start))

    def stepped(self, record: Mapping[str, Any]) -> None:
        self._call(lambda logger: logger.log(figures(record), record["step"]))

    evaluated = stepped

    def ended(self, summary: RunSummary) -> None:
        self._summary = asdict(summary)

    def closed(self) -> None:
        """End the logger's run if it has been started."""
        if self._started:
            self._started = False
            self._call(lambda logger: logger.end(self._summary))

    def _call(self, method: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            method(self._logger)
        except Exception as error:  # noqa: BLE001 - the run goes on after any error of a logger
            self._logger = None
            self._notify(f"{self._name} failed and is left out from here on: {type(error).__name__}: {error}")


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record, except the step."""
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


_PROJECT = "backhand"  # default name of the project or experiment
_LONGEST_VALUE = 6000  # MLflow rejects longer values of parameters


class _MLflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME, by default `backhand`."""

    def begin(self, start: RunStart) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        directory = start.directory / LOGS
        directory.mkdir(exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        identity = (
            self._client.create_experiment(name, artifact_location=(directory / "mlflow-artifacts").as_uri())
            if experiment is None
            else experiment.experiment_id
        )
        self._run = self._client.create_run(identity, run_name=start.directory.name).info.run_id
        parameters = [Param(name, str(value)[:_LONGEST_VALUE]) for name, value in start.config.items()]
        self._client.log_batch(self._run, params=parameters)

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._client.set_terminated(self._run, "FINISHED" if summary else "KILLED")


class _TensorBoard:
    """Event files with scalars and the configuration as text."""

    def begin(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(start.directory / LOGS / "tensorboard"), purge_step=start.step + 1 if start.step else None
        )
        options = json.dumps(dict(start.config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in options.splitlines()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._writer.add_text("ended", "finished" if summary else "not finished")
        self._writer.close()


class _Trackio:
    """A run with the name of the directory. A resumed run continues it."""

    def begin(self, start: RunStart) -> None:
        import trackio

        # trackio prints messages to standard output, which is reserved for the output of the command.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=start.directory.name,
                config={name: str(value) for name, value in start.config.items()},
                resume="allow" if start.step else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any]) -> None:
        if summary:
            self._run.log({f"summary/{name}": value for name, value in figures(summary).items()})
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


class _Wandb:
    """A run in the project WANDB_PROJECT, by default `backhand`. A resumed run is a new run in the same group."""

    def begin(self, start: RunStart) -> None:
        import wandb

        directory = start.directory / LOGS
        directory.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=start.directory.name,
            group=str(start.directory),
            dir=str(directory),
            config=dict(start.config),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)


# The keys are the names of the loggers, of their packages and of Backhand's extras.
_LOGGERS: Mapping[str, Callable[[], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def chosen_loggers(names: Iterable[str], notify: Callable[[str], None]) -> list[LoggerObserver]:
    """Return an observer for each name. Raises UsageError if a package is not installed."""
    observers = []
    for name in dict.fromkeys(names):
        if find_spec(name) is None:
            raise UsageError(f"{name} is not installed", where="report_to", next_step=install(f"'backhand[{name}]'"))
        observers.append(LoggerObserver(name, _LOGGERS[name](), notify))
    return observers
