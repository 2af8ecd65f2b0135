"""MLflow: a run in the store of MLFLOW_TRACKING_URI, or else in `logs/mlflow.db` of the run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from backhand.train.observer import RunStart
from backhand.train.run_directory import LOGS

EXPERIMENT = "backhand"
# MLflow refuses longer values of parameters.
_LONGEST_VALUE = 6000


class MLflowLogger:
    """A run of the experiment `backhand`, or of MLFLOW_EXPERIMENT_NAME."""

    def begin(self, start: RunStart) -> None:
        """Create the run, and log every option as a parameter."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        directory = start.directory / LOGS
        directory.mkdir(exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{directory / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
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
        """All figures of a step at once."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, "FINISHED" if summary else "KILLED")
