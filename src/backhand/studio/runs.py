"""Runs as the page lists and shows them. Everything is read from run directories and from the files of the queue."""

from __future__ import annotations

import hashlib
import math
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError, UsageError
from backhand.json_shape import parse
from backhand.printing import duration
from backhand.report.page import live_values, result_sentence
from backhand.report.run_record import read_run
from backhand.runs.checkpoint import newest_checkpoint
from backhand.runs.directory import (
    ADAPTER,
    ANSWERS,
    CHECKPOINTS,
    CONFIG,
    FACTS,
    METRICS,
    PROOFS,
    REPORT,
    STATUS,
    SUMMARY,
)
from backhand.runs.status import RunStatus, is_running, read_status, state_of
from backhand.studio.draft import offered
from backhand.studio.queue import Job, read_job, waiting
from backhand.studio.workspace import Workspace, is_possible
from backhand.system import terminate

_SHOWN = (CONFIG, METRICS, PROOFS, ANSWERS, FACTS, SUMMARY, STATUS, ADAPTER, REPORT, f"{CHECKPOINTS}/latest")
LIVE_SECTIONS = ("answers", "curves", "proofs", "data", "repeat")
_LOG_BYTES = 20_000
_METRICS_BYTES = 400_000
"""Bytes at the end of metrics.jsonl that contain the last steps and the values per row of an evaluation."""
_RECENT_STEPS = 20
MAX_NEW_TOKENS = 128
"""Limit of an answer on the page."""

STATES = {
    "waiting": "waits in the queue",
    "starting": "is being prepared",
    "running": "trains",
    "finished": "finished",
    "interrupted": "stopped, and can be continued",
    "failed": "ended with an error",
    "killed": "was killed, and can be continued",
    "preparing": "is being prepared, or its process has ended",
    "not started": "could not start",
    "cancelled": "was cancelled before it started",
}


@dataclass(frozen=True)
class Progress:
    """Steps of a run, and the predicted time of all that remains."""

    step: int
    total: int
    left: str  # "" if it is not known; of the other steps alone, without evaluations, if the run has no log here
    of_steps: bool = True  # the time left is that of the other steps alone


@dataclass(frozen=True)
class ListedRun:
    """A run in the list."""

    name: str
    path: Path
    state: str  # a key of `STATES`
    reason: str = ""
    began: str = ""
    ended: str = ""  # time of its end; "" before
    progress: Progress | None = None  # None before the first step
    job: Job | None = None  # its last start, None if it was started elsewhere

    @property
    def state_words(self) -> str:
        """The state in words."""
        return STATES[self.state]

    @property
    def at_work(self) -> bool:
        """True if a process prepares or trains the run, so that its files may change."""
        return self.state in ("starting", "running")

    @property
    def has_started(self) -> bool:
        """False if the run waits or is being prepared: only an earlier start has a result, which may be replaced."""
        return self.state not in ("waiting", "starting")

    @property
    def can_continue(self) -> bool:
        """True if `train --resume` can continue the run."""
        may = self.state in ("interrupted", "failed", "killed", "preparing")
        return may and newest_checkpoint(self.path) is not None

    @property
    def start_failed(self) -> bool:
        """True if the last start ended with an error, and before it wrote the run's status."""
        ended = self.job is not None and self.job.exit_code not in (None, 0)
        status = read_status(self.path) if ended else None
        return status is not None and self.job is not None and _prepared_by_other(self.job, status)

    @property
    def can_restart(self) -> bool:
        """True if the run ended without a checkpoint, and the command that started it is known."""
        without_start = ("not started", "cancelled", "interrupted", "failed", "killed")
        ended = self.state in without_start and not self.can_continue
        return ended and self.job is not None and "--resume" not in self.job.words


