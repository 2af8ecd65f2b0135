"""Real processes that start in a moment: forked from one that has imported everything, and computes on one thread.

Forking the test process itself would copy the threads that it computes with, and its locks.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PATIENCE_S = 600
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Call a function of a module in a process of its own, which the caller joins."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.forked"])
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    process = context.Process(target=function, args=arguments)
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
    import pytest

    os.environ["BACKHAND_TEST_DEVICE"] = name
    file = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    known = "ignore:Module already imported so cannot be rewritten"
    tests = str(Path(__file__).parents[1] / "devices")
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", known, tests]))
