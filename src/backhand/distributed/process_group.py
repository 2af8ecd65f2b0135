"""One run on several processes, here or on several machines: gloo between processors, NCCL between cards.

    joined     every process meets the others where the environment says; nobody waits for ever
    same       what the processes have must be equal: base, rows, configuration, versions; then every adapter
    follow     the first process chooses, the others take over: configuration, micro-batches, checkpoint
    total      once a step: the gradient, the loss and the counts
    gather     what each has found; from here on all know of a signal to one

A process alone is `step.Processes`, and never comes here. Whoever starts the processes sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, as torchrun and Kubeflow do. Ray Train has also connected them with torch: then the meeting
point is there already, and the run's connections are made beside Ray's.

The gradient of a step whose micro-batches several processes compute (`step.OneProcessSum` is that of one alone):

    g = g₀ + g₁ + … + g_{m-1},   each gᵢ computed from zero, added from the left in float64

Addition of floats is not associative: who adds what to what decides the last bits. `ordered` keeps the equation as it
stands, for any number of processes: the buffer of N elements is cut into W slices, each process sends slice k of each
of its micro-batches to process k, which adds them in their order, and the sums go back to everyone. `sum` adds a
process's own micro-batches first and then the processes in one all-reduce.

Bytes that a process sends in a step, with mᵣ micro-batches of its own:

    ordered   4 N (W - 1) / W · (mᵣ + 1)        as much as an all-reduce where each process has one micro-batch
    sum       4 N (W - 1) / W · 2

Besides, the processes tell each other (`step.Processes.total`) what each micro-batch had of nats and supervised tokens,
whether it attends, and the seconds that each computed and waited.

Bound of `sum`: with u = 2⁻²⁴ and m micro-batches, two orders of the same additions differ in each element by at most
2 (m - 1) u Σᵢ |gᵢ| / (1 - (m - 1) u)      [Higham, Accuracy and Stability of Numerical Algorithms, §4.2]
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

from backhand.distributed import rendezvous as meeting
from backhand.distributed.heartbeat import Pulse, StoppedElsewhere
from backhand.distributed.rendezvous import Place, all_joined, connected, torch_distributed
from backhand.errors import ArtifactError, BackhandError, CheckError, ResourceError, short_reason
from backhand.loop.step import GradientSum, Processes, zero_sum
from backhand.options.config import Reduce
from backhand.printing import going_on
from backhand.runs.interruption import stop_word
from backhand.words import shorten

_BIT = 1 << 18
"""Elements of a message between two processes."""
_NEVER = timedelta(days=30)
"""Timeout of a collective operation: `pulse` knows earlier, and a slow step is no fault."""
_MEETINGS = itertools.count()
"""Of this process: a store that outlives a run still holds what was written for the run before."""


@contextmanager
def joined(reduce: Reduce) -> Iterator[Group]:
    """The several processes of this run, as the environment says; none leaves before all do.

    Raises:
        UsageError: half an environment, or a port that is taken.
        ResourceError: the others do not come, or one is lost.
        StoppedElsewhere: another process ended for a reason of its own.
    """
    place = Place.of_environment()
    with going_on(f"waiting for the other processes at {place.host}:{place.port}"):
        group = Group(place, reduce)
    try:
        yield group
        group.close()
    except BaseException as error:
        group.leave(error)
        raise


class Group(Processes):
    """Several processes. Attributes and methods are those of `Processes`."""

    def __init__(self, place: Place, reduce: Reduce) -> None:
        super().__init__()
        self._dist = dist = torch_distributed()
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self._ordered = reduce == "ordered"
        self._signal = 0
        self._waiting = False
        self._connected_by_others = dist.is_initialized()
        self._group: Any = None  # torch's own, of all processes
        point = f"{place.host}:{place.port}"
        meeting = f"{place.attempt}/{next(_MEETINGS)}"
        served = place.agent_store or self._connected_by_others
        store = dist.PrefixStore(meeting, connected(place, point, server=not served))
        me = f"{platform.node()} {os.getpid()}"
        store.set(f"joined/{self.rank}", me)
        there = all_joined(store, self.size, point)
        self.names = [f"rank {rank} (process {name[1]} on {name[0]})" for rank, name in enumerate(there)]
        self.here = sum(name[0] == platform.node() for name in there)
        beats = dist.PrefixStore(meeting, connected(place, point, server=False))
        self._pulse = Pulse(beats, self.rank, self.names, point)
        self._connect(store)

    def _connect(self, store: Any) -> None:
        """Connections from each to each, in a thread: nothing else could be waited for meanwhile."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                if self._connected_by_others:
                    self._group = self._dist.new_group(backend=backend, timeout=_NEVER)
                else:
                    place = {"store": store, "rank": self.rank, "world_size": self.size}
                    self._dist.init_process_group(backend, **place, timeout=_NEVER)
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                failed.append(error)

        thread = threading.Thread(target=connect, name="connect", daemon=True)
        thread.start()
        began = time.monotonic()
        while thread.is_alive() and not failed:
            thread.join(0.05)
            self._pulse.check()
            if time.monotonic() - began > meeting.JOIN_S:
                failed.append(TimeoutError(f"no connection from each process to each within {meeting.JOIN_S:.0f} s"))
        if failed:
            raise ResourceError(
                "the processes have met and cannot connect to each other",
                why=short_reason(failed[0]),
                next_step="open the ports between them, or name the network: GLOO_SOCKET_IFNAME=eth0",
            ) from None

    @property
    def stopping(self) -> bool:
        """Whether all processes know that one has been asked to stop."""
        return self._signal != 0

    def shared_out(self, tokens: Sequence[int]) -> list[list[int]]:
        """For each process the numbers of its pieces, rising, of pieces of so many tokens; the longest come first."""
        return shared_out(tokens, self.size)

    def gradient_sum(self, gradients: Tensor, shares: Sequence[Sequence[int]]) -> GradientSum:
        """The sum of one step."""
        return OrderedSum(gradients, shares, self) if self._ordered else PlainSum(gradients, self)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, as JSON holds it."""
        asked = 0 if self.interruption is None else self.interruption.requested or 0
        data = json.dumps([asked, value]).encode()
        longest = max(int(length) for length in self._gathered(torch.tensor([len(data)])))
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        found = [json.loads(bytes(piece.numpy())) for piece in self._gathered(padded)]
        self._signal = max(self._signal, *(signal for signal, _ in found))
        if self._signal and self.interruption is not None:
            self.interruption.heard_elsewhere(self._signal)
        return [value for _, value in found]

    def _gathered(self, sent: Tensor) -> list[Tensor]:
        received = [torch.empty_like(sent) for _ in range(self.size)]
        self.all_gather(received, sent)
        return received

    def follow(self, value: bytes) -> bytes:
        """The value of the first process."""
        length = torch.tensor([len(value)])
        self._finish(lambda: [self._dist.broadcast(length, 0, group=self._group, async_op=True)])
        if not int(length):
            return b""
        data = torch.frombuffer(bytearray(value if self.leads else int(length)), dtype=torch.uint8)
        self._finish(lambda: [self._dist.broadcast(data, 0, group=self._group, async_op=True)])
        return bytes(data.numpy())

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send a piece to each process, and receive one of each."""
        self._swap(list(received.split(received_sizes)), list(sent.split(sent_sizes)))

    def all_gather(self, received: list[Tensor], sent: Tensor) -> None:
        """Give every process the tensor of each."""
        self._swap(received, [sent] * self.size)

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up in place."""
        self._finish(lambda: [self._dist.all_reduce(tensor, group=self._group, async_op=True)])

    def _swap(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """One piece to each process and one from each, a bit at a time, so that both directions of a link are used.

        Gloo's own all-to-all fills one direction first: over 100 Mbit/s it took 1.5 s for what now takes 0.9 s.
        """
        dist, operations = self._dist, []
        received[self.rank].copy_(sent[self.rank])
        for away in range(1, self.size):
            there, back = (self.rank + away) % self.size, (self.rank - away) % self.size
            pieces = [(dist.isend, piece, there) for piece in sent[there].split(_BIT) if piece.numel()]
            returns = [(dist.irecv, piece, back) for piece in received[back].split(_BIT) if piece.numel()]
            paired = itertools.zip_longest(pieces, returns)
            operations += [dist.P2POp(*one, group=self._group) for pair in paired for one in pair if one is not None]
        self._finish(lambda: [_Waited(dist.batch_isend_irecv(operations), sent[0].is_cuda)])

    def _finish(self, begin: Callable[[], list[Any]]) -> None:
        """Wait for operations as long as everybody is there."""
        pause_s, self._waiting = 2e-5, True
        try:
            for work in begin():
                while not work.is_completed():
                    self._pulse.check()
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, 1e-3)
                work.wait()
            self._waiting = False
        except RuntimeError as error:
            self._waiting = False
            raise self._pulse.explain(short_reason(error)) from None

    def same(self, facts: Mapping[str, Any]) -> None:
        """Compare what processes must have alike. Raises ArtifactError naming what differs, and both sides."""
        first, *others = self.gather(dict(facts))
        for rank, there in enumerate(others, start=1):
            different = [name for name in sorted({*first, *there}) if first.get(name) != there.get(name)]
            if different:
                shown = "; ".join(
                    f"{name}: {_short(first.get(name))} on rank 0, {_short(there.get(name))} on rank {rank}"
                    for name in different
                )
                raise ArtifactError(
                    f"{self.names[0]} and {self.names[rank]} are not about to make the same run",
                    where=", ".join(different),
                    why=shown,
                    next_step="give all processes the same model, rows, options and versions",
                )

    def same_adapter(self, digest: Callable[[], str], step: int) -> None:
        """Compare the adapters. Raises CheckError naming the processes whose adapter is another one."""
        first, *others = self.gather(digest())
        different = [rank for rank, there in enumerate(others, start=1) if there != first]
        if different:
            raise CheckError(
                f"after step {step} the adapter of {', '.join(self.names[rank] for rank in different)} is not that of "
                f"{self.names[0]}",
                why="they began alike and added up the same gradients: a processor or a memory computes otherwise",
                next_step="continue from the checkpoint before with --resume, without that machine",
            )

    def leave(self, error: BaseException) -> None:
        """Tell the others why this process ends."""
        exit_code = _exit_code(error)
        if isinstance(error, StoppedElsewhere):
            error.said_elsewhere = self._pulse.leave(exit_code, error.what, echo=True)
        elif isinstance(error, BackhandError):
            error.said_elsewhere = self._pulse.leave(exit_code, error.one_line, echo=False)
        else:
            word = stop_word(exit_code - 128) if isinstance(error, KeyboardInterrupt | SystemExit) else None
            self._pulse.leave(exit_code, word or f"{type(error).__name__}: {error}", echo=False)
        if self._waiting:
            # A thread of gloo's still waits for a process that is gone, and Python would wait for that thread.
            atexit.register(_end_now, exit_code)

    def close(self) -> None:
        """Wait until all are done, and end the connections."""
        self._pulse.close()
        self._dist.destroy_process_group(self._group)


class _Waited:
    """Messages under way, as one operation.

    Gloo tells of a message that it has come only to who waits for it, so on processors a thread does; on a card waiting
    belongs to the stream of the thread that computes.
    """

    def __init__(self, works: list[Any], on_card: bool) -> None:
        self._works = works
        self._error: RuntimeError | None = None
        self._thread = None if on_card else threading.Thread(target=self._wait, name="messages", daemon=True)
        if self._thread is not None:
            self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        """Whether all have come."""
        return all(work.is_completed() for work in self._works) if self._thread is None else not self._thread.is_alive()

    def wait(self) -> None:
        """Raises RuntimeError for a connection that was closed."""
        if self._thread is None:
            self._wait()
        if self._error is not None:
            raise self._error


def _exit_code(error: BaseException) -> int:
    """What the command line will make of an exception, as far as the others need to know."""
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


def shared_out(tokens: Sequence[int], processes: int) -> list[list[int]]:
    """Which micro-batches each process computes: each goes to the one that has the fewest tokens so far.

    Args:
        tokens: of every micro-batch, the longest first.
        processes: how many there are; some get none where there are fewer micro-batches.

    Returns:
        for each process the numbers of its micro-batches, rising; each number once.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for number, count in enumerate(tokens):
        process = loads.index(min(loads))
        shares[process].append(number)
        loads[process] += count
    return shares


