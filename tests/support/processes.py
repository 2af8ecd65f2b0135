"""Real processes that start in a moment: forked from one that has imported everything, and computes on one thread.

That one is forked from the test process before its first test. To fork each from the test process itself would copy the
threads that it computes with, and its locks.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

_PATIENCE_S = 600
_SPAWNED = util.spawnv_passfds


def fork_the_server(config: pytest.Config) -> None:
    """Fork this process, which has imported all that the tests need and has started no threads, into the server.

    Multiprocessing would start it as a program of its own, which takes five seconds to import the same once more.
    """
    runs_none = config.option.collectonly or config.pluginmanager.hasplugin("dsession")  # xdist's workers do
    if runs_none or not hasattr(os, "fork"):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture:  # what its processes say is shown with the test that they belong to
        capture.resume_global_capture()
    try:
        resource_tracker.ensure_running()
        forkserver._forkserver.__init__()  # that of the process from which this one was forked is not its own
        with mock.patch.object(util, "spawnv_passfds", _forked):
            forkserver.ensure_running()
    finally:
        if capture:
            capture.suspend_global_capture(in_=False)


def _forked(executable: str, arguments: list[str], passed: list[int]) -> int:
    """As `util.spawnv_passfds`, without a new program: its process, which does what `python -c` was to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: xdist has a thread that reads
        process = os.fork()
    if process:
        return process
    try:
        # Nothing that the test process has open is kept, but its streams: who has the other end waits for its end.
        for last, following in pairwise([2, *sorted(passed), 1 << 20]):
            os.closerange(last + 1, following)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115 - open until the end
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        # Pytest's own would keep to themselves what a thread or a destructor raises, and make errors of warnings.
        threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        faulthandler.disable()
        os.environ["OMP_NUM_THREADS"] = "1"
        importlib.import_module("tests.support.forked")
        forkserver._forkserver.__init__()  # its lock is held here
        util.spawnv_passfds = _SPAWNED
        exec(arguments[arguments.index("-c") + 1], {})
    except Exception:  # noqa: BLE001 - nobody else would tell of it
        traceback.print_exc()
    finally:
        os._exit(1)


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call a function of a module in a process of its own, which the caller joins."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a process of its own; its exit code, negative for a signal."""
    process = start(function, *arguments)
    process.join(_PATIENCE_S)
    if process.exitcode is None:  # it hangs, and would keep this process from ending
        process.kill()
        process.join()
        raise AssertionError(f"{function.__name__} hangs")
    return process.exitcode


def forked_well() -> None:
    """For a process of its own: end with 0 where its parent has imported all, and hides nothing.

    Where forking it fails, multiprocessing starts a plain one without a word.
    """
    all_there = "tests.support.forked" in sys.modules and gc.isenabled() and gc.get_freeze_count() > 1_000
    plain = threading.excepthook is threading.__excepthook__ and sys.unraisablehook is sys.__unraisablehook__
    sys.exit(not (all_there and plain))


def device_tests(name: str, said: Path) -> None:
    """For a process of its own: the tests of devices with this one; what they print goes to a file."""
    os.environ["BACKHAND_TEST_DEVICE"] = name
    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    known = "ignore:Module already imported so cannot be rewritten"
    tests = str(Path(__file__).parents[1] / "devices")
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", known, tests]))
