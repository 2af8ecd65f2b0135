"""Runs on three processes that lose one or two, and runs whose first process has no room on its disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from backhand.files import FileLayer
from backhand.options.config import TrainConfig
from backhand.runs.status import read_status
from backhand.training.run import train
from tests.support.faulty_runs import temporary
from tests.support.held_runs import before
from tests.support.ranks import bits_of_several, start_and_kill, start_ranks
from tests.support.tiny_run import TinyRun, with_options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    output = tmp_path_factory.mktemp("straight") / "run"
    config = tiny.config(output, max_steps=4, save_every=1, eval_every=2, dropout=0.2, micro_batch_rows=1)
    train(config)
    return config


def assert_goes_on(output: Path, straight: TrainConfig) -> None:
    """One process continues the run, or begins it where nothing was saved, to the bits of the run made alone."""
    started = (output / "config.toml").exists()
    train(with_options(straight, output=output, resume=started))
    assert bits_of_several(output) == bits_of_several(straight.run.output)
    assert not temporary(output) and (output / "summary.json").exists()


LOST = [
    ("load", 0),
    ("load", 2),
    ("exchange", 0),
    ("exchange", 2),
    ("exchange", 1),
    ("evaluation", 2),
    ("evaluation", 0),
    ("save", 1),
    ("save", 0),
    ("publish", 2),
    ("end", 0),
    ("summary", 0),
]


@pytest.mark.parametrize(
    ("place", "rank"),
    [pytest.param(*case, marks=pytest.mark.slow if number % 3 else ()) for number, case in enumerate(LOST)],
)
def test_one_of_three_is_killed(place: str, rank: int, straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    silent_s = 6.0 if place in ("end", "summary") else 60.0
    configs = [with_options(straight, output=output)] * 3
    ranks = start_and_kill(configs, tmp_path / "ranks", rank, place, silent_s=silent_s)
    codes = ranks.exit_codes()
    assert codes == [-signal.SIGKILL if one == rank else 5 for one in range(3)], ranks.said()
    said = "".join(ranks.said())
    assert f"rank {rank} (process " in said and "--resume" in said and "Traceback" not in said
    assert_goes_on(output, straight)


@pytest.mark.parametrize("lost", [(0, 1), (1, 2)])
def test_two_of_three_are_killed(lost: tuple[int, int], straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    places = dict.fromkeys(lost, ("exchange", "kill"))
    ranks = start_ranks([with_options(straight, output=output)] * 3, tmp_path / "ranks", at_place=places)
    (left,) = {0, 1, 2} - set(lost)
    codes = ranks.exit_codes()
    assert codes == [5 if one == left else -signal.SIGKILL for one in range(3)], ranks.said()
    assert any(f"rank {one} (process " in ranks.said()[left] for one in lost)
    status = read_status(output)
    assert status is not None and status.state == ("failed" if left == 0 else "killed")
    assert_goes_on(output, straight)


@pytest.mark.parametrize("rank", [0, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 2))])
def test_one_that_is_stopped_for_a_while_is_waited_for(rank: int, straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    at = {rank: ("exchange", "stop")}
    ranks = start_ranks([with_options(straight, output=output)] * 3, tmp_path / "ranks", at_place=at)
    ranks.wait_until_stopped(rank)
    time.sleep(1.0)
    ranks.send(rank, signal.SIGCONT)
    assert ranks.exit_codes() == [0, 0, 0], ranks.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output)


def test_one_that_is_stopped_and_then_killed(straight: TrainConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    at = {1: ("exchange", "stop")}
    ranks = start_ranks([with_options(straight, output=output)] * 3, tmp_path / "ranks", at_place=at)
    ranks.wait_until_stopped(1)
    ranks.send(1, signal.SIGKILL)
    assert ranks.exit_codes() == [5, -signal.SIGKILL, 5], ranks.said()
    assert_goes_on(output, straight)


@pytest.mark.parametrize("number", ["interrupt", "terminate"])
def test_a_signal_to_one_of_three_and_a_kill_of_another(number: str, straight: TrainConfig, tmp_path: Path) -> None:
    """Whatever comes first decides the exit code; the run goes on to the same bits."""
    output = tmp_path / "run"
    places = {0: ("exchange", number), 2: ("exchange", "kill")}
    ranks = start_ranks([with_options(straight, output=output)] * 3, tmp_path / "ranks", at_place=places)
    codes = ranks.exit_codes()
    assert codes[2] in (-signal.SIGKILL, 130, 143) and set(codes[:2]) <= {5, 130, 143}, ranks.said()
    assert_goes_on(output, straight)


# ---- the disk of rank 0 is full ----------------------------------------------------------------------------------


def no_longer_than(length: int) -> None:
    """Files of this process may have so many bytes; the log of what it prints is short enough."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))


def full_from_write(number: int, code: int) -> None:
    """The write of this number fails, and every one after it."""
    writes = 0

    def fail(*_: object) -> None:
        nonlocal writes
        writes += 1
        if writes >= number:
            raise OSError(code, os.strerror(code))

    before(FileLayer, "write", fail)


FULL: dict[str, partial[None]] = {
    **{f"files of {length} bytes": partial(no_longer_than, length) for length in (3_000, 12_000, 40_000)},
    **{f"full at write {number}": partial(full_from_write, number, errno.ENOSPC) for number in (1, 2, 4, 9, 15)},
    "quota": partial(full_from_write, 6, errno.EDQUOT),
    "input/output error": partial(full_from_write, 7, errno.EIO),
    "read-only": partial(full_from_write, 5, errno.EROFS),
}


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param(kind, size, marks=pytest.mark.slow if size == 3 or number % 2 else ())
        for number, kind in enumerate(FULL)
        for size in (2, 3)
    ],
)
def test_the_disk_of_rank_0_is_full(kind: str, size: int, straight: TrainConfig, tmp_path: Path) -> None:
    """All end with 5, once it is said why; with room again, the run goes on to the same bits."""
    output = tmp_path / "run"
    configs = [with_options(straight, output=output)] * size
    ranks = start_ranks(configs, tmp_path / "ranks", prepare={0: FULL[kind]})
    assert ranks.exit_codes() == [5] * size, ranks.said()
    said = ranks.said()
    assert "why: " in said[0] and "next: " in said[0] and "Traceback" not in "".join(said), said
    assert "bug" not in "".join(said)
    assert_goes_on(output, straight)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_disk_of_another_rank_is_full(size: int, straight: TrainConfig, tmp_path: Path) -> None:
    """It writes nothing of the run."""
    output = tmp_path / "run"
    prepare = dict.fromkeys(range(1, size), partial(full_from_write, 1, errno.ENOSPC))
    ranks = start_ranks([with_options(straight, output=output)] * size, tmp_path / "ranks", prepare=prepare)
    assert ranks.exit_codes() == [0] * size, ranks.said()
    assert bits_of_several(output) == bits_of_several(straight.run.output)
