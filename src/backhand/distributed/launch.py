"""Start a run in several processes, and send rank 0's configuration and checkpoint to the other processes.

The processes are started by torchrun, or by `--workers N`, which uses torch's elastic launcher. The launcher runs the
same command in N processes of this machine, with a rendezvous on a free port. If a worker fails, the launcher ends the
others. It passes on Ctrl-C and SIGTERM, and gives the workers time to save a checkpoint.

Rank 0 sends its configuration, its checkpoint and the summary of a finished run to the other ranks, so the run
directory may be on a disk that only rank 0 can read. The paths of the model and of the rows and the device are options
of each process. Digests verify that the model and the rows are the same.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backhand.adapters.record import installed_packages
from backhand.distributed.communicator import Communicator
from backhand.errors import BackhandError, ResourceError, UsageError
from backhand.nn.compute import available_cores
from backhand.options.config import TrainConfig
from backhand.options.config_file import config_from_table, config_table, dump_config
from backhand.printing import may_be_silent
from backhand.runs.checkpoint import Checkpoint
from backhand.runs.directory import CONFIG, SUMMARY
from backhand.runs.interruption import Interrupted, signal_in
from backhand.runs.status import read_status
from backhand.runs.summary import RunSummary, read_summary
from backhand.safe_path import python_words, safe_environment
from backhand.system import process_start, stop_signals

_TYPED = "BACKHAND_TYPED_OPTIONS"
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_SHUTDOWN_S = 600
"""Seconds that a worker has, after a signal to stop, to finish its step and save a checkpoint."""


class WorkersEnded(BackhandError):
    """The workers ended without finishing the run. They have printed the reason."""

    said_elsewhere = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("the processes of the run have ended")
        self.exit_code = exit_code


def in_process_group() -> bool:
    """Return True if a launcher started this process as one of several, by the environment variable WORLD_SIZE."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def restarted_by_torchrun() -> bool:
    """Return True if torchrun has restarted this process after a failure of a process of the run.

    Raises:
        UsageError: the variable is no number.
    """
    count = os.environ.get(_RESTARTS) or "0"
    try:
        return int(count) > 0
    except ValueError:
        raise UsageError(
            f"{_RESTARTS} is {count!r}, no number",
            where="environment",
            next_step="unset it; torchrun sets it for the processes that it starts",
        ) from None


def typed_in_launcher() -> frozenset[str]:
    """Return the names of the options that were typed on the command line of the launcher."""
    return frozenset(os.environ.get(_TYPED, "").split())


