"""status.json: whether a run goes on, is over, or was stopped; with the process, so that a killed run can be told.

A process that is killed leaves `running` behind, and its number belongs to nobody, or to a process that began later.
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
from backhand.reading import read_json
from backhand.runs.directory import STATUS, RunDirectory
from backhand.runs.interruption import Interrupted
from backhand.system import begun_s, exists

State = Literal["running", "finished", "interrupted", "failed", "killed"]


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    state: State  # `killed` is never written: it is what `read_status` makes of `running` without its process
    total_steps: int
    step: int  # optimizer steps done when the state was written
    # process, host: number of the process that trains, and the name of its machine
    process: int
    host: str
    # began, changed: times, ISO 8601 in UTC
    began: str
    changed: str
    reason: str = ""  # why it did not finish; empty where it did


@contextmanager
def status_kept(directory: RunDirectory, total_steps: int, step: Callable[[], int]) -> Iterator[None]:
    """Inside, the run is `running`; afterwards `finished`, `interrupted` or `failed`.

    Raises:
        ResourceError: status.json cannot be written at the beginning or after a good end.
    """
    began = _now()
    status = RunStatus("running", total_steps, step(), os.getpid(), platform.node(), began, began)

    def write(state: State, reason: str = "") -> None:
        changed = replace(status, state=state, step=step(), changed=_now(), reason=reason)
        directory.write(STATUS, json.dumps(asdict(changed), indent=2, ensure_ascii=True) + "\n")

    write("running")
    try:
        yield
    except BaseException as error:
        # What went wrong matters more than that it cannot be written down.
        with suppress(BackhandError, OSError):
            reason = str(error) or type(error).__name__
            if by_signal(error):
                reason = "stopped at once by a signal; what came after the last checkpoint is lost"
            stopped = isinstance(error, Interrupted) or by_signal(error)
            write("interrupted" if stopped else "failed", reason)
        raise
    write("finished")


def by_signal(error: BaseException) -> bool:
    """Whether a signal ended the run at once, a second one as a rule, see `Interruption`."""
    code = error.code if isinstance(error, SystemExit) else None
    return isinstance(error, KeyboardInterrupt) or (isinstance(code, int) and code > 128)


def read_status(run: Path) -> RunStatus | None:
    """The status of a run, `killed` where its process is gone; None where there is none to read."""
    path = run / STATUS
    try:
        status = read_json(path, RunStatus)
        written_s = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    # Of a process on another machine that shares the disk nothing can be told.
    here = status.host == platform.node()
    if status.state == "running" and here and not _lives(status.process, written_s):
        return replace(status, state="killed", reason="its process ended without a word")
    return status


def _lives(process: int, since_s: float) -> bool:
    """Whether a process of this number exists that had begun by then."""
    return exists(process) and ((began_s := begun_s(process)) is None or began_s <= since_s + 1.0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
