"""Where and how a process of a run computes: device, dtype, threads, how much memory it holds, and how much it may."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from backhand.distributed.communicator import Communicator
from backhand.nn.available_memory import available_bytes
from backhand.nn.compute import release_freed_memory, resolve_device, resolve_dtype, resolve_threads
from backhand.options.config import TrainConfig, parse_bytes
from backhand.system import rss_bytes
from backhand.words import in_words


@dataclass(frozen=True)
class Machine:
    """Where and how a process of a run computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    world_size: int = 1  # processes that share each step
    here: int = 1  # those of them on this machine, which share its memory


def resolve_machine(config: TrainConfig, processes: Communicator | None = None) -> Machine:
    """Device, dtype and threads of this process. Raises UsageError for a device that cannot be used."""
    processes = Communicator() if processes is None else processes
    size, here = processes.world_size, processes.local_world_size
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


def crowded_note(mapped_bytes: int, free_bytes: int | None) -> str | None:
    """What to say of mapped files that do not fit into the memory that is free; None where they do.

    Args:
        mapped_bytes: of the files.
        free_bytes: what may still be allocated, pages of files that can be given up among it; None if not known.
    """
    if free_bytes is None or mapped_bytes <= free_bytes:
        return None
    again = mapped_bytes - free_bytes
    return (
        f"the model's file, {in_words(mapped_bytes)}, is larger than the memory that is free, {in_words(free_bytes)}: "
        f"{in_words(again)} or more of it are read from the disk again in each pass, forward and backward, which is as "
        "slow as the disk; a smaller file or --recompute block leaves more room"
    )


_RAISED_BY = 1.1


@dataclass(eq=False)
class MemoryKeeper:
    """Holds a run to the memory that was planned for it: asked after every step, before and after every checkpoint.

    Freed buffers are kept for the next step (`nn.compute.keep_freed_memory`), and matrix kernels that are compiled in
    between settle among them. Where rows have many lengths the gaps between such kernels fit the next step's buffers
    less and less, and the process grows although it holds no more: 1.5 GB in place of 0.7 after sixty steps of a small
    model. Giving the gaps back costs the page faults of one step, so steps have it done only where the plan would be
    exceeded, and once after the first. It is also done around each checkpoint, whose buffers are larger than any gap a
    step leaves, and leave gaps that fit no step: 110 MB for 5 million parameters.
    """

    limit_bytes: int  # highest resident memory that was planned
    measure: Callable[[], int] = rss_bytes  # the process's resident memory now
    release: Callable[[], object] = release_freed_memory  # gives freed memory back to the system
    _before: int = field(default=0, init=False)
    _released: bool = field(default=False, init=False)

    def make_room(self) -> None:
        """Give freed memory back: what comes next needs large buffers.

        Called before the first step as well: all that this one takes is growth, and what it compiles settles among its
        buffers, so that memory is given back after it once.
        """
        self.release()
        self._before = self._before or self.measure()

    def after_step(self) -> None:
        """Give freed memory back if another step that grows like this one would exceed the plan."""
        now = self.measure()
        if self._released and now > self.limit_bytes:
            # One step alone fills it again: the plan was too low. Releasing at every step would help nobody.
            self.limit_bytes = int(_RAISED_BY * now)
        growth = 0 if self._released else max(0, now - self._before)
        self._released = self._before > 0 and now + growth > self.limit_bytes
        if self._released:
            self.release()
        self._before = now
