"""Training with a report: the function of `backhand train` and `backhand.train`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from backhand.bounds import check_kind
from backhand.data.given_rows import GivenRows
from backhand.distributed.launch import in_process_group
from backhand.engines.engine import RunCache
from backhand.errors import BackhandError, UsageError, error_text
from backhand.loop.observers import Callback, Observer, RunStart, as_callbacks
from backhand.options.config import TrainConfig
from backhand.printing import going_on, say, visible
from backhand.runs.directory import CONFIG
from backhand.runs.summary import RunSummary
from backhand.training.contexts import runs_per_context
from backhand.training.run import train as train_without_report


class _ReportWriter(Observer):
    """Writes report.html at the end of a run that has started, whether it succeeds or fails."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._directory: Path | None = None

    def started(self, start: RunStart) -> None:
        """Remember the run directory."""
        self._directory = start.directory

    def closed(self) -> None:
        """Write the page. An error is printed and does not end the run, which is saved."""
        if self._directory is None or not (self._directory / CONFIG).exists():  # removed after an error in a callback
            return
        from backhand.report.command import write_report

        try:
            with going_on("writing the report"):
                target = write_report(self._directory)
        except (BackhandError, OSError) as error:
            message, out = f"the report could not be written: {error_text(error)}", sys.stderr
        else:
            message, out = visible(f"Report: {shlex.quote(str(target))}"), sys.stdout
        if out is sys.stderr or not self._quiet:
            with suppress(OSError):  # the stream is closed, and the error that ended the run is more important
                say(*message.split("\n"), file=out)


def train_command(config: TrainConfig, *, typed: frozenset[str] = frozenset()) -> Mapping[str, RunSummary]:
    """Run `train`, or one run for each file if the option `context` is a directory, with one base for all.

    Returns:
        the results by the name of the context, or under "" if there is one run.

    Raises:
        BackhandError: as `train`. The runs of earlier contexts are complete.
    """
    runs = runs_per_context(config.validate())
    if not runs:
        return {"": train(config, typed=typed)}
    run_cache, summaries = RunCache(), {}
    for number, (name, one) in enumerate(runs.items(), 1):
        if not config.run.quiet:
            say(visible(f"Context {number} of {len(runs)}: {name}"))
        summaries[name] = train(one, typed=typed, run_cache=run_cache)
    return summaries


def train(
    config: TrainConfig,
    *,
    callbacks: Iterable[Callback] | Callback | None = (),
    typed: frozenset[str] = frozenset(),
    run_cache: RunCache | None = None,
) -> RunSummary:
    """Train, and write report.html to the run directory, even after an interruption.

    Args:
        config: all options. Values that are None or `auto` are chosen automatically and written to config.toml.
        callbacks: see `api.train`.
        typed: names of options that were given explicitly, even with their default value. They matter when a run is
            resumed or started from an adapter.
        run_cache: objects that several runs of this process share.

    Returns:
        The results of the run, which are the contents of summary.json.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step.
        CheckError: a guard failed, or the results are not finite. Earlier checkpoints are intact.
        Interrupted: after a signal and a checkpoint.
    """
    check_kind("config", config, TrainConfig)
    config.validate()
    callbacks = as_callbacks(callbacks)
    given = [name for name in (*config.data.data, *config.data.eval_data) if isinstance(name, GivenRows)]
    if (callbacks or given) and config.run.workers > 1 and not in_process_group():
        what = "callbacks" if callbacks else "rows in memory"
        raise UsageError(
            f"{what} cannot be passed to {config.run.workers} worker processes",
            where="workers",
            next_step="leave out workers, and start the script with torchrun",
        )
    observers = (*callbacks, _ReportWriter(config.run.quiet))
    return train_without_report(config, callbacks=observers, typed=typed, run_cache=run_cache)
