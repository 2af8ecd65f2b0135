"""How long OpenMP's threads wait: what is set, when it is cut short, and that libgomp does as its manual says."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from backhand.cli.command import Prepared
from backhand.cli.main import run_prepared
from backhand.nn import waiting
from backhand.nn.waiting import CALM_LOOKS, SPINS, UNWATCHED, WAITED_SHARE, Decision, briefly_beside_others, set_waiting

needs_counts = pytest.mark.skipif(waiting._time_waited() is None, reason="this system does not count waiting for cores")


def test_what_is_set(monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr(waiting, "_time_waited", lambda: 0.0)
    set_waiting(environment)
    assert environment == {"GOMP_SPINCOUNT": str(SPINS)}


def test_threads_that_cannot_be_watched_wait_briefly(monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr(waiting, "_time_waited", lambda: None)
    set_waiting(environment)
    assert environment == {"GOMP_SPINCOUNT": str(UNWATCHED)}


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_the_environment_says_stays(given, monkeypatch):
    environment = dict(given)
    set_waiting(environment)
    assert environment == given
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with briefly_beside_others():
        assert "waiting" not in [thread.name for thread in threading.enumerate()]


@needs_counts
def test_ours_is_watched_until_the_end(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", str(SPINS))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with briefly_beside_others():
        assert "waiting" in [thread.name for thread in threading.enumerate()]
    assert "waiting" not in [thread.name for thread in threading.enumerate()]


@needs_counts
def test_a_command_is_watched_while_it_runs(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    set_waiting()
    seen: list[str] = []
    run_prepared(Prepared(lambda: seen.extend(t.name for t in threading.enumerate()), None, lambda _: None))
    assert "waiting" in seen
    del os.environ["GOMP_SPINCOUNT"]  # what this test has not set, monkeypatch would put back


class Recorded:
    """What was asked for last."""

    held = False

    def hold(self) -> None:
        self.held = True

    def let_go(self) -> None:
        self.held = False


def test_others_count_at_once_and_calm_only_after_a_while():
    more = Recorded()
    decide = Decision(more)
    decide(WAITED_SHARE / 2)
    assert not more.held
    decide(WAITED_SHARE * 2)
    assert more.held
    for _ in range(CALM_LOOKS - 1):
        decide(0.0)
    decide(WAITED_SHARE * 2)
    for _ in range(CALM_LOOKS - 1):
        decide(0.0)
        assert more.held
    decide(0.0)
    assert not more.held


def test_the_time_waited_grows_where_threads_wait():
    """Two threads' worth of work for one core."""
    code = """
        import os, threading, time
        from backhand.nn.waiting import _time_waited
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        before = _time_waited()
        child = os.fork()
        end = time.monotonic() + 0.4
        while time.monotonic() < end: pass
        if child:
            print(None if before is None else _time_waited() - before)
    """
    answer = _in_a_process(code)
    if answer == "None":
        pytest.skip("this system does not count waiting for cores")
    assert float(answer) > 0.1


def test_a_system_that_does_not_count(monkeypatch):
    monkeypatch.setattr(waiting.Path, "read_text", lambda *_, **__: "0 0 0\n")
    assert waiting._time_waited() is None
    monkeypatch.setattr(waiting.os, "scandir", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    assert waiting._time_waited() is None


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs two cores of Linux")
def test_more_threads_than_cores_do_not_spin():
    """Threads told to spin for ever: after a region they take a core, and while more are held they take none."""
    code = """
        import ctypes, os, time
        from pathlib import Path
        import torch
        from backhand.nn.waiting import MoreThreads, _libgomp
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
        more = MoreThreads()
        first, count = spins(), threads()
        more.hold()
        more.hold()
        held, count_held = sleeps(), threads()
        more.let_go()
        more.let_go()
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

    monkeypatch.setattr(waiting, "_libgomp", lambda _: OpenMP())
    monkeypatch.setattr(waiting.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    more = waiting.MoreThreads()
    more.hold()
    more.let_go()
    assert [team > 8 for team in teams] == [True]  # one of torch's threads holds all of the team but itself


def test_nothing_is_held_where_there_is_no_libgomp(monkeypatch):
    monkeypatch.setattr(waiting, "_libgomp", lambda _: None)
    before = threading.active_count()
    more = waiting.MoreThreads()
    more.hold()
    assert threading.active_count() == before
    more.let_go()


def _in_a_process(code: str, **environment: str) -> str:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()
