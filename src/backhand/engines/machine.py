"""The device, dtype and threads of a process, its memory budget, and keeping within it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from backhand.distributed.communicator import Communicator
from backhand.nn.compute import release_freed_memory, resolve_device, resolve_dtype, resolve_threads
from backhand.options.config import TrainConfig, parse_bytes
from backhand.system import available_bytes, rss_bytes
from backhand.words import in_words


@dataclass(frozen=True)
class Machine:
    """The device, dtype and threads of a process of a run."""

    device: torch.device
    dtype: torch.dtype  # the compute dtype
    threads: int
    world_size: int = 1  # number of processes that share each step
    local_world_size: int = 1  # number of these processes on this machine; they share its memory


def resolve_machine(config: TrainConfig, processes: Communicator | None = None) -> Machine:
    """Return device, dtype and threads of this process. Raises UsageError for a device that cannot be used."""
    processes = Communicator() if processes is None else processes
    world_size, local_world_size = processes.world_size, processes.local_world_size
    if world_size == 1:  # the workers are not started yet, and will all be on this machine
        world_size = local_world_size = config.run.workers
    device, threads = resolve_device(config.model), resolve_threads(config.model)
    if local_world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())
        if config.model.threads is None and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, threads // local_world_size)
    return Machine(device, resolve_dtype(config.model, device), threads, world_size, local_world_size)


def memory_budget(config: TrainConfig, machine: Machine, process_bytes: int, shared_bytes: int) -> int | None:
    """Return the memory that the process may use in total, in bytes; None without a limit or on a graphics card.

    It is this process's share of `--memory`, or by default of the free memory.

    Args:
        config: the configuration of the run.
        machine: the machine with its number of processes.
        process_bytes: bytes that the process uses already.
        shared_bytes: bytes of mapped files, which are in memory once for all processes.
    """
    if machine.device.type != "cpu":
        return None
    counted_twice = shared_bytes * (machine.local_world_size - 1)  # every process counts the mapped files
    if config.model.memory:
        return (parse_bytes(config.model.memory, where="memory") + counted_twice) // machine.local_world_size
    free = available_bytes()
    return None if free is None else (free + counted_twice) // machine.local_world_size + process_bytes


def crowded_note(mapped_bytes: int, free_bytes: int | None) -> str | None:
    """Return a warning if the mapped files do not fit into the free memory, else None.

    Args:
        mapped_bytes: size of the files.
        free_bytes: bytes that can still be allocated, including reclaimable pages of files; None if unknown.
    """
    if free_bytes is None or mapped_bytes <= free_bytes:
        return None
    excess = mapped_bytes - free_bytes
    return (
        f"the model's file, {in_words(mapped_bytes)}, is larger than the memory that is free, {in_words(free_bytes)}: "
        f"each forward and backward pass reads {in_words(excess)} or more of it from the disk again, and is as slow as "
        "the disk; use a smaller file, or --recompute block, which leaves more memory free"
    )


_RAISED_BY = 1.1


@dataclass(eq=False)
class MemoryKeeper:
    """Keeps a run within its memory plan by returning freed memory to the system when necessary.

    The allocator keeps freed buffers for the next step (`nn.compute.keep_freed_memory`), and matrix kernels that are
    compiled meanwhile are allocated between them. If rows have many lengths, the gaps between the kernels fit fewer and
    fewer buffers. The process then grows without using more: to 1.5 GB instead of 0.7 after sixty steps of a small
    model.

    Returning the gaps to the system costs the page faults of one step. Therefore it happens only after the first step,
    after a step that would exceed the plan, and before and after each checkpoint. A checkpoint's buffers are larger
    than any gap of a step, and they leave gaps that fit no step: 110 MB for 5 million parameters.
    """

    limit_bytes: int  # the planned peak of the resident memory
    measure: Callable[[], int] = rss_bytes  # returns the current resident memory in bytes
    release: Callable[[], object] = release_freed_memory  # returns freed memory to the system
    _before: int = field(default=0, init=False)
    _released: bool = field(default=False, init=False)

    def make_room(self) -> None:
        """Return freed memory to the system before or after large buffers are allocated.

        It is also called before the first step. The growth of the first step then triggers a release after it, because
        kernels that the step compiles are allocated between its buffers.
        """
        self.release()
        self._before = self._before or self.measure()

    def after_step(self) -> None:
        """Return freed memory to the system if another step with the same growth would exceed the plan."""
        now = self.measure()
        if self._released and now > self.limit_bytes:
            # A single step has exceeded the plan again, so the plan is too low. Releasing after every step is useless.
            self.limit_bytes = int(_RAISED_BY * now)
        growth = 0 if self._released else max(0, now - self._before)
        self._released = self._before > 0 and now + growth > self.limit_bytes
        if self._released:
            self.release()
        self._before = now
