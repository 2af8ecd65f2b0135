"""The queue: one run at a time, cancelled while it waits, and kept whatever process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backhand.errors import UsageError
from backhand.studio import queue
from backhand.studio.runs import run_of
from backhand.studio.workspace import Workspace
from tests.support.studio_client import until

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def start(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start the queue's process as the page does, but as a child of the test."""
    monkeypatch.setattr(queue, "start_worker", lambda _: None)
    processes: list[subprocess.Popen[bytes]] = []

    def started() -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen([sys.executable, "-m", "backhand.studio.queue", str(space.root)]))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.wait()
    for name in ("one", "two"):
        job = queue.read_job(space, name)
        if job is not None and job.running and job.process is not None:
            os.kill(job.process, signal.SIGKILL)


def runs(space: Workspace, name: str) -> bool:
    job = queue.read_job(space, name)
    return job is not None and job.running


def code(space: Workspace, name: str) -> int | None:
    job = queue.read_job(space, name)
    return None if job is None else job.exit_code


def end(space: Workspace, name: str) -> None:
    job = queue.read_job(space, name)
    assert job is not None and job.process is not None
    os.kill(job.process, signal.SIGTERM)


# `watch` goes on until it is ended, and imports no model.


def test_runs_start_one_after_another_and_survive_the_process_that_started_them(
    space: Workspace, start: Start, finished: Path
) -> None:
    queue.enqueue(space, "one", ["watch", str(finished)])
    queue.enqueue(space, "two", ["--version"])
    first = start()
    until(lambda: runs(space, "one"))
    assert list(queue.waiting(space)) == ["two"]
    for name in ("one", "two"):
        with pytest.raises(UsageError, match=f"the run {name} waits or trains already"):
            queue.enqueue(space, name, ["--version"])
    first.kill()
    first.wait()
    second, third = start(), start()
    until(lambda: (second.poll() is None) != (third.poll() is None))  # one of them is enough
    assert runs(space, "one") and list(queue.waiting(space)) == ["two"]
    end(space, "one")
    until(lambda: code(space, "two") == 0)
    assert "0.1.0" in space.log_file("two").read_text() and not queue.waiting(space)
    assert [process.wait(60) for process in (second, third)] == [0, 0]


def test_a_run_that_waits_is_cancelled_and_the_others_keep_their_order(space: Workspace, start: Start) -> None:
    for name in ("a", "b", "c"):
        queue.enqueue(space, name, ["--version"])
    assert queue.cancel(space, "b") and not queue.cancel(space, "b")
    assert list(queue.waiting(space)) == ["a", "c"]
    assert start().wait(60) == 0
    assert [code(space, name) for name in ("a", "b", "c")] == [0, None, 0]
    assert run_of(space, "b").state == "cancelled" and run_of(space, "b").can_restart
    queue.enqueue(space, "b", ["--version"])
    assert run_of(space, "b").state == "waiting"


def test_the_code_and_the_message_of_a_run_that_cannot_start_are_kept(space: Workspace, start: Start) -> None:
    queue.enqueue(space, "one", ["train", "--rang=1", f"--output={space.run('one')}"])
    assert start().wait(60) == 0
    assert run_of(space, "one").can_restart and run_of(space, "one").state == "not started"
    assert code(space, "one") == 2 and "Did you mean --rank" in space.log_file("one").read_text()
    assert not space.run("one").exists()


def test_files_that_are_no_jobs_hold_up_nothing(space: Workspace, start: Start) -> None:
    (space.queue / "000001-broken.json").write_text("{")
    queue.enqueue(space, "one", ["--version"])
    assert start().wait(60) == 0
    assert code(space, "one") == 0 and queue.read_job(space, "broken") is None
