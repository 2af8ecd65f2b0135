"""The processes of one run, on one machine or several: gloo between processors, NCCL between GPUs.

    joined                every process connects to the others as the environment says, with a time limit
    assert_equal          base, rows, configuration and versions are equal in all processes
    broadcast             rank 0 chooses the configuration, the micro-batches and the checkpoint
    reduce_step           once per step: gradient, loss and counts
    all_gather_object     one JSON value per process; carries signals as well

A single process uses `communicator.Communicator` and never enters this file. The program that starts the processes sets
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and Kubeflow do. Ray Train also initializes torch's default
process group. Then the store exists already, and the run creates a process group of its own next to Ray's.

`gradient_sums` has the sum of a step's gradients over the processes.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from backhand.distributed import rendezvous
from backhand.distributed.communicator import Communicator, GradientSum
from backhand.distributed.gradient_sums import OrderedSum, PlainSum, assign
from backhand.distributed.heartbeat import Heartbeat, StoppedElsewhere
from backhand.distributed.rendezvous import DistributedEnv, all_joined, connected, torch_distributed
from backhand.errors import ArtifactError, BackhandError, CheckError, ResourceError, short_reason
from backhand.options.config import Reduce
from backhand.printing import going_on
from backhand.runs.interruption import stop_word
from backhand.words import shorten

_MESSAGE_ELEMENTS = 1 << 18
"""Elements of one message between two processes."""
_NO_TIMEOUT = timedelta(days=30)
"""Timeout of a collective operation. The heartbeat detects a lost process earlier, and a slow step is not an error."""
_RUN_NUMBERS = itertools.count()
"""Number of this process's runs. A store that outlives a run still holds the keys of the previous run."""


@contextmanager
def joined(reduce: Reduce) -> Iterator[ProcessGroup]:
    """Join the process group that the environment describes. No process leaves before all have finished.

    Raises:
        UsageError: the environment is incomplete, or the port is in use.
        ResourceError: a process does not join in time, or is lost.
        StoppedElsewhere: another process ended with an error.
    """
    env = DistributedEnv.from_environment()
    with going_on(f"waiting for the other processes at {env.host}:{env.port}"):
        group = ProcessGroup(env, reduce)
    try:
        yield group
        group.close()
    except BaseException as error:
        group.leave(error)
        raise


