"""The tests of other devices, on one that is none: `tests/support/pretend_card.py`.

In a process of its own: torch knows a further backend from then on, and other packages would ask it for its memory.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import device_tests, run


def test_everything_runs_where_its_tensors_are(tmp_path: Path) -> None:
    code = run(device_tests, "pretend", tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert code == 0, said[-6000:]
    assert " passed" in said and "skipped" not in said
