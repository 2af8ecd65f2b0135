"""status.json: the state of a run and its process, from which a killed run is recognised.

A killed process leaves the state `running`. Its number then belongs to no process, or to one that started later.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from backhand.data.raw_rows import any_in_memory
from backhand.errors import BackhandError
from backhand.printing import reworded
from backhand.reading import read_json, read_plain, read_settings
from backhand.runs.checkpoint import newest_checkpoint
from backhand.runs.directory import ADAPTER, CHECKPOINTS, CONFIG, STATUS, SUMMARY, RunDirectory, run_of
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import read_summary
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


def state_of(run: Path, status: RunStatus | None) -> str:
    """Return the state of a run, also without a readable status: `finished`, or `preparing` without a summary."""
    return status.state if status is not None else "finished" if (run / SUMMARY).is_file() else "preparing"


def resume_command(run: str, *, in_memory: bool, prove_resume: int | None = None) -> str:
    """Return the command that continues a run, or the call in a program and for a run whose rows a program gave."""
    if in_memory:
        proof = "" if prove_resume is None else f", prove_resume={prove_resume}"
        return f"backhand.train(data=rows, output={run!r}, resume=True{proof})"
    proof = "" if prove_resume is None else f" --prove-resume {prove_resume}"
    options = f"--resume --output {shlex.quote(run)}{proof}"
    call = reworded(options)
    return f"backhand train {options}" if call == options else f"backhand.train({call})"


@dataclass(frozen=True)
class Unfinished:
    """An adapter of a run that has not taken all its steps."""

    run: str  # the run directory, as the adapter's path names it
    status: RunStatus
    step: int | None  # the step whose adapter it is; None if no checkpoint has the same adapter
    in_memory: bool  # a program gave the rows of the run

    @property
    def fact(self) -> str:
        """A clause about the run and the adapter, without the name of the run."""
        state, total = self.status.state, self.status.total_steps
        adapter = "" if self.step is None else f", and this adapter is that of step {self.step}"
        if state in ("running", "killed"):
            ended = "has not ended yet" if state == "running" else "was killed"
            return f"{ended}{adapter} of {total}" if adapter else ended
        return f"{'failed' if state == 'failed' else 'stopped'} after step {self.status.step} of {total}{adapter}"

    @property
    def note(self) -> str:
        """A note for the user, with the command that continues the run."""
        said = f"{self.run} {self.fact}"
        if self.status.state == "running":
            return said
        return f"{said}; continue with {resume_command(self.run, in_memory=self.in_memory)}"


def unfinished(adapter: Path | str | None) -> Unfinished | None:
    """Return the state of the run that an adapter belongs to, or None if it has ended or there is none.

    Args:
        adapter: a run, its `adapter/`, or one of its checkpoints. Any other directory is no adapter of a run.
    """
    given = None if adapter is None else Path(adapter)
    run = run_of(given)
    status = None if run is None else read_status(run)
    if given is None or run is None or status is None or status.state == "finished":
        return None
    place = given.resolve()
    place = run / ADAPTER if place == run else place
    newest, summary = newest_checkpoint(run), read_summary(run / SUMMARY)
    if place != run / ADAPTER and place.parent != run / CHECKPOINTS:
        return None
    if newest is not None and summary is not None and newest.name == f"step-{summary.steps}":
        return None  # the last step is done, and only a proof or the answers for the report are missing
    named = next((one for one in (given, *given.parents) if one.name and one.resolve() == run), run)
    return Unfinished(str(named), status, _step_of(place, run), _has_rows_in_memory(run))


def _step_of(adapter: Path, run: Path) -> int | None:
    """Return the newest step whose checkpoint has the same record, which contains the digest of the tensors."""
    from backhand.adapters.contents import RECORD_FILE

    steps = []
    with suppress(OSError):
        record = read_plain(adapter / RECORD_FILE)
        for checkpoint in (run / CHECKPOINTS).glob("step-*"):
            _, _, step = checkpoint.name.partition("-")
            if step.isdecimal() and read_plain(checkpoint / RECORD_FILE) == record:
                steps.append(int(step))
    return max(steps, default=None)


def _has_rows_in_memory(run: Path) -> bool:
    """Return True if a program gave the rows of a run, by its config.toml."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        data = tomllib.loads(read_settings(run / CONFIG))["data"]
        return any_in_memory(map(str, (*data["data"], *data.get("eval_data", ()))))
    return False


def is_running(process: int, start: str | None) -> bool:
    """Return True if the process exists and is not a later one with the same number."""
    return exists(process) and start in (None, process_start(process))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
