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
import traceback
from collections.abc import Callable
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

_PATIENCE_S = 600


def fork_the_server(config: pytest.Config) -> None:
    """Fork this process, which has imported all that the tests need and has computed nothing, into the server.

    Multiprocessing would start it as a program of its own, which takes five seconds to import the same once more.
    """
    if not hasattr(os, "fork"):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.resume_global_capture()  # what its processes say is shown with the test that they belong to
    try:
        resource_tracker.ensure_running()
        with mock.patch.object(util, "spawnv_passfds", _forked):
            forkserver.ensure_running()
    finally:
        capture.suspend_global_capture(in_=False)


def _forked(executable: str, arguments: list[str], passed: list[int]) -> int:
    """As `util.spawnv_passfds`, without a new program: its process, which does what `python -c` was to do."""
    process = os.fork()
    if process:
        return process
    try:
        faulthandler.disable()
        # Nothing of the test process's is held open: who has its other end waits for it to be closed.
        for last, following in pairwise([2, *sorted(passed), 1 << 20]):
            os.closerange(last + 1, following)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115 - open until the end
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        importlib.import_module("support.forked")
        forkserver._forkserver.__init__()  # its lock is held here
        exec(arguments[-1], {})
    except Exception:  # noqa: BLE001 - nobody else would tell of it
        traceback.print_exc()
    finally:
        os._exit(0)


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
    """For a process of its own: end with 0 where its parent has imported all, since forkserver says nothing if not."""
    sys.exit(not ("support.forked" in sys.modules and gc.isenabled() and gc.get_freeze_count() > 1_000))


def device_tests(name: str, said: Path) -> None:
    """For a process of its own: the tests of devices with this one; what they print goes to a file."""
    os.environ["BACKHAND_TEST_DEVICE"] = name
    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    known = "ignore:Module already imported so cannot be rewritten"
    tests = str(Path(__file__).parents[1] / "devices")
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", known, tests]))
