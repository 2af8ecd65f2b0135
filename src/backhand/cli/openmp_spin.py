"""The spinning of idle OpenMP threads: long while their cores are free, brief while they are contended.

A step has some 1,500 parallel regions, and between two of them the threads wait. A spinning thread starts at once,
while a sleeping thread must be woken, which takes longer than many regions. But if another program wants the core, it
gets it when the spinning thread's time slice ends, just when a region needs the thread. The better choice depends on
the load of the machine, which changes. libgomp reads the spin count, GOMP_SPINCOUNT, only once, when it is loaded. But
"if there are more OpenMP threads than available CPUs", threads spin 100 times only [libgomp, GOMP_SPINCOUNT].

The command line therefore sets SPINS. While a command runs, a thread monitors how long the process's threads have
waited for a core (/proc/self/task/*/schedstat). From a tenth of the time on, other programs want the cores. Until that
has been over for a second, the process holds more OpenMP threads than there are cores. These threads sleep: only their
number matters. Results do not change.

The Python API does the same. If torch was loaded before it, libgomp's own spin count stays, which is far larger.

If the wait time cannot be read, or the machine has many cores, for which as many threads would be needed,
UNWATCHED_SPINS is set and stays. Settings in the environment are never changed. This file does not import torch, so
that the command line can use it before torch is loaded.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

VARIABLE = "GOMP_SPINCOUNT"
SPINS, UNWATCHED_SPINS = 20_000, 1_000
"""Spins before a thread sleeps. At 12 to 50 ns per spin, depending on the processor: 0.2 to 1 ms, and 12 to 50 µs."""
_POLICY = "OMP_WAIT_POLICY"

INTERVAL_S = 0.2
CONTENDED_SHARE = 0.1
"""Measured: below 0.05 alone, above 0.45 next to one busy process on two cores."""
CALM_INTERVALS = 5
MOST_CORES = 32


def set_spin_count(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the spin count unless the environment has one. Must be called before libgomp is loaded."""
    if VARIABLE not in environment and _POLICY not in environment:
        watched = _run_queue_wait_s() is not None and (os.cpu_count() or 1) <= MOST_CORES
        environment[VARIABLE] = str(SPINS if watched else UNWATCHED_SPINS)


@contextmanager
def adaptive_spinning() -> Iterator[None]:
    """Inside the context, threads sleep at once while other programs want the cores, and otherwise spin as before."""
    set_here = os.environ.get(VARIABLE, str(SPINS)) == str(SPINS) and _POLICY not in os.environ
    if not set_here or _run_queue_wait_s() is None:
        yield
        return
    done = threading.Event()
    watching = threading.Thread(target=_watch, args=(done,), name="OpenMP contention", daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def _watch(done: threading.Event) -> None:
    """Acquire or release additional threads at intervals, until `done` is set."""
    more = Oversubscription()
    decide = ContentionPolicy(more)
    waited, at = _run_queue_wait_s(), time.monotonic()
    try:
        while not done.wait(INTERVAL_S):
            if "torch" not in sys.modules:
                continue  # nothing computes, as in `backhand studio`
            waited_before, at_before = waited, at
            waited, at = _run_queue_wait_s(), time.monotonic()
            if waited is not None and waited_before is not None:
                # The wait time of a thread is lost when the thread ends.
                decide(max(0.0, waited - waited_before) / (at - at_before))
    finally:
        more.release()


class ContentionPolicy:
    """Acquires additional threads when the cores are contended, and releases them after a calm period."""

    def __init__(self, more: Oversubscription) -> None:
        self._more = more
        self._calm_looks = CALM_INTERVALS

    def __call__(self, share: float) -> None:
        """Take the total wait time of the process's threads, as a share of the elapsed time."""
        if share > CONTENDED_SHARE:
            self._calm_looks = 0
            self._more.acquire()
        elif self._calm_looks < CALM_INTERVALS:
            self._calm_looks += 1
            if self._calm_looks == CALM_INTERVALS:
                self._more.release()


class Oversubscription:
    """Sleeping OpenMP threads, enough to exceed the number of cores. Initially there are none.

    They belong to a Python thread that has entered one parallel region with them and keeps them. They end with it.
    """

    def __init__(self) -> None:
        self._release: Callable[[], None] | None = None

    def acquire(self) -> None:
        """Create the threads. Nothing happens if they exist, or if torch has no libgomp or is not loaded yet."""
        torch: Any = sys.modules.get("torch")
        if self._release is not None or not hasattr(torch, "get_num_threads") or torch.get_num_threads() == 1:
            return  # a single thread never waits
        openmp = _libgomp(torch)
        if openmp is None:
            return
        # More than the cores that libgomp can have counted when it was loaded, for any later affinity and any number of
        # torch threads. The thread of this team is not counted, but the first thread of the program is.
        team = (os.cpu_count() or 1) + 1
        entered, over = threading.Event(), threading.Event()

        def keep() -> None:
            # A region runs a C function in each thread. A Python function would take the interpreter's lock in threads
            # that Python does not know. `free` takes one pointer, like the function of a region, and does nothing for
            # a null pointer. So nothing must be compiled, and this works without the compiled kernels.
            try:
                openmp.GOMP_parallel(ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p), None, team, 0)
            finally:
                entered.set()
            over.wait()

        thread = threading.Thread(target=keep, name="more OpenMP threads", daemon=True)
        with suppress(RuntimeError):  # no thread is available: the threads continue to spin
            thread.start()
            entered.wait()

            def release() -> None:
                over.set()
                thread.join()

            self._release = release

    def release(self) -> None:
        """End the threads."""
        if self._release is not None:
            self._release()
            self._release = None


def _libgomp(torch: Any) -> Any | None:
    """Return the libgomp that torch uses, found through torch's own library, or None if torch uses another OpenMP."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _run_queue_wait_s() -> float | None:
    """Return the seconds that this process's threads were ready but did not run, or None if the system does not say."""
    nanoseconds = ran = 0
    try:
        for task in os.scandir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
                spent, waited, _ = Path(task.path, "schedstat").read_text(encoding="ascii").split()
                ran, nanoseconds = ran + int(spent), nanoseconds + int(waited)
    except (OSError, ValueError):
        return None
    return nanoseconds / 1e9 if ran > 0 else None  # a system that does not count reports 0
