"""What is made once for all test processes of a session: whichever is first makes it, the others wait for it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory of this name, which `make` has filled; nothing in it may be changed."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    place.parent.mkdir(exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            fresh = place.with_suffix(f".{os.getpid()}")
            fresh.mkdir()
            try:
                make(fresh)
            except BaseException:
                shutil.rmtree(fresh)
                raise
            fresh.rename(place)
    return place
