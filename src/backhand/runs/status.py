"""status.json: the state of a run and its process, from which a killed run is recognised.

A killed process leaves the state `running`. Its number then belongs to no process, or to one that started later.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from backhand.errors import BackhandError
from backhand.printing import reworded
from backhand.reading import read_json
from backhand.runs.directory import STATUS, RunDirectory
from backhand.runs.interruption import Interrupted
from backhand.system import exists, process_start

State = Literal["running", "finished", "interrupted", "failed", "killed"]


@dataclass(frozen=True)
class RunStatus:
    """The state of a run."""

    state: State  # `killed` is never written: `read_status` returns it for `running` without a process
    total_steps: int
    step: int  # optimizer steps done at the last change
    # process, host: number of the training process, and the name of its machine
    process: int
    host: str
    # began, changed: times, ISO 8601 in UTC
    began: str
    changed: str
    reason: str = ""  # why the run did not finish, or ""
    # process_start, launcher_start: `system.process_start` of the process and of the process that started it
    process_start: str | None = None
    launcher_start: str | None = None


@contextmanager
def status_kept(directory: RunDirectory, total_steps: int, step: Callable[[], int]) -> Iterator[None]:
    """Record the state `running` for the block, and then `finished`, `interrupted` or `failed`.

    Raises:
        ResourceError: status.json cannot be written at the start, or at the end of a finished run.
    """
    began = _now()
    status = RunStatus(
        "running",
        total_steps,
        step(),
        os.getpid(),
        platform.node(),
        began,
        began,
        process_start=process_start(os.getpid()),
        launcher_start=process_start(os.getppid()),
    )

    def write(state: State, reason: str = "") -> None:
        changed = replace(status, state=state, step=step(), changed=_now(), reason=reason)
        directory.write(STATUS, json.dumps(asdict(changed), indent=2, ensure_ascii=True) + "\n")

    write("running")
    try:
        yield
    except BaseException as error:
        # The error matters more than a status that cannot be written.
        with suppress(BackhandError, OSError):
            said = "\n".join(map(reworded, str(error).split("\n")))
            if not isinstance(error, BackhandError | SystemExit):
                said = f"{type(error).__name__}: {said}".removesuffix(": ")
            if by_signal(error):
                said = "stopped at once by a signal; steps after the last checkpoint are lost"
            stopped = isinstance(error, Interrupted) or by_signal(error)
            write("interrupted" if stopped else "failed", said)
        raise
    write("finished")


def by_signal(error: BaseException) -> bool:
    """Return True if a signal ended the run at once, usually a second one; see `Interruption`."""
    code = error.code if isinstance(error, SystemExit) else None
    return isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and code > 128)


def read_status(run: Path) -> RunStatus | None:
    """Return the status of a run, or None if there is no readable one. The state is `killed` if its process is gone."""
    path = run / STATUS
    try:
        status = read_json(path, RunStatus)
    except (OSError, ValueError):
        return None
    # Nothing is known of a process on another machine that shares the disk.
    here = status.host == platform.node()
    if status.state == "running" and here and not is_running(status.process, status.process_start):
        return replace(status, state="killed", reason="its process ended without a message")
    return status


def is_running(process: int, start: str | None) -> bool:
    """Return True if the process exists and is not a later one with the same number."""
    return exists(process) and start in (None, process_start(process))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