class ProcessGroup(Communicator):
    """Several processes of one run. `Communicator` documents the attributes and methods.

    Args:
        env: this process's part of the environment.
        reduce: how the gradients of a step are summed.
    """

    def __init__(self, env: DistributedEnv, reduce: Reduce) -> None:
        super().__init__()
        self._dist = dist = torch_distributed()
        self.rank, self.world_size, self.local_rank = env.rank, env.world_size, env.local_rank
        self._ordered = reduce == "ordered"
        self._signal = 0
        self._in_collective = False
        self._initialized_by_others = dist.is_initialized()
        self._group: Any = None  # torch's process group; None for the default one
        address = f"{env.host}:{env.port}"
        prefix = f"{env.attempt}/{next(_RUN_NUMBERS)}"
        store_exists = env.agent_store or self._initialized_by_others
        store = dist.PrefixStore(prefix, connected(env, address, server=not store_exists))
        store.set(f"joined/{self.rank}", f"{platform.node()} {os.getpid()}")
        members = all_joined(store, self.world_size, address)
        self.names = [f"rank {rank} (process {pid} on {node})" for rank, (node, pid) in enumerate(members)]
        self.local_world_size = sum(node == platform.node() for node, _ in members)
        beats = dist.PrefixStore(prefix, connected(env, address, server=False))
        self._heartbeat = Heartbeat(beats, self.rank, self.names, address)
        self._connect(store)

    def _connect(self, store: Any) -> None:
        """Connect all processes in a thread, so that this thread can watch the heartbeat meanwhile."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                if self._initialized_by_others:
                    self._group = self._dist.new_group(backend=backend, timeout=_NO_TIMEOUT)
                else:
                    self._dist.init_process_group(
                        backend, store=store, rank=self.rank, world_size=self.world_size, timeout=_NO_TIMEOUT
                    )
            except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
                failed.append(error)

        thread = threading.Thread(target=connect, name="connect", daemon=True)
        thread.start()
        start_s = time.monotonic()
        while thread.is_alive() and not failed:
            thread.join(0.05)
            self._heartbeat.check()
            if time.monotonic() - start_s > rendezvous.JOIN_S:
                failed.append(TimeoutError(f"the processes did not connect within {rendezvous.JOIN_S:.0f} s"))
        if failed:
            raise ResourceError(
                "the processes have joined but cannot connect to each other",
                why=short_reason(failed[0]),
                next_step="open the ports between the machines, or name the network interface: GLOO_SOCKET_IFNAME=eth0",
            ) from None

    @property
    def should_stop(self) -> bool:
        return self._signal != 0

    def assign(self, tokens: Sequence[int]) -> list[list[int]]:
        return assign(tokens, self.world_size)

    def gradient_sum(self, gradients: Tensor, shares: Sequence[Sequence[int]]) -> GradientSum:
        return OrderedSum(gradients, shares, self) if self._ordered else PlainSum(gradients, self)

    def all_gather_object(self, value: Any) -> list[Any]:
        signal = 0 if self.interruption is None else self.interruption.requested or 0
        data = json.dumps([signal, value]).encode()
        longest = max(int(length) for length in self._all_gather_equal(torch.tensor([len(data)])))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        parts = [json.loads(bytes(piece.numpy())) for piece in self._all_gather_equal(padded)]
        self._signal = max(self._signal, *(signal for signal, _ in parts))
        if self._signal and self.interruption is not None:
            self.interruption.heard_elsewhere(self._signal)
        return [value for _, value in parts]

    def share_rows(self, rows: Tensor, places: Sequence[list[int]]) -> None:
        received = [rows.new_empty(len(place) * rows.shape[1]) for place in places]
        self.all_gather(received, rows[places[self.rank]].flatten())
        for place, part in zip(places, received, strict=True):
            rows[place] = part.view(len(place), rows.shape[1])

    def _all_gather_equal(self, sent: Tensor) -> list[Tensor]:
        """Return the tensor of every process; all have one shape."""
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        self.all_gather(received, sent)
        return received

    def broadcast(self, value: bytes) -> bytes:
        length = torch.tensor([len(value)])
        self._finish(lambda: [self._dist.broadcast(length, 0, group=self._group, async_op=True)])
        if not int(length):
            return b""
        data = torch.frombuffer(bytearray(value if self.is_main_process else int(length)), dtype=torch.uint8)
        self._finish(lambda: [self._dist.broadcast(data, 0, group=self._group, async_op=True)])
        return bytes(data.numpy())

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send one piece to each process and receive one from each."""
        self._exchange(list(received.split(received_sizes)), list(sent.split(sent_sizes)))

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        """Give every process the tensor of each process."""
        self._exchange(received, [sent] * self.world_size)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum over all processes in place."""
        self._finish(lambda: [self._dist.all_reduce(tensor, group=self._group, async_op=True)])

    def _exchange(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """Send one piece to each process and receive one from each, in short messages that use both directions.

        Gloo's own all-to-all fills one direction of a link first: over 100 Mbit/s it took 1.5 s instead of 0.9 s.
        """
        dist, operations = self._dist, []
        received[self.rank].copy_(sent[self.rank])
        for offset in range(1, self.world_size):
            to, source = (self.rank + offset) % self.world_size, (self.rank - offset) % self.world_size
            sends = [(dist.isend, piece, to) for piece in sent[to].split(_MESSAGE_ELEMENTS) if piece.numel()]
            receives = [
                (dist.irecv, piece, source) for piece in received[source].split(_MESSAGE_ELEMENTS) if piece.numel()
            ]
            pairs = itertools.zip_longest(sends, receives)
            operations += [dist.P2POp(*one, group=self._group) for pair in pairs for one in pair if one is not None]
        self._finish(lambda: [_Messages(dist.batch_isend_irecv(operations), sent[0].is_cuda)])

    def _finish(self, start: Callable[[], list[Any]]) -> None:
        """Start operations and wait for them, as long as the heartbeat finds all processes alive."""
        pause_s, self._in_collective = 2e-5, True
        try:
            for work in start():
                while not work.is_completed():
                    self._heartbeat.check()
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1e-3)
                work.wait()
            self._in_collective = False
        except RuntimeError as error:
            self._in_collective = False
            raise self._heartbeat.explain(short_reason(error)) from None

    def assert_equal(self, facts: Mapping[str, Any]) -> None:
        first, *others = self.all_gather_object(dict(facts))
        for rank, other in enumerate(others, start=1):
            different = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
            if different:
                shown = "; ".join(
                    f"{name}: {_short(first.get(name))} on rank 0, {_short(other.get(name))} on rank {rank}"
                    for name in different
                )
                raise ArtifactError(
                    f"{self.names[0]} and {self.names[rank]} are not about to make the same run",
                    where=", ".join(different),
                    why=shown,
                    next_step="give all processes the same model, rows, options and versions",
                )

    def assert_equal_adapters(self, digest: Callable[[], str], step: int) -> None:
        first, *others = self.all_gather_object(digest())
        different = [rank for rank, other in enumerate(others, start=1) if other != first]
        if different:
            raise CheckError(
                f"after step {step} the adapter of {', '.join(self.names[rank] for rank in different)} differs from "
                f"that of {self.names[0]}",
                why="the processes started with equal adapters and added the same gradients, so a processor or a "
                "memory computes wrong results",
                next_step="continue from the previous checkpoint with --resume, without that machine",
            )

    def leave(self, error: BaseException) -> None:
        """Tell the other processes why this process ends."""
        exit_code = _exit_code(error)
        if isinstance(error, StoppedElsewhere):
            error.said_elsewhere = self._heartbeat.leave(exit_code, error.what, echo=True)
        elif isinstance(error, BackhandError):
            error.said_elsewhere = self._heartbeat.leave(exit_code, error.one_line, echo=False)
        else:
            word = stop_word(exit_code - 128) if isinstance(error, KeyboardInterrupt | SystemExit) else None
            self._heartbeat.leave(exit_code, word or f"{type(error).__name__}: {error}", echo=False)
        if self._in_collective:
            # A thread of gloo still waits for a process that has ended, and Python would wait for that thread.
            atexit.register(_end_now, exit_code)

    def close(self) -> None:
        """Wait until all processes have finished, then close the connections."""
        self._heartbeat.close()
        self._dist.destroy_process_group(self._group)


class _Messages:
    """Point-to-point messages in flight, with the interface of one operation.

    Gloo completes a message only for a thread that waits for it, so on processors a separate thread waits. On a GPU,
    waiting belongs to the stream of the computing thread.
    """

    def __init__(self, works: list[Any], on_gpu: bool) -> None:
        self._works = works
        self._error: RuntimeError | None = None
        self._thread = None if on_gpu else threading.Thread(target=self._wait, name="messages", daemon=True)
        if self._thread is not None:
            self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works) if self._thread is None else not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for all messages. Raises RuntimeError if a connection was closed."""
        if self._thread is None:
            self._wait()
        if self._error is not None:
            raise self._error


def _exit_code(error: BaseException) -> int:
    """Return the exit code that the command line will map an exception to."""
    match error:
        case BackhandError():
            return error.exit_code
        case KeyboardInterrupt():
            return 130
        case SystemExit():
            return error.code if isinstance(error.code, int) and error.code else 1
        case OSError() | MemoryError():
            return 5
    return 1


def _end_now(exit_code: int) -> None:
    import sys

    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _short(value: object) -> str:
    return shorten("nothing" if value is None else str(value), 24)