def listed_run(path: Path, job: Job | None = None, *, waits: bool = False, log: str = "") -> ListedRun:
    """Return a run as it is now.

    Args:
        path: the run directory, which may not exist yet.
        job: the last start from the page, if any.
        waits: True if the run waits in the queue.
        log: the last lines of that start's output.
    """
    status = read_status(path)
    state, reason = "starting", ""
    if waits:
        state = "waiting"
    elif status is not None and (status.state == "running" or not _prepares(job, status)):
        state, reason = status.state, status.reason
    elif job is not None and not job.running:
        state = "cancelled" if job.cancelled else "not started"
    elif job is None:
        state = state_of(path, status)
    began = status.began if status is not None else ""
    ended = status.changed if status is not None and state == status.state != "running" else ""
    return ListedRun(path.name, path, state, reason, began, ended, _progress(path, status, log), job)


def _prepares(job: Job | None, status: RunStatus) -> bool:
    """Return True if the process of a start has not written the status yet, which an earlier start left."""
    return job is not None and job.running and _prepared_by_other(job, status)


def _prepared_by_other(job: Job, status: RunStatus) -> bool:
    """Return True if the status was written by another process than that of a start."""
    if status.process == job.process:
        return False
    # With several processes, the one that was started launches the one that writes.
    return job.process_start is None or job.process_start != status.launcher_start


def all_runs(workspace: Workspace) -> list[ListedRun]:
    """Return all runs: those at work, then those that wait in their order, then all others, the newest first."""
    queue = waiting(workspace)
    names = {path.name for path in workspace.runs.iterdir() if path.is_dir() and not path.is_symlink()}
    names |= {path.stem for path in workspace.jobs.glob("*.json")} | queue.keys()
    runs = [run_of(workspace, name, queue) for name in names if is_possible(name)]
    order = {name: place for place, name in enumerate(queue)}
    runs.sort(key=lambda run: (run.began, run.name), reverse=True)
    runs.sort(key=lambda run: -2 if run.at_work else order.get(run.name, 0) - len(order) if run.name in order else 0)
    return runs


def run_of(workspace: Workspace, name: str, queue: Mapping[str, Job] | None = None) -> ListedRun:
    """Return the run of this name.

    Raises:
        UsageError: there is none.
    """
    queue = waiting(workspace) if queue is None else queue
    path, job = workspace.run(name), queue.get(name) or read_job(workspace, name)
    if job is None and not path.is_dir():
        raise UsageError(f"there is no run {name}", next_step="choose one in the list of runs")
    log = log_of(workspace.log_file(name)) if job is not None and job.running else ""
    return listed_run(path, job, waits=name in queue, log=log)


def stop(run: ListedRun) -> None:
    """Ask a run to save and stop.

    Raises:
        UsageError: it does not train, or not on this machine.
    """
    status = read_status(run.path)
    if status is not None and status.state == "running":
        if status.host != platform.node():
            raise UsageError(f"the run {run.name} trains on {status.host}", next_step="stop it on that machine")
        process, start = status.process, status.process_start
    elif run.job is not None and run.job.process is not None and run.job.exit_code is None:
        process, start = run.job.process, run.job.process_start
    else:
        raise UsageError(f"the run {run.name} does not train", next_step="reload the page")
    if not is_running(process, start):
        raise UsageError(f"the run {run.name} has ended", next_step="reload the page")
    terminate(process)


def version_of(run: ListedRun, log: Path | None) -> str:
    """Return a text that changes with every file of the run's page, and with its state."""
    parts = [run.name, run.state]
    for path in (*(run.path / name for name in _SHOWN), *([] if log is None else [log])):
        try:
            status = path.stat()
            parts.append(f"{status.st_mtime_ns} {status.st_size} {status.st_ino}")
        except OSError:
            parts.append("-")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=1024)
def result_of(path: Path, _version: str) -> str:
    """Return the result of a run in one sentence, "" if it is not known.

    The second argument is the result of `version_of`: a run is read again only if it has changed.
    """
    try:
        return result_sentence(read_run(path))
    except BackhandError:
        return ""


def page_of(run: ListedRun) -> dict[str, Any] | None:
    """Return the values of the run's page, or None before its configuration is written."""
    try:
        record = read_run(run.path)
    except UsageError:
        return None
    except BackhandError as error:
        return {"unreadable": str(error)}
    values = live_values(record, with_commands=False)
    return values | {
        "sections": [(name, label) for name, label in values["sections"] if name in LIVE_SECTIONS],
        "has_report": (run.path / REPORT).is_file(),
        "has_adapter": (run.path / ADAPTER).is_dir() or newest_checkpoint(run.path) is not None,
    }


