"""The child in which `make fuzz` runs commands: every fault that it is to see, it sees, and blames on nobody else."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz import child
from tests.fuzz.child import Attempt, Outcome, run_attempts
from tests.support.processes import start


def _turn() -> int:
    while True:
        pass


def _fill() -> int:
    # Pages of its own: what the heap has left over is in use already when the child begins.
    room = mmap.mmap(-1, child.PEAK_BYTES + 2**26)
    for page in range(0, len(room), 4096):
        room[page] = 1
    return 0


def _touch() -> int:
    Path("there").write_text("another")
    return 0


def _write() -> int:
    Path("out").write_text("mine")
    return 0


def _raise() -> int:
    raise ValueError


def _kill() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


FAULTS: list[tuple[Callable[[], int], str]] = [
    (lambda: 0, ""),
    (_turn, "hang"),
    (lambda: 1, "exit 1"),
    (_fill, "memory"),
    (_touch, "touched there"),
    (_write, ""),
    (_kill, "signal 9"),
    (lambda: 4, ""),
    (_raise, "exit 1"),
    (lambda: os._exit(5), "exit 5"),
    (lambda: 0, ""),
]


def _laid(place: Path) -> Path:
    place.mkdir()
    (place / "there").write_text("one")
    return place


def test_every_fault_is_seen_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A page takes a busy virtual machine microseconds: what is too much must be there well within the limit of time.
    monkeypatch.setattr(child, "HANG_S", 2)
    monkeypatch.setattr(child, "PEAK_BYTES", 2**26)
    attempts = [Attempt(function, _laid(tmp_path / str(number))) for number, (function, _) in enumerate(FAULTS)]
    outcomes = run_attempts(attempts)
    assert [outcome.fault for outcome in outcomes] == [fault for _, fault in FAULTS]
    assert outcomes[1].code is None and outcomes[1].cpu_s >= 1
    assert "ValueError" in outcomes[8].said
    assert all(outcome.said == "" for outcome in outcomes if not outcome.fault)


def test_a_process_that_is_killed_ends_the_whole(tmp_path: Path) -> None:
    process = start(_with_shares_that_die, tmp_path)
    process.join(60)
    process.kill()
    assert process.exitcode == 3


def _with_shares_that_die(place: Path) -> None:
    names: dict[str, Any] = {"make_world": lambda _: None, "_warm_up": lambda *_: None, "_share": _die}
    with (
        mock.patch.multiple(program, **names),
        mock.patch("sys.argv", ["fuzz", "--keep", str(place), "--processes", "2"]),
    ):
        try:
            program.main()
        except BrokenProcessPool:
            sys.exit(3)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_command_line_is_run(tmp_path: Path) -> None:
    outcome: Outcome = run_attempts([Attempt(["lint", "--data", "absent.jsonl"], _laid(tmp_path / "case"))])[0]
    assert (outcome.code, outcome.fault) == (3, "") and "absent.jsonl" in outcome.said
