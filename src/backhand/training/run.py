"""`backhand train`: one run from its configuration, or from a checkpoint, to its summary.

    lock the run directory → configuration → `load_run`: rows, model, adapter → `Trainer`: loop, summary

`train` starts several processes if `--workers` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

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
from backhand.errors import BackhandError
from backhand.files import FileLayer
from backhand.loop.loggers import chosen_loggers
from backhand.loop.observers import Callback, MetricsFile, Observers, as_observers
from backhand.loop.rewards.process import RewardProcess
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
from backhand.training.resume import original_adapter, resumed_config
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
    if not in_process_group():
        if config.run.workers > 1:
            return launch_workers(config, typed)
        given = typed | typed_in_launcher()
        return _train(config, callbacks, files, given, Communicator(), run_cache, pause_at)
    from backhand.distributed.process_group import joined

    with joined(config.run.reduce) as processes:
        return _train(config, callbacks, files, typed | typed_in_launcher(), processes)


def _train(
    config: TrainConfig,
    callbacks: Iterable[Callback],
    files: FileLayer | None,
    typed: frozenset[str],
    processes: Communicator,
    run_cache: RunCache | None = None,
    pause_at: int | None = None,
) -> RunSummary:
    """Run `train` in this process, which may be one of several."""
    from_adapter = {"run.from_adapter": config.run.from_adapter}
    processes.assert_equal(comparable_settings(decisive_settings(config)) | from_adapter | versions())
    if not processes.is_main_process:
        config = replace(config, run=replace(config.run, quiet=True, report_to=()))
        callbacks = ()
    elif restarted_by_torchrun():
        config = resume_after_restart(config)
    terminal = TerminalObserver(quiet=config.run.quiet)
    all_observers = [terminal, *chosen_loggers(config.run.report_to, terminal.noted), *as_observers(callbacks)]
    run = config.run
    try:
        if processes.is_main_process and os.path.lexists(run.output) and not (run.resume or run.overwrite):
            check_readable(config.data)
        # Only rank 0 locks the directory and writes to it. The other ranks use its name in messages.
        run_directory: AbstractContextManager[RunDirectory] = (
            opened(run.output, resume=run.resume, overwrite=run.overwrite, files=files)
            if processes.is_main_process
            else nullcontext(RunDirectory(run.output.resolve(), files or FileLayer()))
        )
        with Interruption(terminal.noted) as interruption, run_directory as directory:
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
                    config = replace(config, run=replace(config.run, from_adapter=original_adapter(directory.path)))
                else:
                    progress = Progress.from_json(checkpoint.contents.get(PROGRESS_FILE, b""))
                    if progress.finished and config.run.prove_resume is None:
                        done = read_summary(directory.path / SUMMARY)  # the run is finished
                        if done is not None and restore_adapter(directory, store, checkpoint.contents, progress):
                            terminal.noted("adapter/ was damaged, and is restored from its checkpoint")
            config, done = broadcast_config(config, done, processes)
            if done is not None:
                terminal.noted(f"the run in {directory.path} is finished; there is nothing left to do")
                terminal.ended(done)
                return done
            checkpoint = broadcast_checkpoint(checkpoint, processes)
            machine = resolve_machine(config, processes)
            # The functions are loaded first, so that one that cannot be loaded leaves no directory.
            rewarded = config.objective.purpose == "prompts" and processes.is_main_process
            options = config.rewards
            reward_process = RewardProcess(options.reward, options.reward_timeout) if rewarded else nullcontext()
            with (
                compute_settings(config.model, machine.threads, machine.dtype, machine.device),
                reward_process as functions,
            ):
                run_cache = run_cache or RunCache()
                loaded = load_run(config, machine, typed, processes, run_cache)
                if functions is not None:
                    functions.check_parameters(loaded.inputs.train.examples)
                metrics = [MetricsFile(directory)] if processes.is_main_process else []
                observer = Observers([*all_observers, *metrics])
                trainer = Trainer(
                    *(loaded, directory, observer, interruption, checkpoint, processes, run_cache, pause_at),
                    functions=functions,
                )
                try:
                    return trainer.train()
                except BaseException as error:
                    with suppress(OSError, BackhandError):  # an error here must not hide the one that ended the run
                        # Until this run has a checkpoint, the run that it is to overwrite can be restored.
                        back = processes.is_main_process and run.overwrite and directory.put_back()
                        if processes.is_main_process and by_signal(error) and (back or trainer.owns_directory):
                            terminal.noted(trainer.stop_message(restored=back))
                    raise
    finally:
        for one in all_observers:
            one.closed()


def _inputs(config: TrainConfig) -> dict[str, Path | str | None]:
    """Return the values of all options that may be paths, by the name of the option."""
    named: dict[str, Path | str | None] = {"model": config.model.model, "from_adapter": config.run.from_adapter}
    for option in ("data", "eval_data"):
        named |= {f"{option}[{i}]": name for i, name in enumerate(getattr(config.data, option))}
    return {**named, "chat_template": config.data.chat_template}