def adapter_of(run: ListedRun) -> Path:
    """Return the adapter of a run: the published one, or that of the newest checkpoint.

    Raises:
        UsageError: there is none yet.
    """
    if (run.path / ADAPTER).is_dir():
        return run.path / ADAPTER
    if (newest := newest_checkpoint(run.path)) is not None:
        return newest
    raise UsageError("there is no checkpoint yet", next_step="wait for the first one")


def asking_words(run: ListedRun, prompt: str) -> list[str]:
    """Return the words of the command that answers a prompt with the base model and with the adapter.

    An adapter of vectors computes vectors of texts, which the page compares.

    Raises:
        UsageError: there is no checkpoint yet.
        ArtifactError: the configuration cannot be read.
    """
    record, adapter = read_run(run.path), adapter_of(run)
    model, data = record.config.get("model", {}).get("model", "smollm2-135m"), record.config.get("data", {})
    words = [f"--model={model}", f"--adapter={adapter}"]
    if run.at_work:
        words.append("--threads=1")  # training uses the others
    if isinstance(template := data.get("chat_template"), str):
        words.append(f"--chat-template={template}")
    if (asked := offered(record.objective).asking(words, prompt)) is not None:
        return asked
    if isinstance(system := record.rows.get("system"), str):
        words.append(f"--system={system}")
    labels = ["--labels=auto"] if record.summary.get("labels") else []
    return [
        "generate",
        *words,
        *labels,
        "--compare",
        "--greedy",
        f"--max-new-tokens={MAX_NEW_TOKENS}",
        f"--prompt={prompt}",
    ]


def usual_error(run: ListedRun) -> tuple[float, float, int] | None:
    """Return the root of the mean squared error of numbers, that of their mean, and the number of held-out rows.

    None unless the run learned numbers, has ended, and had held-out rows.
    """
    summary = read_run(run.path).summary
    adapted, constant = summary.get("adapted_classes") or {}, summary.get("base_classes") or {}
    if "mse" not in adapted or "mse" not in constant:
        return None
    return math.sqrt(adapted["mse"]), math.sqrt(constant["mse"]), adapted["rows"]


def activity_of(log: str) -> str:
    """Return what a command has been doing since its last line, with the time, "" if it has said nothing about it."""
    return (log.splitlines() or [""])[-1].partition("still at work after ")[2]


def error_of(log: str) -> str:
    """Return the error at the end of a command's output, "" if there is none."""
    start = log.rfind("error: ")
    return log[start:].strip() if start >= 0 else ""


def log_of(path: Path, most: int = _LOG_BYTES) -> str:
    """Return the last `most` bytes of a run's output."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def _progress(path: Path, status: RunStatus | None, log: str) -> Progress | None:
    if status is None or status.total_steps <= 0:
        return None
    steps = _last_steps(path / METRICS)
    if status.state != "running" or not steps:
        return Progress(status.step, status.total_steps, "")
    (first, first_s), (last, last_s) = steps[0], steps[-1]
    if times := _STEP_LINE.findall(log):
        return Progress(last, status.total_steps, times[-1], of_steps=False)
    per_step = (last_s - first_s) / (last - first) if last > first else last_s / max(1, last)
    left = status.total_steps - last
    return Progress(last, status.total_steps, duration(left * per_step) if left else "")


_STEP_LINE = re.compile(r"^step \d.*  (\S.*) left$", re.MULTILINE)
"""A line that `train` prints at least once a minute, with the time left to the end of the run."""


def _last_steps(path: Path) -> list[tuple[int, float]]:
    """Return (step, seconds of training) of the last steps in metrics.jsonl."""
    steps = []
    for line in log_of(path, _METRICS_BYTES).split("\n")[-3 * _RECENT_STEPS :]:
        with suppress(ValueError, KeyError, TypeError):
            values = parse(line)
            steps.append((int(values["step"]), float(values["time_s"])))
    return steps[-_RECENT_STEPS:]
