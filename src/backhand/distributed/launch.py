"""How a run comes to several processes: the environment says so, or `--workers N` starts them by torch's own launcher.

The launcher runs the same command once more in N processes of this machine. Its rendezvous is this process's own, on a
port that is free. When one worker ends with an error the others are ended; Ctrl-C and SIGTERM are passed on, and the
workers have time for a checkpoint.

What the first process knows the others take over: configuration, checkpoint, an end. The run directory may lie on a
disk of its own. Where model and rows lie, and on which device a process computes, is each process's own business; that
they are the same model and rows is compared by their digests.
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
"""How long a worker that was asked to stop has for its step and its checkpoint."""


class WorkersEnded(BackhandError):
    """The workers ended without finishing the run, and have said why."""

    said_elsewhere = True

    def __init__(self, exit_code: int) -> None:
        super().__init__("the processes of the run have ended")
        self.exit_code = exit_code


def in_a_group() -> bool:
    """Whether the environment says that this process is one of several; `distributed.joined` reads the rest of it."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def restarted() -> bool:
    """Return True if torchrun has started this process again, after one of the run's had failed.

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


def typed_elsewhere() -> frozenset[str]:
    """Options that were typed where the launcher was started."""
    return frozenset(os.environ.get(_TYPED, "").split())


def launched(config: TrainConfig, typed: frozenset[str]) -> RunSummary:
    """Run in `config.run.workers` processes, and wait for them.

    Args:
        config: validated.
        typed: names of options that were given even where they have their default value.

    Raises:
        WorkersEnded: with the exit code of the first that failed, which has said why.
        ResourceError: one was killed.
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
        # What the launcher logs of a worker that ended is said better by the worker, and by us.
        package = "torch.distributed.elastic"
        for name in (package, *(name for name in logging.root.manager.loggerDict if name.startswith(f"{package}."))):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
        with _for_the_launcher(_for_workers(config, typed)):
            try:
                program, *words = python_words("backhand", "train", str(toml))
                with may_be_silent():  # the workers are not
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
    """Exit code of the worker that ended first; the launcher ends the others by SIGTERM."""
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


def _for_workers(config: TrainConfig, typed: frozenset[str]) -> dict[str, str]:
    """Environment of the workers; what a user has set stays."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    threads = max(1, available_cores() // config.run.workers)
    usual = {
        "GLOO_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    chosen = {name: value for name, value in usual.items() if name not in os.environ}
    return chosen | {_TYPED: " ".join(sorted(typed))} | safe_environment()


@contextmanager
def _for_the_launcher(environment: Mapping[str, str]) -> Iterator[None]:
    """The workers' environment; then it is as it was, and so are handlers of signals: the launcher has its own."""
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


_OWN = {
    "model": ("model", "device", "memory", "threads", "tune_allocator"),
    "data": ("data", "eval_data"),
    "run": ("output", "quiet", "debug"),
}
_MAY_DIFFER = ("model.device", "model.threads")


def alike(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all processes must have alike, of `resume.decisive_settings`."""
    return {name: value for name, value in settings.items() if name not in _MAY_DIFFER}


def versions() -> dict[str, Any]:
    """What decides the last bits of a sum: packages, and the instructions that the processor has."""
    return {**installed_packages(), "processor": torch.backends.cpu.get_cpu_capability()}


def followed(
    config: TrainConfig, done: RunSummary | None, processes: Communicator
) -> tuple[TrainConfig, RunSummary | None]:
    """Configuration and, of a run that is finished already, summary of the first process.

    Args:
        config: this process's own; it keeps its places in it.
    """
    if processes.world_size == 1:
        return config, done
    table, summary = processes.broadcast_object([config_table(config), done and dataclasses.asdict(done)])
    if processes.is_main_process:
        return config, done
    taken = config_from_table(table, "rank 0")
    usual = TrainConfig()
    parts = {}
    for part, names in _OWN.items():
        own, there, normal = (getattr(which, part) for which in (config, taken, usual))
        kept = {name: value for name in names if (value := getattr(own, name)) != getattr(normal, name)}
        parts[part] = replace(there, **kept)
    return replace(taken, **parts), summary and RunSummary(**summary)


def shared_checkpoint(checkpoint: Checkpoint | None, processes: Communicator) -> Checkpoint | None:
    """The checkpoint of the first process, byte for byte."""
    if processes.world_size == 1:
        return checkpoint
    head = processes.broadcast_object(
        checkpoint and [checkpoint.step, dict(checkpoint.facts), list(checkpoint.contents)]
    )
    if head is None:
        return None
    step, facts, names = head
    mine = {} if checkpoint is None else checkpoint.contents
    return Checkpoint(step, {name: processes.broadcast(mine.get(name, b"")) for name in names}, facts)


def continued_after_restart(config: TrainConfig) -> TrainConfig:
    """Of a process that torchrun has started again: the run goes on where it was, if it had begun.

    Raises:
        Interrupted: it was stopped on purpose; torchrun takes that for a failure.
    """
    run = config.run
    if not (run.output / CONFIG).exists():
        return config
    status = read_status(run.output)
    if run.overwrite:
        launcher = process_start(os.getppid())
        if status is None or launcher is None or status.launcher_start != launcher:
            return config  # a run of before, which this one is to replace
    if status is not None and status.state == "interrupted" and (number := signal_in(status.reason)) is not None:
        again = f"backhand train --resume --output {shlex.quote(str(run.output))}"
        raise Interrupted(number, status.step, f"continue with {again}")
    return replace(config, run=replace(run, resume=True, overwrite=False, from_adapter=None))
