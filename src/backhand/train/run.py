"""`backhand train`: one run from its configuration to its summary, or from where it was stopped.

run directory locked → configuration → job (rows, model, adapter) → `job_run`: loop → summary
"""

from __future__ import annotations

from collections.abc import Iterable

from backhand.nn.compute import compute_settings
from backhand.train.callbacks import Callback, as_observers
from backhand.train.checkpoint import Checkpoint, CheckpointStore
from backhand.train.config import TrainConfig
from backhand.train.console import TerminalObserver
from backhand.train.files import FileLayer
from backhand.train.interruption import Interruption
from backhand.train.job import build_job
from backhand.train.job_run import JobRun
from backhand.train.loggers.choice import chosen_loggers
from backhand.train.machine import resolve_machine
from backhand.train.metrics_file import MetricsFile
from backhand.train.observer import Observer, Observers
from backhand.train.progress import Progress
from backhand.train.resume import resumed_config
from backhand.train.run_directory import SUMMARY, RunDirectory, opened
from backhand.train.run_state import PROGRESS_FILE
from backhand.train.summary import RunSummary, read_summary


def train(
    config: TrainConfig,
    *,
    callbacks: Iterable[Callback] = (),
    files: FileLayer | None = None,
    typed: frozenset[str] = frozenset(),
) -> RunSummary:
    """Train as `config` says; what is left behind stands in the run directory, see docs.

    Args:
        config: every option. What is None or `auto` in it is chosen, and written to config.toml.
        callbacks: told of every step and evaluation, besides the terminal, metrics.jsonl and loggers.
        files: the file layer, for tests.
        typed: names of options that were given even where they have their default value; matters when resuming,
            and when starting from an adapter.

    Returns:
        what the run came to, as summary.json has it.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step; each says what to do.
        CheckError: a guard fired, or nothing finite came out; what was saved before is intact.
        Interrupted: after a signal and a checkpoint.
    """
    config.validate()
    terminal = TerminalObserver(quiet=config.run.quiet)
    everyone: list[Observer] = [
        terminal,
        *chosen_loggers(config.run.report_to, terminal.noted),
        *as_observers(callbacks),
    ]
    run = config.run
    try:
        with (
            Interruption(terminal.noted) as interruption,
            opened(run.output, resume=run.resume, overwrite=run.overwrite, files=files) as directory,
        ):
            checkpoint = None
            if run.resume:
                config = resumed_config(config, directory.path, typed).validate()
                checkpoint = _newest_checkpoint(directory, terminal)
                if checkpoint is not None and (done := _finished(checkpoint, config, directory)) is not None:
                    terminal.noted(f"the run in {directory.path} is finished; there is nothing left to do")
                    terminal.ended(done)
                    return done
            machine = resolve_machine(config)
            with compute_settings(config.model, machine.threads, machine.dtype, machine.device):
                job = build_job(config, machine, typed)
                told = Observers([*everyone, MetricsFile(directory)])
                return JobRun(job, directory, told, interruption, checkpoint).train()
    finally:
        for observer in everyone:
            observer.closed()


def _newest_checkpoint(directory: RunDirectory, observer: Observer) -> Checkpoint | None:
    if not directory.checkpoints.is_dir():
        return None
    return CheckpointStore(directory.checkpoints, directory.files, observer.noted).newest_valid()


def _finished(checkpoint: Checkpoint, config: TrainConfig, directory: RunDirectory) -> RunSummary | None:
    """The summary of a run that needs nothing more; None if there is something to do."""
    if config.run.prove_resume is not None:
        return None
    if not Progress.from_json(checkpoint.contents.get(PROGRESS_FILE, b"")).finished:
        return None
    return read_summary(directory.path / SUMMARY)
