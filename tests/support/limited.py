"""A command in a process of its own, under limits of the system; one that hangs is killed and reported."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import start

_PATIENCE_S = 240
"""A busy machine is slow; what hangs, hangs for ever."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int | None
    output: str
    errors: str

    @property
    def what(self) -> str:
        """The line that says what is wrong."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error:")]
        return lines[-1] if lines else ""


def limited(
    words: Sequence[object],
    place: Path,
    *,
    file_bytes: int | None = None,
    memory_bytes: int | None = None,
    data_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    unprivileged: bool = False,
) -> Ended:
    """Run `backhand WORDS` in a directory.

    Args:
        words: of the command line.
        place: working directory.
        file_bytes: how long a file may become (ulimit -f).
        memory_bytes: address space above what a process with everything imported has.
        data_bytes: data above what such a process has.
        environment: further variables.
        limits: further limits, by the number of the resource.
        unprivileged: run as `drop_privileges` says.
    """
    log = place / ".log"
    limits = dict(limits or {})
    if file_bytes is not None:
        limits[resource.RLIMIT_FSIZE] = file_bytes
    arguments = (str(place), memory_bytes, data_bytes, dict(environment or {}), limits, unprivileged)
    process = start(_run, [str(word) for word in words], *arguments)
    process.join(_PATIENCE_S)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    texts = [Path(f"{log}.{name}") for name in ("out", "err")]
    output, errors = (path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in texts)
    for path in texts:
        path.unlink(missing_ok=True)
    assert code is not None, f"it hangs: backhand {' '.join(map(str, words))}"
    assert "Traceback" not in errors, errors
    return Ended(code, output, errors)


def _run(
    words: list[str],
    place: str,
    memory_bytes: int | None,
    data_bytes: int | None,
    environment: dict[str, str],
    limits: dict[int, int],
    unprivileged: bool,
) -> None:
    os.chdir(place)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f".log.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
    os.environ.update(environment)
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split() if memory_bytes or data_bytes else []
    if memory_bytes is not None:
        limits[resource.RLIMIT_AS] = int(pages[0]) * resource.getpagesize() + memory_bytes
    if data_bytes is not None:
        limits[resource.RLIMIT_DATA] = int(pages[5]) * resource.getpagesize() + data_bytes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    if unprivileged:
        drop_privileges()
    from backhand.cli.main import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def drop_privileges() -> None:
    """Give up what root may do and other users may not, in this process and the programs that it starts.

    It still owns what root owns, so that it can read this program. Its processes count for a user of its own.
    """
    if os.geteuid() != 0:
        return
    os.setresuid(100_000 + os.getpid(), 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    keep_none_in_programs = 1 | 2  # SECBIT_NOROOT, and locked
    if libc.prctl(28, keep_none_in_programs, 0, 0, 0):  # PR_SET_SECUREBITS
        raise OSError(ctypes.get_errno(), "prctl")
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3 of the call
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
