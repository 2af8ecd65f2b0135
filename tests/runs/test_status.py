"""What status.json says of a run that was ended from outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from backhand.runs.directory import opened
from backhand.runs.status import RunStatus, read_status, status_kept


def status_after(error: BaseException, place: Path) -> RunStatus:
    with (
        opened(place, resume=False, overwrite=False) as directory,
        pytest.raises(type(error)),
        status_kept(directory, 3, lambda: 1),
    ):
        raise error
    status = read_status(place)
    assert status is not None
    return status


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_second_signal_is_reported_in_a_sentence(error: BaseException, tmp_path: Path) -> None:
    status = status_after(error, tmp_path / "run")
    assert status.state == "interrupted"
    assert status.reason == "stopped at once by a signal; steps after the last checkpoint are lost"


def test_a_program_that_leaves_is_no_signal(tmp_path: Path) -> None:
    status = status_after(SystemExit("enough"), tmp_path / "run")
    assert (status.state, status.reason) == ("failed", "enough")
