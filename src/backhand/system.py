"""Platform-specific calls (Linux, macOS, Windows).

`make types` checks the package as Linux and as Windows would run it. Knowledge of processors is in `kernels.build`, and
calls that only Linux has and that are optional are next to their use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt

    import psutil  # type: ignore[import-untyped]
else:
    import errno
    import fcntl
    import resource
    import select

PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""For every `os.open`: child processes do not inherit the descriptor, and Windows does not translate line ends."""
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)


def install(what: str) -> str:
    """Return the command that installs packages into this program's environment, which uv or pipx may have made."""
    if Path(sys.prefix, "pipx_metadata.json").exists():
        return f"pipx runpip backhand install {what}"
    if find_spec("pip") is None:  # uv creates environments without pip
        python = f'"{sys.executable}"' if sys.platform == "win32" else shlex.quote(sys.executable)
        return f"uv pip install --python {python} {what}"
    return f"pip install {what}"


@cache
def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed. Cached."""
    from importlib import metadata  # takes a tenth of the time of --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def stop_signals() -> tuple[int, ...]:
    """Return the signals that ask a process to end, as far as the system has them."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    return tuple(int(getattr(signal, name)) for name in names if hasattr(signal, name))


def rss_bytes() -> int:
    """Return the resident memory of this process, or its peak if the system reports only that."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().rss)
        return highest_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the highest resident memory since the process started."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return highest_rss_bytes()


_LOCKED_BYTE = 2**30
"""Offset of the locked byte on Windows. It is far after the contents, which other processes can thus still read."""


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends. Return False if another process holds the lock.

    Args:
        wait: wait until the lock is free.
    """
    if sys.platform == "win32":
        while True:
            try:
                os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except PermissionError:
                if not wait:
                    return False
                time.sleep(0.05)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            return False
        return True


def others_can_write(status: os.stat_result) -> bool:
    """Return True if another user owns the file or folder, or may write to it. Root counts as the user itself.

    On Windows always False: its permissions are not in the status.
    """
    if sys.platform == "win32":
        return False
    return status.st_uid not in (os.geteuid(), 0) or bool(status.st_mode & 0o022)


def open_unnamed(directory: Path) -> int:
    """Open a temporary file that disappears when it is closed; return a descriptor to write and read it."""
    descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=directory)
    if sys.platform == "win32":
        os.close(descriptor)
        return os.open(name, os.O_RDWR | os.O_TEMPORARY | PLAIN)
    os.unlink(name)  # noqa: PTH108 - a name, not a path
    return descriptor


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk; Windows does that by itself. Raises OSError."""
    if sys.platform != "win32":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
                raise
        finally:
            os.close(descriptor)


def read_at(descriptor: int, data: bytearray, place: int) -> int:
    """Read into `data` from an offset of a file; return the number of bytes. Not thread-safe on Windows."""
    if sys.platform == "win32":
        os.lseek(descriptor, place, os.SEEK_SET)
        done = 0
        while found := os.read(descriptor, len(data) - done):
            data[done : done + len(found)] = found
            done += len(found)
        return done
    return os.preadv(descriptor, [data], place)


def wait_for_pipe(descriptor: int, seconds: float) -> bool:
    """Return True if a pipe has data or loses its writers within a time; False if it is never opened for writing."""
    until = time.monotonic() + seconds
    if sys.platform == "win32":
        there = ctypes.c_ulong(0)
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
        peek = ctypes.windll.kernel32.PeekNamedPipe
        while peek(handle, None, 0, None, ctypes.byref(there), None) and not there.value:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
    else:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            if time.monotonic() > until:
                return False
        os.set_blocking(descriptor, True)
    return True  # also if the pipe is gone


def highest_rss_bytes() -> int:
    """Return the highest resident memory by one fast call. In a child process it may include the parent's."""
    if sys.platform == "win32":
        peak = int(psutil.Process().memory_info().peak_wset)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def free_bytes() -> int | None:
    """Return the memory that may be allocated, or None on systems that report it in /proc or not at all."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().available)
    return None


def memory_bytes() -> int | None:
    """Return the memory of this machine, or None if the system does not report it."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def memory_limits() -> tuple[int | None, int | None]:
    """Return the limits on this process's address space and data, in bytes; None for no limit."""
    if sys.platform != "win32":
        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        addresses, data = (None if limit == resource.RLIM_INFINITY else limit for limit in limits)
        return addresses, data
    return None, None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated within the limits of control groups, or None if unknown.

    Args:
        root: directory of /proc and /sys, for tests.
    """
    amounts = list(_group_bytes(root))
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    if (free := free_bytes()) is not None:
        amounts.append(free)
    addresses, _ = memory_limits()
    if addresses is not None:
        with suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            amounts.append(max(0, addresses - pages * mmap.PAGESIZE))
    return min(amounts) if amounts else None


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield the free bytes of each control group of this process and of its parents."""
    memberships = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory") or "memory" in controllers.split(","):
                memberships.append(group.strip("/"))
    for base, limit_file, used_file, cache_name in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        # In a container, the root of the file system is often the container's group, with another name outside.
        for group in {"", *memberships}:
            for ancestor in (Path(group), *Path(group).parents):
                directory = root / base / ancestor
                with suppress(OSError, ValueError):
                    limit = int((directory / limit_file).read_text(encoding="ascii"))
                    used = int((directory / used_file).read_text(encoding="ascii"))
                    yield max(0, limit - max(0, used - _cached_bytes(directory, cache_name)))


