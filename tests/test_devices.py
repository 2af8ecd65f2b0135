"""The tests of other devices, on one that is none: `tests/support/pretend_card.py`.

In a process of its own: torch knows a further backend from then on, and other packages would ask it for its memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_everything_runs_where_its_tensors_are() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / "devices")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "BACKHAND_TEST_DEVICE": "pretend"},
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
