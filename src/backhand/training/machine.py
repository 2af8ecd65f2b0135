"""Where and how a process of a run computes: device, dtype, threads, and how much memory it may take."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from backhand.nn.available_memory import available_bytes
from backhand.nn.compute import resolve_device, resolve_dtype, resolve_threads
from backhand.training.config import TrainConfig, parse_bytes
from backhand.training.step import Processes


@dataclass(frozen=True)
class Machine:
    """Where and how a process of a run computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    world_size: int = 1  # processes that share each step
    here: int = 1  # those of them on this machine, which share its memory


def resolve_machine(config: TrainConfig, processes: Processes | None = None) -> Machine:
    """Device, dtype and threads of this process. Raises UsageError for a device that cannot be used."""
    processes = Processes() if processes is None else processes
    size, here = processes.size, processes.here
    if size == 1:  # not started yet: `workers` are about to be, on this machine
        size = here = config.run.workers
    device, threads = resolve_device(config.model), resolve_threads(config.model)
    if here > 1:
        if device.type == "cuda":
            device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())
        if config.model.threads is None and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, threads // here)
    return Machine(device, resolve_dtype(config.model, device), threads, size, here)


def memory_budget(config: TrainConfig, machine: Machine, process_bytes: int, shared_bytes: int) -> int | None:
    """What the process may take in all: as asked for, else what is free; shared with the others on the machine.

    Args:
        shared_bytes: of what it takes, those of mapped files, which are in memory once for all processes.
    """
    if machine.device.type != "cpu":
        return None
    again = shared_bytes * (machine.here - 1)  # counted by each of the others as well
    if config.model.memory:
        return (parse_bytes(config.model.memory, where="memory") + again) // machine.here
    free = available_bytes()
    return None if free is None else (free + again) // machine.here + process_bytes
