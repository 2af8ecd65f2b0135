"""`backhand train`: one run from its configuration, or from a checkpoint, to its summary.

    lock the run directory → configuration → `load_run`: rows, model, adapter → `Trainer`: loop, summary

`RunProcess` does this in each process of a run. `train` starts several processes if `--workers` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from backhand.data.prepare import check_readable
from backhand.distributed.communicator import Communicator
from backhand.distributed.launch import (
    broadcast_checkpoint,
    broadcast_config,
    comparable_settings,
    in_process_group,
    launch_workers,
    restarted_by_torchrun,
    resume_after_restart,
    typed_in_launcher,
    versions,
)
from backhand.engines.engine import RunCache
from backhand.engines.machine import resolve_machine
from backhand.errors import RESUME_STEP, BackhandError
from backhand.files import FileLayer
from backhand.loop.loggers import chosen_loggers
from backhand.loop.observers import Callback, MetricsFile, Observer, Observers, as_observers
from backhand.loop.state import PROGRESS_FILE, Progress, restore_adapter
from backhand.nn.compute import compute_settings
from backhand.options.config import TrainConfig
from backhand.printing import going_on, reworded
from backhand.reading import refuse_inputs_inside
from backhand.runs.checkpoint import Checkpoint, CheckpointStore
from backhand.runs.directory import OWNED, SUMMARY, RunDirectory, opened
from backhand.runs.interruption import Interruption
from backhand.runs.status import by_signal, read_status
from backhand.runs.summary import RunSummary, read_summary
from backhand.training.console import TerminalObserver
from backhand.training.hooks import training_of
from backhand.training.identity import decisive_settings
from backhand.training.loaded_run import load_run
from backhand.training.resume import original_adapter, resumed_config, unread_sources
from backhand.training.trainer import Trainer


def train(
    config: TrainConfig,
    *,
    callbacks: Iterable[Callback] = (),
    files: FileLayer | None = None,
    typed: frozenset[str] = frozenset(),
    run_cache: RunCache | None = None,
    pause_at: int | None = None,
) -> RunSummary:
    """Train with the options of `config` and write the results to the run directory.

    If a launcher such as torchrun has started this process as one of several, these processes are one run. With
    `workers`, the processes are started here, and this process waits for them.

    Args:
        config: every option. Values for options that are None or `auto` are chosen and written to config.toml.
        callbacks: observers or functions that receive every step and evaluation.
        files: the file layer, for tests.
        typed: names of the options that were typed, including those typed with their default value. It matters for
            resuming and for starting from an adapter.
        run_cache: objects that several runs of this process share.
        pause_at: stop after this step as after a signal. The run can be resumed.

    Returns:
        the contents of summary.json.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: the run cannot start.
        CheckError: a guard failed. Earlier checkpoints are intact.
        Interrupted: a signal stopped the run after a checkpoint. After `pause_at`, the signal number is 0.
    """
    config.validate()
    given = typed | typed_in_launcher()
    if in_process_group():
        from backhand.distributed.process_group import joined

        with joined(config.run.reduce) as processes:
            return RunProcess(config, given, processes, callbacks, files).train()
    if config.run.workers > 1:
        return launch_workers(config, typed)
    return RunProcess(config, given, Communicator(), callbacks, files, run_cache, pause_at).train()


class _Beginning(NamedTuple):
    """The options, the checkpoint and the summary of a run before it is loaded. They are the same in all processes."""

    config: TrainConfig  # a resumed run has the stored options and those that may change
    checkpoint: Checkpoint | None = None  # to continue from; None for a new run, or one without a checkpoint
    summary: RunSummary | None = None  # of a run that is finished


@dataclass(eq=False)
class RunProcess:
    """One process of a run, from its options to the summary. Rank 0 alone prints and writes files."""

    config: TrainConfig  # the validated options
    typed: frozenset[str]  # names of the options that were typed
    processes: Communicator  # all processes of the run
    callbacks: Iterable[Callback] = ()  # called in rank 0
    files: FileLayer | None = None  # the file layer, for tests
    run_cache: RunCache | None = None  # shared with other runs of this process
    pause_at: int | None = None  # step to stop after, as after a signal
    terminal: TerminalObserver = field(init=False)
    _called: Sequence[Observer] = field(init=False)  # the callbacks as observers

    def train(self) -> RunSummary:
        """Train to the end. Returns and raises the same as `train`."""
        self._agree()
        run, is_main = self.config.run, self.processes.is_main_process
        terminal = self.terminal = TerminalObserver(quiet=run.quiet)
        self._called = as_observers(self.callbacks)
        observers = [terminal, *chosen_loggers(run.report_to, terminal.noted), *self._called]
        try:
            if is_main and os.path.lexists(run.output) and not (run.resume or run.overwrite):
                check_readable(self.config.data)
            doing = going_on("the files of the run")
            with Interruption(terminal.noted) as interruption, self._opened() as directory, doing:
                self.processes.interruption = interruption
                beginning = self._beginning(directory)
                if beginning.summary is None:
                    metrics = [MetricsFile(directory)] if is_main else []
                    return self._train(beginning, directory, Observers([*observers, *metrics]), interruption)
                because = beginning.summary.stopped_because
                early = f", because it stopped early: {because}" if because else ""
                terminal.noted(f"the run in {directory.path} is finished; there is nothing left to do{early}")
                terminal.ended(beginning.summary)
                return beginning.summary
        finally:
            for one in observers:
                one.closed()

    def _agree(self) -> None:
        """Check that all processes were given the same run. Other ranks than 0 become quiet.

        Raises:
            ArtifactError: options, package versions or processors differ.
            Interrupted: torchrun has restarted a run that was stopped by a signal.
        """
        run = self.config.run
        settings = comparable_settings(decisive_settings(self.config))
        self.processes.assert_equal(settings | {"run.from_adapter": run.from_adapter} | versions())
        if not self.processes.is_main_process:
            self.config = replace(self.config, run=replace(run, quiet=True, report_to=()))
            self.callbacks = ()
        elif restarted_by_torchrun():
            self.config = resume_after_restart(self.config)

    def _opened(self) -> AbstractContextManager[RunDirectory]:
        """Return the run directory. Rank 0 locks it; the other ranks use its name in messages."""
        run = self.config.run
        if self.processes.is_main_process:
            return opened(run.output, resume=run.resume, overwrite=run.overwrite, files=self.files)
        return nullcontext(RunDirectory(run.output.resolve(), self.files or FileLayer()))

    def _beginning(self, directory: RunDirectory) -> _Beginning:
        """Return the options, checkpoint and summary of rank 0. Paths and device remain those of this process."""
        found = _Beginning(self.config)
        if self.processes.is_main_process:
            if self.config.run.overwrite:
                refuse_inputs_inside(directory.path, _inputs(self.config), owned=OWNED)
            if self.config.run.resume:
                found = self._resumed(directory)
        config, summary = broadcast_config(found.config, found.summary, self.processes)
        checkpoint = None if summary is not None else broadcast_checkpoint(found.checkpoint, self.processes)
        return _Beginning(config, checkpoint, summary)

    def _resumed(self, directory: RunDirectory) -> _Beginning:
        """Return the stored options, the newest checkpoint and, if the run is finished, its summary."""
        config = resumed_config(self.config, directory.path, self.typed).validate()
        store = CheckpointStore(directory.checkpoints, directory.files, self.terminal.noted)
        checkpoint = store.newest_valid() if directory.checkpoints.is_dir() else None
        if checkpoint is None:
            run = replace(config.run, from_adapter=original_adapter(directory.path))
            return _Beginning(replace(config, run=run))
        progress = Progress.from_json(checkpoint.contents.get(PROGRESS_FILE, b""))
        if not progress.finished or config.run.prove_resume is not None:
            return _Beginning(config, checkpoint)
        summary = read_summary(directory.path / SUMMARY)
        if summary is not None and summary.unmeasured:
            return _Beginning(config, checkpoint)
        status = read_status(directory.path)
        if summary is not None and progress.stopped_by_callback and status and progress.step < status.total_steps:
            progress = replace(progress, finished=False, stopped_because=None)
            contents = {**checkpoint.contents, PROGRESS_FILE: progress.to_json()}
            return _Beginning(config, replace(checkpoint, contents=contents))
        for note in unread_sources(self.config, directory.path):
            self.terminal.noted(note)
        if summary is not None and restore_adapter(directory, store, checkpoint.contents, progress):
            self.terminal.noted("adapter/ was damaged, and is restored from its checkpoint")
        return _Beginning(config, checkpoint, summary)

    def _train(
        self, beginning: _Beginning, directory: RunDirectory, observer: Observers, interruption: Interruption
    ) -> RunSummary:
        """Load the run and train it to the end."""
        config, processes = beginning.config, self.processes
        machine = resolve_machine(config, processes)
        run_cache = self.run_cache or RunCache()
        training = training_of(config)
        with (
            compute_settings(config.model, machine.threads, machine.dtype, machine.device),
            training.resources(config, processes),  # first, so that what cannot be opened leaves no directory
        ):
            loaded = load_run(config, machine, self.typed, processes, run_cache, training)
            trainer = Trainer(
                loaded,
                directory,
                observer,
                interruption,
                beginning.checkpoint,
                processes,
                run_cache,
                self.pause_at,
            )
            try:
                return trainer.train()
            except BaseException as error:
                with suppress(OSError, BackhandError):  # an error here must not hide the one that ended the run
                    if processes.is_main_process:
                        # Until this run has a checkpoint, the run that it is to overwrite can be restored.
                        restored = self.config.run.overwrite and directory.put_back()
                        if restored and isinstance(error, BackhandError) and error.next_step:
                            step = error.next_step.replace(RESUME_STEP, "train again with --overwrite")
                            error.next_step = f"the former run was put back; {step}"
                        if by_signal(error) and (restored or trainer.owns_directory):
                            self.terminal.noted(trainer.stop_message(restored=restored))
                        if observer.failed in self._called and not (restored or self.config.run.resume):
                            removed = directory.discard()
                            note = "the run had no checkpoint yet, and its directory was removed"
                            error.add_note(note if removed else reworded(trainer.stop_message(restored=False)))
                raise


def _inputs(config: TrainConfig) -> dict[str, Path | str | None]:
    """Return the values of all options that may be paths, by the name of the option."""
    named: dict[str, Path | str | None] = {"model": config.model.model, "from_adapter": config.run.from_adapter}
    for option in ("data", "eval_data"):
        named |= {f"{option}[{i}]": name for i, name in enumerate(getattr(config.data, option))}
    return {**named, "chat_template": config.data.chat_template}
