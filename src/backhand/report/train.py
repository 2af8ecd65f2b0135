"""Training that leaves a report: what `backhand train` and `backhand.train` call."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from backhand.bounds import check_kind
from backhand.distributed.launch import in_a_group
from backhand.errors import BackhandError, UsageError
from backhand.loop.observers import Callback, Observer, RunStart
from backhand.options.config import TrainConfig
from backhand.printing import say, visible
from backhand.runs.summary import RunSummary
from backhand.training.run import train as train_without_report


class _ReportWriter(Observer):
    """Writes report.html when a run that began is over, however it ended."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._directory: Path | None = None

    def started(self, start: RunStart) -> None:
        """Remember where."""
        self._directory = start.directory

    def closed(self) -> None:
        """Write; a page that cannot be written takes nothing from the run, which is saved."""
        if self._directory is None:
            return
        from backhand.report.command import write_report

        try:
            target = write_report(self._directory)
        except (BackhandError, OSError) as error:
            said, out = f"the report could not be written: {error}", sys.stderr
        else:
            said, out = visible(f"Report: {shlex.quote(str(target))}"), sys.stdout
        if out is sys.stderr or not self._quiet:
            with suppress(OSError):  # nobody is left to read it; what ended the run is what is told
                say(*said.split("\n"), file=out)


def train(
    config: TrainConfig, *, callbacks: Iterable[Callback] = (), typed: frozenset[str] = frozenset()
) -> RunSummary:
    """Train as `config` says, and leave report.html in the run directory, also after an interruption.

    Args:
        config: every option. What is None or `auto` in it is chosen, and written to config.toml.
        callbacks: told how the run goes: an `Observer`, or a function that is called with every record of
            metrics.jsonl. What one raises ends the run.
        typed: names of options that were given even where they have their default value; matters when resuming,
            and when starting from an adapter.

    Returns:
        what the run came to, as summary.json has it.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step; each says what to do.
        CheckError: a guard fired, or nothing finite came out; what was saved before is intact.
        Interrupted: after a signal and a checkpoint.
    """
    check_kind("config", config, TrainConfig)
    callbacks = tuple(callbacks)
    if callbacks and config.run.workers > 1 and not in_a_group():
        raise UsageError(
            f"callbacks cannot go along to {config.run.workers} processes of their own",
            where="workers",
            next_step="leave out workers, and start the script itself with torchrun",
        )
    return train_without_report(config, callbacks=(*callbacks, _ReportWriter(config.run.quiet)), typed=typed)