def _cached_bytes(directory: Path, name: str) -> int:
    """Return the bytes of a group's inactive file cache, which the system releases on demand."""
    with suppress(OSError, ValueError):
        for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def affinity_cores() -> int:
    """Return the number of cores that this process may run on; all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_reserve(size: int) -> bool:
    """Return True if the limit of `ulimit -v` allows this process another `size` bytes of addresses."""
    if sys.platform == "win32" or memory_limits()[0] is None:
        return True
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def exists(process: int) -> bool:
    """Return True if there is a process with this number."""
    try:
        if sys.platform == "win32":
            return bool(psutil.pid_exists(process))
        os.kill(process, 0)
    except PermissionError:
        return True  # it exists, and belongs to another user
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    return True


def process_start(process: int) -> str | None:
    """Return a text that distinguishes a process from later ones with its number, or None if it ended or is unknown.

    It is not a time of the clock, which may be set while the process runs.
    """
    if sys.platform == "win32":
        with suppress(psutil.Error, OSError, TypeError, ValueError):
            return str(psutil.Process(process).create_time())
        return None
    with suppress(OSError, ValueError, IndexError):
        # The second field is the program's name in parentheses, and may contain spaces itself.
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        state, ticks = itemgetter(0, 19)(stat.rpartition(")")[2].split())
        if state != "Z":  # a zombie has ended, and only waits to be collected
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() + f"/{ticks}"
    return None


def end_with_parent() -> None:
    """Have this process killed when its parent ends, whatever either of them is doing.

    A thread could not do that: a function that hangs may hold the interpreter's lock, as a search by `re` does. A
    second process watches instead. On POSIX it watches standard input, whose other end closes with the parent.
    """
    if sys.platform == "win32":
        watch = (
            "import psutil, sys, time\n"
            "parent, this = (psutil.Process(int(word)) for word in sys.argv[1:])\n"
            "while parent.is_running() and this.is_running(): time.sleep(0.5)\n"
            "this.is_running() and this.kill()"
        )
        numbers = str(os.getppid()), str(os.getpid())
        nowhere, hidden = subprocess.DEVNULL, subprocess.CREATE_NO_WINDOW
        words = [sys.executable, "-c", watch, *numbers]
        subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, creationflags=hidden)
    else:
        read_end, write_end = os.pipe()  # the write end closes with this process
        main_process = os.getpid()
        if os.fork():
            os.close(read_end)
            return
        os.close(write_end)
        os.close(1)
        ends = select.poll()
        for descriptor in (0, read_end):
            ends.register(descriptor, 0)  # reports only that the other end is closed
        if read_end not in dict(ends.poll()):
            os.kill(main_process, signal.SIGKILL)
        os._exit(0)


def start_detached(
    words: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    *,
    output: int = subprocess.DEVNULL,
    inherited: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that goes on when this one or its terminal ends.

    Args:
        environment: variables in addition to those of this process.
        output: descriptor for standard output and standard error.
        inherited: descriptors that the process keeps open; none on Windows.
    """
    shared: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "cwd": directory}
    if sys.platform == "win32":
        shared["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    else:
        shared |= {"start_new_session": True, "pass_fds": inherited}
    return subprocess.Popen(words, env={**os.environ, **environment}, **shared)


def terminate(process: int) -> None:
    """Ask a process to end, if it exists. Windows ends it at once."""
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def end_group(process: int) -> None:
    """End a process that leads a session, with all processes in it; on Windows only this process."""
    with suppress(ProcessLookupError):
        if sys.platform == "win32":
            os.kill(process, signal.SIGTERM)
        else:
            os.killpg(process, signal.SIGKILL)


FORKS = sys.platform == "linux"
"""True if a process with threads can be forked safely, for work that uses none of them."""


def limit_process(processor_seconds: int, added_bytes: int) -> None:
    """End this process after processor seconds since its start, and refuse it more memory than `added_bytes`.

    A limit of memory that is already set stays. macOS limits only the time, and Windows neither.
    """
    if sys.platform != "win32" and _limited.get(resource.RLIMIT_CPU) != processor_seconds:
        _limit(resource.RLIMIT_CPU, processor_seconds)
    if sys.platform == "linux" and resource.RLIMIT_AS not in _limited:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + added_bytes)


def lift_limits() -> None:
    """Return to the limits that this process had before `limit_process`."""
    if sys.platform != "win32":
        for kind in list(_limited):
            resource.setrlimit(kind, _first_limits(kind))
    _limited.clear()


_limited: dict[int, int] = {}

if sys.platform != "win32":

    @cache
    def _first_limits(kind: int) -> tuple[int, int]:
        return resource.getrlimit(kind)

    def _limit(kind: int, value: int) -> None:
        soft, hard = _first_limits(kind)
        resource.setrlimit(kind, (value if soft == resource.RLIM_INFINITY else min(value, soft), hard))
        _limited[kind] = value


def become_worker() -> None:
    """Leave signals of the terminal to the parent process, and write no core when a limit ends this process."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        # The parent may have reserved gigabytes of heap (`kernels.large_pages`), to which no later limit applies.
        with suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
