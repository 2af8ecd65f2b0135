"""Whatever happens to one save of a run, the run is continued to the same bits."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from backhand.options.config import TrainConfig
from backhand.training.run import train
from tests.support.fault_table import documented
from tests.support.faulty_files import LosingFiles
from tests.support.faulty_runs import calls_of_save, distinct, leave_faulty_saves, observed_saves, temporary
from tests.support.processes import run
from tests.support.tiny_run import TinyRun, final_bits, with_options

STEP = 4
"""Of the save that goes wrong. It follows saves of steps 1 to 3, publishes a better adapter, and removes step 2."""


class Straight:
    """A run that nothing happens to, and the calls of its save of step 4.

    Args:
        tiny: the model and the rows.
        directory: where the run is made.
    """

    def __init__(self, tiny: TinyRun, directory: Path) -> None:
        self.config = tiny.config(directory / "straight", dropout=0.2, max_steps=5, save_every=1, eval_every=2, keep=2)
        self.calls = calls_of_save(self.config, directory / "straight", STEP)
        self.bits = final_bits(directory / "straight")

    def check_resumed(self, left: Path, place: Path) -> None:
        """The run in `left`, continued at `place`, ends in the same bits, and nothing temporary stays."""
        shutil.copytree(left, place)
        train(with_options(TrainConfig(), output=place, resume=True, quiet=True))
        assert final_bits(place) == self.bits
        assert not temporary(place)
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tiny, tmp_path_factory.mktemp("straight"))


def test_the_save_does_everything_that_a_save_may_do(straight: Straight, tiny: TinyRun, tmp_path: Path) -> None:
    seen: list[tuple[str, set[str]]] = []

    def look(what: str, step: int) -> None:
        if step == STEP:
            run_directory = tmp_path / "run"
            adapter = (run_directory / "adapter" / "adapter_model.safetensors").read_bytes()
            names = {path.name for path in (run_directory / "checkpoints").iterdir()}
            seen.append((str(hash(adapter)), names))

    with observed_saves(look):
        train(with_options(straight.config, output=tmp_path / "run"))
    (adapter_before, before), (adapter_after, after) = seen
    assert adapter_before != adapter_after
    assert "step-3" in before and "step-4" not in before
    assert "step-4" in after and before - after
    assert len(straight.calls) > 80


def faulty(config: TrainConfig, calls: range, error: int | None, directory: Path) -> list[Path]:
    """What a fault at each call leaves."""
    (directory / "left").mkdir()
    assert (
        run(leave_faulty_saves, with_options(config, output=directory / "run"), calls, error, directory / "left") == 0
    )
    left = sorted((directory / "left").iterdir(), key=lambda path: path.name)
    assert {path.name for path in left} == {str(number) for number in calls}
    return left


def test_killed_at_every_call_of_a_save(straight: Straight, tmp_path: Path) -> None:
    left = faulty(straight.config, straight.calls, None, tmp_path)
    assert documented("SIGKILL at a call of the file layer during a save") == len(left)
    assert any(temporary(directory) for directory in left)
    for directory in distinct(left):
        straight.check_resumed(directory, tmp_path / "resumed")


@pytest.mark.parametrize("code", ["ENOSPC", "EFBIG", "EIO"])
def test_failing_at_every_call_of_a_save(code: str, straight: Straight, tmp_path: Path) -> None:
    left = faulty(straight.config, straight.calls, getattr(errno, code), tmp_path)
    assert documented(f"{code} from a call of the file layer during a save") == len(left)
    for directory in distinct(left):
        straight.check_resumed(directory, tmp_path / "resumed")


def test_power_lost_at_every_call_of_a_save(straight: Straight, tmp_path: Path) -> None:
    (tmp_path / "lost").mkdir()
    files = LosingFiles(tmp_path / "run")
    files.snapshot_every_call_into(tmp_path / "lost")
    files.losing = False

    def look(what: str, step: int) -> None:
        files.losing = step == STEP and what == "begin"

    with observed_saves(look):
        train(with_options(straight.config, output=tmp_path / "run"), files=files)
    assert documented("power lost during a save: un-synced bytes gone, names reordered") == len(files.snapshots)
    states = distinct(files.snapshots)
    assert len(states) > 5
    for directory in states:
        straight.check_resumed(directory, tmp_path / "resumed")