def launch_workers(config: TrainConfig, typed: frozenset[str]) -> RunSummary:
    """Run the training in `config.run.workers` processes and wait for them.

    Args:
        config: the validated configuration.
        typed: names of the options that were typed, including those typed with their default value.

    Raises:
        WorkersEnded: a worker failed. It has printed the reason, and the error has its exit code.
        ResourceError: a worker was killed, or the run has no summary.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    workers = config.run.workers
    with tempfile.TemporaryDirectory(prefix="backhand-") as directory:
        toml = Path(directory) / "run.toml"
        toml.write_text(dump_config(config), encoding="utf-8")
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"timeout": 60},
            max_restarts=0,
            local_addr="127.0.0.1",
            shutdown_timeout=_SHUTDOWN_S,
            logs_specs=DefaultLogsSpecs(log_dir=directory),  # else in a directory of its own that nobody removes
        )
        # Workers report their own failures, and `_failure` reports killed workers. The launcher's logs add nothing.
        package = "torch.distributed.elastic"
        for name in (package, *(name for name in logging.root.manager.loggerDict if name.startswith(f"{package}."))):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each logger has its own level
        with _launcher_environment(_worker_environment(config, typed)):
            try:
                program, *words = python_words("backhand", "train", str(toml))
                with may_be_silent():  # the workers print progress
                    elastic_launch(launch, program)(*words)
            except SignalException as error:
                raise WorkersEnded(128 + int(error.sigval)) from None
            except ChildFailedError as error:
                raise _failure(error.failures) from None
    summary = read_summary(config.run.output / SUMMARY)
    if summary is None:
        raise ResourceError("the run has left no summary", where=str(config.run.output / SUMMARY))
    return summary


def _failure(failures: Mapping[int, Any]) -> BackhandError:
    """Return the error for the worker that ended first. The launcher ends the other workers by SIGTERM."""
    in_order = sorted(failures.items(), key=lambda failure: failure[1].timestamp)
    codes = [failure.exitcode for _, failure in in_order]
    killed = [(rank, failure) for rank, failure in in_order if failure.exitcode != -signal.SIGTERM]
    if killed and killed[0][1].exitcode < 0:
        rank, failure = killed[0]
        name = signal.Signals(-failure.exitcode).name
        return ResourceError(
            f"rank {rank} (process {failure.pid}) was killed by {name}",
            why="by the system where memory ran out, or by somebody" if name == "SIGKILL" else None,
            next_step="continue from the newest checkpoint with --resume",
        )
    return WorkersEnded(next((code for code in codes if code > 0), 1))


def _worker_environment(config: TrainConfig, typed: frozenset[str]) -> dict[str, str]:
    """Return the environment variables to set for the workers. Variables that the user has set are left unchanged."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    threads = max(1, available_cores() // config.run.workers)
    defaults = {
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    chosen = {name: value for name, value in defaults.items() if name not in os.environ}
    return chosen | {_TYPED: " ".join(sorted(typed))} | safe_environment()


@contextmanager
def _launcher_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the context. Restore them afterwards, and the signal handlers as well.

    The launcher installs its own signal handlers.
    """
    before = {name: os.environ[name] for name in environment if name in os.environ}
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name, None)
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Options whose values each process may choose. A value other than the default replaces rank 0's value.
_PER_PROCESS = {
    "model": ("model", "device", "memory", "threads", "tune_allocator"),
    "data": ("data", "eval_data"),
    "run": ("output", "quiet", "debug"),
}
_MAY_DIFFER = ("model.device", "model.threads")


def comparable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `identity.decisive_settings` that must be equal in all processes."""
    return {name: value for name, value in settings.items() if name not in _MAY_DIFFER}


def versions() -> dict[str, Any]:
    """Return everything that determines the last bits of a sum: package versions and the processor's instructions."""
    return {**installed_packages(), "processor": torch.backends.cpu.get_cpu_capability()}


def broadcast_config(
    config: TrainConfig, done: RunSummary | None, processes: Communicator
) -> tuple[TrainConfig, RunSummary | None]:
    """Return rank 0's configuration and, for a finished run, its summary.

    Args:
        config: the configuration of this process. Its paths and device replace rank 0's.
        done: the summary of a finished run; None if the run goes on.
        processes: the processes of the run.
    """
    if processes.world_size == 1:
        return config, done
    table, summary = processes.broadcast_object([config_table(config), done and dataclasses.asdict(done)])
    if processes.is_main_process:
        return config, done
    main_config = config_from_table(table, "rank 0")
    defaults = TrainConfig()
    parts = {}
    for part, names in _PER_PROCESS.items():
        local, main, default = (getattr(one, part) for one in (config, main_config, defaults))
        changed = {name: value for name in names if (value := getattr(local, name)) != getattr(default, name)}
        parts[part] = replace(main, **changed)
    return replace(main_config, **parts), summary and RunSummary(**summary)


def broadcast_checkpoint(checkpoint: Checkpoint | None, processes: Communicator) -> Checkpoint | None:
    """Return rank 0's checkpoint."""
    if processes.world_size == 1:
        return checkpoint
    head = processes.broadcast_object(
        checkpoint and [checkpoint.step, dict(checkpoint.facts), list(checkpoint.contents)]
    )
    if head is None:
        return None
    step, facts, names = head
    contents = {} if checkpoint is None else checkpoint.contents
    return Checkpoint(step, {name: processes.broadcast(contents.get(name, b"")) for name in names}, facts)


def resume_after_restart(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a process that torchrun has restarted: resume the run if it has started.

    Raises:
        Interrupted: the run was stopped by a signal, which torchrun treats as a failure.
    """
    run = config.run
    if not (run.output / CONFIG).exists():
        return config
    status = read_status(run.output)
    if run.overwrite:
        launcher = process_start(os.getppid())
        if status is None or launcher is None or status.launcher_start != launcher:
            return config  # the directory contains an earlier run, which this run is to overwrite
    if status is not None and status.state == "interrupted" and (number := signal_in(status.reason)) is not None:
        command = f"backhand train --resume --output {shlex.quote(str(run.output))}"
        raise Interrupted(number, status.step, f"continue with {command}")
    return replace(config, run=replace(run, resume=True, overwrite=False, from_adapter=None))