class OrderedSum:
    """`ordered` over several processes.

    Args:
        gradients: the buffer, (elements,).
        shares: of every process, see `shared_out`.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[Sequence[int]], processes: Group) -> None:
        self._gradients, self._shares, self._processes = gradients, shares, processes
        self._slice = -(-gradients.numel() // processes.size)
        self._sent = gradients.new_zeros(processes.size, len(shares[processes.rank]), self._slice)
        self._added = 0

    def add(self) -> None:
        """See `step.GradientSum.add`."""
        for process, piece in enumerate(self._gradients.split(self._slice)):
            self._sent[process, self._added, : piece.numel()] = piece
        self._gradients.zero_()
        self._added += 1

    def total(self) -> None:
        """See `step.GradientSum.total`."""
        processes, numbers = self._processes, [number for share in self._shares for number in share]
        lengths = [len(share) * self._slice for share in self._shares]
        received = self._gradients.new_empty(len(numbers), self._slice)
        own = [lengths[processes.rank]] * processes.size
        processes.all_to_all(received.view(-1), self._sent.view(-1), lengths, own)
        added = zero_sum(self._gradients, self._slice)
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            added.add_(received[place])
        whole = self._gradients.new_empty(processes.size, self._slice)
        processes.all_gather(list(whole.unbind()), added.to(whole.dtype))
        self._gradients.copy_(whole.view(-1)[: self._gradients.numel()])


class PlainSum:
    """`sum` over several processes: the next gradient is added to this one where it stands, then one all-reduce."""

    def __init__(self, gradients: Tensor, processes: Group) -> None:
        self._gradients, self._processes = gradients, processes

    def add(self) -> None:
        """See `step.GradientSum.add`."""

    def total(self) -> None:
        """See `step.GradientSum.total`."""
        self._processes.all_reduce(self._gradients)
