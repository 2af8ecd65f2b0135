"""trackio: the project `backhand`, or TRACKIO_PROJECT, where trackio keeps its own; `trackio show` opens it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

from backhand.train.loggers.interface import figures
from backhand.train.observer import RunStart

PROJECT = "backhand"


class TrackioLogger:
    """A run named like the directory; a continued run goes on in the same one."""

    def begin(self, start: RunStart) -> None:
        """Begin, or go on."""
        import trackio

        # It prints greetings to standard output, which belongs to the command.
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=start.directory.name,
                config={name: str(value) for name, value in start.config.items()},
                resume="allow" if start.step else "never",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The figures of a step."""
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Wait until everything is written, the figures of the summary last."""
        if summary:
            self._run.log({f"summary/{name}": value for name, value in figures(summary).items()})
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
