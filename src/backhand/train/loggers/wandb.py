"""Weights & Biases: offline in `logs/wandb` of the run, for `wandb sync` to send later, unless WANDB_MODE is set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from backhand.train.observer import RunStart
from backhand.train.run_directory import LOGS

PROJECT = "backhand"


class WandbLogger:
    """A run of the project `backhand`, or of WANDB_PROJECT; a continued run is another one in the same group."""

    def begin(self, start: RunStart) -> None:
        """Begin a run named like the directory."""
        import wandb

        directory = start.directory / LOGS
        directory.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.directory.name,
            group=str(start.directory),
            dir=str(directory),
            config=dict(start.config),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A row a step: what an evaluation finds after a step belongs to the same row."""
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary, and finish."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)
