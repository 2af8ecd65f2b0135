"""How long OpenMP's threads wait for one another: long while their cores are free, hardly at all otherwise.

A step has some 1,500 regions of threads, and between two of them the threads wait. A thread that spins is there at
once; one that sleeps has to be woken, which takes longer than many a region. But where another program wants the core,
it gets it when the spinning thread's time is over, just when a region needs the thread. Which is better depends on
neighbours, who come and go. How often threads look before they sleep, GOMP_SPINCOUNT, is read once, when libgomp is
loaded; but "if there are more OpenMP threads than available CPUs", they look 100 times [libgomp, GOMP_SPINCOUNT].

So the command line sets SPINS, and while a command runs a thread looks at how long this process's threads have waited
for a core (/proc/self/task/*/schedstat). From a tenth of the time on, somebody else wants the cores: until that has
been over for a second, more OpenMP threads are held than there are cores. They sleep; that they are there is all.
Nothing is computed differently.

Where that time cannot be read, and on machines of many cores, which would take as many threads, UNWATCHED is set and
stays. What the environment says about waiting always stays.
Nothing here imports torch, so that the command line can ask before it is loaded.
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
SPINS, UNWATCHED = 20_000, 1_000
"""Looks before a thread sleeps: by 12 to 50 ns, as the processor pauses, 0.2 to 1 ms, and 12 to 50 µs."""
_POLICY = "OMP_WAIT_POLICY"

INTERVAL_S = 0.2
WAITED_SHARE = 0.1
"""Measured: below 0.05 alone, above 0.45 beside one busy process on two cores."""
CALM_LOOKS = 5
MOST_CORES = 32


def set_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say how long threads wait, unless the environment does; before libgomp is loaded, which reads it then."""
    if VARIABLE not in environment and _POLICY not in environment:
        watched = _time_waited() is not None and (os.cpu_count() or 1) <= MOST_CORES
        environment[VARIABLE] = str(SPINS if watched else UNWATCHED)


@contextmanager
def briefly_beside_others() -> Iterator[None]:
    """Inside, threads that would spin SPINS times sleep at once while other programs want the cores."""
    ours = os.environ.get(VARIABLE) == str(SPINS) and _POLICY not in os.environ
    if not ours or _time_waited() is None:
        yield
        return
    done = threading.Event()
    watching = threading.Thread(target=_watch, args=(done,), name="waiting", daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def _watch(done: threading.Event) -> None:
    """Hold more threads or let them go, every now and then, until it is done."""
    more = MoreThreads()
    decide = Decision(more)
    waited, at = _time_waited(), time.monotonic()
    try:
        while not done.wait(INTERVAL_S):
            waited_before, at_before = waited, at
            waited, at = _time_waited(), time.monotonic()
            if waited is not None and waited_before is not None:
                # A thread that ends takes along what it has waited.
                decide(max(0.0, waited - waited_before) / (at - at_before))
    finally:
        more.let_go()


class Decision:
    """Holds more threads as soon as others want the cores, and lets them go once that has been over a while."""

    def __init__(self, more: MoreThreads) -> None:
        self._more = more
        self._calm_looks = CALM_LOOKS

    def __call__(self, share: float) -> None:
        """Take the time that this process's threads waited for cores, in all, over the time that went by."""
        if share > WAITED_SHARE:
            self._calm_looks = 0
            self._more.hold()
        elif self._calm_looks < CALM_LOOKS:
            self._calm_looks += 1
            if self._calm_looks == CALM_LOOKS:
                self._more.let_go()


class MoreThreads:
    """As many OpenMP threads, asleep, as it takes to be more than there are cores; none at first.

    They belong to a thread of Python's that has entered one region with them and keeps them; with it they end.
    """

    def __init__(self) -> None:
        self._release: Callable[[], None] | None = None

    def hold(self) -> None:
        """Have them; nothing happens where they are there already, or torch has no libgomp, or is not loaded yet."""
        torch: Any = sys.modules.get("torch")
        if self._release is not None or not hasattr(torch, "get_num_threads") or torch.get_num_threads() == 1:
            return  # one thread waits for none
        openmp = _libgomp(torch)
        if openmp is None:
            return
        # More than libgomp can have counted cores when it was loaded, whatever the allowed cores and the number of
        # torch's threads become while these are held. This team's own thread is not counted, the program's first is.
        team = (os.cpu_count() or 1) + 1
        entered, over = threading.Event(), threading.Event()

        def keep() -> None:
            # A region runs a function of C in each thread. One of Python would take the interpreter's lock in threads
            # that Python does not know. `free` takes one pointer, as a region's function does, and of none it frees
            # nothing: so nothing has to be compiled, and this works where our own loops are not there.
            try:
                openmp.GOMP_parallel(ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p), None, team, 0)
            finally:
                entered.set()
            over.wait()

        thread = threading.Thread(target=keep, name="more OpenMP threads", daemon=True)
        with suppress(RuntimeError):  # no thread to be had: threads go on spinning
            thread.start()
            entered.wait()

            def release() -> None:
                over.set()
                thread.join()

            self._release = release

    def let_go(self) -> None:
        """Have none."""
        if self._release is not None:
            self._release()
            self._release = None


def _libgomp(torch: Any) -> Any | None:
    """The libgomp that torch computes with, found through torch's own library; None where it is another."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


def _time_waited() -> float | None:
    """Seconds that this process's threads have been ready to run, and did not; None where the system does not say."""
    nanoseconds = ran = 0
    try:
        for task in os.scandir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                spent, waited, _ = Path(task.path, "schedstat").read_text(encoding="ascii").split()
                ran, nanoseconds = ran + int(spent), nanoseconds + int(waited)
    except (OSError, ValueError):
        return None
    return nanoseconds / 1e9 if ran > 0 else None  # a system that does not count says 0
