"""The spin count of OpenMP threads: its value, when it is reduced, and that libgomp behaves as its manual says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import backhand
from backhand.cli import openmp_spin
from backhand.cli.command import Prepared
from backhand.cli.main import run_prepared
from backhand.cli.openmp_spin import (
    CALM_INTERVALS,
    CONTENDED_SHARE,
    SPINS,
    UNWATCHED_SPINS,
    ContentionPolicy,
    adaptive_spinning,
    set_spin_count,
)

needs_counts = pytest.mark.skipif(
    openmp_spin._run_queue_wait_s() is None, reason="this system does not count waiting for cores"
)


def test_what_is_set(monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr(openmp_spin, "_run_queue_wait_s", lambda: 0.0)
    set_spin_count(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS)}


def test_threads_that_cannot_be_watched_wait_briefly(monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr(openmp_spin, "_run_queue_wait_s", lambda: None)
    set_spin_count(environment)
    assert environment == {"GOMP_SPINCOUNT": str(UNWATCHED_SPINS)}


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_the_environment_says_stays(given, monkeypatch):
    environment = dict(given)
    set_spin_count(environment)
    assert environment == given
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with adaptive_spinning():
        assert "OpenMP contention" not in [thread.name for thread in threading.enumerate()]


@needs_counts
def test_ours_is_watched_until_the_end(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", str(SPINS))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with adaptive_spinning():
        assert "OpenMP contention" in [thread.name for thread in threading.enumerate()]
    assert "OpenMP contention" not in [thread.name for thread in threading.enumerate()]


@needs_counts
def test_a_command_is_watched_while_it_runs(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    set_spin_count()
    seen: list[str] = []
    run_prepared(Prepared(lambda: seen.extend(t.name for t in threading.enumerate()), None, lambda _: None))
    assert "OpenMP contention" in seen
    del os.environ["GOMP_SPINCOUNT"]  # what this test has not set, monkeypatch would put back


@needs_counts
def test_a_function_of_the_package_is_watched_while_it_runs(monkeypatch, tmp_path):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    seen: list[str] = []

    class Row(dict):
        def items(self):
            seen.extend(thread.name for thread in threading.enumerate())
            return super().items()

    backhand.lint(data=[Row(prompt="a", completion="b")])
    assert "OpenMP contention" in seen
    assert "OpenMP contention" not in [thread.name for thread in threading.enumerate()]


class Recorded:
    """What was asked for last."""

    held = False

    def acquire(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False


def test_others_count_at_once_and_calm_only_after_a_while():
    more = Recorded()
    decide = ContentionPolicy(more)
    decide(CONTENDED_SHARE / 2)
    assert not more.held
    decide(CONTENDED_SHARE * 2)
    assert more.held
    for _ in range(CALM_INTERVALS - 1):
        decide(0.0)
    decide(CONTENDED_SHARE * 2)
    for _ in range(CALM_INTERVALS - 1):
        decide(0.0)
        assert more.held
    decide(0.0)
    assert not more.held


def test_the_time_waited_grows_where_threads_wait():
    """Two threads' worth of work for one core."""
    code = """
        import os, threading, time
        from backhand.cli.openmp_spin import _run_queue_wait_s
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        before = _run_queue_wait_s()
        child = os.fork()
        end = time.monotonic() + 0.4
        while time.monotonic() < end: pass
        if child:
            print(None if before is None else _run_queue_wait_s() - before)
    """
    answer = _in_a_process(code)
    if answer == "None":
        pytest.skip("this system does not count waiting for cores")
    assert float(answer) > 0.1


def test_a_system_that_does_not_count(monkeypatch):
    monkeypatch.setattr(openmp_spin.Path, "read_text", lambda *_, **__: "0 0 0\n")
    assert openmp_spin._run_queue_wait_s() is None
    monkeypatch.setattr(openmp_spin.os, "scandir", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    assert openmp_spin._run_queue_wait_s() is None


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores of Linux")
def test_more_threads_than_cores_do_not_spin():
    """Threads set to spin for ever: after a region they take a core, and while more are held they take none."""
    code = """
        import ctypes, os, time
        from pathlib import Path
        import torch
        from backhand.cli.openmp_spin import Oversubscription, _libgomp
        if _libgomp(torch) is None:
            print("none")
            raise SystemExit
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        x = torch.ones(1 << 20)
        def spent_asleep():
            x.add_(1)
            before = time.process_time()
            time.sleep(0.2)
            return time.process_time() - before
        def spins():  # more than once, since the machine may be busy
            return any(spent_asleep() > 0.05 for _ in range(20))
        def sleeps():
            return any(spent_asleep() < 0.02 for _ in range(20))
        def threads():
            return len(os.listdir("/proc/self/task"))
        more = Oversubscription()
        first, count = spins(), threads()
        more.acquire()
        more.acquire()
        held, count_held = sleeps(), threads()
        more.release()
        more.release()
        time.sleep(0.3)  # they end by themselves
        last, count_last = spins(), threads()
        print(first, held, last, count_held > count, count_last == count)
    """
    answer = _in_a_process(code, GOMP_SPINCOUNT="1000000000000")
    if answer == "none":
        pytest.skip("torch computes with another OpenMP here")
    assert answer == "True True True True True"


@pytest.mark.parametrize("torch_threads", [2, 5, 8])
def test_as_many_are_held_whatever_becomes_of_torch_s_threads_and_of_the_cores(torch_threads, monkeypatch):
    """Eight cores when libgomp was loaded: the count of its threads stays above, with one of torch's threads or two."""
    teams: list[int] = []

    class OpenMP:
        def GOMP_parallel(self, _function, _data, team, _flags):
            teams.append(team)

        def omp_get_num_procs(self):
            return 2  # as many as are allowed by now

    monkeypatch.setattr(openmp_spin, "_libgomp", lambda _: OpenMP())
    monkeypatch.setattr(openmp_spin.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    more = openmp_spin.Oversubscription()
    more.acquire()
    more.release()
    assert [team > 8 for team in teams] == [True]  # one of torch's threads holds all of the team but itself


def test_nothing_is_held_where_there_is_no_libgomp(monkeypatch):
    monkeypatch.setattr(openmp_spin, "_libgomp", lambda _: None)
    before = threading.active_count()
    more = openmp_spin.Oversubscription()
    more.acquire()
    assert threading.active_count() == before
    more.release()


def _in_a_process(code: str, **environment: str) -> str:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()
