"""Command lines in a forked child, under limits of time and memory; what became of it, and of what lies around."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backhand.printing import visible
from backhand.system import peak_rss_bytes, rss_bytes
from tests.support.addresses import limit_addresses

MEMORY_BYTES = 3 * 2**30
"""Of address space, above what the parent has."""
PEAK_BYTES = 3 * 2**29
"""Of memory in use, above what the child has when it begins: a gigabyte and a half."""
HANG_S = 10
ALLOWED = (0, 2, 3, 4, 6)
"""Exit codes that a command may have on any bytes. 1 is a bug; 5 would say that the machine is too small for them,
which is for `plan` to say."""
OUTPUT = "out"
"""The one name in its directory that a command may change."""

TOUCHED = "touched"

Files = Mapping[str, tuple[int, int, int]]


class Attempt(NamedTuple):
    """The words after `backhand`, or a function that returns an exit code; and the directory to run in."""

    command: Sequence[str] | Callable[[], int]
    place: Path


@dataclass(frozen=True)
class Outcome:
    """What one case came to.

    Attributes:
        code: exit code, negative for a signal; None where it was stopped for taking too long.
        cpu_s: processor seconds of the child.
        peak_bytes: memory in use above what the child had when it began; 0 where it died.
        said: what it wrote to standard error, or the part of it that is kept.
        fault: why this is a failure, or "".
    """

    code: int | None
    cpu_s: float
    peak_bytes: int
    said: str
    fault: str


def run_attempts(attempts: Sequence[Attempt]) -> list[Outcome]:
    """Run command lines one after the other in as few children as will do: making one costs as much as most commands.

    What fails among others is run again alone, and what it comes to then counts; not where it has changed a file that
    it was to leave, since the change is there already.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(attempts):
        outcomes += _run_in_one_child(attempts[len(outcomes) :])
    return [
        run_attempt(attempt) if _again(outcome) and len(attempts) > 1 else outcome
        for attempt, outcome in zip(attempts, outcomes, strict=True)
    ]


def _again(outcome: Outcome) -> bool:
    return bool(outcome.fault) and not outcome.fault.startswith(TOUCHED)


def run_attempt(attempt: Attempt) -> Outcome:
    """Run one command line in a child of its own."""
    (outcome,) = _run_in_one_child([attempt])
    return outcome


def _run_in_one_child(attempts: Sequence[Attempt]) -> list[Outcome]:
    """The outcome of the first case, and of those after it as long as the child lives."""
    before = [_tree(attempt.place) for attempt in attempts]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(attempts, writing)
    os.close(writing)
    outcomes = []
    with os.fdopen(reading, "rb", buffering=0) as reported:
        for attempt, there in zip(attempts, before, strict=True):
            # A busy machine gives a child its seconds late: the limit on processor seconds is the one that counts.
            hung = not select.select([reported], [], [], HANG_S * 30)[0]
            if hung:
                os.killpg(child, signal.SIGKILL)
            line = b"" if hung else reported.readline()
            if not line:  # it is dead, and this case was its last
                _, status, usage = os.wait4(child, 0)
                code = os.waitstatus_to_exitcode(status)
                outcomes.append(_outcome(attempt, code, usage.ru_utime + usage.ru_stime, 0, hung, there))
                return outcomes
            code, cpu_s, peak = line.split()
            outcomes.append(_outcome(attempt, int(code), float(cpu_s), int(peak), False, there))
        os.waitpid(child, 0)
    return outcomes


def _outcome(attempt: Attempt, code: int, cpu_s: float, peak: int, hung: bool, before: Files) -> Outcome:
    log = _log_of(attempt)
    said = log.read_bytes()[-4000:].decode("utf-8", "replace") if log.exists() else ""
    shown = _output_of(attempt)
    # What `generate` says is the model's own; everything else is ours to make visible.
    printed = "" if callable(attempt.command) or attempt.command[0] == "generate" else _text_of(shown)
    log.unlink(missing_ok=True)
    shown.unlink(missing_ok=True)
    fault = ""
    if hung or code == -signal.SIGXCPU:
        fault = "hang"
    elif code not in ALLOWED and not (code == 5 and not callable(attempt.command) and attempt.command[0] == "plan"):
        fault = f"exit {code}" if code >= 0 else f"signal {-code}"
    elif code and "Traceback (most recent call last)" in said:
        fault = "traceback"
    elif any(visible(text, "\n") != text for text in (said, printed)):
        fault = "raw characters"
    elif peak > PEAK_BYTES:
        fault = "memory"
    changed = sorted(before.items() ^ _tree(attempt.place).items())
    if changed and not fault:
        fault = f"{TOUCHED} {changed[0][0]}"
    return Outcome(None if fault == "hang" else code, cpu_s, peak, said, fault)


def _log_of(attempt: Attempt) -> Path:
    return attempt.place.parent / f"{attempt.place.name}.log"


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _output_of(attempt: Attempt) -> Path:
    return attempt.place.parent / f"{attempt.place.name}.shown"


def _be_child(attempts: Sequence[Attempt], telling: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        # Whatever the parent has in their place, a test's capture for one.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        limit_addresses(MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
        for attempt in attempts:
            code, cpu_s, peak = _run_here(attempt)
            os.write(telling, f"{code} {cpu_s} {peak}\n".encode())
    except BaseException:  # noqa: BLE001 - the child must not go on as the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _run_here(attempt: Attempt) -> tuple[int, float, int]:
    """Exit code, processor seconds, and memory in use above what there was before."""
    for number, path in ((1, _output_of(attempt)), (2, _log_of(attempt))):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(attempt.place)
    temporary = attempt.place.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    own = attempt.place / "home"
    home = own if own.is_dir() else temporary
    os.environ |= {"HOME": str(home), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    began, at_first = time.process_time(), _resident_from_now()
    resource.setrlimit(resource.RLIMIT_CPU, (int(began) + HANG_S + 1, resource.RLIM_INFINITY))
    try:
        if callable(attempt.command):
            code = attempt.command()
        else:
            from backhand.cli.main import main

            code = main([str(word) for word in attempt.command])
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - a fault of the case, reported as its exit code
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    return code, time.process_time() - began, max(0, peak_rss_bytes() - at_first)


def _resident_from_now() -> int:
    """Resident memory, from which on the system counts its peak again.

    A forked child has fewer pages than its parent, mapped files for one: its own are what counts.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return rss_bytes()


def _tree(place: Path) -> Files:
    """Name → kind, size and time of everything in the directory but the output."""
    found: dict[str, tuple[int, int, int]] = {}
    for path in place.rglob("*"):
        if path.relative_to(place).parts[0] != OUTPUT:
            status = path.lstat()
            found[str(path.relative_to(place))] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return {
        name: (mode, size if mode & 0o100000 else 0, at if mode & 0o100000 else 0)
        for name, (mode, size, at) in found.items()
    }
