"""What systems do each in its own way, in all its forms: no other file names a call that one of them does not have.

`make types` looks at the package as Linux and as Windows see it. What the kernels know of processors is
`kernels.build`'s; what is asked of Linux alone, and left out elsewhere, stays where it is used.
"""

from __future__ import annotations

import mmap
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

if sys.platform == "win32":
    import ctypes
    import msvcrt

    import psutil  # type: ignore[import-untyped]
else:
    import errno
    import fcntl
    import resource
    import select

PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""With every `os.open`: not for programs that are started, and bytes as they are."""
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)


def install(what: str) -> str:
    """What to type to have packages where this program is: its environment may be one that uv or pipx has made."""
    if Path(sys.prefix, "pipx_metadata.json").exists():
        return f"pipx runpip backhand install {what}"
    if find_spec("pip") is None:  # as in every environment of uv
        python = f'"{sys.executable}"' if sys.platform == "win32" else shlex.quote(sys.executable)
        return f"uv pip install --python {python} {what}"
    return f"pip install {what}"


@cache
def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is not there; read once."""
    from importlib import metadata  # a tenth of the time of --help

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def stop_signals() -> tuple[int, ...]:
    """Those by which a process is asked to end, as far as the system has them."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    return tuple(int(getattr(signal, name)) for name in names if hasattr(signal, name))


def rss_bytes() -> int:
    """Resident memory of this process now; the peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().rss)
        return highest_rss_bytes()


def peak_rss_bytes() -> int:
    """Highest resident memory since the process began."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return highest_rss_bytes()


_LOCKED_BYTE = 2**30
"""On Windows, where a file is locked: far behind what is written, so that who reads it is not kept from it."""


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends, however it ends; False where another one has it.

    Args:
        wait: until it is free.
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
    """Open a file that is gone when it is closed, to be written and read; return its descriptor."""
    descriptor, name = tempfile.mkstemp(prefix=".tmp-", dir=directory)
    if sys.platform == "win32":
        os.close(descriptor)
        return os.open(name, os.O_RDWR | os.O_TEMPORARY | PLAIN)
    os.unlink(name)  # noqa: PTH108 - a name, not a path
    return descriptor


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where that is not the system's to see to. Raises OSError."""
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
    """Fill `data` with a file's bytes from a place on; return how many. On Windows for one thread at a time."""
    if sys.platform == "win32":
        os.lseek(descriptor, place, os.SEEK_SET)
        done = 0
        while found := os.read(descriptor, len(data) - done):
            data[done : done + len(found)] = found
            done += len(found)
        return done
    return os.preadv(descriptor, [data], place)


def wait_for_pipe(descriptor: int, seconds: float) -> bool:
    """Whether a pipe has something to read, or its writers have left, in time; not one never opened to write."""
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
    return True  # also where there is no pipe any more


def highest_rss_bytes() -> int:
    """Highest resident memory, by one quick call; in a program that was started, perhaps that of its starter."""
    if sys.platform == "win32":
        peak = int(psutil.Process().memory_info().peak_wset)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def free_bytes() -> int | None:
    """Memory that may be allocated, where it does not stand in /proc; None where the system does not tell."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().available)
    return None


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell."""
    if sys.platform == "win32":
        return int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def memory_limits() -> tuple[int | None, int | None]:
    """Bytes of addresses and of data that this process may have; None for as many as there are."""
    if sys.platform != "win32":
        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        addresses, data = (None if limit == resource.RLIM_INFINITY else limit for limit in limits)
        return addresses, data
    return None, None


def may_reserve(size: int) -> bool:
    """Return True if this process may have so many bytes of addresses more, by the limit of `ulimit -v`."""
    if sys.platform == "win32" or memory_limits()[0] is None:
        return True
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def exists(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        if sys.platform == "win32":
            return bool(psutil.pid_exists(process))
        os.kill(process, 0)
    except PermissionError:
        return True  # it exists, and is somebody else's
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    return True


def process_start(process: int) -> str | None:
    """Return what distinguishes a process from later ones with its number; None if it has ended, or is not known.

    It is no time of the clock, which may be set while the process runs.
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
    """Have this process killed when the one that started it ends, however it ends, and whatever this one does.

    A thread would not do: what hangs in a function may hold the interpreter's lock, as a search by `re` does. Where
    there is fork, it is the end of standard input that tells: whatever ended the one that holds its other end.
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
        ours, held = os.pipe()  # ends with this process
        served = os.getpid()
        if os.fork():
            os.close(ours)
            return
        os.close(held)
        os.close(1)
        ends = select.poll()
        for descriptor in (0, ours):
            ends.register(descriptor, 0)  # nothing but that the other end is closed
        if ours not in dict(ends.poll()):
            os.kill(served, signal.SIGKILL)
        os._exit(0)
