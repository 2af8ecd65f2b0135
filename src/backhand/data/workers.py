"""Worker processes: functions are called in them within limits of processor time and memory, and on all cores.

On Linux a worker is forked from this process in a few milliseconds, and inherits its function. On other systems,
where forking a process with threads is not safe, a new interpreter is started, and its function is pickled.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Generic, TypeVar

from backhand.errors import ResourceError
from backhand.files import reason
from backhand.system import FORKS, affinity_cores, become_worker

T = TypeVar("T")
R = TypeVar("R")

MOST_WORKERS = 8
"""Reading rows keeps one core busy with some six workers."""
_WALL_SECONDS = 60
"""Time limit of a call on Windows, which has no limit of processor time."""

_parent_ends: weakref.WeakSet[Connection] = weakref.WeakSet()
_worker = threading.Event()


class WorkerEndedError(Exception):
    """The worker ended during a call.

    Attributes:
        signal: number of the signal that ended it, or None if the call took too long.
    """

    def __init__(self, signal: int | None) -> None:
        super().__init__("did not come to an end in time" if signal is None else f"ended with signal {signal}")
        self.signal = signal


def inside() -> bool:
    """Return True if this process is a worker."""
    return _worker.is_set()


class Worker(Generic[R]):
    """A process that calls one function with the arguments that it is sent.

    It ends when this object is deleted, or with this process.

    Raises:
        ResourceError: the system starts no further process.
    """

    def __init__(self, function: Callable[..., R]) -> None:
        context: Any = multiprocessing.get_context("fork" if FORKS else "spawn")
        self._lock = threading.Lock()
        self._connection, other = context.Pipe()
        _parent_ends.add(self._connection)
        self._process = context.Process(target=_serve, args=(other, function), daemon=True)
        try:
            with _start_conditions():
                self._process.start()
        except OSError as error:
            raise ResourceError(
                "no process can be started to prepare rows",
                why=reason(error),
                next_step="raise the limit of processes (ulimit -u), or free memory",
            ) from None
        other.close()
        # Also when this process ends: multiprocessing would wait for the worker, which waits for calls.
        self._finalizer = Finalize(self, _end, (self._connection, self._process), exitpriority=1)

    def call(self, *arguments: Any) -> R:
        """Return the function's result. Raises what the function raises, or WorkerEndedError."""
        with self._lock:
            self.send(*arguments)
            return self.receive()

    def send(self, *arguments: Any) -> None:
        """Begin a call. The result must be received before the next call."""
        with suppress(BrokenPipeError, ConnectionResetError):  # `receive` reports the end of the process
            self._connection.send(arguments)

    def receive(self) -> R:
        """Return the result of the call. Raises what the function raises, or WorkerEndedError."""
        try:
            if sys.platform == "win32" and not self._connection.poll(_WALL_SECONDS):
                self._process.kill()
                raise WorkerEndedError(None)
            answer: tuple[R, Exception | None] = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            ended_by = -(self._process.exitcode or 0)
            if ended_by == getattr(signal, "SIGKILL", None):
                raise ResourceError(
                    "a process that prepares rows was killed",
                    why="usually because too little memory is left",
                    next_step="free memory, or give shorter rows",
                ) from None
            raise WorkerEndedError(ended_by) from None
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def close(self) -> None:
        """End the process, also during a call."""
        self._finalizer()


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the results of `function` for all items in order, computed by up to one worker per core.

    A single item is not worth a worker, so this process computes it.

    Raises:
        WorkerEndedError: a worker ended.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if len(first) < 2 or not FORKS:
        yield from map(function, chain(first, items))
        return
    most = min(affinity_cores() + 1, MOST_WORKERS)
    calling: deque[Worker[R]] = deque()
    try:
        for item in chain(first, items):
            results = []
            worker = _one_more(function, calling) if len(calling) < most else None
            if worker is None:
                most, worker = len(calling), calling.popleft()
                results.append(worker.receive())
            calling.append(worker)
            worker.send(item)
            yield from results
        for worker in calling:
            yield worker.receive()
    finally:
        for worker in calling:
            worker.close()


def _one_more(function: Callable[[T], R], others: Collection[Worker[R]]) -> Worker[R] | None:
    """Start a worker, or return None if the system starts no more than these others."""
    try:
        return Worker(function)
    except ResourceError:
        if not others:
            raise
        return None


def _end(connection: Connection, process: Any) -> None:
    connection.close()
    process.kill()


@contextmanager
def _start_conditions() -> Iterator[None]:
    """Keep a new process from importing the main program, and libraries from warnings about forked threads.

    A worker runs no code of the threads that exist here.
    """
    main, parallel = sys.modules["__main__"], os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        sys.modules["__main__"] = main
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """Answer calls until the other end of the connection closes."""
    _worker.set()
    gc.freeze()  # otherwise the first collection would copy all memory that is shared with the parent
    become_worker()
    for inherited in list(_parent_ends):
        inherited.close()  # otherwise other workers would outlive the parent
    if FORKS:
        _leave_files(connection.fileno())
    with suppress(EOFError, OSError):
        while True:
            arguments = connection.recv()
            try:
                connection.send((function(*arguments), None))
            except Exception as error:  # noqa: BLE001 - raised again by `receive`
                connection.send((None, error))


def _leave_files(kept: int) -> None:
    """Replace the files inherited from the parent, except `kept`, by standard error.

    Otherwise locks and pipes of a parent that is killed would stay until its workers have ended. The numbers stay
    open, since an inherited object may close its number later.
    """
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number not in (2, kept):
            with suppress(OSError):
                os.dup2(2, number)
