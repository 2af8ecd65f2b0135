"""What the first of several processes knows and the others take over: configuration, checkpoint, an end.

The run directory may lie on a disk of its own. Where model and rows lie, and on which device a process computes, is
each process's own business; that they are the same model and rows is compared by their digests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from backhand.adapters.record import installed_packages
from backhand.runs.checkpoint import Checkpoint
from backhand.runs.directory import CONFIG
from backhand.runs.interruption import Interrupted, signal_in
from backhand.runs.status import read_status
from backhand.runs.summary import RunSummary
from backhand.system import begun_s
from backhand.training.config import TrainConfig
from backhand.training.config_file import config_from_table, config_table
from backhand.training.step import Processes

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
    config: TrainConfig, done: RunSummary | None, processes: Processes
) -> tuple[TrainConfig, RunSummary | None]:
    """Configuration and, of a run that is finished already, summary of the first process.

    Args:
        config: this process's own; it keeps its places in it.
    """
    if processes.size == 1:
        return config, done
    told = {"config": config_table(config), "done": None if done is None else dataclasses.asdict(done)}
    led = json.loads(processes.follow(json.dumps(told).encode()))
    if processes.leads:
        return config, done
    taken = config_from_table(led["config"], "rank 0")
    usual = TrainConfig()
    parts = {}
    for part, names in _OWN.items():
        own, there, normal = (getattr(which, part) for which in (config, taken, usual))
        kept = {name: value for name in names if (value := getattr(own, name)) != getattr(normal, name)}
        parts[part] = replace(there, **kept)
    return replace(taken, **parts), None if led["done"] is None else RunSummary(**led["done"])


def shared_checkpoint(checkpoint: Checkpoint | None, processes: Processes) -> Checkpoint | None:
    """The checkpoint of the first process, byte for byte."""
    if processes.size == 1:
        return checkpoint
    head: dict[str, Any] = {}
    if checkpoint is not None:
        head = {"step": checkpoint.step, "facts": dict(checkpoint.facts), "files": list(checkpoint.contents)}
    head = json.loads(processes.follow(json.dumps(head).encode()))
    if not head:
        return None
    contents = {
        name: processes.follow(b"" if checkpoint is None else checkpoint.contents[name]) for name in head["files"]
    }
    return Checkpoint(head["step"], contents, head["facts"])


def continued_after_restart(config: TrainConfig) -> TrainConfig:
    """Of a process that torchrun has started again: the run goes on where it was, if it had begun.

    Raises:
        Interrupted: it was stopped on purpose; torchrun takes that for a failure.
    """
    run = config.run
    written = run.output / CONFIG
    if not written.exists():
        return config
    if run.overwrite:
        launcher_s = begun_s(os.getppid())
        if launcher_s is None or written.stat().st_mtime < launcher_s - 1.0:
            return config  # a run of before, which this one is to replace
    status = read_status(run.output)
    if status is not None and status.state == "interrupted" and (number := signal_in(status.reason)) is not None:
        again = f"backhand train --resume --output {shlex.quote(str(run.output))}"
        raise Interrupted(number, status.step, f"continue with {again}")
    return replace(config, run=replace(run, resume=True, overwrite=False, from_adapter=None))
