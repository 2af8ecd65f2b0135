"""`backhand train`: one run from its configuration to its summary, or from where it was stopped.

run directory locked → configuration → job (rows, model, adapter) → `Trainer`: loop → summary
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from backhand.distributed.communicator import Communicator
from backhand.distributed.launch import (
    alike,
    continued_after_restart,
    followed,
    in_a_group,
    launched,
    restarted,
    shared_checkpoint,
    typed_elsewhere,
    versions,
)
from backhand.engines.engine import RunCache
from backhand.engines.machine import resolve_machine
from backhand.errors import BackhandError
from backhand.files import FileLayer
from backhand.loop.loggers import chosen_loggers
from backhand.loop.observers import Callback, Observers, as_observers, metrics_file
from backhand.loop.state import PROGRESS_FILE, Progress, restore_adapter
from backhand.nn.compute import compute_settings
from backhand.options.config import TrainConfig
from backhand.reading import refuse_inputs_inside
from backhand.runs.checkpoint import CheckpointStore
from backhand.runs.directory import OWNED, SUMMARY, RunDirectory, opened
from backhand.runs.interruption import Interruption
from backhand.runs.status import by_signal
from backhand.runs.summary import RunSummary, read_summary
from backhand.training.console import TerminalObserver
from backhand.training.identity import decisive_settings
from backhand.training.loaded_run import load_run
from backhand.training.resume import begun_from, resumed_config
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
    """Train as `config` says; what is left behind stands in the run directory, see docs.

    Where the environment says that this process is one of several, all of them are one run; with `workers` they are
    started here, and this process only waits for them.

    Args:
        config: every option. What is None or `auto` in it is chosen, and written to config.toml.
        callbacks: told of every step and evaluation, besides the terminal, metrics.jsonl and loggers.
        files: the file layer, for tests.
        typed: names of options that were given even where they have their default value; matters when resuming,
            and when starting from an adapter.
        run_cache: what other runs of this process have left for this one, and the other way round.
        pause_at: stop after this step as after a signal; the run can be continued.

    Returns:
        what the run came to, as summary.json has it.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: before the first step; each says what to do.
        CheckError: a guard fired, or nothing finite came out; what was saved before is intact.
        Interrupted: after a signal and a checkpoint; or after `pause_at`, as one of the number 0.
    """
    config.validate()
    if not in_a_group():
        if config.run.workers > 1:
            return launched(config, typed)
        given = typed | typed_elsewhere()
        return _train(config, callbacks, files, given, Communicator(), run_cache, pause_at)
    from backhand.distributed.process_group import joined

    with joined(config.run.reduce) as processes:
        return _train(config, callbacks, files, typed | typed_elsewhere(), processes)


def _train(
    config: TrainConfig,
    callbacks: Iterable[Callback],
    files: FileLayer | None,
    typed: frozenset[str],
    processes: Communicator,
    run_cache: RunCache | None = None,
    pause_at: int | None = None,
) -> RunSummary:
    """One process's part of `train`."""
    begun_from_option = {"run.from_adapter": config.run.from_adapter}  # of rank 0 in what follows
    processes.assert_equal(alike(decisive_settings(config)) | begun_from_option | versions())
    if not processes.is_main_process:
        config = replace(config, run=replace(config.run, quiet=True, report_to=()))
        callbacks = ()
    elif restarted():
        config = continued_after_restart(config)
    terminal = TerminalObserver(quiet=config.run.quiet)
    everyone = [terminal, *chosen_loggers(config.run.report_to, terminal.noted), *as_observers(callbacks)]
    run = config.run
    try:
        # The directory is locked by the process that writes; to the others it is a name, which all of them say alike.
        place: AbstractContextManager[RunDirectory] = (
            opened(run.output, resume=run.resume, overwrite=run.overwrite, files=files)
            if processes.is_main_process
            else nullcontext(RunDirectory(run.output.resolve(), files or FileLayer()))
        )
        with Interruption(terminal.noted) as interruption, place as directory:
            processes.interruption = interruption
            checkpoint = done = None
            if run.overwrite and processes.is_main_process:
                refuse_inputs_inside(directory.path, _inputs(config), owned=OWNED)
            if run.resume and processes.is_main_process:
                config = resumed_config(config, directory.path, typed).validate()
                store = CheckpointStore(directory.checkpoints, directory.files, terminal.noted)
                if directory.checkpoints.is_dir():
                    checkpoint = store.newest_valid()
                if checkpoint is None:
                    config = replace(config, run=replace(config.run, from_adapter=begun_from(directory.path)))
                else:
                    progress = Progress.from_json(checkpoint.contents.get(PROGRESS_FILE, b""))
                    if progress.finished and config.run.prove_resume is None:
                        done = read_summary(directory.path / SUMMARY)  # nothing more is needed
                        if done is not None and restore_adapter(directory, store, checkpoint.contents, progress):
                            terminal.noted("adapter/ was damaged, and is restored from its checkpoint")
            config, done = followed(config, done, processes)
            if done is not None:
                terminal.noted(f"the run in {directory.path} is finished; there is nothing left to do")
                terminal.ended(done)
                return done
            checkpoint = shared_checkpoint(checkpoint, processes)
            machine = resolve_machine(config, processes)
            with compute_settings(config.model, machine.threads, machine.dtype, machine.device):
                run_cache = run_cache or RunCache()
                loaded = load_run(config, machine, typed, processes, run_cache)
                told = Observers([*everyone, *([metrics_file(directory)] if processes.is_main_process else [])])
                trainer = Trainer(loaded, directory, told, interruption, checkpoint, processes, run_cache, pause_at)
                try:
                    return trainer.train()
                except BaseException as error:
                    with suppress(OSError, BackhandError):  # nothing here takes the place of what ended the run
                        # The run that was here stays until this one has a checkpoint.
                        back = processes.is_main_process and run.overwrite and directory.put_back()
                        if processes.is_main_process and by_signal(error) and (back or trainer.owns_directory):
                            terminal.noted(trainer.stop_message(restored=back))
                    raise
    finally:
        for observer in everyone:
            observer.closed()


def _inputs(config: TrainConfig) -> dict[str, Path | str | None]:
    """Options that may name files, each with its first name that does."""
    named: dict[str, Path | str | None] = {"model": config.model.model, "from_adapter": config.run.from_adapter}
    for option in ("data", "eval_data"):
        named |= {f"{option}[{i}]": name for i, name in enumerate(getattr(config.data, option))}
    return {**named, "chat_template": config.data.chat_template}
