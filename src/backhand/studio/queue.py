"""The queue of runs: one file for each run that waits, and a process that starts them one after another.

The process, `python -m backhand.studio.queue DIRECTORY`, survives the server, and every run survives this process. Both
hold the lock of the queue: if the process is killed, its successor waits for the run.

    queue/N-NAME.json    the command of a run that waits
    queue/.lock          held while a run of the queue trains
    queue/.next          held by the one process that waits for `.lock`
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from backhand.errors import UsageError
from backhand.files import FileLayer, replace_file
from backhand.reading import read_json, read_settings
from backhand.runs.directory import CONFIG
from backhand.runs.status import is_running
from backhand.safe_path import python_words, safe_environment
from backhand.studio.workspace import Workspace
from backhand.system import PLAIN, lock, process_start, start_detached


@dataclass(frozen=True)
class Job:
    """The last start of a run, or a start that waits."""

    words: list[str]  # the words after `backhand`
    form: str = ""  # the form that described the run, as the query of an address; "" if there was none
    process: int | None = None  # None until it is started
    process_start: str | None = None  # see `runs.status.is_running`
    exit_code: int | None = None  # None until it has ended
    cancelled: bool = False  # True if it was cancelled while it waited

    @property
    def running(self) -> bool:
        """True if the process has started and not ended."""
        return self.exit_code is None and self.process is not None and is_running(self.process, self.process_start)


def waiting(workspace: Workspace) -> dict[str, Job]:
    """Return the runs that wait, in their order, with their commands."""
    jobs = {}
    for name, path in workspace.queued().items():
        job = _read(path)
        if job is not None:
            jobs[name] = job
    return jobs


def enqueue(workspace: Workspace, name: str, words: list[str], form: str = "") -> None:
    """Add a run to the queue, and start the process if there is none.

    Raises:
        UsageError: a run of this name waits or trains.
        OSError: the file cannot be written.
    """
    last = read_job(workspace, name)
    if name in waiting(workspace) or (last is not None and last.running):
        raise UsageError(f"the run {name} waits or trains already", next_step="wait for it, or cancel it")
    numbers = [int(path.name.partition("-")[0]) for path in workspace.queue.glob("*.json")]
    _write(workspace.queue / f"{max(numbers, default=0) + 1:06}-{name}.json", Job(words, form))
    start_worker(workspace)


def cancel(workspace: Workspace, name: str) -> bool:
    """Remove a run from the queue; return False if it does not wait.

    A run that never started stays as a cancelled one. Any other run has the state of its last start again.
    """
    if (path := workspace.queued().get(name)) is None:
        return False
    job = _read(path)
    with suppress(FileNotFoundError):  # it has just been started
        if job is None or read_job(workspace, name) is not None or workspace.run(name).exists():
            path.unlink()
        else:
            path.rename(workspace.job_file(name))
            _write(workspace.job_file(name), replace(job, cancelled=True))
        return True
    return False


def rename(workspace: Workspace, old: str, new: str) -> None:
    """Rename a run that does not wait, and its directory in the command that started it.

    Raises:
        UsageError: the new name is taken or not possible.
    """
    workspace.rename(old, new)
    if (job := read_job(workspace, new)) is not None:
        _write(workspace.job_file(new), replace(job, words=with_output(job.words, workspace.run(new))))


def with_output(words: list[str], output: Path) -> list[str]:
    """Return the words of a command with another run directory."""
    return [*(word for word in words if not word.startswith("--output=")), f"--output={output}"]


def deleted_rows(workspace: Workspace, name: str, words: list[str]) -> list[Path]:
    """Return the uploads that a start of this run would read and that were deleted.

    Args:
        words: the words of the start.
    """
    pattern = re.compile(re.escape(str(workspace.rows)) + r"/rows-\d+[\w.]*\w")
    named = {Path(path) for text in _texts(workspace, name, Job(words)) for path in pattern.findall(text)}
    return sorted(path for path in named if not path.exists())


def users_of(workspace: Workspace, rows: Path) -> list[str]:
    """Return the runs that wait or train, and whose command or configuration names these rows."""
    jobs = waiting(workspace)
    for path in workspace.jobs.glob("*.json"):
        if (job := _read(path)) is not None and job.running:
            jobs[path.stem] = job
    return [run for run, job in jobs.items() if refers_to(workspace, run, rows, job)]


def refers_to(workspace: Workspace, run: str, rows: Path, job: Job | None = None) -> bool:
    """Return True if a run's configuration, or the command that starts it, names these rows."""
    return any(rows.name in text for text in _texts(workspace, run, job or Job([])))


def _texts(workspace: Workspace, name: str, job: Job) -> Iterator[str]:
    yield from (*job.words, job.form)
    # A continued run reads its own configuration, and a changed run that of another one.
    for path in (workspace.runs / name / CONFIG, *map(Path, job.words)):
        if path.name == CONFIG:
            with suppress(OSError):
                yield read_settings(path)


def read_job(workspace: Workspace, name: str) -> Job | None:
    """Return the last start of a run, or None."""
    return _read(workspace.job_file(name))


def start_worker(workspace: Workspace) -> None:
    """Start the process of the queue if a run waits. If there is a process already, the new one ends at once."""
    if not waiting(workspace):
        return
    words = python_words("backhand.studio.queue", str(workspace.root))
    process = start_detached(words, workspace.root, safe_environment())
    # Without a wait, it would stay in the system's list of processes after its end.
    threading.Thread(target=process.wait, daemon=True).start()


def work(workspace: Workspace) -> None:
    """Start the runs of the queue one after another, until none waits."""
    successor = _open(workspace.queue / ".next")
    if not lock(successor):
        return  # another process waits, which has not read the queue yet
    turn = _open(workspace.queue / ".lock")
    lock(turn, wait=True)
    os.close(successor)
    while queued := workspace.queued():
        name, path = next(iter(queued.items()))
        job = _read(path)
        with suppress(FileNotFoundError):  # it has just been cancelled
            path.rename(workspace.job_file(name))
            if job is not None:
                _run(workspace, name, job, turn)


def _run(workspace: Workspace, name: str, job: Job, turn: int) -> None:
    with workspace.log_file(name).open("wb") as log:
        command = python_words("backhand", *job.words)
        process = start_detached(command, workspace.root, safe_environment(), output=log.fileno(), inherited=(turn,))
    job = replace(job, process=process.pid, process_start=process_start(process.pid))
    _write(workspace.job_file(name), job)
    code = process.wait()
    if (now := read_job(workspace, name)) is not None and now.process == job.process:
        _write(workspace.job_file(name), replace(job, exit_code=code))


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | PLAIN, 0o600)


def _read(path: Path) -> Job | None:
    try:
        return read_json(path, Job)
    except (OSError, ValueError):
        return None


def _write(path: Path, job: Job) -> None:
    replace_file(FileLayer(), path, json.dumps(asdict(job)).encode())


if __name__ == "__main__":
    work(Workspace(Path(sys.argv[1])))
